"""Generator and discriminator for points in R^d, with the call signatures of the image networks.

They take points [B, d] where the image networks take [B, H, W, C], so the whole method runs on 2-D data. `levels` are
the standard deviations of x_0, ..., x_T. Inputs are divided by them and outputs multiplied, so that the networks work
with values of unit scale (Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
Section 5). `octaves` adds Fourier features of each coordinate, without which networks with few inputs learn fine
structure slowly (Tancik et al. 2020, "Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional
Domains").
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from ddgan_jax.config.types import Blocks, Latents, Layers, Octaves, Width
from ddgan_jax.networks import layers
from ddgan_jax.networks.layers import Dtype


def _features(x: jax.Array, levels: Sequence[float], k: jax.Array, octaves: int) -> jax.Array:
    """Divides x [B, d] by levels[k] and appends sin and cos of (2^i pi x), divided by 2^i, for i < octaves.

    Returns [B, d (1 + 2 octaves)]. Amplitudes fall with the frequency, as in smooth functions. With equal amplitudes
    the highest frequencies would dominate D's gradient, and with it R1.
    """
    x = x / jnp.asarray(levels)[k][:, None] if levels else x
    waves = [wave(2.0**i * jnp.pi * x) / 2**i for i in range(octaves) for wave in (jnp.sin, jnp.cos)]
    return jnp.concatenate([x, *waves], axis=-1)


def _mlp(inputs: list[jax.Array], width: int, depth: int, outputs: int, dtype: Dtype) -> jax.Array:
    h = jnp.concatenate(inputs, axis=-1).astype(dtype)
    for i in range(depth):
        h = layers.leaky_relu(nn.Dense(width, dtype=dtype, name=f"dense_{i}")(h))
    return nn.Dense(outputs, dtype=jnp.float32, name="out")(h.astype(jnp.float32))


class _PointNetwork(nn.Module):
    """Base class with the fields of both networks."""

    width: Width = 128
    depth: Layers = 4
    t_emb_dim: Width = 32
    octaves: Octaves = 0
    levels: Sequence[float] = ()
    dtype: Dtype = jnp.float32


class PointGenerator(_PointNetwork):
    """G(x_{t+1} [B,d], t [B], z [B,nz]) -> x0_hat [B,d] float32, unbounded. `keys` is accepted and unused."""

    depth: Blocks = 4
    dim: int = 2
    nz: Latents = 2

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, z: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        inputs = [
            _features(x, self.levels, t + 1, self.octaves),
            layers.sinusoidal_embedding(t, self.t_emb_dim),
            z,
        ]
        scale = self.levels[0] if self.levels else 1.0
        return scale * _mlp(inputs, self.width, self.depth, self.dim, self.dtype)


class PointDiscriminator(_PointNetwork):
    """D(x_t [B,d], t [B], x_{t+1} [B,d]) -> logits [B] float32. `axis_name` is accepted and unused."""

    @nn.compact
    def __call__(self, x_t: jax.Array, t: jax.Array, x_tp1: jax.Array, axis_name: str | None = None) -> jax.Array:
        t_emb = layers.sinusoidal_embedding(t, self.t_emb_dim)
        x_t, x_tp1 = (_features(x, self.levels, k, self.octaves) for x, k in ((x_t, t), (x_tp1, t + 1)))
        return _mlp([x_t, t_emb, x_tp1], self.width, self.depth, 1, self.dtype)[:, 0]
