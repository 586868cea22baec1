"""How a set of fake features [M, D] lies in the manifold of the real ones [N, D], and nearest neighbours.

A set's manifold is the union of closed balls about its points, each of a radius that reaches the k-th nearest other
point of the set. With B_r and B_f the balls of the real and of the fake points:

    (1)  precision = share of the fakes in some B_r     recall   = share of the reals in some B_f
    (2)  density   = mean over the fakes of (number of B_r that hold it) / k
         coverage  = share of the reals whose B_r holds some fake

(1) is the improved precision and recall of Kynkaanniemi et al. 2019 (with k = 3), (2) is from Naeem et al. 2020 (with
k = 5), whose published code takes open balls where these are closed.

How distances are measured. The default device computes ||a||^2 + ||b||^2 - 2 a.b in float32, in blocks, about the
median of the set; its rounding is at most `_slack`. That settles all but a few pairs. Those, and all radii, are
measured again in float64 as sum (a - b)^2, which is 0 for equal points and one number for a pair, whatever the order.
So ties are exact, equal sets have precision = recall = coverage = 1 whatever duplicates they hold, and neither the size
of the blocks nor the device changes the result. Where float32 cannot name the k nearest, because more than SPARE other
points lie within its rounding, `_among_all` finds them in float64.

Memory beyond the features: some 15 blocks, 0.25 GB at D = 4096, whatever N and M are. Many pairs within rounding of a
radius, as where a large part of all points are copies of each other, cost time (each is measured again), not memory.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from ddgan_jax.errors import UserError
from ddgan_jax.metrics.distances import check_features, check_same_width

Progress = Callable[[Iterable[int]], Iterable[int]]  # such as tqdm.tqdm; it gets the starts of the blocks of queries

BLOCK = 1024  # rows of a block; at D = 4096 one takes 16 MiB, and the distances between two of them 4 MiB
SPARE = 6  # neighbours measured again beyond those asked for, since float32 may have them in another order
MIDDLE = 512  # rows whose median is the centre: near most points, and unlike the mean however far some outliers are
TINY = 1e-30  # in the unit of the features; squares below it may have been rounded to 0
RANGE = 1e140  # of the largest feature, and of its reciprocal: beyond it squares leave float64
EXACT = 2**21  # numbers of float64 taken at once where pairs are measured again, 16 MiB


class Manifold(NamedTuple):
    """(1) and (2), and what they say of each sample."""

    precision: float  # 0 to 1
    recall: float  # 0 to 1
    density: float  # 0 or more; about 1 for equal distributions
    coverage: float  # 0 to 1
    balls: np.ndarray  # int64 [M], real balls that hold each fake; where 0, it is outside the real manifold
    recalled: np.ndarray  # bool [N], whether each real is in the fake manifold
    covered: np.ndarray  # bool [N], whether the ball of each real holds a fake


# --- Blocks -------------------------------------------------------------------------------------------------------


class _Set:
    """Features [N, D] of which blocks are taken as float32 [block, D], centred, scaled, and padded by zeros."""

    def __init__(self, x: np.ndarray, block: int, centre: np.ndarray, unit: float):
        self.x, self.block, self.unit = x, block, unit
        # In the precision of the features, which is faster; any centre gives the same distances. 1 / unit must fit.
        narrow = x.dtype.kind == "f" and x.dtype.itemsize <= 4 and unit > 1e-30
        self.centre = centre.astype(np.float32 if narrow else np.float64)

    @property
    def starts(self) -> range:
        return range(0, len(self.x), self.block)

    def rows(self, start: int) -> np.ndarray:
        """float32 [block, D]."""
        part = self.x[start : start + self.block]
        out = np.zeros((self.block, part.shape[1]), np.float32)
        np.multiply(part - self.centre, 1 / self.unit, out=out[: len(part)], casting="same_kind")
        return out

    def radii(self, squared: np.ndarray, start: int) -> np.ndarray:
        """Squared radii [N] -> float32 [block] of one block, in its unit."""
        part = squared[start : start + self.block] / self.unit**2
        return np.pad(part, (0, self.block - len(part))).astype(np.float32)


def _even(block: int, rows: int) -> int:
    """The smallest block that cuts `rows` into no more blocks than `block` does, so that little of it is padding."""
    if block < 1:
        raise UserError(f"distances are computed for at least 1 row at a time, not block={block}")
    return -(-rows // -(-rows // block))


def _sets(x: np.ndarray, y: np.ndarray, block: int) -> tuple[_Set, _Set]:
    """Both about their common middle and in a common unit, a power of two near the size of the largest feature.

    The unit keeps squares within the range of float32, and as a power of two it rounds nothing. UserError if float64
    cannot hold the squares.
    """
    with np.errstate(over="ignore"):
        centre = (_middle(x) + _middle(y)) / 2
        largest = max(float(np.abs(edge(s, axis=0) - centre).max()) for s in (x, y) for edge in (np.min, np.max))
    if largest and not 1 / RANGE < largest < RANGE:
        raise UserError(
            f"features differ by up to {largest:.3g}, and their squared distances are out of the range of float64: "
            f"scale them to between {1 / RANGE:g} and {RANGE:g}"
        )
    unit = 2.0 ** np.ceil(np.log2(largest)) if largest > 0 else 1.0
    return _Set(x, block, centre, unit), _Set(y, block, centre, unit)


def _middle(x: np.ndarray) -> np.ndarray:
    """float64 [D], the median of about MIDDLE rows."""
    return np.median(x[:: -(-len(x) // MIDDLE)].astype(np.float64), axis=0)


def _squared(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """||a - b||^2 and ||a||^2 + ||b||^2, float32 [block, block], of rows [block, D]."""
    norms = jnp.sum(a * a, axis=1)[:, None] + jnp.sum(b * b, axis=1)[None]
    return norms - 2 * jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST), norms


def _slack(width: int) -> float:
    """How far off `_squared` may be, in units of ||a||^2 + ||b||^2: 3e-5 for 4,096 features.

    Rounding errors of a sum of D terms grow like sqrt(D) (Higham and Mary 2019); this is several times what they may
    reach, and hundreds of times what is seen.
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


# --- Neighbours ---------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="same")
def _closest(distances, indices, a, b, start_a, start_b, count_b, same):
    """The nearest rows so far, [block, K] distances and indices, and those of the block b of the base.

    Distances are squared, and the least that they can be: rounding is taken off.
    """
    squared, norms = _squared(a, b)
    least = squared - _slack(a.shape[1]) * norms - TINY
    columns = start_b + jnp.arange(len(b))
    out = columns[None] >= count_b
    if same:
        out |= columns[None] == (start_a + jnp.arange(len(a)))[:, None]
    kept = distances.shape[1]
    values, places = jax.lax.top_k(-jnp.concatenate([distances, jnp.where(out, jnp.inf, least)], axis=1), kept)
    before = jnp.take_along_axis(indices, jnp.minimum(places, kept - 1), axis=1)
    return -values, jnp.where(places < kept, before, places - kept + start_b)


def _neighbours(
    queries: np.ndarray, base: np.ndarray, k: int, block: int, progress: Progress, same: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Indices [M, k] and squared distances, float64 [M, k], of the k nearest of the base, nearest first.

    `same` says that the sets are one, of which a point is not its own neighbour. Of equally near ones the first counts.
    """
    near, far = _sets(queries, base, block)
    candidates = min(k + SPARE, len(base) - same)
    indices, distances = np.empty((len(queries), k), np.int64), np.empty((len(queries), k))
    for start in progress(near.starts):
        rows = jnp.asarray(near.rows(start))
        shape = (near.block, candidates)
        best = (jnp.full(shape, jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32))
        for other in far.starts:
            best = _closest(*best, rows, far.rows(other), start, other, len(base), same=same)
            jax.block_until_ready(best)  # otherwise blocks queue up faster than they are used, and fill the memory
        # By index first, so that the stable sort below takes the first of equals.
        found = np.sort(np.asarray(best[1])[: len(queries) - start], axis=1)
        which = np.repeat(np.arange(start, start + len(found)), candidates)
        measured = _exact(queries, base, which, found.ravel()).reshape(found.shape)
        order = np.argsort(measured, axis=1, kind="stable")[:, :k]
        part = slice(start, start + len(found))
        indices[part] = np.take_along_axis(found, order, axis=1)
        distances[part] = np.take_along_axis(measured, order, axis=1)
        # A row that is no candidate is at least as far as the last candidate can be near. Where the k-th distance is
        # larger than that, such a row may be nearer; a distance of 0 is the k-th in any case.
        beyond = np.asarray(best[0])[: len(found), -1].astype(np.float64) * near.unit**2
        radius = distances[part][:, -1]
        unsettled = start + np.flatnonzero((beyond <= radius) & (radius > 0) & (candidates < len(base) - same))
        if len(unsettled):
            indices[unsettled], distances[unsettled] = _among_all(
                queries, base, unsettled, distances[unsettled], near.centre, block, same
            )
    return indices, distances


def _among_all(
    queries: np.ndarray,
    base: np.ndarray,
    rows: np.ndarray,
    found: np.ndarray,
    centre: np.ndarray,
    block: int,
    same: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """The result of `_neighbours` for the queries `rows` [n], computed in float64.

    `found` [n, k] are distances to any k of the base, nearest first: no true neighbour is further than the last.
    """
    n, k = found.shape
    indices, distances, radius = np.zeros((n, k), np.int64), np.full((n, k), np.inf), found[:, -1:]
    a = queries[rows] - centre.astype(np.float64)
    slack = _slack(a.shape[1]) * np.finfo(np.float64).eps / np.finfo(np.float32).eps
    for start in range(0, len(base), block):
        b = base[start : start + block] - centre.astype(np.float64)
        norms = np.sum(a * a, axis=1)[:, None] + np.sum(b * b, axis=1)
        near = norms - 2 * a @ b.T <= radius + slack * norms
        columns = np.arange(start, start + len(b))
        if same:
            near &= columns != rows[:, None]
        i, j = np.nonzero(near)
        measured = np.full(near.shape, np.inf)
        measured[i, j] = _exact(queries, base, rows[i], columns[j])
        both = np.concatenate([distances, measured], axis=1)
        order = np.argsort(both, axis=1, kind="stable")[:, :k]
        distances = np.take_along_axis(both, order, axis=1)
        indices = np.take_along_axis(np.concatenate([indices, np.tile(columns, (n, 1))], axis=1), order, axis=1)
    return indices, distances


def nearest(
    queries: ArrayLike, base: ArrayLike, block: int = BLOCK, progress: Progress = iter
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest row of base [N, D] to each of queries [M, D]: indices int64 [M], distances float64 [M].

    Euclidean, in units of the features; of equally near rows the first. Raises UserError for empty sets, NaN,
    infinity, or different widths.
    """
    queries, base = check_features(queries, "the queries"), check_features(base, "the base")
    check_same_width(queries, base)
    block = _even(block, max(len(queries), len(base)))
    indices, squared = _neighbours(queries, base, 1, block, progress)
    return indices[:, 0], np.sqrt(squared[:, 0])


def nearest_other(x: ArrayLike, block: int = BLOCK, progress: Progress = iter) -> np.ndarray:
    """The distance of each row of x [N, D] to the nearest other one, float64 [N]; UserErrors as of `nearest`."""
    x = check_features(x, "the features", 2)
    return np.sqrt(_neighbours(x, x, 1, _even(block, len(x)), progress, same=True)[1][:, 0])


# --- Manifolds ----------------------------------------------------------------------------------------------------


@jax.jit
def _inside(fake, real, fake_radii, real_radii, fake_count, real_count):
    """Of two blocks: real balls about each fake, reals with a fake in their ball, reals in a ball of a fake; and pairs.

    Pairs [block, block] that float32 cannot settle have 1 (of the ball of the real) and 2 (of that of the fake) set.
    """
    squared, norms = _squared(fake, real)
    slack = _slack(fake.shape[1]) * norms + TINY
    valid = (jnp.arange(len(fake)) < fake_count)[:, None] & (jnp.arange(len(real)) < real_count)[None]
    in_real = valid & (squared + slack <= real_radii[None])
    in_fake = valid & (squared + slack <= fake_radii[:, None])
    maybe_real = valid & ~in_real & (squared - slack <= real_radii[None])
    maybe_fake = valid & ~in_fake & (squared - slack <= fake_radii[:, None])
    pairs = maybe_real.astype(jnp.uint8) + 2 * maybe_fake.astype(jnp.uint8)
    return in_real.sum(axis=1), in_real.any(axis=0), in_fake.any(axis=0), pairs


def radii(x: ArrayLike, k: int = 3, block: int = BLOCK, progress: Progress = iter) -> np.ndarray:
    """The squared distance of each row of x [N, D] to its k-th nearest other one, float64 [N]: the radii of a manifold.

    Raises UserError for k < 1, k rows or fewer, NaN or infinity.
    """
    if k < 1:
        raise UserError(f"precision and recall need at least 1 neighbour, not k={k}")
    x = check_features(x, "the features", k + 1)
    return _neighbours(x, x, k, _even(block, len(x)), progress, same=True)[1][:, -1]


def precision_recall(
    real: ArrayLike,
    fake: ArrayLike,
    k: int = 3,
    block: int = BLOCK,
    progress: Progress = iter,
    real_radii: np.ndarray | None = None,
) -> Manifold:
    """Precision, recall, density and coverage of fake [M, D] against real [N, D], equations (1) and (2).

    `real_radii` are `radii(real, k)`, if they are known already. `block` rows at a time; it costs memory, and does not
    change the result. Raises UserError for k < 1, sets of k
    samples or fewer, NaN, infinity, or different widths.
    """
    if k < 1:
        raise UserError(f"precision and recall need at least 1 neighbour, not k={k}")
    real, fake = check_features(real, "the real features", k + 1), check_features(fake, "the fake features", k + 1)
    check_same_width(real, fake)
    block = _even(block, max(len(real), len(fake)))
    # Each set about its own mean: the fakes of a collapsed generator lie closer to each other than to anything else.
    if real_radii is None:
        real_radii = _neighbours(real, real, k, block, progress, same=True)[1][:, -1]
    fake_radii = _neighbours(fake, fake, k, block, progress, same=True)[1][:, -1]
    fakes, reals = _sets(fake, real, block)
    balls = np.zeros(len(fake), np.int64)
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for i in progress(fakes.starts):
        rows, own = jnp.asarray(fakes.rows(i)), fakes.radii(fake_radii, i)
        for j in reals.starts:
            counts = min(fakes.block, len(fake) - i), min(reals.block, len(real) - j)
            held, covers, recalls, pairs = map(
                np.asarray, _inside(rows, reals.rows(j), own, reals.radii(real_radii, j), *counts)
            )
            balls[i : i + counts[0]] += held[: counts[0]]
            covered[j : j + counts[1]] |= covers[: counts[1]]
            recalled[j : j + counts[1]] |= recalls[: counts[1]]
            a, b = np.nonzero(pairs)
            unsettled, a, b = pairs[a, b], a + i, b + j
            squared = _exact(fake, real, a, b)
            hit = (unsettled & 1 > 0) & (squared <= real_radii[b])
            np.add.at(balls, a[hit], 1)
            covered[b[hit]] = True
            recalled[b[(unsettled & 2 > 0) & (squared <= fake_radii[a])]] = True
    return Manifold(
        precision=float(np.mean(balls > 0)),
        recall=float(recalled.mean()),
        density=float(balls.mean() / k),
        coverage=float(covered.mean()),
        balls=balls,
        recalled=recalled,
        covered=covered,
    )
