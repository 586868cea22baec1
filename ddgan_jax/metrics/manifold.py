"""How a set of fake features [M, D] lies in the manifold of the real ones [N, D], and nearest neighbours.

The manifold of a set is the union of closed balls about its points, each of which reaches the k-th nearest other point
of the set. With B_r the ball of a real point, and B_f that of a fake point:

    (1)  precision = fraction of the fakes in some B_r     recall   = fraction of the reals in some B_f
    (2)  density   = mean over the fakes of (number of B_r that contain it) / k
         coverage  = fraction of the reals whose B_r contains some fake

(1) is the improved precision and recall of Kynkaanniemi et al. 2019 (with k = 3), (2) is from Naeem et al. 2020 (with
k = 5), whose published code uses open balls where these are closed.

Distances are exact. The default device computes ||a||^2 + ||b||^2 - 2 a.b in float32, in blocks, about the median of
the set, with a rounding error of at most `_rounding`. That decides all but a few comparisons. The others, and all
radii, are computed in float64 as sum (a - b)^2, which is 0 for equal points and the same number for a pair in either
order. So ties are exact, equal sets have precision = recall = coverage = 1 whatever duplicates they contain, and
neither the size of the blocks nor the device changes the result.

Memory beyond the features: some 15 blocks, 0.25 GB at D = 4096, for any N and M. Many pairs that float32 cannot decide
cost time (each is computed again), not memory: for example, clusters of near-copies that are far apart.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from ddgan_jax.errors import UserError
from ddgan_jax.metrics.distances import check_features, check_same_width

Progress = Callable[[Iterable[int]], Iterable[int]]  # such as tqdm.tqdm; it gets the first row of every block

BLOCK = 1024  # rows of a block; at D = 4096 one takes 16 MiB, and the distances between two of them 4 MiB
SPARE = 6  # candidates beyond the k nearest, since float32 may order them differently
MAX_CANDIDATES = 2**22  # of all rows that are searched at once
CENTRE_ROWS = 512  # rows whose median is the centre: unlike the mean, it ignores outliers
TINY = 1e-30  # squares below it may have been rounded to 0 in float32
SMALLEST, LARGEST = 1e-140, 1e15  # feature sizes whose squares stay within float64, and within float32
EXACT = 2**21  # float64 numbers at once where distances are computed again, 16 MiB


class Manifold(NamedTuple):
    """(1) and (2), and the results of each sample."""

    precision: float  # 0 to 1
    recall: float  # 0 to 1
    density: float  # 0 or more; about 1 for equal distributions
    coverage: float  # 0 to 1
    balls: np.ndarray  # int64 [M], number of real balls that contain each fake; where 0, it is outside the manifold
    recalled: np.ndarray  # bool [N], whether each real is in the fake manifold
    covered: np.ndarray  # bool [N], whether the ball of each real contains a fake


def _centre(x: np.ndarray, y: np.ndarray) -> np.ndarray:
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


def _block(x: np.ndarray, rows: slice | np.ndarray, centre: np.ndarray, size: int) -> np.ndarray:
    """The rows of x, centred, as float32 [size, D]; zeros after the last."""
    part = x[rows]
    out = np.zeros((size, x.shape[1]), np.float32)
    np.subtract(part, centre, out=out[: len(part)], casting="same_kind")
    return out


def _squared(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """||a - b||^2 and its largest rounding error, float32 [n, m], of rows [n, D] and [m, D]."""
    norms = jnp.sum(a * a, axis=1)[:, None] + jnp.sum(b * b, axis=1)[None]
    squared = norms - 2 * jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return squared, _rounding(a.shape[1]) * norms + TINY


def _rounding(width: int) -> float:
    """The largest rounding error of `_squared` relative to ||a||^2 + ||b||^2: 3e-5 for 4,096 features.

    Rounding errors of a sum of D terms grow like sqrt(D) (Higham and Mary 2019); this bound is several times larger,
    and hundreds of times larger than the errors that occur.
    """
    return float((16 + 8 * np.sqrt(width)) * np.finfo(np.float32).eps / 2)


def _exact(x: np.ndarray, y: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """||x_i - y_j||^2 for pairs of indices [n], float64 [n]."""
    out = np.empty(len(i))
    step = max(1, EXACT // x.shape[1])
    for start in range(0, len(i), step):
        part = slice(start, start + step)
        difference = x[i[part]].astype(np.float64)
        difference -= y[j[part]]
        out[part] = np.sum(np.square(difference, out=difference), axis=1)
    return out


def _even(block: int, rows: int) -> int:
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
    size = _even(block, max(len(x), len(y)))
    search = _Search(x, y, _centre(x, y), k, size, same=base is None)
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
        size = _even(min(self.block, max(1, MAX_CANDIDATES // candidates)), len(rows))
        indices, squared = np.empty((len(rows), self.k), np.int64), np.empty((len(rows), self.k))
        unsettled = np.zeros(len(rows), bool)
        for start in progress(range(0, len(rows), size)):
            part = slice(start, start + size)
            found, bound = self._candidates(rows[part], candidates, size)
            exact = _exact(self.queries, self.base, np.repeat(rows[part], candidates), found.ravel())
            exact = exact.reshape(found.shape)
            order = np.argsort(exact, axis=1, kind="stable")[:, : self.k]
            indices[part] = np.take_along_axis(found, order, axis=1)
            squared[part] = np.take_along_axis(exact, order, axis=1)
            # A row that is no candidate is at least as far away as the bound. If the k-th distance is larger, such a
            # row may be nearer; a distance of 0 is the k-th in any case.
            radius = squared[part][:, -1]
            unsettled[part] = (bound <= radius) & (radius > 0) & (candidates < every)
        if unsettled.any():
            indices[unsettled], squared[unsettled] = self(rows[unsettled], 4 * candidates)
        return indices, squared

    def _candidates(self, rows: np.ndarray, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The indices [n, count] of the rows of the base that float32 finds nearest, ascending, so that ties go to the
        first; and the least squared distance [n] of any other row."""
        a = jnp.asarray(_block(self.queries, rows, self.centre, size))
        own = np.full(size, -1, np.int32)
        if self.same:
            own[: len(rows)] = rows
        best = jnp.full((size, count), jnp.inf, jnp.float32), jnp.zeros((size, count), jnp.int32)
        for start in range(0, len(self.base), self.block):
            b = _block(self.base, slice(start, start + self.block), self.centre, self.block)
            best = _nearest(*best, a, b, own, start, len(self.base))
            jax.block_until_ready(best)  # otherwise blocks queue up faster than they are used, and fill the memory
        bounds, found = (np.asarray(x)[: len(rows)] for x in best)
        return np.sort(found, axis=1), bounds[:, -1].astype(np.float64)


@jax.jit
def _nearest(bounds, indices, a, b, own, start, count):
    """The candidates so far, [n, K] smallest possible squared distances and indices, updated by a block of the base.

    `b` [m, D] holds the rows of the base from `start` on, of which there are `count` in all; `own` [n] are rows that
    are excluded.
    """
    squared, error = _squared(a, b)
    columns = start + jnp.arange(len(b))
    excluded = (columns[None] >= count) | (columns[None] == own[:, None])
    both = jnp.concatenate([bounds, jnp.where(excluded, jnp.inf, squared - error)], axis=1)
    values, places = jax.lax.top_k(-both, bounds.shape[1])
    columns = jnp.broadcast_to(columns, excluded.shape).astype(indices.dtype)
    return -values, jnp.take_along_axis(jnp.concatenate([indices, columns], axis=1), places, axis=1)


OUTSIDE, INSIDE, UNDECIDED = 0, 1, 2


@jax.jit
def _inside(fake, real, fake_radii, real_radii):
    """Where fakes lie relative to the balls of reals, and reals to those of fakes: OUTSIDE ..., int8 [n, m] twice.

    Radii are squared, float32 [n] and [m].
    """
    squared, error = _squared(fake, real)

    def place(radii):
        return jnp.where(squared + error <= radii, INSIDE, jnp.where(squared - error <= radii, UNDECIDED, OUTSIDE))

    return place(real_radii[None]).astype(jnp.int8), place(fake_radii[:, None]).astype(jnp.int8)


def precision_recall(
    real: ArrayLike,
    fake: ArrayLike,
    k: int = 3,
    block: int = BLOCK,
    progress: Progress = iter,
    real_radii: np.ndarray | None = None,
) -> Manifold:
    """Precision, recall, density and coverage of fake [M, D] against real [N, D], equations (1) and (2).

    `real_radii` [N] are the squared distances of the reals to their k-th neighbours, if they are known already. `block`
    rows are compared at a time; it does not change the result. Raises UserError for k < 1, sets of k samples or fewer,
    NaN, infinity, or different widths.
    """
    real, fake = check_features(real, "the real features", k + 1), check_features(fake, "the fake features", k + 1)
    check_same_width(real, fake)
    if real_radii is None:
        real_radii = neighbours(real, None, k, block, progress)[1][:, -1]
    fake_radii = neighbours(fake, None, k, block, progress)[1][:, -1]
    size, centre = _even(block, max(len(real), len(fake))), _centre(real, fake)
    padded_fake, padded_real = (np.pad(r, (0, -len(r) % size)).astype(np.float32) for r in (fake_radii, real_radii))
    balls = np.zeros(len(fake), np.int64)
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for i in progress(range(0, len(fake), size)):
        fakes = slice(i, min(i + size, len(fake)))
        rows = jnp.asarray(_block(fake, fakes, centre, size))
        for j in range(0, len(real), size):
            reals = slice(j, min(j + size, len(real)))
            places = _inside(
                rows, _block(real, reals, centre, size), padded_fake[i : i + size], padded_real[j : j + size]
            )
            in_real, in_fake = (np.array(x)[: fakes.stop - i, : reals.stop - j] for x in places)
            for place, radii in ((in_real, real_radii[reals][None]), (in_fake, fake_radii[fakes][:, None])):
                a, b = np.nonzero(place == UNDECIDED)
                place[a, b] = _exact(fake, real, a + i, b + j) <= np.broadcast_to(radii, place.shape)[a, b]
            balls[fakes] += in_real.sum(axis=1)
            covered[reals] |= in_real.any(axis=0)
            recalled[reals] |= in_fake.any(axis=0)
    return Manifold(
        precision=float(np.mean(balls > 0)),
        recall=float(recalled.mean()),
        density=float(balls.mean() / k),
        coverage=float(covered.mean()),
        balls=balls,
        recalled=recalled,
        covered=covered,
    )
