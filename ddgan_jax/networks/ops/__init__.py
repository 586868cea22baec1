"""The operations of the networks and the optimizer, in forms that are fast on each platform.

Each operation has a plain form, in `reference.py`, and a fast form with the same result up to rounding, whose docstring
describes what it does on each platform. Networks call `ops.conv(x, kernel)` and name no platform. To understand the
method, read `reference.py` and skip the rest of this folder.

One switch selects the reference forms: the environment variable DDGAN_OPS=reference, or

    with ops.use_reference():
        state, metrics = jax.jit(make_train_step(method, 0, True))(state, images)

DDGAN_OPS=reference:conv,group_norm, or `ops.use_reference("conv", "group_norm")`, selects them for these operations
only. `ops.portable()` selects forms for converters to other formats. The switch is read while a function is traced, and
is part of the key of `jax.jit`'s caches, so a function is traced again for another form.
"""

import functools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax

from ddgan_jax.errors import UserError
from ddgan_jax.networks.ops import reference
from ddgan_jax.networks.ops.conv import conv as _conv
from ddgan_jax.networks.ops.conv import pointwise as _pointwise
from ddgan_jax.networks.ops.fir import products as _products
from ddgan_jax.networks.ops.fir import upfirdn as _upfirdn
from ddgan_jax.networks.ops.memory import add_shift as _add_shift
from ddgan_jax.networks.ops.memory import materialize as _materialize
from ddgan_jax.networks.ops.memory import row_major as _row_major
from ddgan_jax.networks.ops.norm import group_norm as _group_norm
from ddgan_jax.networks.ops.reference import FIR_KERNEL, MAX_CHANNELS

F = TypeVar("F", bound=Callable[..., Any])

FORMS = ("fast", "reference", "portable")
_form = jax.make_user_context(os.environ.get("DDGAN_OPS") or "fast")


def use_reference(*operations: str) -> AbstractContextManager[None]:
    """A context in which functions are traced with the reference forms of `operations`; without arguments, of all."""
    return _form(f"reference:{','.join(operations)}" if operations else "reference")


def portable() -> AbstractContextManager[None]:
    """A context in which functions are traced in forms that converters to other formats support."""
    return _form("portable")


@functools.cache
def _as_reference(form: str) -> frozenset[str]:
    """The operations that run in their reference form. Raises UserError for an unknown `form`."""
    word, _, names = form.partition(":")
    chosen = frozenset(names.split(",") if names else OPERATIONS)
    if word not in FORMS or (word != "reference" and names):
        forms = f"{', '.join(FORMS)}, or for some of them reference:conv,group_norm"
        raise UserError(f"DDGAN_OPS={form} is not a form of the operations: it is {forms}")
    if unknown := ", ".join(sorted(chosen - OPERATIONS)):
        raise UserError(f"DDGAN_OPS={form}: no operation {unknown}: they are {', '.join(sorted(OPERATIONS))}")
    return frozenset() if word == "fast" else chosen


OPERATIONS: set[str] = set()


def _operation(plain: F, fast: Callable[..., Any], portable: Callable[..., Any] | None = None) -> F:
    """The operation `plain`, in the selected form; `portable` defaults to `plain`."""

    @functools.wraps(plain)
    def operation(*args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(plain.__name__):  # a name in compiled programs and profiles
            slow = portable if portable and _form.value == "portable" else plain
            return (slow if plain.__name__ in _as_reference(_form.value) else fast)(*args, **kwargs)

    OPERATIONS.add(plain.__name__)
    return operation  # type: ignore[return-value]


conv = _operation(reference.conv, _conv)
pointwise = _operation(reference.pointwise, _pointwise)
upfirdn = _operation(reference.upfirdn, _upfirdn, portable=_products)
group_norm = _operation(reference.group_norm, _group_norm)
add_shift = _operation(reference.add_shift, _add_shift)
materialize = _operation(reference.materialize, _materialize)
row_major = _operation(reference.row_major, _row_major)


def fir_filter(x: jax.Array, kernel: Sequence[float], pad: int) -> jax.Array:
    """[B, H, W, C] filtered along both axes, with `pad` zeros in total along each."""
    return upfirdn(x, kernel, 1.0, up=1, down=1, before=(pad + 1) // 2, after=pad // 2)


def fir_downsample(x: jax.Array, kernel: Sequence[float] = FIR_KERNEL) -> jax.Array:
    """[B, H, W, C] -> [B, H // 2, W // 2, C], low-pass filtered."""
    pad = len(kernel) - 2
    return upfirdn(x, kernel, 1.0, up=1, down=2, before=(pad + 1) // 2, after=pad // 2)


def fir_upsample(x: jax.Array, kernel: Sequence[float] = FIR_KERNEL, margin: int = 0) -> jax.Array:
    """[B, H, W, C] -> [B, 2H + 2 margin, 2W + 2 margin, C], mean preserved; `margin` pixels of the tails are kept."""
    before = (len(kernel) - 1) // 2 + 1 + margin
    return upfirdn(x, kernel, 2.0, up=2, down=1, before=before, after=len(kernel) - before + 2 * margin)


__all__ = [
    "FIR_KERNEL",
    "FORMS",
    "MAX_CHANNELS",
    "OPERATIONS",
    "add_shift",
    "conv",
    "fir_downsample",
    "fir_filter",
    "fir_upsample",
    "group_norm",
    "materialize",
    "pointwise",
    "portable",
    "row_major",
    "upfirdn",
    "use_reference",
]
