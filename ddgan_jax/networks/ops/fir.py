"""FIR resampling on a TPU: a matrix product for each axis, mostly of zeros, which its matrix units are made for.

It upsamples [64, 32, 32, 128] in 179 thousand cycles, by shifted slices in 805. As modelled, sampling with a small
network takes a v5e 6.5 ms instead of 7.3.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddgan_jax.networks.ops import reference


def upfirdn(
    x: jax.Array, kernel: Sequence[float], gain: float, up: int, down: int, before: int, after: int
) -> jax.Array:
    """`reference.upfirdn`."""
    options: dict[str, Any] = {"kernel": kernel, "gain": gain, "up": up, "down": down, "before": before, "after": after}
    by_products, plain = (functools.partial(form, **options) for form in (products, reference.upfirdn))
    return jax.lax.platform_dependent(x, tpu=by_products, default=plain)


def products(
    x: jax.Array, kernel: Sequence[float], gain: float, up: int, down: int, before: int, after: int
) -> jax.Array:
    """y[n] = sum over j of taps[j] z[n down + j - before]; z is x with up - 1 zeros between its pixels, 0 outside."""
    taps = gain * np.flip(np.asarray(kernel, np.float64)) / np.sum(kernel)
    for axis, equation in ((1, "nh,bhwc->bnwc"), (2, "nw,bhwc->bhnc")):
        size = x.shape[axis]
        last = (size - 1) * up + before + after - len(taps) + 1  # the filter's last place
        n, i = np.indices((last // down + 1, size))
        j = i * up + before - n * down
        matrix = np.where((j >= 0) & (j < len(taps)), np.take(taps, j, mode="clip"), 0)
        x = jnp.einsum(equation, jnp.asarray(matrix, x.dtype), x, precision=jax.lax.Precision.HIGHEST)
    return x
