"""StackedMNIST: how many of 1,000 modes? DDGAN and the one-shot GAN, of the same networks and time.

    python -m experiments.stacked_mnist --at_once=2             # an hour; started again, it goes on

Trains and evaluates configs/stacked_mnist.py:mnist_5k in runs/experiments/stacked_mnist, one seed.
"""

import argparse
import pathlib
from typing import Any

import numpy as np

from ddgan_jax import figures
from experiments import common

NAME, FLAGS = "stacked_mnist", ["--config=configs/stacked_mnist.py:mnist_5k"]
METHODS = {"DDGAN, T = 4": [], "one-shot GAN (T = 1)": ["--config.diffusion.num_steps=1"]}
SEEDS = (0,)
SHOWN = 64


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    """Train, evaluate and sample both."""
    runs = common.sweep(NAME, FLAGS, METHODS, args.at_once, SEEDS)
    for run in runs:
        folder = common.workdir(NAME, METHODS, run["method"], run["seed"])
        records = figures.read_metrics(folder / "metrics.jsonl")
        measures = ("modes", "kl", "num_samples")
        run["on_the_way"] = [
            {"step": r["step"]} | {name: r[f"eval/{name}"] for name in measures} for r in records if "eval/modes" in r
        ]
    common.keep(NAME, "samples", common.samples(NAME, METHODS, SHOWN))
    return {"runs": runs}


def table(results: dict[str, Any]) -> str:
    """Markdown: a row a method."""
    lines = [
        "| method | network calls | steps | modes of 1,000 | KL | Frechet distance | training | sampling 100, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        judged = run["judged"]
        cells = [
            run["method"],
            str(judged["sampling"]["network_calls"]),
            f"{run['steps']:,}",
            str(judged["modes"]),
            f"{judged['kl']:.3f}",
            f"{judged['classifier_frechet']:.1f}",
            f"{run['train_seconds'] / 3600:.2f} h",
            f"{judged['sampling']['seconds_per_100']:.2g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """Modes and KL on the way, and samples of each method."""
    plt = figures.pyplot()
    figure, panels = plt.subplots(1, 2 + len(METHODS), figsize=(4.2 * (2 + len(METHODS)), 4.2), layout="constrained")
    for axis, measure in zip(panels, ("modes", "kl"), strict=False):
        for run in results["runs"]:
            way = run["on_the_way"]
            axis.plot([w["step"] for w in way], [w[measure] for w in way], ".-", label=run["method"])
        title = {"modes": "modes of 1,000", "kl": "KL, nats"}[measure]
        axis.set(xlabel="step", title=f"{title}, of {way[-1]['num_samples']:,.0f} samples")
        axis.legend()
    with np.load(path.parent / "samples.npz") as arrays:
        for axis, method in zip(panels[2:], METHODS, strict=True):
            axis.imshow(figures.grid(arrays[method]))
            axis.set_title(method)
            axis.axis("off")
    figures.save_figure(figure, path)


if __name__ == "__main__":
    common.run(__file__, experiment, trains=True)
