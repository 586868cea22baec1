"""What a CPU must hold in memory, and not make again, nor each time as another kernel.

XLA's compiler for CPUs fuses a cheap operation into each one that uses it, and so on, so that the sum that a residual
block ends with is made again from all its terms, those of the blocks before as well, by each of a dozen others. Nearly
every one of those is then a kernel of its own to compile, where all blocks of a size could share one.
jax.lax.optimization_barrier is no help: it is taken out before fusion. A call that may not be inlined is a border that
fusion does not cross, even if the function has nothing to do.

With it and the forms that it stands in, CIFAR-10's step has 690 different kernels of XLA's making instead of 1,280,
compiles in 26 to 28 s on 2 cores of an AMD EPYC instead of 47, and takes 1.49 GB instead of 1.80.
benchmarks/NOTES.md has what each border adds.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata


@jax.custom_vjp
@jax.jit
def materialize(tree: Any) -> Any:
    """The arrays of `tree`, in memory on a CPU, and their gradients too; elsewhere nothing is done."""
    return jax.lax.platform_dependent(tree, cpu=_border, default=lambda tree: tree)


materialize.defvjp(lambda tree: (materialize(tree), None), lambda _, gradients: (materialize(gradients),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def merge(x: jax.Array, h: jax.Array, rescale: bool) -> jax.Array:
    """`reference.merge`, result and gradient in memory."""
    return _rescaled(x + h, rescale)


def _rescaled(x: jax.Array, rescale: bool) -> jax.Array:
    """The sum, or its gradient: in memory only once it is divided."""
    return materialize(x / np.sqrt(2).astype(x.dtype) if rescale else x)


merge.defvjp(lambda x, h, rescale: (merge(x, h, rescale), None), lambda rescale, _, g: (_rescaled(g, rescale),) * 2)


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
