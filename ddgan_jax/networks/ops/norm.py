"""Group norm that sums over pixels first, and then over the channels of a group by a small matrix product.

Reductions over part of the fastest axis are slow. bfloat16 inputs are read once for both statistics.

| measured | this form | reference |
|---|---|---|
| [8, 32, 32, 256] with SiLU, CPU | 2.2 ms | 3.7 ms |
| the same with gradients, CPU | 6.5 ms | 24.9 ms |
| a step of a small network, H100 (modelled) | 42.3 ms | 46.5 ms |
| sampling with it, H100 (modelled) | 28.0 ms | 30.3 ms |
| a step of it, TPU (modelled) | 39.6 ms | 59.6 ms |
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ddgan_jax.networks.ops.memory import materialize
from ddgan_jax.networks.ops.reference import num_groups


def group_norm(x: jax.Array, gain: jax.Array, bias: jax.Array, silu: bool = False) -> jax.Array:
    """The fast form of `reference.group_norm`."""
    return materialize(_group_norm(x, gain, bias, silu))


@functools.partial(jax.jit, static_argnums=3)
def _group_norm(x: jax.Array, gain: jax.Array, bias: jax.Array, silu: bool) -> jax.Array:
    pixels, dtype = x.shape[1] * x.shape[2], x.dtype
    x = x.astype(jnp.float32)
    mean = _group_mean(jnp.sum(x, axis=(1, 2)), pixels)
    if dtype == jnp.bfloat16:  # both sums in one pass; the cancellation is small beside the rounding of x
        variance = jnp.maximum(_group_mean(jnp.sum(jnp.square(x), axis=(1, 2)), pixels) - jnp.square(mean), 0)
    else:
        variance = _group_mean(jnp.sum(jnp.square(x - mean[:, None, None]), axis=(1, 2)), pixels)
    scale = gain * jax.lax.rsqrt(variance + 1e-6)
    y = x * scale[:, None, None] + (bias - mean * scale)[:, None, None]
    return (jax.nn.silu(y) if silu else y).astype(dtype)


def _group_mean(sums: jax.Array, pixels: int) -> jax.Array:
    """The mean of each channel's group [B, C], from the sums of channels over `pixels` [B, C], by a matrix product."""
    channels = sums.shape[-1]
    groups = num_groups(channels)
    size = channels // groups
    same_group = np.kron(np.eye(groups, dtype=np.float32), np.ones((size, size), np.float32))
    return jnp.matmul(sums, same_group * (groups / (channels * pixels)), precision=jax.lax.Precision.HIGHEST)
