"""StackedMNIST: how many of 1,000 modes? DDGAN, its Gaussian start and the one-shot GAN, of the same networks and time.

    python -m experiments.stacked_mnist --at_once=2             # about three hours; started again, it goes on

Trains and evaluates configs/stacked_mnist.py:mnist_5k in runs/experiments/stacked_mnist, one seed.
"""

import argparse
import pathlib
from typing import Any

import numpy as np

from ddgan_jax import figures
from ddgan_jax.storage.log import read_metrics
from experiments import common

NAME, FLAGS = "stacked_mnist", ["--config=configs/stacked_mnist.py:mnist_5k"]
SEEDS = (0,)
START, FROM_START = "Gaussian denoiser, T = 4", "DDGAN, T = 4, from the Gaussian denoiser"
METHODS = {
    START: [
        "--config.objective=gaussian",
        "--config.train.num_steps=6500",
        "--config.train.lr_g=1e-3",
        "--config.train.lr_min=5e-5",
        "--config.train.d_lead=0",
        "--config.eval.every=0",
    ],
    "one-shot GAN (T = 1)": ["--config.diffusion.num_steps=1", "--config.train.num_steps=8000"],
    FROM_START: [
        f"{common.INIT_FROM}runs/experiments/{NAME}/0_seed0",  # START, the first
        "--config.train.num_steps=3000",
        "--config.loss.mismatched=0.5",
        "--config.loss.moment=50",
    ],
    "DDGAN, T = 4, from scratch": [],
}
SHOWN = 64


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    """Train, evaluate and sample all."""
    runs = common.sweep(NAME, FLAGS, METHODS, args.at_once, SEEDS)
    start = next(run for run in runs if run["method"] == START)
    for run in runs:
        folder = common.workdir(NAME, METHODS, run["method"], run["seed"])
        records = read_metrics(folder / "metrics.jsonl")
        measures = ("modes", "kl", "num_samples")
        run["on_the_way"] = [
            {"step": r["step"]} | {name: r[f"eval/{name}"] for name in measures} for r in records if "eval/modes" in r
        ]
        if run["method"] == FROM_START:
            run["before"] = {name: start[name] for name in ("steps", "train_seconds")}
    common.keep(NAME, "samples", common.samples(NAME, METHODS, SHOWN))
    return {"runs": runs}


def table(results: dict[str, Any]) -> str:
    """Markdown: a row a method; steps and time of one that began with another's networks are with those before."""
    lines = [
        "| method | network calls | steps | modes of 1,000 | KL | Frechet distance | precision | recall | training "
        "| on one core of | sampling 100, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        judged, before = run["judged"], run.get("before")
        cells = [
            run["method"],
            str(judged["sampling"]["network_calls"]),
            (f"{before['steps']:,} + " if before else "") + f"{run['steps']:,}",
            f"{judged['modes']:,}",
            f"{judged['kl']:.3f}",
            f"{judged['classifier_frechet']:.1f}",
            f"{judged['precision']:.2f}",
            f"{judged['recall']:.2f}",
            (f"{before['train_seconds'] / 3600:.2f} + " if before else "") + f"{run['train_seconds'] / 3600:.2f} h",
            run["machine"].partition(" of ")[2].partition(",")[0],
            f"{judged['sampling']['seconds_per_100']:.2g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """Modes and KL on the way, after the steps of the run that one began with, and samples of each method."""
    plt = figures.pyplot()
    figure, panels = plt.subplots(2, 3, figsize=(14, 9.2), layout="constrained")
    curves, pictures = panels[:, 0], panels[:, 1:].flat
    for axis, measure, title in zip(curves, ("modes", "kl"), ("modes of 1,000", "KL, nats"), strict=True):
        for i, run in enumerate(results["runs"]):
            if way := run["on_the_way"]:
                steps = [w["step"] + run.get("before", {"steps": 0})["steps"] for w in way]
                axis.plot(steps, [w[measure] for w in way], ".-", color=f"C{i}", label=run["method"])
                axis.set(xlabel="step", title=f"{title}, of {way[-1]['num_samples']:,.0f} samples")
        axis.legend(fontsize=8)
    with np.load(path.parent / "samples.npz") as arrays:
        for axis, method in zip(pictures, METHODS, strict=True):
            axis.imshow(figures.grid(arrays[method]))
            axis.set_title(method)
            axis.axis("off")
    figures.save_figure(figure, path)


if __name__ == "__main__":
    common.run(__file__, experiment, trains=True)
