"""What a CPU must hold in memory, and not make again, nor each time as another kernel.

XLA's compiler for CPUs fuses a cheap operation into each one that uses it, and so on, so that the sum that a residual
block ends with is made again from all its terms, those of the blocks before as well, by each of a dozen others. Nearly
every one of those is then a kernel of its own to compile, where all blocks of a size could share one.
jax.lax.optimization_barrier is no help: it is taken out before fusion. A call that may not be inlined is a border that
fusion does not cross, even if the function has nothing to do. benchmarks/NOTES.md has the numbers.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata


@jax.custom_vjp
@jax.jit
def materialize(tree: Any) -> Any:
    """The arrays of `tree`, in memory on a CPU, and their gradients too; elsewhere nothing is done."""
    return jax.lax.platform_dependent(tree, cpu=_border, default=lambda tree: tree)


materialize.defvjp(lambda tree: (materialize(tree), None), lambda _, gradients: (materialize(gradients),))


def in_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of trees of arrays, an elementwise one, so that a CPU runs it on flat arrays that are in memory.

    Arrays of one size are then updated by the same few kernels, whatever their shapes.
    """
    function = jax.jit(function)  # traced once for the shapes of its results and for other platforms

    def flat(*trees: Any) -> Any:
        rows = _border(jax.tree.map(lambda x: x.reshape(x.size if x.ndim else ()), trees))
        shapes = jax.eval_shape(function, *trees)
        return jax.tree.map(lambda x, like: x.reshape(like.shape), function(*rows), shapes)

    return lambda *trees: jax.lax.platform_dependent(*trees, cpu=flat, default=function)


def _border(tree: Any) -> Any:
    """The arrays of `tree`, through a call that is not inlined. XLA empties it, JAX must not see that it is empty."""
    with set_xla_metadata(inlineable="false"):
        return jax.jit(jax.lax.optimization_barrier)(tree)
