"""The nearest rows of one set of features [N, D] to those of another, exactly, in blocks on the default device.

The default device computes ||a||^2 + ||b||^2 - 2 a.b in float32, about the median of the sets, with a rounding error of
at most `_rounding`. That decides all but a few comparisons. The others, and all distances that are returned, are
computed in float64 as sum (a - b)^2, which is 0 for equal rows and the same number for a pair in either order.

Memory beyond the features: at most 0.5 GB on the device and some 15 blocks, for any N and M. Many pairs that float32
cannot decide cost time (each is computed again), not memory: for example, clusters of near-copies that are far apart.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from ddgan_jax.errors import UserError
from ddgan_jax.metrics.distances import check_features, check_same_width

Progress = Callable[[Iterable[int]], Iterable[int]]  # such as tqdm.tqdm; it gets the first row of every block

BLOCK = 1024  # rows of a block; at D = 4096 one takes 16 MiB, and the distances between two of them 4 MiB
PART = 2**27  # numbers of a set that are on the device at once, 512 MiB: 32 blocks at D = 4096
SPARE = 6  # candidates beyond the k nearest, since float32 may order them differently
MAX_CANDIDATES = 2**22  # of all rows that are searched again at once
CENTRE_ROWS = 512  # rows whose median is the centre: unlike the mean, it ignores outliers
TINY = 1e-30  # squares below it may have been rounded to 0 in float32
SMALLEST, LARGEST = 1e-140, 1e15  # feature sizes whose squares stay within float64, and within float32
EXACT = 2**21  # float64 numbers at once where distances are computed again, 16 MiB


def centre_of(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A point [D] in the middle of both sets, in the precision in which they are centred.

    Raises UserError if the squares of centred features leave the range of float32, or those of float64 are all 0.
    """
    medians = [np.median(s[:: -(-len(s) // CENTRE_ROWS)].astype(np.float64), axis=0) for s in (x, y)]
    with np.errstate(over="ignore"):
        centre = (medians[0] + medians[1]) / 2
        largest = max(float(np.abs(edge(s, axis=0) - centre).max()) for s in (x, y) for edge in (np.min, np.max))
    if largest and not SMALLEST < largest < LARGEST:
        raise UserError(
            f"features differ by up to {largest:.3g}, and their squared distances are out of range: "
            f"scale them to between {SMALLEST:g} and {LARGEST:g}"
        )
    return centre.astype(np.result_type(x, y, np.float32))


def block_of(x: np.ndarray, rows: slice | np.ndarray, centre: np.ndarray, size: int) -> np.ndarray:
    """The rows of x, centred, as float32 [size, D]; zeros after the last."""
    part = x[rows]
    out = np.zeros((size, x.shape[1]), np.float32)
    np.subtract(part, centre, out=out[: len(part)], casting="same_kind")
    return out


class Part(NamedTuple):
    """Consecutive blocks of a set on the default device."""

    first: int  # the index of the first block
    blocks: jax.Array  # [n, size, D], centred
    norms: jax.Array  # [n, size], squared


def parts_of(x: np.ndarray, centre: np.ndarray, size: int) -> Iterator[Part]:
    """The blocks of a set, in parts of up to PART numbers, so that a set need not fit on the device."""
    count, most = -(-len(x) // size), max(1, PART // (size * x.shape[1]))
    for first in range(0, count, most):
        starts = range(first * size, min(first + most, count) * size, size)
        blocks = jnp.stack([block_of(x, slice(start, start + size), centre, size) for start in starts])
        yield Part(first, blocks, squared_norms(blocks))


@jax.jit
def squared_norms(x: jax.Array) -> jax.Array:
    """The squared norms [...] of rows [..., D]."""
    return jnp.sum(x * x, axis=-1)


def squared_distances(
    a: jax.Array, b: jax.Array, norms_a: jax.Array, norms_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """||a - b||^2 and its largest rounding error, float32 [n, m], of rows [n, D] and [m, D] with squared norms."""
    norms = norms_a[:, None] + norms_b[None]
    squared = norms - 2 * jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return squared, _rounding(a.shape[1]) * norms + TINY


def _rounding(width: int) -> float:
    """The largest rounding error of `squared_distances` relative to ||a||^2 + ||b||^2: 3e-5 for 4,096 features.

    Rounding errors of a sum of D terms grow like sqrt(D) (Higham and Mary 2019); this bound is several times larger,
    and hundreds of times larger than the errors that occur.
    """
    return float((16 + 8 * np.sqrt(width)) * np.finfo(np.float32).eps / 2)


def exact_distances(x: np.ndarray, y: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """||x_i - y_j||^2 for pairs of indices [n], float64 [n]."""
    out = np.empty(len(i))
    step = max(1, EXACT // x.shape[1])
    for start in range(0, len(i), step):
        part = slice(start, start + step)
        difference = x[i[part]].astype(np.float64)
        difference -= y[j[part]]
        out[part] = np.sum(np.square(difference, out=difference), axis=1)
    return out


def even_block(block: int, rows: int) -> int:
    """The smallest block that cuts `rows` into the same number of blocks as `block`, which minimizes padding."""
    if block < 1:
        raise UserError(f"distances are computed for at least 1 row at a time, not block={block}")
    return -(-rows // -(-rows // block))


def neighbours(
    queries: ArrayLike,
    base: ArrayLike | None = None,
    k: int = 1,
    block: int = BLOCK,
    progress: Progress = iter,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of base [N, D] for each of queries [M, D], nearest first; of equally near rows the first.

    Without `base`, the k nearest other rows of `queries`. Returns indices, int64 [M, k], and squared Euclidean
    distances, float64 [M, k]. `block` rows are compared at a time; it does not change the result. Raises UserError for
    k < 1, too few rows, NaN, infinity, or different widths.
    """
    if k < 1:
        raise UserError(f"precision and recall need at least 1 neighbour, not k={k}")
    x = check_features(queries, "the features" if base is None else "the queries", 1 if base is not None else k + 1)
    y = x if base is None else check_features(base, "the base", k)
    check_same_width(x, y)
    size = even_block(block, max(len(x), len(y)))
    search = _Search(x, y, centre_of(x, y), k, size, same=base is None)
    return search(np.arange(len(x)), k + SPARE, progress)


@dataclasses.dataclass(frozen=True)
class _Search:
    """The search for the k nearest rows of `base`; if `same`, of a set in itself, where no row is its own neighbour."""

    queries: np.ndarray
    base: np.ndarray
    centre: np.ndarray
    k: int
    block: int
    same: bool

    def __call__(self, rows: np.ndarray, candidates: int, progress: Progress = iter) -> tuple[np.ndarray, np.ndarray]:
        """Indices and squared distances [n, k] for the queries `rows` [n], from `candidates` that float32 finds."""
        every = len(self.base) - self.same
        candidates = min(candidates, every)
        indices, squared = np.empty((len(rows), self.k), np.int64), np.empty((len(rows), self.k))
        unsettled = np.zeros(len(rows), bool)
        whole = self.same and len(rows) == len(self.base)
        group = len(rows) if whole else max(1, MAX_CANDIDATES // candidates)
        for start in range(0, len(rows), group):
            part = slice(start, start + group)
            found, bound = self._candidates(rows[part], candidates, whole, progress)
            indices[part], squared[part] = self._nearest(rows[part], found)
            # A row that is no candidate is at least as far away as the bound. If the k-th distance is larger, such a
            # row may be nearer; a distance of 0 is the k-th in any case.
            radius = squared[part][:, -1]
            unsettled[part] = (bound <= radius) & (radius > 0) & (candidates < every)
        if unsettled.any():
            indices[unsettled], squared[unsettled] = self(rows[unsettled], 4 * candidates)
        return indices, squared

    def _nearest(self, rows: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of the candidates `found` [n, c], ascending indices, in float64: indices, distances [n, k]."""
        exact = exact_distances(self.queries, self.base, np.repeat(rows, found.shape[1]), found.ravel()).reshape(
            found.shape
        )
        order = np.argsort(exact, axis=1, kind="stable")[:, : self.k]
        return np.take_along_axis(found, order, axis=1), np.take_along_axis(exact, order, axis=1)

    def _candidates(
        self, rows: np.ndarray, count: int, whole: bool, progress: Progress
    ) -> tuple[np.ndarray, np.ndarray]:
        """The indices [n, count] of the rows of the base that float32 finds nearest, ascending, so that ties go to the
        first; and the least squared distance [n] of any other row. `whole`: `rows` are all of the base, where each
        product of two blocks serves the rows of both.
        """
        size = self.block if whole else even_block(self.block, len(rows))
        blocks = -(-len(rows) // size)
        own = np.full(blocks * size, -1, np.int32)
        if self.same:
            own[: len(rows)] = rows
        best = jnp.full((blocks, size, count), jnp.inf, jnp.float32), jnp.zeros((blocks, size, count), jnp.int32)
        for part in parts_of(self.base, self.centre, self.block):
            before = best
            for start in progress(range(0, len(rows), size)):
                i = start // size
                a = block_of(self.queries, rows[start : start + size], self.centre, size)
                if whole:
                    after = _search_both(*best, a, i, *part, len(self.base))
                else:
                    after = _search(*best, a, own[i * size : (i + 1) * size], i, *part, len(self.base))
                jax.block_until_ready(before)  # otherwise blocks queue up and fill the memory
                before, best = best, after
        bounds, found = (np.asarray(x).reshape(blocks * size, count)[: len(rows)] for x in best)
        return np.sort(found, axis=1), bounds[:, -1].astype(np.float64)


def _update(bounds, indices, smallest, columns):
    """The candidates so far, [n, K] smallest possible squared distances and indices, with those of `columns` [m]."""
    values, places = jax.lax.top_k(-jnp.concatenate([bounds, smallest], axis=1), bounds.shape[1])
    columns = jnp.broadcast_to(columns, smallest.shape).astype(indices.dtype)
    return -values, jnp.take_along_axis(jnp.concatenate([indices, columns], axis=1), places, axis=1)


@jax.jit
def _search(bounds, indices, a, own, i, first, blocks, norms, count):
    """The candidates [blocks, n, K] of all queries, after the rows `a` of block i are compared with a part of the base.

    The part begins with block `first` of the base, which has `count` rows; `own` [n] are rows that are excluded.
    """

    norms_a = squared_norms(a)

    def compare(j, best):
        squared, error = squared_distances(a, blocks[j], norms_a, norms[j])
        columns = (first + j) * blocks.shape[1] + jnp.arange(blocks.shape[1])
        excluded = (columns[None] >= count) | (columns[None] == own[:, None])
        return _update(*best, jnp.where(excluded, jnp.inf, squared - error), columns)

    best = jax.lax.fori_loop(0, len(blocks), compare, (bounds[i], indices[i]))
    return tuple(x.at[i].set(new) for x, new in zip((bounds, indices), best, strict=True))


@jax.jit
def _search_both(bounds, indices, a, i, first, blocks, norms, count):
    """`_search` of a set in itself: each product serves block i and a later block, so earlier ones are left out."""
    size, norms_a = len(a), squared_norms(a)
    rows = i * size + jnp.arange(size)

    def compare(j, best):
        squared, error = squared_distances(a, blocks[j], norms_a, norms[j])
        columns = (first + j) * size + jnp.arange(size)
        smallest = squared - error

        def update(best, index, smallest, own, others):
            excluded = (others[None] >= count) | (others[None] == own[:, None])
            new = _update(best[0][index], best[1][index], jnp.where(excluded, jnp.inf, smallest), others)
            return tuple(x.at[index].set(y) for x, y in zip(best, new, strict=True))

        best = update(best, i, smallest, rows, columns)
        return jax.lax.cond(
            first + j == i, lambda best: best, lambda best: update(best, first + j, smallest.T, columns, rows), best
        )

    return jax.lax.fori_loop(jnp.maximum(i - first, 0), len(blocks), compare, (bounds, indices))
