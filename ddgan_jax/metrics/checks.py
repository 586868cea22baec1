"""Checks of an evaluation before its work begins."""

import numpy as np

from ddgan_jax.config.settings import Config
from ddgan_jax.data import sources, synthetic
from ddgan_jax.errors import UserError

SCORE_SPLITS = 10  # of the Inception Score


def check_settings(c: Config) -> None:
    """Raise UserError for settings of `config.eval` that exclude each other."""
    if c.eval.reference_statistics and c.eval.features != "inception":
        raise UserError(
            f"eval.reference_statistics={c.eval.reference_statistics} is for eval.features=inception, not "
            f"{c.eval.features}: leave it out (--config.eval.reference_statistics=)"
        )


def check_sizes(c: Config, num_real: int, num_samples: int = 0, manifolds: bool = True) -> None:
    """Raise UserError unless there are enough samples and real images for the measures of `c.eval.features`.

    `num_samples` 0 stands for an evaluation during training. `manifolds`: whether precision and recall are measured.
    """
    e = c.eval
    count, reference = num_samples or e.online_samples, min(e.reference_samples or num_real, num_real)
    samples = f"a set of {num_samples} samples" if num_samples else f"eval.online_samples={e.online_samples}"
    real = f"a set of {reference} real images"
    needs = []  # (the size, of what, the smallest allowed, the measure that needs it)
    if e.features == "inception":
        needs += [(count, samples, SCORE_SPLITS, f"the Inception Score of {SCORE_SPLITS} splits")]
        needs += [(reference, real, 2, "KID")] if num_real else []
    elif e.features == "classifier":
        everything = f"a set of {num_real} real images"  # of which `reference` are compared with the samples
        needs += [(num_real, everything, 5, "a classifier that is tested on a fifth of them")]
    if manifolds:
        why, least = f"the precision and recall of eval.k={e.k}", e.k + 1
        needs += [(count, samples, least, why), (reference, real, least, why)]
        needs += [(e.manifold_samples, f"eval.manifold_samples={e.manifold_samples}", least, why)]
    for found, what, least, why in sorted(needs, key=lambda need: -need[2]):
        if found < least:
            raise UserError(f"{what} is too small to evaluate: {why} needs at least {least}")


def check_gaussians(c: Config, data: sources.Data | None) -> None:
    """Raise UserError unless samples are compared with the 25 Gaussians, the only points that can be evaluated."""
    ours, given = synthetic.gaussians(), f"data.name={c.data.name}"
    if c.data.name == "gaussians":
        if data is None or (data.images.shape == ours.shape and np.array_equal(data.images, ours)):
            return
        given = f"other data {list(data.images.shape)}"
    raise UserError(
        f"eval.features=points compares samples with the 25 Gaussians of data.name=gaussians, not with {given}: "
        "set eval.every=0 to train without evaluations"
    )
