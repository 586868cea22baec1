"""Group norm whose backward pass is in closed form and keeps x and the statistics alone.

JAX would keep the centred, the normalised and the activated image too: on a CPU CIFAR-10's step has 1.79 GB instead of
1.87. Means of groups are sums of channels, then two small matrix products, since a CPU is slow at reductions over part
of the fastest axis: [8, 32, 32, 256] with SiLU takes 2.2 ms instead of 3.7, with gradients 6.5 instead of 24.9.
bfloat16 is read once for both statistics: the norms of CIFAR-10's G take a TPU 2.0 million cycles instead of 5.6.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddgan_jax.ops.memory import materialize
from ddgan_jax.ops.reference import num_groups


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def group_norm(x: jax.Array, gain: jax.Array, bias: jax.Array, silu: bool = False) -> jax.Array:
    """`reference.group_norm`; the backward pass keeps x and the statistics alone, and makes the rest again."""
    return _normalize(x, gain, bias, silu)[0]


@functools.partial(jax.jit, static_argnums=3)
def _normalize(x: jax.Array, gain: jax.Array, bias: jax.Array, silu: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`group_norm`, and at each channel the mean of its group and 1 / its standard deviation: [B, C]."""
    pixels, coarse = x.shape[1] * x.shape[2], x.dtype == jnp.bfloat16
    x = x.astype(jnp.float32)
    mean = _group_mean(jnp.sum(x, axis=(1, 2)), pixels)
    if coarse:  # both sums in one pass: what float32 loses in the difference is little beside the rounding of x
        variance = jnp.maximum(_group_mean(jnp.sum(jnp.square(x), axis=(1, 2)), pixels) - jnp.square(mean), 0)
    else:
        variance = _group_mean(jnp.sum(jnp.square(x - mean[:, None, None]), axis=(1, 2)), pixels)
    rstd = jax.lax.rsqrt(variance + 1e-6)
    y = _affine(x, *_scale_and_shift(gain, bias, mean, rstd))
    return materialize(jax.nn.silu(y) if silu else y), mean, rstd


@functools.partial(jax.jit, static_argnums=0)
def _normalize_gradients(silu: bool, saved: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, ...]:
    """With y = gain n + bias, n = (x - mean) rstd: dx = rstd (gain g - E[gain g] - n E[gain g n]), E over the group."""
    x, gain, bias, mean, rstd = saved
    dtype, pixels = x.dtype, x.shape[1] * x.shape[2]
    x = jax.lax.optimization_barrier(x.astype(jnp.float32))  # or XLA keeps what the forward pass made of it
    scale, shift = _scale_and_shift(gain, bias, mean, rstd)
    if silu:
        (g,) = jax.vjp(jax.nn.silu, _affine(x, scale, shift))[1](g)
    d_bias = jnp.sum(g, axis=(1, 2))
    d_gain = (jnp.sum(g * x, axis=(1, 2)) - mean * d_bias) * rstd
    along_one, along_n = _group_mean(gain * d_bias, pixels), _group_mean(gain * d_gain, pixels)
    of_x, of_one = materialize((-along_n * rstd**2, (along_n * mean * rstd - along_one) * rstd))
    dx = g * scale[:, None, None] + _affine(x, of_x, of_one)
    if len(gain) == 1:
        d_gain, d_bias = (jnp.sum(d, axis=0, keepdims=True) for d in (d_gain, d_bias))
    return dx.astype(dtype), d_gain, d_bias


def _normalize_forward(x: jax.Array, gain: jax.Array, bias: jax.Array, silu: bool) -> tuple[jax.Array, Any]:
    y, mean, rstd = _normalize(x, gain, bias, silu)
    return y, (x, gain, bias, mean, rstd)


group_norm.defvjp(_normalize_forward, _normalize_gradients)


def _group_mean(sums: jax.Array, pixels: int) -> jax.Array:
    """Sums of channels over the `pixels`, [B, C] -> the mean of a channel's group, at each channel: [B, C].

    By matrix products: on a CPU both reductions over part of the channels, the fastest axis, and repeats along it take
    several times as long.
    """
    channels = sums.shape[-1]
    groups = num_groups(channels)
    spread = np.repeat(np.eye(groups, dtype=np.float32), channels // groups, axis=1)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return product(product(sums, spread.T * (groups / (channels * pixels))), spread)


def _scale_and_shift(gain: jax.Array, bias: jax.Array, mean: jax.Array, rstd: jax.Array) -> tuple[jax.Array, jax.Array]:
    """gain (x - mean) rstd + bias is x times the one plus the other, [B, C]."""
    return materialize((gain * rstd, bias - mean * gain * rstd))


def _affine(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    return x * scale[:, None, None] + shift[:, None, None]
