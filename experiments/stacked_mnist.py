"""StackedMNIST: how many of 1,000 modes after 21,000 steps, about an hour on a CPU core.

    python -m experiments.stacked_mnist --at_once=2             # three seeds of ours, one of the one-shot GAN: 2 hours

Trains and evaluates configs/stacked_mnist.py:mnist_5k in runs/experiments/stacked_mnist; finished runs are not
repeated. Each run is evaluated at its end, and at the step with the smallest distance.
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np

from ddgan_jax.commands import figures
from ddgan_jax.storage import checkpoint
from experiments import common

NAME, FLAGS = "stacked_mnist", ["--config=configs/stacked_mnist.py:mnist_5k"]
METHODS = {"DDGAN, T = 3, our recipe": [], "one-shot GAN, T = 1": ["--config.diffusion.num_steps=1"]}
OURS, ONE_SHOT = METHODS
CASES = [(OURS, 0), (ONE_SHOT, 0), (OURS, 1), (OURS, 2)]  # and seeds
SHOWN = 64
MEASURES = {
    "modes of 1,000": common.measure("modes", ","),
    "KL": common.measure("kl", ".3f"),
    "classifier distance": common.measure("classifier_frechet", ".0f"),
    "precision": common.measure("precision", ".2f"),
    "recall": common.measure("recall", ".2f"),
}
ON_THE_WAY = {"modes": "modes of 1,000", "kl": "KL, nats", "classifier_frechet": "classifier distance"}


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    """Train, evaluate and sample every method."""
    runs = common.sweep(NAME, FLAGS, METHODS, args.at_once, CASES)
    for run in runs:
        workdir, flags = common.job(NAME, FLAGS, METHODS, run["method"], run["seed"])
        out = workdir / "evaluation_of_best"
        if not (out / "results.json").exists():
            common.main(*flags, "--mode=evaluate", f"--checkpoint={workdir}/best", f"--out={out}")
        best = json.loads((out / "results.json").read_text())
        run["best"] = {name: best[name] for name in (*ON_THE_WAY, "precision", "recall")}
        run["best"]["step"] = checkpoint.best(workdir)["step"]
    common.keep(NAME, "samples", common.samples(NAME, METHODS, SHOWN))
    return {"runs": runs}


def table(results: dict[str, Any]) -> str:
    """Markdown with a row for each method, seed and evaluated step."""
    lines = [f"| method | seed | evaluated at | {' | '.join(MEASURES)} |", "|---|---|---|" + "---|" * len(MEASURES)]
    for method in METHODS:
        for run in common.of_method(results, method):
            moments = {f"{run['steps']:,} steps": run["judged"]}
            if run["best"]["step"] != run["steps"]:
                moments[f"{run['best']['step']:,} steps, the best"] = run["best"]
            for moment, judged in moments.items():
                cells = [method, str(run["seed"]), moment, *(measure(judged) for measure in MEASURES.values())]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draw modes, KL and distance during training, a line for each seed, and samples of each method's first seed."""
    plt = figures.pyplot()
    figure, panels = plt.subplots(1, 3 + len(METHODS), figsize=(4.5 * (3 + len(METHODS)), 4.5), layout="constrained")
    for axis, (measure, title) in zip(panels[:3], ON_THE_WAY.items(), strict=True):
        for i, method in enumerate(METHODS):
            for run in common.of_method(results, method):
                way = run["on_the_way"]
                label = method if run["seed"] == 0 else None
                axis.plot([w["step"] for w in way], [w[measure] for w in way], ".-", color=f"C{i}", label=label)
        axis.set(xlabel="step", title=f"{title}, of {way[-1]['num_samples']:,.0f} samples")
        if measure != "modes":
            axis.set_yscale("log")
    panels[0].legend(fontsize=8)
    with np.load(path.parent / "samples.npz") as arrays:
        for axis, method in zip(panels[3:], METHODS, strict=True):
            axis.imshow(figures.grid(arrays[method]))
            axis.set_title(method, fontsize=10)
            axis.axis("off")
    figures.save_figure(figure, path)


if __name__ == "__main__":
    common.run(__file__, experiment, trains=True)
