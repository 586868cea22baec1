"""The discriminator D(x_t, t, x_{t+1}) -> logit, which classifies x_t as real or generated given x_{t+1}.

See Section 3.2 of the paper and its appendix. The network is described by a list of stages: residual blocks with a
width, each of which may halve the image. The two discriminators of the paper are presets, and `preset` returns a
similar one for other image sizes.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ddgan_jax.config.types import Positive, PositiveFloat, Range, Width
from ddgan_jax.devices import parallel
from ddgan_jax.errors import UserError
from ddgan_jax.networks import layers, ops
from ddgan_jax.networks.layers import Dtype

STDDEV_GROUP = 4  # examples that share one minibatch standard deviation


def _are_stages(stages: Sequence[Any]) -> bool:
    pairs = all(isinstance(stage, tuple) and len(stage) == 2 for stage in stages)
    return pairs and all(type(width) in (int, float) and down in (0, 1) for width, down in stages)


# (width in units of ngf, halve the image?)
Stages = Annotated[
    Sequence[tuple[float, bool]],
    Range(_are_stages, "pairs of a width and True or False, as ((2, False), (4, True))"),
]
SMALL: Stages = ((2, False), (4, True), (8, True), (8, True))  # CIFAR-10 and StackedMNIST, 32 px
LARGE: Stages = ((4, True), (8, True), (8, True), (8, True), (8, True), (8, True))  # CelebA-HQ and LSUN, 256 px


def preset(image_size: int) -> dict:
    """Fields of a Discriminator for square images of 8 to 1024 px: at 32 and 256 px the paper's.

    The image is halved until 4 to 7 px are left. Up to 64 px the first block keeps the size, as in SMALL; above that it
    halves, as in LARGE. Above 256 px narrower stages come first, so that the cost of a stage hardly depends on the
    image size. Raises UserError for another size.
    """
    if not 8 <= image_size <= 1024:
        raise UserError(f"there is a discriminator for images of 8 to 1024 px, not {image_size}: set data.image_size")
    halvings = int(np.log2(image_size / 4))
    if image_size <= 64:
        widths = [2.0, 4.0, 8.0, 8.0, 8.0][: halvings + 1]
        return {"start": 2, "stages": tuple((w, i > 0) for i, w in enumerate(widths)), "zero_final": True}
    narrower = max(int(np.ceil(np.log2(image_size / 256))), 0)
    widths = [min(4 * 2.0 ** (i - narrower), 8) for i in range(halvings)]
    return {"start": widths[0] / 2, "stages": tuple((w, True) for w in widths), "zero_final": False}


class Stage(nn.Module):
    """A residual block (x [B,H,W,C], t_emb [B,E]) -> [B,H',W',features]; t_emb is added between its convolutions."""

    features: int
    downsample: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, t_emb: jax.Array) -> jax.Array:
        conv = partial(layers.Conv, self.features, kernel_init=layers.init_out(), dtype=self.dtype)
        time = nn.Dense(self.features, kernel_init=layers.init_out(), dtype=self.dtype, name="time")
        h = layers.leaky_relu(conv(name="conv_0")(layers.leaky_relu(x), time(t_emb)))
        if self.downsample:
            h, x = ops.fir_downsample(h), ops.fir_downsample(x)
        h = conv(kernel_init=layers.init_out(0.0), name="conv_1")(h)
        x = conv(size=1, use_bias=False, name="shortcut")(x)
        return layers.merge(x, h, rescale=True)


def minibatch_stddev(x: jax.Array, axis_name: str | None = None) -> jax.Array:
    """Appends a channel to x [B, H, W, C]: the mean standard deviation within groups of 4 neighbours in the batch.

    Returns [B, H, W, C+1]. The batch is the one of all replicas along `axis_name`. Where a replica's part is not a
    multiple of 4, a group spans up to 4 neighbouring replicas, which exchange their features. For a group of one
    example the channel is 1e-4, the square root of the 1e-8 that keeps the gradient finite.

    Raises UserError unless the whole batch is 1, 2, 3 or a multiple of 4.
    """
    rows, first = parallel.gather_neighbours(x.astype(jnp.float32), axis_name, STDDEV_GROUP)
    group = min(len(rows), STDDEV_GROUP)
    if len(rows) % group:
        raise UserError(
            f"the discriminator compares groups of {STDDEV_GROUP} images: a batch of {len(rows)} is not a multiple"
        )
    variance = jnp.var(rows.reshape(len(rows) // group, group, *x.shape[1:]), axis=1)
    stddev = jnp.repeat(jnp.mean(jnp.sqrt(variance + 1e-8), axis=(1, 2, 3)), group)
    own = stddev if len(rows) == len(x) else jax.lax.dynamic_slice_in_dim(stddev, first, len(x))
    feature = jnp.broadcast_to(own[:, None, None, None], (*x.shape[:3], 1))
    return jnp.concatenate([x, feature.astype(x.dtype)], axis=-1)


class Discriminator(nn.Module):
    """D(x_t [B,H,W,C], t [B], x_{t+1} [B,H,W,C]) -> logits [B] float32. The defaults are the paper's for CIFAR-10.

    `axis_name` is the axis of the replicas that share a batch (`minibatch_stddev`). With `num_classes` > 0 the call
    also takes labels `y` int32 [B], whose projection on the last features is added to the logit (Miyato and Koyama,
    "cGANs with Projection Discriminator", equation 4).
    """

    ngf: Width = 64
    start: PositiveFloat = 2  # width of the first convolution, 1x1 over both images, in units of ngf
    stages: Stages = SMALL
    t_emb_dim: Width = 256
    zero_final: bool = True  # initialize the last convolution (almost) with zeros
    patch_size: Positive = 1  # the generator's
    product: bool = False  # x_t * x_{t+1} as a third input, whose sum is the correlation of the two (not in the paper)
    num_classes: int = 0  # 0: unconditional
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_t: jax.Array,
        t: jax.Array,
        x_tp1: jax.Array,
        y: jax.Array | None = None,
        axis_name: str | None = None,
    ) -> jax.Array:
        def dense(features: int, name: str, dtype: Dtype = self.dtype) -> nn.Dense:
            return nn.Dense(features, kernel_init=layers.init_out(), dtype=dtype, name=name)

        t_emb = layers.sinusoidal_embedding(t, self.t_emb_dim)
        t_emb = layers.leaky_relu(dense(self.t_emb_dim, "time_0")(t_emb))
        t_emb = layers.leaky_relu(dense(self.t_emb_dim, "time_1")(t_emb))

        images = [x_t, x_tp1, x_t * x_tp1] if self.product else [x_t, x_tp1]
        patches = [layers.to_patches(image, self.patch_size) for image in images]
        x = jnp.concatenate(patches, axis=-1).astype(self.dtype)
        h = layers.Conv(
            layers.width(self.start * self.ngf), 1, kernel_init=layers.init_out(), dtype=self.dtype, name="conv_in"
        )(x)
        for i, (width, downsample) in enumerate(self.stages):
            if downsample and min(h.shape[1:3]) < 2:
                raise UserError(
                    f"images of {x.shape[1]}x{x.shape[2]} are too small for a discriminator that halves them "
                    f"{sum(down for _, down in self.stages)} times"
                )
            h = Stage(layers.width(width * self.ngf), downsample, self.dtype, name=f"stage_{i}")(h, t_emb)

        h = minibatch_stddev(h, axis_name)
        scale = 0.0 if self.zero_final else 1.0
        h = layers.Conv(h.shape[-1] - 1, kernel_init=layers.init_out(scale), dtype=self.dtype, name="conv_out")(h)
        h = jnp.sum(layers.leaky_relu(h).astype(jnp.float32), axis=(1, 2))
        logits = dense(1, "out", jnp.float32)(h)[:, 0]
        if self.num_classes:
            classes = layers.embed(self.num_classes, h.shape[-1], jnp.float32, "class", h.shape[-1] ** -0.5)
            logits = logits + jnp.sum(classes(y) * h, axis=-1)
        return logits
