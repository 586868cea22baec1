"""Ablations on the digits: how many steps, and which parts, does the method need? Same networks, steps and data.

    python -m experiments.digits --at_once=2                    # three seeds of each

Trains and evaluates configs/digits.py:paper in runs/experiments/digits; what is finished there is not done again.
"""

import argparse
import pathlib
from typing import Any

from ddgan_jax import figures
from experiments import common

NAME, FLAGS = "digits", ["--config=configs/digits.py:paper", "--config.log.samples_every=0"]
METHODS = {
    "T = 1 (one-shot GAN)": ["--config.diffusion.num_steps=1"],
    "T = 2": ["--config.diffusion.num_steps=2"],
    "T = 4 (DDGAN)": [],
    "T = 8": ["--config.diffusion.num_steps=8"],
    "T = 4 without z": ["--config.generator.nz=0"],
    "one-shot GAN on diffused images": ["--config.objective=one_shot"],
    "Gaussian denoiser, T = 4": ["--config.objective=gaussian"],
    "Gaussian denoiser, T = 100": ["--config.objective=gaussian", "--config.diffusion.num_steps=100"],
}
MEASURES = {
    "classifier_frechet": "Frechet distance",
    "precision": "precision",
    "recall": "recall",
}
COLUMNS = {
    "Frechet distance": lambda judged: f"{judged['classifier_frechet']:.1f}",
    "precision": lambda judged: f"{judged['precision']:.2f}",
    "recall": lambda judged: f"{judged['recall']:.2f}",
}
SHOWN = 32  # samples of each method's first seed in the figure


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    """Train, evaluate and sample all."""
    runs = common.sweep(NAME, FLAGS, METHODS, args.at_once)
    common.keep(NAME, "samples", common.samples(NAME, METHODS, SHOWN))
    return {"runs": runs}


def table(results: dict[str, Any]) -> str:
    """Markdown: a row a method, all seeds in it."""
    return common.method_table(results, METHODS, COLUMNS)


def draw_figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """The measures against the number of network calls, every seed a dot; below, samples of the first seed."""
    plt = figures.pyplot()
    figure = plt.figure(figsize=(13, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(4, 3))
    panels = above.subplots(1, len(MEASURES))
    for axis, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        for i, method in enumerate(METHODS):
            runs = [run["judged"] for run in common.of_method(results, method)]
            calls = [run["sampling"]["network_calls"] * 1.04 ** (i - 4) for run in runs]  # side by side
            axis.plot(calls, [run[measure] for run in runs], "os^Dv<>Pp"[i], color=f"C{i}", label=method, alpha=0.8)
        axis.set(xscale="log", xlabel="network calls for a sample", title=title)
    panels[0].set_yscale("log")
    above.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    common.draw_samples(below, path.parent, METHODS)
    figures.save_figure(figure, path)


if __name__ == "__main__":
    common.run(__file__, experiment, trains=True)
