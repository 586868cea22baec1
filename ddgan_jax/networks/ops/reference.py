"""The plain form of every operation of `ops`, differentiated by JAX. The fast forms are tested against it.

Nothing here depends on the platform. This file states what the networks compute; the others make it fast.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddgan_jax.errors import UserError

FIR_KERNEL = (1, 3, 3, 1)
MAX_CHANNELS = 16_384  # of a layer

# --- Convolutions -----------------------------------------------------------------------------------------------


def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[B, H, W, C] convolved with [3, 3, C, F], zero-padded by one -> [B, H, W, F]."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[B, H, W, C] convolved with [1, 1, C, F] -> [B, H, W, F]."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


# --- FIR resampling: upfirdn (Karras et al., "Analyzing and Improving the Image Quality of StyleGAN") -----------


def upfirdn(
    x: jax.Array, kernel: Sequence[float], gain: float, up: int, down: int, before: int, after: int
) -> jax.Array:
    """[B, H, W, C] with up - 1 zeros between pixels, padded, times gain kernel / sum along each axis, every down-th."""
    edges = (before, after, up - 1)
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), edges, edges, (0, 0, 0)))
    taps = (gain * np.flip(np.asarray(kernel, np.float64)) / np.sum(kernel)).tolist()
    for axis in (1, 2):
        stop = x.shape[axis] - len(taps) + 1  # the filter's last place
        x = sum(tap * jax.lax.slice_in_dim(x, j, j + stop, down, axis) for j, tap in enumerate(taps))
    return x


# --- Norms ------------------------------------------------------------------------------------------------------


def num_groups(channels: int) -> int:
    """The number of groups of a norm, min(C // 4, 32). Raises UserError if it does not divide the channels."""
    if channels > MAX_CHANNELS:
        raise UserError(f"a layer of {channels:,} channels is too wide: lower nf or ch_mult")
    groups = min(channels // 4, 32)
    if groups == 0 or channels % groups:
        raise UserError(
            f"group norm splits channels into min(C // 4, 32) equal groups, which {channels} channels do not allow: "
            "choose nf and ch_mult so that every width is a multiple of 4 up to 128 and of 32 above"
        )
    return groups


def group_norm(x: jax.Array, gain: jax.Array, bias: jax.Array, silu: bool = False) -> jax.Array:
    """gain (x - mean) / sqrt(variance + 1e-6) + bias for x [B, H, W, C], followed by SiLU if `silu`.

    Mean and variance are those of a group of channels of one example. gain and bias are float32 [B, C] or [1, C].
    Computes in float32 and returns x's type.
    """
    batch, channels, count = x.shape[0], x.shape[-1], num_groups(x.shape[-1])
    groups = x.astype(jnp.float32).reshape(batch, -1, count, channels // count)
    mean, variance = (moment(groups, (1, 3), keepdims=True) for moment in (jnp.mean, jnp.var))
    normed = ((groups - mean) / jnp.sqrt(variance + 1e-6)).reshape(x.shape)
    y = normed * gain[:, None, None] + bias[:, None, None]
    return (jax.nn.silu(y) if silu else y).astype(x.dtype)


# --- Memory -----------------------------------------------------------------------------------------------------


def add_shift(x: jax.Array, shift: jax.Array) -> jax.Array:
    """[B, H, W, C] + [B, C], one number for all pixels of a channel."""
    return x + shift[:, None, None]


def materialize(tree: Any) -> Any:
    """The arrays of `tree`."""
    return tree


def row_major(tree: Any) -> Any:
    """The arrays of `tree`."""
    return tree
