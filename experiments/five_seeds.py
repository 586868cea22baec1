"""Five seeds of the first command, `configs/mnist.py`, and of the digits of 8 px, `configs/digits.py`.

    python -m experiments.five_seeds --at_once=2                # about an hour; --only and --seeds train some

Trains and evaluates in runs/experiments/five_seeds; finished runs are not repeated, and with --only or --seeds, the
others keep committed results. The evaluation's classifier of MNIST also counts the samples of whose class it is sure,
and the held-out digits.
"""

import argparse
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

import ddgan_jax
from ddgan_jax.commands import figures
from ddgan_jax.config import presets
from ddgan_jax.config.settings import read
from ddgan_jax.data.sources import open_data
from ddgan_jax.metrics.feature_networks import classifier_network
from ddgan_jax.metrics.features import extract
from experiments import common

NAME, SEEDS, SHOWN = "five_seeds", (0, 1, 2, 3, 4), 64
METHODS = {f"configs/{name}.py": [f"--config=configs/{name}.py"] for name in ("mnist", "digits")}
FIRST = next(iter(METHODS))
SURE = 0.9  # probability of the class
MEASURES = {
    "classifier distance": common.measure("classifier_frechet", ".1f"),
    "precision": common.measure("precision", ".2f"),
    "recall": common.measure("recall", ".2f"),
    "rarest digit, %": lambda judged: f"{100 * judged['smallest_share']:.1f}",
    "most frequent, %": lambda judged: f"{100 * judged['largest_share']:.1f}",
    "read surely, %": lambda judged: f"{100 * judged['sure']:.1f}" if "sure" in judged else "",
}


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate every seed, and sample the first."""
    chosen, seeds = args.only or list(METHODS), args.seeds or SEEDS
    runs = common.sweep(NAME, [], METHODS, args.at_once, [(method, seed) for method in chosen for seed in seeds])
    for run in common.of_method({"runs": runs}, FIRST):
        model = ddgan_jax.load(str(common.workdir(NAME, METHODS, FIRST, run["seed"])))
        run["judged"]["sure"] = sure_share(model.sample(run["judged"]["num_samples"]))
    if SEEDS[0] in seeds:
        common.keep_samples(NAME, METHODS, SHOWN, chosen)
    held_out = open_data(dataclasses.replace(read(presets.get("mnist")).data, split="test")).images
    return {"runs": common.with_committed(NAME, runs), "sure_of_held_out": sure_share(held_out)}


def sure_share(images: np.ndarray) -> float:
    """The fraction of uint8 images [N, H, W, 1] whose class the classifier reads with a probability above `SURE`."""
    config = read(presets.get("mnist"))
    network, _ = classifier_network(config, open_data(config.data))
    logits = extract([network], [images], 200, len(images))[0].logits
    return float(np.mean(jax.nn.softmax(logits).max(axis=-1) > SURE))


def table(results: dict[str, Any]) -> str:
    """Markdown with a row for each configuration and every seed in each cell, and one for real digits."""
    rows = common.method_table(results, common.trained(results, METHODS), MEASURES)
    real = f"| 1,000 held-out digits of MNIST | | | | | | | {100 * results['sure_of_held_out']:.1f} | | |"
    return f"{rows.replace('| method |', '| configuration |', 1)}\n{real}"


def draw_figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draw the measures of every seed, and samples of the first."""
    plt = figures.pyplot()
    figure = plt.figure(figsize=(12, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3, 4))
    names = {"classifier_frechet": "classifier distance", "precision": "precision", "recall": "recall"}
    methods = common.trained(results, METHODS)
    for axis, (measure, title) in zip(above.subplots(1, len(names)), names.items(), strict=True):
        for method in methods:
            runs = common.of_method(results, method)
            axis.plot([run["seed"] for run in runs], [run["judged"][measure] for run in runs], "o-", label=method)
        axis.set(title=title, xlabel="seed", ylim=(0, None) if measure == "classifier_frechet" else (0, 1))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    common.draw_samples(below, path.parent, methods, 8)
    figures.save_figure(figure, path)


if __name__ == "__main__":
    common.run(__file__, experiment, trains=True, methods=METHODS, seeds=SEEDS)
