"""Slow: the main job, as the README states it, and how good the digits of it and of configs/digits.py are."""

import json
import warnings

import numpy as np
import pytest
from commands import succeed

from ddgan_jax.metrics.distances import frechet_distance, moments


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

    def distance(self, *sets):
        """The Frechet distance of two sets of images."""
        weights, bias = self.network.coefs_[0], self.network.intercepts_[0]
        return frechet_distance(*(moments([(self.inputs(images) @ weights + bias).clip(0)]) for images in sets))

    def shares(self, images):
        """The share of every digit among the images."""
        return np.bincount(self.network.predict(self.inputs(images)), minlength=10) / len(images)


@pytest.mark.slow
def test_the_main_job_draws_the_digits_of_each_class(tmp_path):
    """`main.py` alone: a classifier reads the class of 95 % of the samples, which are precise and varied."""
    succeed(f"--workdir={tmp_path}")
    for name in ("config.json", "metrics.jsonl", "results.json", "curves.png", "samples/final.png"):
        assert (tmp_path / name).exists(), name
    succeed("--mode=evaluate", f"--workdir={tmp_path}", f"--out={tmp_path / 'evaluation'}")
    found = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    print({name: found[name] for name in ("classifier_frechet", "label_agreement", "precision", "recall", "seconds")})
    assert found["label_agreement"] >= 0.95 and found["precision"] >= 0.75 and found["recall"] >= 0.6


@pytest.mark.slow
def test_the_digits_of_scikit_learn_are_drawn(tmp_path):
    """All ten digits, each at least 5 %, and a Frechet distance of at most 2 (two halves of the real data: 0.58)."""
    succeed("--config=configs/digits.py", f"--workdir={tmp_path}")
    succeed("--mode=sample", f"--workdir={tmp_path}", "--num_samples=1797", f"--out={tmp_path / 'samples.npz'}")
    images, judge = np.load(tmp_path / "samples.npz")["images"], Judge()
    assert images.shape == (1797, 8, 8, 1)
    distance, shares = judge.distance(images, judge.real), judge.shares(images)
    seconds = json.loads((tmp_path / "results.json").read_text())["seconds"]
    print(f"Frechet distance {distance:.2f}, shares {np.round(100 * shares, 1)} %, {seconds} s")
    assert distance <= 2 and shares.min() >= 0.05
    halves = judge.real[::2], judge.real[1::2]
    assert abs(judge.distance(*halves) - 0.58) < 0.2  # the measure is the one that is meant


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
