"""Does a training in bfloat16 end where one in float32 does? Digits and StackedMNIST, three seeds of each.

    python -m experiments.bfloat16 --at_once=2                  # 2 to 4 hours: CPUs convert every bfloat16 by software

Trains and evaluates configs/digits.py and configs/stacked_mnist.py:mnist_5k in runs/experiments/bfloat16; finished runs
are not repeated. The runs of StackedMNIST in float32 are those of `experiments.stacked_mnist`.
"""

import argparse
import pathlib
from typing import Any

from ddgan_jax.commands import figures
from experiments import common, stacked_mnist

NAME, TYPES = "bfloat16", ("float32", "bfloat16")
DIGITS, STACKED = "digits", "StackedMNIST"
FLAGS = {
    DIGITS: ["--config=configs/digits.py", "--config.log.samples_every=0"],
    STACKED: [*stacked_mnist.FLAGS, "--config.log.samples_every=0", "--config.eval.every=0"],
}
METHODS = {
    f"{data}, {dtype}": [*flags, f"--config.model.dtype={dtype}"] for data, flags in FLAGS.items() for dtype in TYPES
}
TRAINED = [f"{STACKED}, bfloat16", f"{DIGITS}, bfloat16", f"{DIGITS}, float32"]
MEASURES = {"classifier_frechet": "classifier distance", "precision": "precision", "recall": "recall", "kl": "KL, nats"}


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate every preset in both types."""
    cases = [(method, seed) for method in TRAINED for seed in common.SEEDS]  # the longest first
    runs = common.sweep(NAME, [], METHODS, args.at_once, cases)
    in_float32 = common.of_method(common.read_results(stacked_mnist.NAME), stacked_mnist.OURS)
    return {"runs": runs + [run | {"method": f"{STACKED}, float32"} for run in in_float32]}


def table(results: dict[str, Any]) -> str:
    """Markdown with a row for each preset and type, and every seed in each cell."""
    lines = [f"| training | steps | {' | '.join(MEASURES.values())} |", "|---|---|" + "---|" * len(MEASURES)]
    for method in METHODS:
        runs = common.of_method(results, method)
        cells = [", ".join(shown(name, run["judged"][name]) for run in runs) for name in MEASURES]
        lines.append(f"| {method} | {runs[0]['steps']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(measure: str, value: float) -> str:
    """A value with as many digits as its spread over seeds leaves meaning."""
    digits = {"classifier_frechet": 0 if value >= 100 else 1, "kl": 3}
    return f"{value:.{digits.get(measure, 2)}f}"


def draw_figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draw a panel for each preset and measure with a row for each type and a dot for each seed."""
    plt = figures.pyplot()
    figure, panels = plt.subplots(len(FLAGS), len(MEASURES), figsize=(13, 3.6), layout="constrained")
    for row, data in zip(panels, FLAGS, strict=True):
        for axis, (name, title) in zip(row, MEASURES.items(), strict=True):
            for i, dtype in enumerate(TYPES):
                values = [run["judged"][name] for run in common.of_method(results, f"{data}, {dtype}")]
                axis.plot(values, [i] * len(values), "o", color=f"C{i}", alpha=0.7)
            labels = TYPES if axis is row[0] else []
            axis.set(title=f"{data}: {title}", yticks=range(len(TYPES)), yticklabels=labels, ylim=(1.5, -0.5))
            axis.grid(alpha=0.3)
    figures.save_figure(figure, path)


if __name__ == "__main__":
    common.run(__file__, experiment, trains=True)
