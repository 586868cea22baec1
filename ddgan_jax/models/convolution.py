"""Convolutions [B, H, W, C] * [3, 3, C, F], zero-padded by one, and [1, 1, C, F], with what makes them fast on a CPU.

c(x, k) is the convolution, i(g, k) the gradient of its x and w(x, g) that of its k. They are the three derivatives of
one trilinear form, so the gradients of each are the other two, to any order.

To XLA the gradient of a kernel is a convolution whose window is the whole image, and takes a CPU two to five times as
long as the convolution itself. As a sum over strips of a few rows it does not (benchmarks/NOTES.md has the numbers).
GPUs and TPUs get XLA's own.
"""

import functools
import operator

import jax
import jax.numpy as jnp


def pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[B, H, W, C] convolved with [1, 1, C, F]: a matrix product."""
    return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """c: [B, H, W, C] convolved with [3, 3, C, F]."""
    return _plain(x, kernel)


@jax.custom_vjp
def input_gradient(g: jax.Array, kernel: jax.Array) -> jax.Array:
    """i: the gradient of x [B, H, W, C] from that of the result, [B, H, W, F]."""
    x = jax.ShapeDtypeStruct((*g.shape[:3], kernel.shape[2]), g.dtype)
    return jax.linear_transpose(lambda x: _plain(x, kernel), x)(g)[0]


@jax.custom_vjp
def kernel_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """w: the gradient of the kernel [3, 3, C, F] from that of the result, [B, H, W, F]."""
    batch, height, width = x.shape[:3]
    rows = max(4, min(2048 // (batch * width), 16), height // 16)  # about 2,048 pixels, and at most 16 strips

    def in_strips(x: jax.Array, g: jax.Array) -> jax.Array:
        strips = (_strip(x, g, i, min(i + rows, height)).astype(jnp.float32) for i in range(0, height, rows))
        return functools.reduce(operator.add, strips).astype(x.dtype)

    whole = functools.partial(_strip, start=0, stop=height)
    return jax.lax.platform_dependent(x, g, cpu=in_strips if height > rows else whole, default=whole)


convolve.defvjp(
    lambda x, k: (convolve(x, k), (x, k)), lambda saved, g: (input_gradient(g, saved[1]), kernel_gradient(saved[0], g))
)
input_gradient.defvjp(
    lambda g, k: (input_gradient(g, k), (g, k)), lambda saved, x: (convolve(x, saved[1]), kernel_gradient(x, saved[0]))
)
kernel_gradient.defvjp(
    lambda x, g: (kernel_gradient(x, g), (x, g)), lambda saved, k: (input_gradient(saved[1], k), convolve(saved[0], k))
)


def _plain(x: jax.Array, kernel: jax.Array, rows: tuple[int, int] = (1, 1)) -> jax.Array:
    """XLA's convolution, padded by one column on both sides, and by `rows` above and below."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), (rows, (1, 1)), dimension_numbers=numbers)


def _strip(x: jax.Array, g: jax.Array, start: int, stop: int) -> jax.Array:
    """What the result's rows from `start` to `stop` contribute to the gradient of the kernel."""
    kernel = jax.ShapeDtypeStruct((3, 3, x.shape[-1], g.shape[-1]), x.dtype)
    rows = (int(start == 0), int(stop == x.shape[1]))
    part = x[:, start - 1 + rows[0] : stop + 1 - rows[1]]
    return jax.linear_transpose(lambda k: _plain(part, k, rows), kernel)(g[:, start:stop])[0]
