"""Ablations on StackedMNIST: which steps and parts are needed where there are 1,000 modes?

    python -m experiments.stacked_ablations --at_once=2         # 3 to 4 hours; --only="T = 2" trains one method

Trains and evaluates configs/stacked_mnist.py:small, for about a tenth of its steps and with the changes of METHODS, in
runs/experiments/stacked_ablations: seed 0, or those of --seeds. Finished runs are not repeated, and other methods and
seeds keep committed results. The training after squared error alone starts from that method's finished run of seed 0.
"""

import argparse
import pathlib
from typing import Any

from ddgan_jax.commands import figures
from experiments import common
from experiments.stacked_mnist import MEASURES

NAME, STEPS, SHOWN = "stacked_ablations", 6_000, 32
FIELDS = {"train.num_steps": STEPS, "eval.every": 0, "log.samples_every": 0}
FLAGS = ["--config=configs/stacked_mnist.py:small", *common.flags_of(FIELDS)]
PLAIN = {"loss.discriminator_input": "x_t", "loss.reconstruction": 0, "loss.reconstruction_end": None}
PAPER = {
    "diffusion.num_steps": 4,
    "diffusion.beta_max": 20.0,
    **PLAIN,
    "discriminator.product": False,
    "train.lr_min_d": 1e-4,
}
OURS, PAPERS = "T = 3 (our recipe)", "T = 4, the paper's losses and noise"
ALONE, WARM = "squared error alone, T = 3", "T = 3, after squared error alone"  # the second starts from the first
# About a third of the work of 6,000 adversarial steps, and the rest of it, if squared error alone takes half the work.
ALONE_STEPS, AFTER_STEPS = 3_800, 4_000
METHODS = {
    name: common.flags_of(fields)
    for name, fields in {
        OURS: {},
        "T = 1 (one-shot GAN)": {"diffusion.num_steps": 1},
        "T = 2": {"diffusion.num_steps": 2},
        "T = 4": {"diffusion.num_steps": 4},
        "T = 3 without z": {"generator.nz": 0},
        ALONE: PLAIN | {"objective": "gaussian", "train.num_steps": ALONE_STEPS},
        WARM: {"train.num_steps": AFTER_STEPS},
        PAPERS: PAPER,
        "the same, G predicts x_t": PAPER | {"diffusion.predicts": "x_t"},
        "the same, G predicts the noise": PAPER | {"diffusion.predicts": "noise"},
        "one-shot GAN on diffused images": PAPER | {"objective": "one_shot"},
        "Gaussian denoiser, T = 4": PAPER | {"objective": "gaussian"},
        "Gaussian denoiser, T = 100": PAPER | {"objective": "gaussian", "diffusion.num_steps": 100},
    }.items()
}
METHODS[WARM] += common.flags_of(
    {"train.init_from": common.workdir(NAME, METHODS, ALONE, 0).relative_to(common.ROOT)},
)


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    """Train, evaluate and sample every method, or those of --only beside the committed results of the others."""
    chosen, seeds = args.only or list(METHODS), args.seeds or common.SEEDS[:1]
    cases = [(method, seed) for seed in seeds for method in chosen]
    runs = common.sweep(NAME, FLAGS, METHODS, args.at_once, cases, last=WARM)
    if common.SEEDS[0] in seeds:
        common.keep_samples(NAME, METHODS, SHOWN, chosen)
    return {"runs": common.with_committed(NAME, runs)}


def table(results: dict[str, Any]) -> str:
    """Markdown with a row for each method."""
    return common.method_table(results, common.trained(results, METHODS), MEASURES)


def draw_figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draw the measures of each method, and samples."""
    plt = figures.pyplot()
    figure = plt.figure(figsize=(14, 10), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(4, 6))
    names = {
        "kl": "KL, nats",
        "classifier_frechet": "classifier distance",
        "precision": "precision",
        "recall": "recall",
    }
    methods = common.trained(results, METHODS)[::-1]  # the first on top
    for axis, (measure, title) in zip(above.subplots(1, len(names), sharey=True), names.items(), strict=True):
        for method in methods:
            values = [run["judged"][measure] for run in common.of_method(results, method)]
            color = "C0" if method == OURS else "C1" if method == PAPERS else "0.5"
            axis.plot(values, [method] * len(values), "o", color=color)
        axis.set(title=title, xlim=(0, None))
        axis.grid(alpha=0.3)
    common.draw_samples(below, path.parent, methods[::-1], SHOWN // 2)
    figures.save_figure(figure, path)


if __name__ == "__main__":
    common.run(__file__, experiment, trains=True, methods=METHODS, seeds=common.SEEDS)
