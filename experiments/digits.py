"""Ablations on the digits, trained until the curves are flat: which steps and parts are needed? Same data and steps.

    python -m experiments.digits --at_once=2                    # two seeds of each

Trains and evaluates configs/digits.py:long, with the changes of METHODS, in runs/experiments/digits; finished runs are
not repeated.
"""

import argparse
import pathlib
from typing import Any

import numpy as np

from ddgan_jax.commands import figures
from ddgan_jax.config import presets
from ddgan_jax.config.settings import as_dict, flat
from experiments import common
from experiments.recipe import MEASURES, PARTS

NAME, STEPS, SEEDS = "digits", 15_000, (0, 1)
FIELDS = {
    "train.num_steps": STEPS,
    "checkpoint.every": STEPS // 6,
    "log.samples_every": 0,
    "eval.every": STEPS // 6,
    "eval.online_samples": 1797,
}
FLAGS = ["--config=configs/digits.py:long", *common.flags_of(FIELDS)]
BATCH = presets.get("digits:long").train.batch_size
_PAPER = flat(as_dict(presets.get("digits:paper")))
PAPER = {field: _PAPER[field] for field in PARTS.values()}  # the paper's losses and noise, T = 4
PAPER["train.lr_min_d"] = _PAPER["train.lr_min"]  # None there, which means the same
METHODS = {
    name: common.flags_of(fields)
    for name, fields in {
        "T = 1 (one-shot GAN)": {"diffusion.num_steps": 1},
        "T = 2": {"diffusion.num_steps": 2},
        "T = 3 (our recipe)": {},
        "T = 4": {"diffusion.num_steps": 4},
        "T = 8": {"diffusion.num_steps": 8},
        "T = 3 without z": {"generator.nz": 0},
        "T = 4, the paper's losses and noise": PAPER,
        "one-shot GAN on diffused images": PAPER | {"objective": "one_shot"},
        "Gaussian denoiser, T = 4": PAPER | {"objective": "gaussian"},
        "Gaussian denoiser, T = 100": PAPER | {"objective": "gaussian", "diffusion.num_steps": 100},
    }.items()
}
SHOWN = 32  # samples of each method's first seed in the figure


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    """Train, evaluate and sample every method."""
    cases = [(method, seed) for seed in SEEDS for method in METHODS]
    runs = common.sweep(NAME, FLAGS, METHODS, args.at_once, cases)
    common.keep(NAME, "samples", common.samples(NAME, METHODS, SHOWN))
    return {"runs": runs}


def table(results: dict[str, Any]) -> str:
    """Markdown with a row for each method, and all seeds in it."""
    measures = {
        "classifier distance": common.measure("classifier_frechet", ".1f"),
        "precision": common.measure("precision", ".2f"),
        "recall": common.measure("recall", ".2f"),
    }
    return common.method_table(results, METHODS, measures)


def minutes(run: dict[str, Any]) -> list[float]:
    """Minutes of training until each evaluation, without the time of evaluations."""
    return [way["step"] * BATCH / run["images_per_second"] / 60 for way in run["on_the_way"]]


def draw_figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draw each measure during training (mean of the seeds), every seed's final value, and samples of the first."""
    plt = figures.pyplot()
    figure = plt.figure(figsize=(14, 9), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(5, 3))
    panels = above.subplots(1, len(MEASURES))
    for axis, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        for i, method in enumerate(METHODS):
            runs = common.of_method(results, method)
            times = np.mean([minutes(run) for run in runs], axis=0)
            values = np.mean([[way[measure] for way in run["on_the_way"]] for run in runs], axis=0)
            style = {"color": f"C{i}", "linestyle": "--" if "Gaussian" in method or "one-shot" in method else "-"}
            axis.plot(times, values, label=method, alpha=0.8, **style)
            for run in runs:
                axis.plot(minutes(run)[-1], run["judged"][measure], "o", color=f"C{i}", alpha=0.8)
        axis.set(xlabel="training, minutes of one core", title=title)
        axis.grid(alpha=0.3)
    panels[0].set_yscale("log")
    above.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    common.draw_samples(below, path.parent, METHODS)
    figures.save_figure(figure, path)


if __name__ == "__main__":
    common.run(__file__, experiment, trains=True)
