"""Counts of modes, in closed form."""

import numpy as np
import pytest
from conftest import refuses

from ddgan_jax.metrics.modes import gaussian_report, grid_centres, mode_report


def test_all_modes_equally():
    report = mode_report(np.tile(np.arange(1000), 25), 1000)
    assert report.modes == 1000 and report.kl == pytest.approx(0, abs=1e-12)
    np.testing.assert_array_equal(report.histogram, np.full(1000, 25))


def test_one_mode():
    report = mode_report(np.full(64, 3), 1000)
    assert report.modes == 1 and report.kl == pytest.approx(np.log(1000), rel=1e-12)
    assert report.histogram[3] == 64 == report.histogram.sum() and len(report.histogram) == 1000


def test_kl_of_uneven_modes():
    """Shares 1/2, 1/4, 1/4, 0 of four: sum h log 4h = log(2) / 2."""
    report = mode_report(np.array([0, 0, 1, 2], np.uint8), 4)
    assert report.modes == 3 and report.kl == pytest.approx(np.log(2) / 2, rel=1e-12)
    np.testing.assert_array_equal(report.histogram, [2, 1, 1, 0])


def test_kl_of_as_many_samples_as_are_drawn_of_stacked_mnist():
    """Even samples of the true distribution have about (K - 1) / 2N: 0.0195 of 25,600."""
    labels = np.random.default_rng(0).integers(0, 1000, 25_600)
    assert mode_report(labels, 1000).kl == pytest.approx(999 / 51_200, rel=0.1)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("0 to 9, not -1 to 4", lambda: mode_report([-1, 4], 10)),
        ("0 to 9, not 0 to 10", lambda: mode_report([0, 10], 10)),
        ("N >= 1", lambda: mode_report(np.zeros(0, int), 10)),
        ("whole numbers", lambda: mode_report([0.5], 10)),
        (r"not int64 \[1, 1\]", lambda: mode_report([[1]], 10)),
        (r"\[N, D\], one row a sample, not of shape \[3\]", lambda: gaussian_report(np.zeros(3))),
        (r"\[N, 2\], N >= 1, not of shape \[2, 3\]", lambda: gaussian_report(np.zeros((2, 3)))),
        ("points hold 0 samples", lambda: gaussian_report(np.zeros((0, 2)))),
        ("points must be real numbers", lambda: gaussian_report([["1", "2"]])),
        ("sample 1 holds NaN", lambda: gaussian_report([[0, 0], [0, np.nan]])),
    ],
)
def test_bad_input(message, call):
    with refuses(message):
        call()


def test_grid_centres():
    centres = grid_centres()
    assert centres.shape == (25, 2) and centres.min() == -4 and centres.max() == 4
    assert centres[0].tolist() == [-4, -4] and centres[1].tolist() == [-4, -2] and centres[5].tolist() == [-2, -4]
    assert grid_centres(2, 1.0).tolist() == [[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]]


def test_gaussians_at_their_centres():
    report = gaussian_report(np.repeat(grid_centres(), 4, axis=0))
    assert (report.modes, report.high_quality) == (25, 1) and report.kl == pytest.approx(0, abs=1e-12)
    np.testing.assert_array_equal(report.histogram, np.full(25, 4))


def test_high_quality_is_a_distance():
    """0.15 along one axis is within three standard deviations of 0.05; 0.12 along both is not."""
    report = gaussian_report([[0.149, 0], [0, -0.149], [0.151, 0], [0.12, 0.12], [4, 2.1], [1, 1]])
    assert report.high_quality == pytest.approx(3 / 6) and report.modes == 2
    assert report.histogram[12] == 2 and report.histogram[23] == 1 and report.histogram.sum() == 3
    # Shares of 2/3 and 1/3: only points of high quality are counted.
    expected = 2 / 3 * np.log(25 * 2 / 3) + 1 / 3 * np.log(25 / 3)
    assert report.kl == pytest.approx(expected, rel=1e-12)


def test_points_off_the_grid():
    """Beyond the grid the nearest centre is one at its edge, near or far; with no good point (1) is undefined."""
    assert gaussian_report([[4.1, -4.1], [4.1, -4.1]]).histogram[20] == 2
    far = gaussian_report([[1e300, -1e300], [6, 6]])
    assert (far.modes, far.high_quality) == (0, 0) and np.isnan(far.kl) and far.histogram.sum() == 0


def test_exact_samples():
    """Of a Gaussian in the plane 1 - exp(-9/2) lies within three standard deviations."""
    rng = np.random.default_rng(0)
    points = grid_centres()[rng.integers(0, 25, 40_000)] + 0.05 * rng.normal(size=(40_000, 2))
    report = gaussian_report(points.astype(np.float32))
    assert report.modes == 25 and report.high_quality == pytest.approx(1 - np.exp(-4.5), abs=0.002)
    assert report.kl < 0.001


def test_nearest_centre_is_that_of_all():
    points = np.random.default_rng(1).uniform(-6, 6, size=(2000, 2))
    distances = np.linalg.norm(points[:, None] - grid_centres(4, 1.5)[None], axis=-1)
    report = gaussian_report(points, side=4, spacing=1.5, std=0.2)
    high = distances.min(axis=1) <= 0.6
    np.testing.assert_array_equal(report.histogram, np.bincount(distances.argmin(axis=1)[high], minlength=16))
    assert report.high_quality == high.mean() and 0 < high.mean() < 1
