"""Every operation of `ops` as its equation says it, differentiated by JAX: what the fast forms are tested against.

Nothing here depends on the device. Read this file to know what the networks compute, and the others to know how fast.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddgan_jax.errors import UserError

FIR_KERNEL = (1, 3, 3, 1)

# --- Convolutions -----------------------------------------------------------------------------------------------


def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[B, H, W, C] convolved with [3, 3, C, F], zero-padded by one -> [B, H, W, F]."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[B, H, W, C] convolved with [1, 1, C, F] -> [B, H, W, F]."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


# --- FIR resampling: upfirdn (Karras et al., "Analyzing and Improving the Image Quality of StyleGAN") -----------


def fir_filter(x: jax.Array, kernel: Sequence[float], pad: int, stride: int = 1) -> jax.Array:
    """[B, H, W, C] filtered in both axes with `pad` zeros in all an axis; every stride-th pixel is kept."""
    return _upfirdn(x, kernel, 1.0, up=1, down=stride, before=(pad + 1) // 2, after=pad // 2)


def fir_downsample(x: jax.Array, kernel: Sequence[float] = FIR_KERNEL) -> jax.Array:
    """[B, H, W, C] -> [B, H // 2, W // 2, C], low-pass filtered."""
    return fir_filter(x, kernel, pad=len(kernel) - 2, stride=2)


def fir_upsample(x: jax.Array, kernel: Sequence[float] = FIR_KERNEL, margin: int = 0) -> jax.Array:
    """[B, H, W, C] -> [B, 2H + 2 margin, 2W + 2 margin, C], the mean kept; `margin` keeps that much of the tails."""
    before = (len(kernel) - 1) // 2 + 1 + margin
    return _upfirdn(x, kernel, 2.0, up=2, down=1, before=before, after=len(kernel) - before + 2 * margin)


def _upfirdn(
    x: jax.Array, kernel: Sequence[float], gain: float, up: int, down: int, before: int, after: int
) -> jax.Array:
    """Insert up - 1 zeros between pixels, pad, convolve with gain kernel / sum along each axis, keep every down-th."""
    edges = (before, after, up - 1)
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), edges, edges, (0, 0, 0)))
    taps = (gain * np.flip(np.asarray(kernel, np.float64)) / np.sum(kernel)).tolist()
    for axis in (1, 2):
        stop = x.shape[axis] - len(taps) + 1  # the filter's last place
        x = sum(tap * jax.lax.slice_in_dim(x, j, j + stop, down, axis) for j, tap in enumerate(taps))
    return x


# --- Norms, attention, residual sums ----------------------------------------------------------------------------


def num_groups(channels: int) -> int:
    """min(C // 4, 32), the groups of a norm. UserError where they do not divide the channels."""
    groups = min(channels // 4, 32)
    if groups == 0 or channels % groups:
        raise UserError(
            f"group norm splits channels into min(C // 4, 32) equal groups, which {channels} channels do not allow: "
            "choose nf and ch_mult so that every width is a multiple of 4 up to 128 and of 32 above"
        )
    return groups


def group_norm(x: jax.Array, gain: jax.Array, bias: jax.Array, silu: bool = False) -> jax.Array:
    """gain (x - mean) / sqrt(variance + 1e-6) + bias of [B, H, W, C], float32, then SiLU if asked for.

    Mean and variance are of a group of channels of an example; gain and bias are [B, C], or [1, C] for all.
    """
    groups = x.astype(jnp.float32).reshape(len(x), -1, num_groups(x.shape[-1]), x.shape[-1] // num_groups(x.shape[-1]))
    mean, variance = (moment(groups, (1, 3), keepdims=True) for moment in (jnp.mean, jnp.var))
    normed = ((groups - mean) / jnp.sqrt(variance + 1e-6)).reshape(x.shape)
    y = normed * gain[:, None, None] + bias[:, None, None]
    return jax.nn.silu(y) if silu else y


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(C)) v of [B, N, C], the softmax in float32 -> [B, N, C] of v's type."""
    logits = jnp.einsum("bqc,bkc->bqk", q, k).astype(jnp.float32) / q.shape[-1] ** 0.5
    return jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(logits).astype(v.dtype), v)


def merge(x: jax.Array, h: jax.Array, rescale: bool) -> jax.Array:
    """x + h, the end of a residual block; divided by sqrt(2), to keep the variance, with `rescale`."""
    return (x + h) / np.sqrt(2).astype(x.dtype) if rescale else x + h


# --- The optimizer: trees of arrays -----------------------------------------------------------------------------


def adam(
    grads: Any, state: optax.ScaleByAdamState, b1: float, b2: float, eps: float
) -> tuple[Any, optax.ScaleByAdamState]:
    """Adam's directions (Kingma and Ba, Algorithm 1, without the learning rate), and its state one step on."""
    return optax.scale_by_adam(b1, b2, eps).update(grads, state)


def descend(
    direction: Callable[..., tuple[Any, Any]], grads: Any, state: Any, params: Any, lr: jax.Array
) -> tuple[Any, Any]:
    """(params - lr d, new state), where `direction(grads, state, params)` is (d, new state)."""
    directions, state = direction(grads, state, params)
    return jax.tree.map(lambda p, d: p - lr * d, params, directions), state


def moving_average(average: Any, params: Any, keep: jax.Array) -> Any:
    """keep average + (1 - keep) params."""
    return jax.tree.map(lambda e, p: keep * e + (1 - keep) * p, average, params)


def tree_norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all numbers of a tree together, []."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


# --- Memory -----------------------------------------------------------------------------------------------------


def materialize(tree: Any) -> Any:
    """The arrays of `tree`."""
    return tree
