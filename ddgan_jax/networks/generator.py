"""The generator G(x_{t+1}, t, z) -> x0_hat: an NCSN++ U-Net whose norms are modulated by the latent z.

See Section 3.2 of the paper and its appendix.

    z     -> pixel norm -> n_mlp + 1 dense layers with SiLU -> z_emb -> the gain and bias of every adaptive norm
    y     -> a learned vector, added to z_emb                             (class-conditional generators only)
    t     -> sinusoidal embedding -> two dense layers       -> t_emb -> a shift inside every residual block
    x_t+1 -> conv -> levels down -> block, attention, block -> levels up, with skips -> norm, SiLU, conv -> tanh

Parameter names give the position of a layer: `down_1_block_0` is the first block of the second level.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from ddgan_jax.config.types import Below1, Blocks, Kernel, Latents, Layers, Positive, Positives, Width
from ddgan_jax.networks import layers
from ddgan_jax.networks.layers import Dtype
from ddgan_jax.networks.ops import FIR_KERNEL

Block = Callable[..., jax.Array]  # (x, features, name, direction=None) -> x, with the embeddings bound


class Generator(nn.Module):
    """G(x_{t+1} [B,H,W,C], t [B], z [B,nz]) -> x0_hat [B,H,W,C] float32, in [-1, 1] with `tanh`.

    The defaults are the paper's CIFAR-10 network (48,432,515 parameters). `keys` [B], one random key per example,
    enables dropout. With `num_classes` > 0 the call also takes labels `y` int32 [B] (not in the paper).

    Every level must halve the image, with patches those of `patch_size`; `method.build` checks this.
    """

    image_channels: int = 3
    nf: Width = 128  # width of the first level
    ch_mult: Positives = (1, 2, 2, 2)  # width of every level, in units of nf
    num_res_blocks: Blocks = 2
    attn_resolutions: Positives = (16,)  # heights of the levels that get attention
    nz: Latents = 100  # size of z; 0: no latent variable, for comparison
    z_emb_dim: Width = 256
    n_mlp: Layers = 4  # hidden layers of the mapping of z
    resblock_type: Literal["biggan", "biggan_oneadagn", "ddpm"] = "biggan"
    conditional: bool = True  # whether G depends on t
    fir: bool = True
    fir_kernel: Kernel = FIR_KERNEL
    resamp_with_conv: bool = True  # convolve when resampling; for 'ddpm', whose resampling is a separate layer
    skip_rescale: bool = True
    progressive: Literal["none", "output_skip"] = (
        "none"  # 'output_skip': each level on the way up adds to the output image
    )
    # Each level on the way down also receives the input image.
    progressive_input: Literal["none", "input_skip", "residual"] = "residual"
    progressive_combine: Literal["sum", "cat"] = "sum"  # how 'input_skip' merges the input image
    tanh: bool = True
    centered: bool = True  # False: the input is in [0, 1]
    dropout: Below1 = 0.0
    dtype: Dtype = jnp.float32
    num_classes: int = 0  # 0: unconditional
    patch_size: Positive = 1  # pixels per side of the patches whose pixels become channels (1: the paper)
    remat: bool = False  # recompute residual blocks in the backward pass: less memory, about a third more computation

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, z: jax.Array, keys: jax.Array | None = None, y: jax.Array | None = None
    ) -> jax.Array:
        block_class = nn.remat(layers.ResBlock, static_argnums=(4,)) if self.remat else layers.ResBlock
        block_index = itertools.count(1)

        def block(x: jax.Array, features: int, name: str, direction: str | None = None) -> jax.Array:
            index = next(block_index)
            block_keys = None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
            options = self.resblock_type, direction, self._fir_kernel(), self.skip_rescale, self.dropout, self.dtype
            return block_class(features, *options, name=name)(x, t_emb, z_emb, 4 * self.nf, block_keys)

        z_emb, t_emb = self._z_embedding(z, y), self._t_embedding(t) if self.conditional else None
        x = x.astype(self.dtype) if self.centered else (2 * x - 1).astype(self.dtype)
        h, skips = self._encode(layers.to_patches(x, self.patch_size), block)
        h = block(h, h.shape[-1], "mid_block_0")
        h = self._attention(h, "mid_attn")
        h = block(h, h.shape[-1], "mid_block_1")
        image = layers.from_patches(self._decode(h, skips, block).astype(jnp.float32), self.patch_size)
        return jnp.tanh(image) if self.tanh else image

    def _encode(self, x: jax.Array, block: Block) -> tuple[jax.Array, list[jax.Array]]:
        """The levels on the way down. Returns the features of the last level, and the skip connections."""
        pyramid, fir_kernel = x, self._fir_kernel()
        h = layers.Conv(self.nf, dtype=self.dtype, name="conv_in")(x)
        skips = [h]
        for level, mult in enumerate(self.ch_mult):
            for i in range(self.num_res_blocks):
                h = block(h, self.nf * mult, f"down_{level}_block_{i}")
                if h.shape[1] in self.attn_resolutions:
                    h = self._attention(h, f"down_{level}_attn_{i}")
                skips.append(h)
            if level == len(self.ch_mult) - 1:
                break
            h = self._resample(h, "down", f"down_{level}_resample", block)
            if self.progressive_input == "input_skip":
                pyramid = layers.resample(pyramid, "down", fir_kernel)
                p = layers.Conv(h.shape[-1], 1, dtype=self.dtype, name=f"down_{level}_combine")(pyramid)
                h = p + h if self.progressive_combine == "sum" else jnp.concatenate([p, h], axis=-1)
            elif self.progressive_input == "residual":  # the next level resamples the merged tensor
                name = f"down_{level}_pyramid"
                p = layers.Resample("down", h.shape[-1], fir_kernel, self.dtype, name=name)(pyramid)
                h = pyramid = layers.merge(p, h, self.skip_rescale)
            skips.append(h)
        return h, skips

    def _decode(self, h: jax.Array, skips: list[jax.Array], block: Block) -> jax.Array:
        """The levels on the way up, with the skips in reverse order. Returns patches of the image before tanh."""
        image = None
        for level in reversed(range(len(self.ch_mult))):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(h, self.nf * self.ch_mult[level], f"up_{level}_block_{i}")
            if h.shape[1] in self.attn_resolutions:
                h = self._attention(h, f"up_{level}_attn")
            if self.progressive == "output_skip":
                above = 0 if image is None else layers.resample(image, "up", self._fir_kernel())
                image = above + self._to_image(h, f"up_{level}_image")
            if level > 0:
                h = self._resample(h, "up", f"up_{level}_resample", block)
        return self._to_image(h, "out") if image is None else image

    def _fir_kernel(self) -> tuple[float, ...] | None:
        return tuple(self.fir_kernel) if self.fir else None

    def _attention(self, x: jax.Array, name: str) -> jax.Array:
        return layers.Attention(self.skip_rescale, self.dtype, name=name)(x)

    def _resample(self, x: jax.Array, direction: str, name: str, block: Block) -> jax.Array:
        """Resamples between two levels: inside a residual block, or by a separate layer for 'ddpm'."""
        if self.resblock_type != "ddpm":
            return block(x, x.shape[-1], name, direction)
        features = x.shape[-1] if self.resamp_with_conv else None
        return layers.Resample(direction, features, self._fir_kernel(), self.dtype, name=name)(x)

    def _to_image(self, x: jax.Array, level: str) -> jax.Array:
        h = layers.GroupNorm(silu=True, name=f"{level}_norm")(x)
        channels = self.image_channels * self.patch_size**2
        return layers.Conv(channels, kernel_init=layers.init_avg(0.0), dtype=self.dtype, name=f"{level}_conv")(h)

    def _z_embedding(self, z: jax.Array, y: jax.Array | None) -> jax.Array:
        """The embedding [B, z_emb_dim] of z, the input of every adaptive norm."""
        z = (
            z if self.nz else z.sum(axis=1, keepdims=True)
        )  # zeros [B, 1]: without z the embedding is a learned constant
        z_emb = layers.pixel_norm(z.astype(jnp.float32))
        for i in range(self.n_mlp + 1):
            z_emb = nn.Dense(self.z_emb_dim, kernel_init=layers.init_out(), dtype=self.dtype, name=f"z_{i}")(z_emb)
            z_emb = jax.nn.silu(z_emb)
        if self.num_classes:
            z_emb = z_emb + layers.embed(self.num_classes, self.z_emb_dim, self.dtype, "class", 0.1)(y)
        return z_emb

    def _t_embedding(self, t: jax.Array) -> jax.Array:
        """The embedding [B, 4 nf] of t, an input of every residual block."""
        dense = partial(nn.Dense, 4 * self.nf, kernel_init=layers.init_avg(), dtype=self.dtype)
        t_emb = dense(name="time_0")(layers.sinusoidal_embedding(t, self.nf))
        return dense(name="time_1")(jax.nn.silu(t_emb))
