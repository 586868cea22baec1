"""Generator and discriminator for points in R^d, with the call signatures of the image networks.

So the whole method runs on 2-D data unchanged: these take [B, d] where the others take [B, H, W, C]. `levels` are the
standard deviations of x_0, ..., x_T: inputs are divided by them, outputs multiplied, so that the networks see numbers
of the size of 1 (Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", Section 5).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from ddgan_jax.models import layers
from ddgan_jax.models.layers import Dtype


def _level(levels: Sequence[float], k: jax.Array) -> jax.Array:
    """levels[k] as [B, 1]; 1 without levels."""
    return jnp.asarray(levels)[k][:, None] if levels else jnp.ones((len(k), 1))


def _mlp(inputs: list[jax.Array], width: int, depth: int, outputs: int, dtype: Dtype) -> jax.Array:
    h = jnp.concatenate(inputs, axis=-1).astype(dtype)
    for i in range(depth):
        h = layers.leaky_relu(nn.Dense(width, dtype=dtype, name=f"dense_{i}")(h))
    return nn.Dense(outputs, dtype=jnp.float32, name="out")(h.astype(jnp.float32))


class PointGenerator(nn.Module):
    """G(x_{t+1} [B,d], t [B], z [B,nz]) -> x0_hat [B,d] float32, unbounded. `keys` is accepted and unused."""

    dim: int = 2
    nz: int = 2
    width: int = 128
    depth: int = 4
    t_emb_dim: int = 32
    levels: Sequence[float] = ()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, z: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        inputs = [x / _level(self.levels, t + 1), layers.sinusoidal_embedding(t, self.t_emb_dim), z]
        scale = self.levels[0] if self.levels else 1.0
        return scale * _mlp(inputs, self.width, self.depth, self.dim, self.dtype)


class PointDiscriminator(nn.Module):
    """D(x_t [B,d], t [B], x_{t+1} [B,d]) -> logits [B] float32."""

    width: int = 128
    depth: int = 4
    t_emb_dim: int = 32
    levels: Sequence[float] = ()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_t: jax.Array, t: jax.Array, x_tp1: jax.Array) -> jax.Array:
        t_emb = layers.sinusoidal_embedding(t, self.t_emb_dim)
        x_t, x_tp1 = x_t / _level(self.levels, t), x_tp1 / _level(self.levels, t + 1)
        return _mlp([x_t, t_emb, x_tp1], self.width, self.depth, 1, self.dtype)[:, 0]
