"""How a set of fake features [M, D] lies in the manifold of the real ones [N, D].

The manifold of a set is the union of closed balls about its points, each of which reaches the k-th nearest other point
of the set. With B_r the ball of a real point, and B_f that of a fake point:

    (1)  precision = fraction of the fakes in some B_r     recall   = fraction of the reals in some B_f
    (2)  density   = mean over the fakes of (number of B_r that contain it) / k
         coverage  = fraction of the reals whose B_r contains some fake

(1) is the improved precision and recall of Kynkaanniemi et al. 2019 (with k = 3), (2) is from Naeem et al. 2020 (with
k = 5), whose published code uses open balls where these are closed.

Distances are exact (`nearest`): float32 decides all but a few comparisons with a radius, float64 the others. So ties
are exact, equal sets have precision = recall = coverage = 1 whatever duplicates they contain, and neither the size of
the blocks nor the device changes the result.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from ddgan_jax.metrics.distances import check_features, check_same_width
from ddgan_jax.metrics.nearest import (
    BLOCK,
    Progress,
    block_of,
    centre_of,
    even_block,
    exact_distances,
    neighbours,
    parts_of,
    squared_distances,
    squared_norms,
)

LISTED = 128  # rows of two blocks with undecided comparisons that are listed on the device


class Manifold(NamedTuple):
    """(1) and (2), and the results of each sample."""

    precision: float  # 0 to 1
    recall: float  # 0 to 1
    density: float  # 0 or more; about 1 for equal distributions
    coverage: float  # 0 to 1
    balls: np.ndarray  # int64 [M], number of real balls that contain each fake; where 0, it is outside the manifold
    recalled: np.ndarray  # bool [N], whether each real is in the fake manifold
    covered: np.ndarray  # bool [N], whether the ball of each real contains a fake


OUTSIDE, INSIDE, UNDECIDED = 0, 1, 2


def _places(fake, real, fake_norms, real_norms, fake_radii, real_radii):
    """Where fakes lie relative to the balls of reals, and reals to those of fakes: OUTSIDE ..., int8 [n, m] twice.

    Radii are squared, float32 [n] and [m]; a negative one is that of no row.
    """
    squared, error = squared_distances(fake, real, fake_norms, real_norms)
    rows = (fake_radii[:, None] >= 0) & (real_radii[None] >= 0)

    def place(radii):
        found = jnp.where(squared + error <= radii, INSIDE, jnp.where(squared - error <= radii, UNDECIDED, OUTSIDE))
        return jnp.where(rows, found, OUTSIDE).astype(jnp.int8)

    return place(real_radii[None]), place(fake_radii[:, None])


@jax.jit
def _count_inside(fake, blocks, norms, fake_radii, real_radii):
    """Compares the fakes [n, D] with each block of reals [b, m, D], whose radii are [b, m].

    Returns the number of balls that contain each fake [b, n], and the reals that are covered and recalled [b, m]. Then
    what is undecided, in rows: row f is for fake f in the balls of the reals, row n + f for the reals in its ball. The
    number of rows with an undecided comparison [b], the first LISTED of them, and their comparisons [b, LISTED, m].
    """
    fake_norms = squared_norms(fake)

    def compare(block):
        reals, real_norms, radii = block
        in_real, in_fake = _places(fake, reals, fake_norms, real_norms, fake_radii, radii)
        undecided = jnp.concatenate([in_real, in_fake]) == UNDECIDED  # of two rows for each fake
        rows = jnp.any(undecided, axis=1)
        listed = jnp.nonzero(rows, size=min(LISTED, len(rows)), fill_value=0)[0]
        covered, recalled = (jnp.any(x == INSIDE, axis=0) for x in (in_real, in_fake))
        return jnp.sum(in_real == INSIDE, axis=1), covered, recalled, jnp.sum(rows), listed, undecided[listed]

    return jax.lax.map(compare, (blocks, norms, real_radii))


@jax.jit
def _undecided(fake, fake_radii, blocks, norms, real_radii, j):
    """The undecided comparisons of the fakes with block j of the reals, in the rows of `_count_inside`."""
    places = _places(fake, blocks[j], squared_norms(fake), norms[j], fake_radii, real_radii[j])
    return jnp.concatenate(places) == UNDECIDED


class _Totals:
    """The balls that contain each fake, and the reals that are covered and recalled, over all blocks so far."""

    def __init__(self, real: np.ndarray, fake: np.ndarray, real_radii: np.ndarray, fake_radii: np.ndarray, size: int):
        """Starts with none, for blocks of `size` rows; the radii are squared."""
        self._real, self._fake, self._size = real, fake, size
        self._real_radii, self._fake_radii = real_radii, fake_radii
        self.balls = np.zeros(len(fake), np.int64)
        self.recalled, self.covered = np.zeros(len(real), bool), np.zeros(len(real), bool)

    def add(self, found: Any, i: int, first: int, undecided: Callable[[int], Any]) -> None:
        """Adds what `_count_inside` found of block i of the fakes and of the reals from block `first` on.

        `undecided(j)` are all undecided comparisons with block first + j, where too many for a list.
        """
        size = self._size
        for j, (in_balls, is_covered, is_recalled, number, listed, comparisons) in enumerate(
            zip(*map(np.array, found), strict=True)
        ):
            a, b = i * size, (first + j) * size
            if number > len(listed):
                number, listed, comparisons = 2 * size, np.arange(2 * size), undecided(j)
            row, n = np.nonzero(comparisons[:number])
            which, m = np.divmod(listed[row], size)
            limits = np.where(which, self._fake_radii[a + m], self._real_radii[b + n])
            inside = exact_distances(self._fake, self._real, a + m, b + n) <= limits
            np.add.at(in_balls, m[inside & (which == 0)], 1)
            is_covered[n[inside & (which == 0)]] = is_recalled[n[inside & (which == 1)]] = True
            self.balls[a : a + size] += in_balls[: len(self._fake) - a]
            self.covered[b : b + size] |= is_covered[: len(self._real) - b]
            self.recalled[b : b + size] |= is_recalled[: len(self._real) - b]


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
    size, centre = even_block(block, max(len(real), len(fake))), centre_of(real, fake)
    padded_fake, padded_real = (
        np.pad(r, (0, -len(r) % size), constant_values=-1).astype(np.float32).reshape(-1, size)
        for r in (fake_radii, real_radii)
    )
    totals = _Totals(real, fake, real_radii, fake_radii, size)
    for first, reals, norms in parts_of(real, centre, size):
        waiting: Any = None
        of_part = padded_real[first : first + len(reals)]
        for i, start in enumerate(progress(range(0, len(fake), size))):
            rows, of_rows = block_of(fake, slice(start, start + size), centre, size), padded_fake[i]
            found = _count_inside(rows, reals, norms, of_rows, of_part)
            if waiting:
                totals.add(*waiting)  # while the device works on the next block
            waiting = found, i, first, functools.partial(_undecided, rows, of_rows, reals, norms, of_part)
        totals.add(*waiting)
    balls, covered, recalled = totals.balls, totals.covered, totals.recalled
    return Manifold(
        precision=float(np.mean(balls > 0)),
        recall=float(recalled.mean()),
        density=float(balls.mean() / k),
        coverage=float(covered.mean()),
        balls=balls,
        recalled=recalled,
        covered=covered,
    )
