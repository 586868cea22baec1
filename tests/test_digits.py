"""Slow: the main job, as the README states it, and how good its digits are."""

import json
import warnings

import numpy as np
import pytest
from commands import succeed


def frechet_distance(a, b):
    """Between the Gaussians fitted to features a and b [N, D]: |difference of means|^2 + tr(A + B - 2 sqrt(A B))."""
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(covariance_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariance_b @ root).clip(0)).sum()
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(covariance_a + covariance_b) - 2 * cross


class Judge:
    """scikit-learn's MLPClassifier, trained on the real digits in [-1, 1]: its 64 hidden ReLU features, its classes."""

    def __init__(self):
        from sklearn.datasets import load_digits
        from sklearn.neural_network import MLPClassifier

        digits = load_digits()
        self.real, self.labels = np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it stops at its 400 iterations
            self.network = MLPClassifier((64,), max_iter=400, random_state=0).fit(self.inputs(self.real), self.labels)

    @staticmethod
    def inputs(images):
        return images.reshape(len(images), -1) / 127.5 - 1

    def features(self, images):
        return (self.inputs(images) @ self.network.coefs_[0] + self.network.intercepts_[0]).clip(0)

    def distance(self, images):
        return frechet_distance(self.features(images), self.features(self.real))

    def shares(self, images):
        """The share of every digit among the images."""
        return np.bincount(self.network.predict(self.inputs(images)), minlength=10) / len(images)


def test_frechet_distance_in_closed_form():
    """Gaussians with diagonal covariances: sum of (mean difference)^2 + (difference of standard deviations)^2."""
    random = np.random.default_rng(0)
    a = random.normal(size=(2000, 3))
    a = (a - a.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(a, rowvar=False))).T  # mean 0, covariance I, exactly
    scale, shift = np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, -2.0])
    np.testing.assert_allclose(frechet_distance(a, a * scale + shift), 0 + 1 + 4 + 0 + 1 + 4, rtol=1e-9)
    np.testing.assert_allclose(frechet_distance(a, a), 0, atol=1e-9)


@pytest.mark.slow
def test_the_main_job_draws_digits(tmp_path):
    """All ten digits, each at least 5 %, and a Frechet distance of at most 2 (two halves of the real data: 0.58)."""
    succeed(f"--workdir={tmp_path}")
    for name in ("config.json", "metrics.jsonl", "results.json", "curves.png", "samples/final.png"):
        assert (tmp_path / name).exists(), name
    succeed("--mode=sample", f"--workdir={tmp_path}", "--num_samples=1797", f"--out={tmp_path / 'samples.npz'}")
    images, judge = np.load(tmp_path / "samples.npz")["images"], Judge()
    assert images.shape == (1797, 8, 8, 1)
    distance, shares = judge.distance(images), judge.shares(images)
    seconds = json.loads((tmp_path / "results.json").read_text())["seconds"]
    print(f"Frechet distance {distance:.2f}, shares {np.round(100 * shares, 1)} %, {seconds} s")
    assert distance <= 2 and shares.min() >= 0.05
    halves = judge.real[::2], judge.real[1::2]
    assert abs(frechet_distance(*map(judge.features, halves)) - 0.58) < 0.2  # the measure is the one that is meant


@pytest.mark.slow
def test_a_digit_that_is_asked_for_is_drawn(tmp_path):
    """digits:conditional: scikit-learn's classifier agrees with the label for at least 95 % of the samples."""
    succeed("--config=configs/digits.py:conditional", f"--workdir={tmp_path}")
    judge, agreement = Judge(), []
    for label in range(10):
        out = tmp_path / f"{label}.npz"
        succeed("--mode=sample", f"--workdir={tmp_path}", f"--label={label}", "--num_samples=200", f"--out={out}")
        agreement.append(np.mean(judge.network.predict(judge.inputs(np.load(out)["images"])) == label))
    print(f"agreement {np.mean(agreement):.3f}, by digit {np.round(agreement, 2)}")
    assert np.mean(agreement) >= 0.95
