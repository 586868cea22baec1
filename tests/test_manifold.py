"""Precision, recall, density, coverage and nearest neighbours: brute force in float64, ties, and torch-fidelity."""

import jax
import numpy as np
import pytest
from conftest import refuses

from ddgan_jax.errors import UserError
from ddgan_jax.metrics import manifold
from ddgan_jax.metrics import nearest as nearest_rows
from ddgan_jax.metrics.manifold import neighbours, precision_recall


def distances(x, y) -> np.ndarray:
    return np.sqrt(np.sum((x.astype(np.float64)[:, None] - y.astype(np.float64)[None]) ** 2, axis=-1))


def squared(x, y):
    return nearest_rows.squared_distances(x, y, nearest_rows.squared_norms(x), nearest_rows.squared_norms(y))


def nearest(queries, base, **options):
    """Indices of the nearest of base, and distances."""
    indices, squared = neighbours(queries, base, **options)
    return indices[:, 0], np.sqrt(squared[:, 0])


def nearest_other(x, **options):
    return np.sqrt(neighbours(x, **options)[1][:, 0])


def brute_force(real, fake, k):
    """(balls about each fake, which reals are recalled, which are covered), from all distances at once."""
    real_radii = np.sort(distances(real, real), axis=1)[:, k]  # column 0 is the distance of a point to itself
    fake_radii = np.sort(distances(fake, fake), axis=1)[:, k]
    cross = distances(fake, real)
    return (
        (cross <= real_radii).sum(axis=1),
        (cross <= fake_radii[:, None]).any(axis=0),
        (cross <= real_radii).any(axis=0),
    )


def check_against_brute_force(real, fake, k, block):
    found = precision_recall(real, fake, k, block)
    balls, recalled, covered = brute_force(real, fake, k)
    np.testing.assert_array_equal(found.balls, balls)
    np.testing.assert_array_equal(found.recalled, recalled)
    np.testing.assert_array_equal(found.covered, covered)
    assert found[:4] == (
        pytest.approx((balls > 0).mean()),
        pytest.approx(recalled.mean()),
        pytest.approx(balls.mean() / k),
        pytest.approx(covered.mean()),
    )
    return found


def draw(n, width, seed, scale=1.0):
    """Points of a curved sheet of 4 dimensions, so that neighbours differ from other points."""
    mix = np.random.default_rng(99).normal(size=(4, width))
    rng = np.random.default_rng(seed)
    return (np.tanh(rng.normal(size=(n, 4)) * scale @ mix) + 0.1 * rng.normal(size=(n, width))).astype(np.float32)


@pytest.mark.parametrize("block", [1000, 16])
@pytest.mark.parametrize(("n", "m", "width", "k"), [(90, 70, 32, 3), (40, 130, 1, 5), (64, 64, 300, 1)])
def test_brute_force(n, m, width, k, block):
    found = check_against_brute_force(draw(n, width, 1), draw(m, width, 2, 0.7), k, block)
    assert found.precision > 0 and found.recall > 0
    assert width == 1 or (found.recall < 1 and found.coverage < 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.uint8, np.int32])
def test_types_of_features(dtype):
    real, fake = (np.clip(20 * x + 100, 0, 255).astype(dtype) for x in (draw(50, 20, 1), draw(60, 20, 2)))
    check_against_brute_force(real, fake, 3, 32)


@pytest.mark.parametrize("k", [1, 3])
def test_ties(k):
    """On a grid of whole numbers most points lie exactly on a radius, and many points are copies."""
    rng = np.random.default_rng(0)
    real, fake = rng.integers(0, 4, size=(80, 3)), rng.integers(0, 4, size=(100, 3))
    found = check_against_brute_force(real.astype(np.float32), fake.astype(np.float32), k, 32)
    assert found.precision > 0.9
    # An offset that float64 still holds and float32 does not.
    check_against_brute_force(real + 2.0**40, fake + 2.0**40, k, 32)


def test_distances_below_the_rounding_of_float32():
    """Tight clusters far apart: within one, ||a||^2 + ||b||^2 - 2 a.b in float32 is all rounding."""
    rng = np.random.default_rng(0)
    centres = 1000 * rng.normal(size=(12, 8))
    real, fake = ((centres[:, None] + 0.01 * rng.normal(size=(12, 5, 8))).reshape(60, 8) for _ in range(2))
    found = np.asarray(squared(real.astype(np.float32), fake.astype(np.float32))[0])
    error = np.abs(found - distances(real, fake) ** 2)
    assert error.max() > 100 * distances(real, fake).min() ** 2
    found = check_against_brute_force(real, fake, 2, 16)
    assert 0 < found.precision < 1 and 0 < found.recall < 1


@pytest.mark.parametrize("width", [3, 512])
def test_rounding_of_float32_is_below_its_bound(width):
    x, y = draw(100, width, 1), draw(100, width, 2) + 1
    found, error = map(np.asarray, squared(x, y))
    assert np.all(np.abs(found - distances(x, y) ** 2) < error)


@pytest.mark.parametrize("scale", [1.0, 1e-35, 1e13])
@pytest.mark.parametrize("width", [1, 3, 500])
def test_equal_sets(width, scale):
    """Exactly 1; and each ball holds its centre and k more, so density is (k + 1) / k, in any order of the points."""
    real = (draw(100, width, 1) + 5) * np.float32(scale)
    for fake in (real, real[::-1], np.random.default_rng(0).permutation(real)):
        found = precision_recall(real, fake, k=4, block=32)
        assert found[:4] == (1, 1, 5 / 4, 1)
        assert found.recalled.all() and found.covered.all() and (found.balls > 0).all()


@pytest.mark.parametrize("scale", [1e-40, 1e-120, 1e12])
def test_sizes_of_features(scale):
    """1e-40 is below the normal numbers of float32, 1e-120 is below all of them."""
    real, fake = (draw(n, 20, n).astype(np.float64) * scale for n in (50, 60))
    check_against_brute_force(real, fake, 3, 32)
    if scale == 1e-40:
        check_against_brute_force(real.astype(np.float32), fake.astype(np.float32), 3, 32)


@pytest.mark.parametrize("block", [1024, 64, 16])
@pytest.mark.parametrize("far", [1e6, 1e12])
@pytest.mark.parametrize("outliers", [1, 20])
def test_a_few_outliers(outliers, far, block):
    """They are far from each other too: float32 names the neighbours neither of them nor, about a mean, of others."""
    real, fake = draw(200, 32, 1), draw(150, 32, 2, 0.8)
    real[3 : 3 + outliers] *= np.float32(far)
    fake[-1] *= np.float32(far)
    assert check_against_brute_force(real, fake, 3, block).density < 5
    check_against_brute_force(fake, real, 3, block)


@pytest.mark.parametrize("block", [1024, 32])
def test_more_neighbours_within_rounding_than_are_spare(block):
    """Clusters of 50 with distances inside that are all rounding in float32, and 20 copies at one distance."""
    rng = np.random.default_rng(0)
    centres = 1000 * rng.normal(size=(4, 8))
    real, fake = ((centres[:, None] + 0.01 * rng.normal(size=(4, 50, 8))).reshape(200, 8) for _ in range(2))
    found = check_against_brute_force(real, fake, 3, block)
    assert 0 < found.precision < 1 and 0 < found.recall < 1
    all_ = distances(real, real) + np.diag(np.full(200, np.inf))
    np.testing.assert_allclose(nearest_other(real, block=block), all_.min(axis=1), rtol=1e-12)
    np.testing.assert_array_equal(nearest(fake, real, block=block)[0], distances(fake, real).argmin(axis=1))
    real[40:60] = real[40]
    check_against_brute_force(real, fake, 3, block)
    np.testing.assert_array_equal(nearest(fake, real, block=block)[0], distances(fake, real).argmin(axis=1))


def test_outliers():
    """Beside them the squares of all other differences are 0 in float32."""
    real = np.array([[1.0], [-1], [0], [1e-22], [2e-22], [3e-22]])
    fake = np.array([[1.0], [-1], [5e-22], [4e-21], [7e-21]])
    found = check_against_brute_force(real, fake, 1, 16)
    assert found.balls.tolist() == [1, 1, 2, 2, 2]  # the ball of an outlier reaches all of the middle


def test_equal_sets_with_copies():
    """Copies put radii at 0, where nothing but an exact distance of 0 is inside."""
    real = np.repeat(draw(30, 100, 1), [1, 2, 10] * 10, axis=0)
    for fake in (real, real[::-1]):
        found = check_against_brute_force(real, fake, 3, 32)
        assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    all_one = np.full((20, 7), 0.1, np.float32)
    assert precision_recall(all_one, all_one)[:4] == (1, 1, 20 / 3, 1)


def test_far_sets():
    found = precision_recall(draw(40, 10, 1), draw(50, 10, 2) + 100)
    assert found[:4] == (0, 0, 0, 0)
    assert not (found.balls.any() or found.recalled.any() or found.covered.any())
    assert len(found.balls) == 50 and len(found.recalled) == len(found.covered) == 40


def test_on_a_line():
    """Reals at 0, 1, 3, 7 have radii 1, 1, 2, 4 for k = 1; fakes at 2.5, 9, 13 have 6.5, 4, 4."""
    found = precision_recall([[0.0], [1], [3], [7]], [[2.5], [9], [13]], k=1)
    # 2.5 is within 2 of 3 only (7 - 2.5 is 4.5); 9 within 4 of 7; 13 within none.
    assert found.balls.tolist() == [1, 1, 0]
    assert (found.precision, found.density) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert found.covered.tolist() == [False, False, True, True] and found.coverage == 0.5
    assert found.recalled.all() and found.recall == 1


def test_collapsed_fakes():
    """One image again and again: its balls are points, so nothing is recalled, and it covers few reals."""
    real = draw(60, 20, 1)
    found = check_against_brute_force(real, np.repeat(real[:1] + 1e-3, 30, axis=0), 3, 16)
    assert (found.precision, found.recall) == (1, 0) and 0 < found.coverage < 0.5


def test_size_of_blocks_does_not_matter():
    real, fake = draw(70, 16, 1), draw(45, 16, 2, 0.7)
    whole = precision_recall(real, fake)
    for block in (1, 7, 64):
        for found, expected in zip(precision_recall(real, fake, block=block), whole, strict=True):
            np.testing.assert_array_equal(found, expected)
        for found, expected in zip(nearest(fake, real, block=block), nearest(fake, real), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_products_are_not_rounded_on_accelerators():
    """Their default has 8 to 11 bits; a CPU does not show it."""
    x = np.ones((2, 3), np.float32)
    assert "HIGHEST" in str(jax.make_jaxpr(squared)(x, x))


def test_one_program_a_function():
    """The last block of a set has fewer rows, and needs no program of its own."""
    before = manifold._count_inside._cache_size(), nearest_rows._search_both._cache_size()
    precision_recall(draw(47, 11, 1), draw(53, 11, 2), block=10)
    assert manifold._count_inside._cache_size() == before[0] + 1
    assert nearest_rows._search_both._cache_size() == before[1] + 2  # of each set in itself


def test_a_set_need_not_fit_on_the_device(monkeypatch):
    """Blocks come in parts. Undecided comparisons are listed on the device, or, where there are many, on the host."""
    real, fake = draw(70, 16, 1), draw(45, 16, 2, 0.7)
    whole = precision_recall(real, fake, block=8), nearest(fake, real, block=8)
    for module, name, value in ((nearest_rows, "PART", 3 * 8 * 16), (manifold, "LISTED", 1)):
        monkeypatch.setattr(module, name, value)
        jax.clear_caches()
        for found, expected in zip(
            (precision_recall(real, fake, block=8), nearest(fake, real, block=8)), whole, strict=True
        ):
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_array_equal(a, b)
    rng = np.random.default_rng(0)
    real, fake = (rng.integers(0, 4, size=(n, 3)).astype(np.float32) for n in (80, 100))
    check_against_brute_force(real, fake, 3, 16)
    jax.clear_caches()  # which hold the programs of another LISTED


def test_progress_sees_every_block():
    seen = []

    def progress(starts):
        for start in starts:
            seen.append(start)
            yield start

    real, fake = draw(30, 4, 1), draw(20, 4, 2)
    assert precision_recall(real, fake, block=10, progress=progress)[:4] == precision_recall(real, fake)[:4]
    assert seen == [0, 10, 20, 0, 10, 0, 10]  # radii of the reals, radii of the fakes, comparison
    seen.clear()
    nearest(real, fake, block=10, progress=progress)
    assert seen == [0, 10, 20]


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_nearest(offset):
    """Distances are exact to float64, though float32 cannot resolve 1000 +- 1e-4 in a product."""
    base = draw(90, 24, 1).astype(np.float64) + offset
    queries = np.concatenate([draw(50, 24, 2) + offset, base[:9] + 1e-4, base[:3]])
    indices, found = nearest(queries, base, block=32)
    expected = distances(queries, base)
    np.testing.assert_array_equal(indices, expected.argmin(axis=1))
    np.testing.assert_allclose(found, expected.min(axis=1), rtol=1e-12)
    np.testing.assert_allclose(found[50:59], 1e-4 * np.sqrt(24), rtol=1e-8)
    assert not found[59:].any() and indices[59:].tolist() == [0, 1, 2]


def test_nearest_other():
    """Without itself; a copy is at distance 0."""
    x = draw(70, 5, 3).astype(np.float64)
    x[7] = x[50]
    all_ = distances(x, x)
    np.fill_diagonal(all_, np.inf)
    np.testing.assert_allclose(nearest_other(x, block=32), all_.min(axis=1), rtol=1e-12, atol=0)
    assert nearest_other(x)[7] == 0
    with pytest.raises(UserError, match="at least 2"):
        nearest_other(x[:1])


def test_nearest_of_equals_is_the_first():
    base = np.array([[5, 5], [1, 0], [0, 1], [1, 0]], np.uint8)
    indices, found = nearest(np.zeros((2, 2), np.uint8), base, block=3)
    assert indices.tolist() == [1, 1] and found.tolist() == [1, 1]
    assert nearest(np.zeros((1, 2)), base[:1])[0].tolist() == [0]


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("the real features hold 3 samples; at least 4", lambda: precision_recall(np.ones((3, 2)), np.ones((9, 2)))),
        ("the fake features hold 5 samples; at least 6", lambda: precision_recall(np.ones((9, 2)), np.ones((5, 2)), 5)),
        ("not k=0", lambda: precision_recall(np.ones((9, 2)), np.ones((9, 2)), k=0)),
        ("not block=0", lambda: precision_recall(np.ones((9, 2)), np.ones((9, 2)), block=0)),
        ("not 2 and 3", lambda: precision_recall(np.ones((9, 2)), np.ones((9, 3)))),
        ("fake features must be finite, but sample 0", lambda: precision_recall(np.eye(9), np.full((9, 9), np.nan))),
        (r"the real features must be an array \[N, D\]", lambda: precision_recall(np.ones(9), np.ones((9, 2)))),
        ("the base hold 0 samples", lambda: nearest(np.ones((1, 2)), np.ones((0, 2)))),
        ("the queries must be finite, but sample 1", lambda: nearest([[0.0], [np.inf]], np.ones((4, 1)))),
        ("differ by up to 1e\\+16, and .* scale them", lambda: precision_recall(1e16 * np.eye(9), np.eye(9))),
        ("differ by up to 1e-200, and", lambda: nearest(1e-200 * np.eye(9), np.zeros((9, 9)))),
        ("not 1 and 2", lambda: nearest(np.ones((4, 1)), np.ones((4, 2)))),
        ("not block=-1", lambda: nearest(np.ones((4, 1)), np.ones((4, 1)), block=-1)),
    ],
)
def test_bad_input(message, call):
    with refuses(message):
        call()


@pytest.mark.parametrize("in_parts", [False, True])
def test_equals_torch_fidelity(in_parts):
    import torch
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, fake = draw(600, 64, 1), draw(500, 64, 2, 0.6)
    expected = prc_features_to_metric(
        torch.from_numpy(fake),
        torch.from_numpy(real),
        prc_neighborhood=3,
        prc_batch_size=256,
        save_cpu_ram=in_parts,
        verbose=False,
    )
    found = precision_recall(real, fake, k=3, block=256)
    assert found.precision == pytest.approx(expected["precision"], rel=1e-3) and 0.1 < found.precision < 1
    assert found.recall == pytest.approx(expected["recall"], rel=1e-3) and 0.1 < found.recall < 0.9
