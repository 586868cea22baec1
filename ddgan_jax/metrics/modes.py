"""Coverage of the modes of a known distribution, and the balance between them.

With h the fraction of the samples in each of K modes: the number of modes with h > 0, and

    (1)  KL(h || uniform) = sum h log(K h), in nats, 0 for equal fractions and log K for a single mode.

StackedMNIST has K = 1,000 modes, one for each triple of digits, and is evaluated by 25,600 samples whose channels a
classifier of digits labels. The grid of Gaussians has K = 25.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ddgan_jax.errors import UserError
from ddgan_jax.metrics.distances import check_features


class ModeReport(NamedTuple):
    """Modes of labelled samples."""

    modes: int  # number of modes with at least one sample
    kl: float  # (1)
    histogram: np.ndarray  # int64 [num_modes], number of samples in each mode


class GaussianReport(NamedTuple):
    """Modes of points in the plane, by their high-quality points."""

    modes: int  # number of modes with at least one high-quality point
    high_quality: float  # fraction of all points within three standard deviations of their centre, 0 to 1
    kl: float  # (1); NaN without high-quality points
    histogram: np.ndarray  # int64 [side^2], high-quality points of each mode, in the order of `grid_centres`


def _report(histogram: np.ndarray) -> ModeReport:
    total = histogram.sum()
    if not total:
        return ModeReport(0, float("nan"), histogram)
    share = histogram[histogram > 0] / total
    return ModeReport(len(share), float(np.sum(share * np.log(len(histogram) * share))), histogram)


def mode_report(labels: ArrayLike, num_modes: int) -> ModeReport:
    """Modes of labels [N] in 0..num_modes-1; an empty mode adds 0 to (1).

    Raises UserError unless there is at least one label, and all are integers in this range.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iu":
        raise UserError(f"labels must be whole numbers [N], N >= 1, not {labels.dtype} {list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= num_modes:
        raise UserError(f"labels must be 0 to {num_modes - 1}, not {labels.min()} to {labels.max()}")
    return _report(np.bincount(labels.astype(np.int64), minlength=num_modes))


def grid_centres(side: int = 5, spacing: float = 2.0) -> np.ndarray:
    """Centres of a square grid about the origin, float64 [side^2, 2]; mode side * i + j has the i-th x and j-th y."""
    axis = (np.arange(side) - (side - 1) / 2) * spacing
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)


def gaussian_report(points: ArrayLike, side: int = 5, spacing: float = 2.0, std: float = 0.05) -> GaussianReport:
    """Modes of points [N, 2] among Gaussians at `grid_centres` with standard deviation `std` along each axis.

    Every point belongs to its nearest centre, and has high quality within 3 std of it (Euclidean). A mode is covered
    if it has at least one high-quality point, as in VEEGAN (Srivastava et al. 2017) and PacGAN (Lin et al. 2018), and
    (1) counts only high-quality points, as PacGAN's code does. 98.9 % of exact samples have high quality. Raises
    UserError for another shape, NaN or infinity.
    """
    points = check_features(points, "points").astype(np.float64)
    if points.shape[1] != 2:
        raise UserError(f"points must be an array [N, 2], N >= 1, not of shape {list(points.shape)}")
    # On a grid, the nearest centre is the nearest along each axis.
    cell = np.clip(np.rint(points / spacing + (side - 1) / 2), 0, side - 1).astype(np.int64)
    mode = side * cell[:, 0] + cell[:, 1]
    high = np.hypot(*(points - grid_centres(side, spacing)[mode]).T) <= 3 * std
    found = _report(np.bincount(mode[high], minlength=side**2))
    return GaussianReport(found.modes, float(high.mean()), found.kl, found.histogram)
