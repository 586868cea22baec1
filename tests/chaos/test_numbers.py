"""The measures at the size of a published evaluation, 50,000 x 2,048, against torch-fidelity on the same features.

Ours come in chunks; the same numbers as at 2,000 x 2,048.
"""

import numpy as np
import pytest

from ddgan_jax.metrics import manifold
from ddgan_jax.metrics.distances import frechet_distance, inception_score, kernel_distance, moments

WIDTH, CLASSES = 2048, 1008


def features(n: int, seed: int, shift: float) -> np.ndarray:
    """Positive and correlated, as those of Inception: float32 [n, WIDTH]."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(64, WIDTH)).astype(np.float32) / 8
    chunks = []
    for start in range(0, n, 5000):
        m = min(5000, n - start)
        hidden = rng.normal(size=(m, 64), scale=1.0, loc=shift).astype(np.float32)
        chunks.append(np.maximum(hidden @ mix + 0.3 * rng.normal(size=(m, WIDTH)).astype(np.float32), 0))
    return np.concatenate(chunks)


@pytest.fixture(params=[2000, 50_000])
def sets(request, full):
    if request.param > 2000 and not full:
        pytest.skip("50,000 features take minutes and 4 GB: --full")
    return features(request.param, 1, 0.0), features(request.param, 2, 0.1)


def test_against_torch_fidelity(sets, count):
    torch = pytest.importorskip("torch")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = sets
    n = len(x)
    tensors = [torch.from_numpy(z) for z in sets]
    off = {}

    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, tensors), verbose=False)
    expected = theirs["frechet_inception_distance"]
    chunked = [moments(np.array_split(z, 37)) for z in sets]
    off["fid"] = abs(frechet_distance(*chunked) / expected - 1)

    size = 1000  # one subset of both: torch-fidelity draws others than we do
    theirs = kid_features_to_metric(
        tensors[0][:size].double(), tensors[1][:size].double(), kid_subsets=1, kid_subset_size=size, verbose=False
    )
    off["kid"] = abs(kernel_distance(x[:size], y[:size]).mean / theirs["kernel_inception_distance_mean"] - 1)

    logits = 2 * np.random.default_rng(0).normal(size=(n, CLASSES)).astype(np.float32)
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=False)
    off["inception score"] = abs(inception_score(logits).mean / theirs["inception_score_mean"] - 1)

    few = min(n, 10_000)  # of each for the manifolds: torch-fidelity takes hours for more
    theirs = prc_features_to_metric(
        tensors[1][:few], tensors[0][:few], prc_neighborhood=3, prc_batch_size=2000, save_cpu_ram=True, verbose=False
    )
    found = manifold.precision_recall(x[:few], y[:few], 3)
    off["precision"] = abs(found.precision - theirs["precision"])
    off["recall"] = abs(found.recall - theirs["recall"])
    print(n, off)
    assert off["fid"] < 1e-6 and off["kid"] < 1e-6 and off["inception score"] < 1e-6, off
    assert off["precision"] < 2e-3 and off["recall"] < 2e-3, off
    count(samples=n, **{name.replace(" ", "_"): value for name, value in off.items()})
