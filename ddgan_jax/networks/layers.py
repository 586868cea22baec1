"""The layers of both networks: convolution, resampling, embeddings, adaptive norms, attention, residual blocks.

All images are NHWC. `dtype` is the compute type of convolutions and dense layers; parameters, and the statistics of
norms and softmaxes, are always float32. The blocks are those of NCSN++ (Song et al.,
"Score-Based Generative Modeling through SDEs", Appendix H) with norms that are modulated by the latent z (Section 3.2).

FIR resampling follows upfirdn (Karras et al., "Analyzing and Improving the Image Quality of StyleGAN"): insert zeros
(up), convolve with the kernel outer(k, k) / sum, keep every second pixel (down).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.nn.initializers import Initializer, variance_scaling

from ddgan_jax.errors import UserError
from ddgan_jax.networks import ops
from ddgan_jax.networks.ops import FIR_KERNEL, MAX_CHANNELS

Dtype = Any


# --- Initialisation: uniform weights, zero biases; a scale of 0 means a variance scale of 1e-10, as in NCSN++ ---


def init_avg(scale: float = 1.0) -> Initializer:
    """Variance scale / mean(fan-in, fan-out), for G's convolutions, attention and time embedding."""
    return variance_scaling(scale or 1e-10, "fan_avg", "uniform")


def init_out(scale: float = 1.0) -> Initializer:
    """Variance scale / fan-out, for the layers that depend on z, and every layer of the discriminator."""
    return variance_scaling(scale or 1e-10, "fan_out", "uniform")


def embed(classes: int, features: int, dtype: Dtype, name: str, std: float) -> nn.Embed:
    """A learned vector [features] for each class, initialized from N(0, std^2)."""
    init = jax.nn.initializers.normal(std)
    return nn.Embed(classes, features, embedding_init=init, dtype=dtype, name=name)


class Conv(nn.Module):
    """A size x size convolution, by default with a bias: [B,H,W,C] -> [B,H,W,features], zero-padded to keep H and W.

    `shift` [B, features] is added with the bias. `convolve` replaces the convolution by another function of an image
    and a kernel [size, size, C, features], which may change height and width.
    """

    features: int
    size: int = 3
    kernel_init: Initializer = init_avg()
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    convolve: Callable[[jax.Array, jax.Array], jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, shift: jax.Array | None = None) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (self.size, self.size, x.shape[-1], self.features))
        convolve = self.convolve or (ops.pointwise if self.size == 1 else ops.conv)
        y = convolve(x.astype(self.dtype), kernel.astype(self.dtype))
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y + bias if shift is None else ops.add_shift(y, bias + shift)


# --- Resampling ---------------------------------------------------------------------------------------------------


def resample(x: jax.Array, direction: str, fir_kernel: Sequence[float] | None) -> jax.Array:
    """Halves ('down') or doubles ('up') [B, H, W, C] with a FIR filter; without a kernel, by means and repetition."""
    if direction == "down":
        return ops.fir_downsample(x, fir_kernel) if fir_kernel else nn.avg_pool(x, (2, 2), (2, 2))
    return ops.fir_upsample(x, fir_kernel) if fir_kernel else jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


class Resample(nn.Module):
    """Resampling as a layer, fused with a 3x3 convolution to `features`, or without one if that is None."""

    direction: str  # 'down' or 'up'
    features: int | None = None
    fir_kernel: Sequence[float] | None = FIR_KERNEL
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.features is None:
            return resample(x, self.direction, self.fir_kernel)
        # The name separates weights trained with a FIR kernel from those without, which are not interchangeable.
        conv = partial(Conv, self.features, dtype=self.dtype, name="fir_conv" if self.fir_kernel else "conv")
        if self.direction == "down":
            pad = (0, 0) if self.fir_kernel else (0, 1)  # without FIR, pad at the right and the bottom only
            if self.fir_kernel:
                x = ops.fir_filter(x, self.fir_kernel, pad=len(self.fir_kernel))
            return conv(convolve=partial(_convolve, stride=2, pad=pad))(x)
        if self.fir_kernel:  # the convolution reads the filter's tails beyond the edge, not zeros
            x = ops.fir_upsample(x, self.fir_kernel, margin=1)
            return conv(convolve=partial(_convolve, stride=1, pad=(0, 0)))(x)
        return conv()(resample(x, "up", None))


def _convolve(x: jax.Array, kernel: jax.Array, stride: int, pad: tuple[int, int]) -> jax.Array:
    """[B, H, W, C] convolved with [k, k, C, F] with a stride and `pad` zeros before and after each axis."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def width(channels: float) -> int:
    """The nearest whole number of channels. Raises UserError below 1 and above MAX_CHANNELS."""
    if not 0.5 < channels <= MAX_CHANNELS:
        raise UserError(f"a layer cannot have {channels:g} channels: change discriminator.start, stages or ngf")
    return round(channels)


def to_patches(x: jax.Array, size: int) -> jax.Array:
    """[B,H,W,C] -> [B, H/size, W/size, size*size*C]: the pixels of a patch, row by row, become channels."""
    b, h, w, c = x.shape
    patches = x.reshape(b, h // size, size, w // size, size, c).swapaxes(2, 3)
    return patches.reshape(b, h // size, w // size, size * size * c)


def from_patches(x: jax.Array, size: int) -> jax.Array:
    """[B,H,W,size*size*C] -> [B, H*size, W*size, C]: the inverse of `to_patches`."""
    b, h, w, c = x.shape
    pixels = x.reshape(b, h, w, size, size, c // size**2).swapaxes(2, 3)
    return pixels.reshape(b, h * size, w * size, c // size**2)


# --- Embeddings -------------------------------------------------------------------------------------------------


def sinusoidal_embedding(t: jax.Array, dim: int) -> jax.Array:
    """[B] integer steps -> [B, dim]: sines, then cosines, of t exp(-i ln(10000) / (half - 1)); a zero if dim is odd."""
    half = dim // 2
    frequencies = jnp.exp(jnp.arange(half, dtype=jnp.float32) * -(np.log(10000.0) / max(half - 1, 1)))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.pad(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1), ((0, 0), (0, dim % 2)))


def pixel_norm(z: jax.Array) -> jax.Array:
    """Scales latents [B, nz] to a mean square of 1."""
    return z * jax.lax.rsqrt(jnp.mean(jnp.square(z), axis=-1, keepdims=True) + 1e-8)


def leaky_relu(x: jax.Array) -> jax.Array:
    """Leaky ReLU with slope 0.2, also *at* zero, where jax.nn.leaky_relu has slope 1. Exact zeros are common in D."""
    return jnp.where(x > 0, x, 0.2 * x)


# --- Norms, attention, blocks -----------------------------------------------------------------------------------


def merge(x: jax.Array, h: jax.Array, rescale: bool) -> jax.Array:
    """x + h, the output of a residual block; with `rescale`, divided by sqrt(2) to preserve the variance."""
    return ops.materialize((x + h) / np.sqrt(2).astype(x.dtype) if rescale else x + h)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(C)) v for [B, N, C] each. Logits and softmax are float32; the result has v's type."""
    logits = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5
    return jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(logits).astype(v.dtype), v)


class GroupNorm(nn.Module):
    """`ops.group_norm` with a learned gain and bias."""

    silu: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        gain, bias = self.param("scale", nn.initializers.ones, shape), self.param("bias", nn.initializers.zeros, shape)
        return ops.group_norm(x, gain[None], bias[None], self.silu)


class AdaptiveGroupNorm(nn.Module):
    """Group norm of x [B,H,W,C] whose gain and bias are a linear function of z_emb [B,E], the mapped latent."""

    silu: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, z_emb: jax.Array) -> jax.Array:
        channels = x.shape[-1]

        def gains_one_biases_zero(key, shape, dtype=jnp.float32):
            return jnp.concatenate([jnp.ones(channels, dtype), jnp.zeros(channels, dtype)])

        style = nn.Dense(
            2 * channels, kernel_init=init_out(), bias_init=gains_one_biases_zero, dtype=self.dtype, name="style"
        )(z_emb)
        gain, bias = jnp.split(style.astype(jnp.float32), 2, axis=-1)
        return ops.group_norm(x, gain, bias, self.silu)


class Keys(nn.Module):
    """The keys of attention, [N, C] -> [N, C]: a dense layer whose bias gets no gradient.

    The bias adds the same number to all logits of a query, which softmax ignores, so its true gradient is zero. Adam
    would amplify the rounding noise of a computed gradient, which differs between numbers of devices.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        kernel = self.param("kernel", init_avg(0.1), (h.shape[-1], h.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (h.shape[-1],))
        return h.astype(self.dtype) @ kernel.astype(self.dtype) + jax.lax.stop_gradient(bias).astype(self.dtype)


class Attention(nn.Module):
    """Single-head self-attention over the pixels of [B, H, W, C], with a residual connection."""

    skip_rescale: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, height, width, c = x.shape
        h = GroupNorm(name="norm")(x).reshape(-1, c)  # flat: a dense layer then needs no transpose for its gradients
        q, v = (nn.Dense(c, kernel_init=init_avg(0.1), dtype=self.dtype, name=name)(h) for name in ("q", "v"))
        k = Keys(self.dtype, name="k")(h)
        q, k, v = (a.reshape(b, height * width, c) for a in (q, k, v))
        h = attention(q, k, v).reshape(-1, c)
        h = nn.Dense(c, kernel_init=init_avg(0.0), dtype=self.dtype, name="out")(h)
        return merge(x, h.reshape(x.shape), self.skip_rescale)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Dropout of [B, H, W, C] with one key per example, so masks do not depend on the batch. None returns x."""
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class ResBlock(nn.Module):
    """A residual block of NCSN++: (x [B,H,W,C], t_emb [B,4nf] or None, z_emb [B,E], keys [B] or None) -> [B,H',W',F].

    `kind` is 'biggan', which can resample inside the block; 'biggan_oneadagn', in which only the first norm is
    adaptive; or 'ddpm', which never resamples and has a dense layer as its shortcut in place of a 1x1 convolution.
    """

    features: int
    kind: str = "biggan"
    direction: str | None = None  # 'down', 'up' or None
    fir_kernel: Sequence[float] | None = FIR_KERNEL
    skip_rescale: bool = True
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, t_emb: jax.Array | None, z_emb: jax.Array, t_emb_dim: int, keys: jax.Array | None = None
    ) -> jax.Array:
        conv = partial(Conv, self.features, dtype=self.dtype)
        in_features = x.shape[-1]
        h = AdaptiveGroupNorm(silu=True, dtype=self.dtype, name="norm_0")(x, z_emb)
        if self.direction:
            h = resample(h, self.direction, self.fir_kernel)
        if self.direction == "down":
            x = resample(x, "down", self.fir_kernel)
        # Without time conditioning the layer is unused, but it exists, as in released weights.
        time = nn.Dense(self.features, kernel_init=init_avg(), dtype=self.dtype, name="time")
        t_shift = time(jnp.zeros((1, t_emb_dim)) if t_emb is None else jax.nn.silu(t_emb))
        h = conv(name="conv_0")(h, None if t_emb is None else t_shift)
        if self.kind == "biggan_oneadagn":
            h = GroupNorm(silu=True, name="norm_1")(h)
        else:
            h = AdaptiveGroupNorm(silu=True, dtype=self.dtype, name="norm_1")(h, z_emb)
        h = dropout(h, self.dropout, keys)
        h = conv(kernel_init=init_avg(0.0), name="conv_1")(h)
        if self.kind == "ddpm":
            if in_features != self.features:
                x = nn.Dense(self.features, kernel_init=init_avg(0.1), dtype=self.dtype, name="shortcut")(x)
        elif self.direction == "up":

            def convolve_and_resample(x: jax.Array, kernel: jax.Array) -> jax.Array:
                return resample(ops.pointwise(x, kernel), "up", self.fir_kernel)  # a quarter of the products

            # The bias is added last: resampling pads with zeros, which would lower it at the edges.
            x = conv(size=1, convolve=convolve_and_resample, name="shortcut")(x)
        elif in_features != self.features or self.direction:
            x = conv(size=1, name="shortcut")(x)
        return merge(x, h, self.skip_rescale)
