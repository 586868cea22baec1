"""Distances between sets of features: closed forms, brute force, and torch-fidelity on the same features."""

import numpy as np
import pytest
import scipy.linalg
from conftest import refuses

from ddgan_jax.metrics.distances import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    load_moments,
    moments,
    save_moments,
)


def features(n: int, width: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    """Correlated features, float32 [n, width]."""
    mix = np.random.default_rng(99).normal(size=(width, width)) / np.sqrt(width)
    x = np.random.default_rng(seed).normal(size=(n, width)) @ mix
    return np.abs(x + shift).astype(np.float32)


def covariance(width: int, seed: int) -> np.ndarray:
    root = np.random.default_rng(seed).normal(size=(width, width + 3))
    return root @ root.T / width


# --- Moments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[], [1], [100], range(1, 101), [3, 4, 50, 99]], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_streamed_moments_equal_one_pass(cuts, offset):
    """With an offset of 1e6 the textbook E[xx] - E[x]E[x] would be off by 1e-4."""
    x = np.random.default_rng(0).normal(size=(101, 5)) * [1, 2, 3, 0.1, 1] + offset
    found = moments(np.split(x, cuts))
    assert found.mu.dtype == found.sigma.dtype == np.float64
    np.testing.assert_allclose(found.mu, x.mean(axis=0), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(found.sigma, np.cov(x, rowvar=False), rtol=1e-8, atol=1e-9)
    np.testing.assert_array_equal(found.sigma, found.sigma.T)


def test_moments_of_float32_features_are_summed_in_float64():
    x = features(3000, 4) + np.float32(3000)
    found = moments(np.split(x, 30))
    np.testing.assert_allclose(found.mu, x.astype(np.float64).mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(found.sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)


def test_moments_from_a_file(tmp_path):
    found = moments([features(20, 6)])
    save_moments(tmp_path / "new" / "stats.npz", found)
    again = load_moments(tmp_path / "new" / "stats.npz", width=6)
    np.testing.assert_array_equal(again.mu, found.mu)
    np.testing.assert_array_equal(again.sigma, found.sigma)
    published = tmp_path / "published.npz"
    np.savez(published, mu=found.mu.astype(np.float32), sigma=found.sigma.astype(np.float32), name="other arrays")
    assert frechet_distance(load_moments(published), found) < 1e-5


BAD_FILES = {
    "no array 'sigma'": {"mu": np.zeros(3)},
    "no array 'mu'": {"sigma": np.eye(3)},
    r"not float64 \[3\] and float64 \[4, 4\]": {"mu": np.zeros(3), "sigma": np.eye(4)},
    r"not float64 \[1, 3\]": {"mu": np.zeros((1, 3)), "sigma": np.eye(3)},
    "width 3, and 2048 is needed": {"mu": np.zeros(3), "sigma": np.eye(3)},
    "NaN": {"mu": np.full(2048, np.nan), "sigma": np.eye(2048)},
    "not symmetric": {"mu": np.zeros(2048), "sigma": np.triu(np.ones((2048, 2048)))},
    "is damaged, or no .npz": {"mu": np.array([None, {}]), "sigma": np.eye(2)},
    "cut.npz": b"PK\x03\x04 and no more",
    "none.npz": None,
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_bad_files_of_moments(tmp_path, message):
    content, file = BAD_FILES[message], tmp_path / (message if message.endswith(".npz") else "stats.npz")
    if isinstance(content, dict):
        np.savez(file, **content)
    elif content is not None:
        file.write_bytes(content)
    with refuses(message):
        load_moments(file, width=2048)


def test_moments_of_another_network(tmp_path):
    """Of the same width; a file that says nothing of its network is believed."""
    found, file = moments([features(20, 6, 0)]), tmp_path / "stats.npz"
    save_moments(file, found, network="a1b2")
    np.testing.assert_array_equal(load_moments(file, 6, network="a1b2").mu, found.mu)
    np.testing.assert_array_equal(load_moments(file, 6).mu, found.mu)
    with refuses("stats.npz is of features of the network a1b2, and those of ffff are needed"):
        load_moments(file, 6, network="ffff")
    save_moments(file, found)
    np.testing.assert_array_equal(load_moments(file, 6, network="ffff").mu, found.mu)


FIVE = np.ones((5, 2))
WIDE, TINY, HUGE = "out of the range of float64: scale them", features(20, 3).astype(np.float64), 1e160


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("at least 2 samples, not 0", lambda: moments([])),
        ("at least 2 samples, not 1", lambda: moments([np.ones((1, 3))])),
        ("sample 1 holds NaN", lambda: moments([FIVE, np.array([[0, 1], [np.nan, 1]])])),
        ("sample 0 holds NaN or infinity", lambda: moments([np.full((3, 2), -np.inf)])),
        ("3 features a sample; the ones before it have 2", lambda: moments([FIVE, np.ones((2, 3))])),
        (r"not of shape \[3\]", lambda: moments([np.ones(3)])),
        ("hold 0 samples", lambda: moments([np.ones((0, 3))])),
        ("real numbers", lambda: moments([np.ones((2, 3), complex)])),
        ("real numbers, not", lambda: moments([np.zeros((2, 1), [("x", "f4")])])),
        ("features must be .*, not lists of different lengths", lambda: moments([[[1.0, 2], [3]]])),
        (WIDE, lambda: moments([HUGE * TINY])),
        (WIDE, lambda: moments([TINY, HUGE * TINY])),
        (WIDE, lambda: kernel_distance(1e60 * TINY, TINY)),
        (WIDE, lambda: frechet_distance(moments([TINY]), Moments(np.full(3, HUGE), np.eye(3)))),
        ("not 2 and 3", lambda: frechet_distance(moments([np.eye(2)]), moments([np.eye(3)]))),
        ("the second features hold 1 samples", lambda: kernel_distance(FIVE, np.ones((1, 2)), 5)),
        ("first features must be finite, but sample 1", lambda: kernel_distance([[1.0, 2], [3, np.inf]], FIVE, 5)),
        ("not 2 and 3", lambda: kernel_distance(FIVE, np.ones((5, 3)), 5)),
        ("not seed=-1", lambda: kernel_distance(FIVE, FIVE, seed=-1)),
        ("not block_size=1", lambda: kernel_distance(FIVE, FIVE, 1)),
        ("logits hold 9 samples; at least 10", lambda: inception_score(np.zeros((9, 3)), 10)),
        ("sample 4 holds NaN", lambda: inception_score(np.where(np.arange(20)[:, None] == 4, np.nan, [0.0, 0]), 10)),
        ("not splits=0", lambda: inception_score(np.zeros((9, 3)), 0)),
        (r"not of shape \[20\]", lambda: inception_score(np.zeros(20), 2)),
    ],
)
def test_bad_input(message, call):
    with refuses(message):
        call()


# --- Frechet ------------------------------------------------------------------------------------------------------


def test_frechet_in_one_dimension():
    """(mu_a - mu_b)^2 + (sigma_a - sigma_b)^2."""
    a, b = Moments(np.array([1.0]), np.array([[4.0]])), Moments(np.array([-2.0]), np.array([[0.25]]))
    assert frechet_distance(a, b) == pytest.approx(9 + 1.5**2, rel=1e-12)


def test_frechet_of_commuting_covariances():
    """Of two Gaussians with the same axes it is the sum of the distances along them, in any rotation."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    s, t, shift = np.arange(1.0, 7), np.array([3, 0, 1, 9, 5, 0.5]), np.arange(6) / 7
    a = Moments(np.zeros(6), rotation @ np.diag(s**2) @ rotation.T)
    b = Moments(rotation @ shift, rotation @ np.diag(t**2) @ rotation.T)
    assert frechet_distance(a, b) == pytest.approx(np.sum(shift**2) + np.sum((s - t) ** 2), rel=1e-7)


@pytest.mark.parametrize("width", [2, 7, 64])
def test_frechet_of_covariances_that_do_not_commute(width):
    s, t = covariance(width, 1), covariance(width, 2)
    assert np.abs(s @ t - t @ s).max() > 0.1
    a, b = Moments(np.zeros(width), s), Moments(np.linspace(-1, 1, width), t)
    expected = np.sum(b.mu**2) + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [2, 10, 500])
def test_frechet_of_fewer_samples_than_features(n):
    """With centred features A [n, D] of each set, tr (S_a S_b)^{1/2} is the sum of the singular values of A B^T."""
    x, y = features(n, 96, 1).astype(np.float64), features(40, 96, 2, shift=0.1).astype(np.float64)
    a, b = (z - z.mean(axis=0) for z in (x, y))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum() / np.sqrt((n - 1) * 39)
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.sum(a**2) / (n - 1) + np.sum(b**2) / 39 - 2 * cross
    assert frechet_distance(moments([x]), moments([y])) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(moments([y]), moments([x])) == pytest.approx(expected, rel=1e-6)
    assert 0 <= frechet_distance(moments([x]), moments([x])) < 1e-10


def test_frechet_of_constant_features():
    a, b = moments([np.ones((5, 3))]), moments([np.zeros((5, 3))])
    assert frechet_distance(a, b) == 3 and frechet_distance(a, a) == 0


@pytest.mark.parametrize("scale", [2.0**500, 2.0**300, 2.0**-300, 2.0**-500])
def test_frechet_of_features_of_any_size(scale):
    """Exactly the scale squared times as large; the square is within float64, and its square is not."""
    x, y = features(50, 8, 1).astype(np.float64), features(60, 8, 2, 0.3).astype(np.float64)
    once = frechet_distance(moments([x]), moments([y]))
    assert once > 0.1 and frechet_distance(moments([scale * x]), moments([scale * y])) == once * scale**2


# --- Kernel -------------------------------------------------------------------------------------------------------


def brute_force_mmd(x, y) -> float:
    """The unbiased estimate, pair by pair."""
    k = lambda a, b: (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3  # noqa: E731
    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_by_brute_force():
    x, y = features(24, 5, 1), features(24, 5, 2, shift=0.3)
    whole = kernel_distance(x, y)
    assert whole.mean == pytest.approx(brute_force_mmd(x, y), rel=1e-10)
    assert (whole.std, whole.blocks, whole.block_size) == (0, 1, 24)
    rng = np.random.default_rng(7)
    order_x, order_y = rng.permutation(24), rng.permutation(24)
    values = [brute_force_mmd(x[order_x[i : i + 7]], y[order_y[i : i + 7]]) for i in (0, 7, 14)]
    cut = kernel_distance(x, y, block_size=7, seed=7)
    assert cut.mean == pytest.approx(np.mean(values), rel=1e-10) and cut.std == pytest.approx(np.std(values), rel=1e-9)
    assert (cut.blocks, cut.block_size) == (3, 7)
    assert kernel_distance(x, y, block_size=7, seed=7) == cut != kernel_distance(x, y, block_size=7, seed=8)


def test_kernel_distance_of_large_blocks(monkeypatch):
    """Rows are multiplied some at a time; how many changes nothing but rounding."""
    x, y = features(50, 5, 1), features(60, 5, 2, shift=0.3)
    whole = kernel_distance(x, y)
    assert whole.block_size == 50
    monkeypatch.setattr("ddgan_jax.metrics.distances.ROWS", 7)
    assert kernel_distance(x, y).mean == pytest.approx(whole.mean, rel=1e-10)


def test_kernel_distance_is_unbiased():
    """Of equal distributions the mean is 0 within its error; the biased estimate would be 15 errors off."""
    x, y = (np.random.default_rng(seed).normal(size=(4000, 8)) for seed in (1, 2))
    same = kernel_distance(x, y, block_size=20)
    assert same.blocks == 200 and abs(same.mean) < 3 * same.std / np.sqrt(200)
    other = kernel_distance(x, y + 0.5, block_size=20)
    assert other.mean > 10 * other.std / np.sqrt(200)


# --- Inception score ----------------------------------------------------------------------------------------------


def test_score_of_predictions_that_say_nothing():
    """All predictions equal: 1, whether they are uniform or certain, and whatever constant is added to the logits."""
    for logits in (np.zeros((100, 7)), np.full((100, 7), 1e5), np.tile([0.0, 1e5, -3], (100, 1))):
        assert inception_score(logits) == pytest.approx((1, 0), abs=1e-12)


def test_score_of_perfect_predictions():
    """Certain, and all C classes equally often in every split: C. Probabilities of 0 are no NaN."""
    logits = np.where(np.eye(8)[np.arange(160) % 8], 0, -1e4)
    assert inception_score(logits, splits=10) == pytest.approx((8, 0), abs=1e-12)
    # Sorted by class, each of 8 splits has but one.
    assert inception_score(logits[np.argsort(np.arange(160) % 8)], splits=8) == pytest.approx((1, 0), abs=1e-12)


def test_score_in_closed_form():
    """A certain and an undecided prediction of two classes: the marginal is (3/4, 1/4)."""
    logits = np.log([[1 - 1e-300, 1e-300], [0.5, 0.5]])
    expected = np.exp((np.log(4 / 3) + 0.5 * np.log(2 / 3) + 0.5 * np.log(2)) / 2)
    assert inception_score(logits, splits=1).mean == pytest.approx(expected, rel=1e-12)


# --- torch-fidelity -----------------------------------------------------------------------------------------------


def test_frechet_equals_torch_fidelity():
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = features(300, 64, 1), features(250, 64, 2, shift=0.2)
    statistics = [fid_features_to_statistics(torch.from_numpy(z)) for z in (x, y)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert expected > 0.1
    found = frechet_distance(moments(np.array_split(x, 7)), moments(np.array_split(y, 3)))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kernel_distance_equals_torch_fidelity(dtype):
    """It computes in the precision of the features, which float32 shows."""
    import torch
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = features(400, 64, 1), features(400, 64, 2, shift=0.2)
    tensors = [torch.from_numpy(z.astype(dtype)) for z in (x, y)]
    found = kid_features_to_metric(*tensors, kid_subsets=1, kid_subset_size=400, verbose=False)
    expected = found["kernel_inception_distance_mean"]
    assert expected > 0.005
    assert kernel_distance(x, y).mean == pytest.approx(expected, rel=1e-3 if dtype == np.float32 else 1e-9)


def test_score_equals_torch_fidelity():
    """303 samples fill 10 splits unevenly."""
    import torch
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 2 * np.random.default_rng(0).normal(size=(303, 50)).astype(np.float32)
    expected = isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=False)
    found = inception_score(logits)
    assert found.mean == pytest.approx(expected["inception_score_mean"], rel=1e-10) and found.mean > 2
    assert found.std == pytest.approx(expected["inception_score_std"], rel=1e-8)
