"""25 Gaussians: who covers the modes, and how cleanly? Each method has the same networks, steps and data.

    python -m experiments.gaussians --at_once=2                 # three seeds of each

Trains and evaluates configs/gaussians.py in runs/experiments/gaussians; finished runs are not repeated. The
figure gives the width of the modes: the deviation along an axis of the high-quality points from their centres, 0.049 in
exact samples.
"""

import argparse
import pathlib
from typing import Any

import numpy as np

from ddgan_jax.commands import figures
from ddgan_jax.data.synthetic import GRID_STD
from ddgan_jax.metrics.modes import grid_centres
from experiments import common

NAME, FLAGS = "gaussians", ["--config=configs/gaussians.py"]
PLAIN = ["--config.generator.octaves=0", "--config.discriminator.octaves=0"]
AVERAGED = ["--config.train.ema_decay=0.999"]
GAUSSIAN = ["--config.objective=gaussian", *AVERAGED]
# With DDGAN's settings it keeps 1 to 8 of the modes
ONE_SHOT = ["--config.diffusion.num_steps=1", "--config.train.r1_gamma=0.02", "--config.train.lr_min_d=0", *AVERAGED]
METHODS = {
    "DDGAN, T = 4": [],
    "one-shot GAN (T = 1)": ONE_SHOT,
    "DDGAN without z, T = 4": ["--config.generator.nz=0"],
    "DDGAN, T = 4, without Fourier features": PLAIN,
    "one-shot GAN (T = 1), without Fourier features": [*ONE_SHOT, *PLAIN],
    "Gaussian denoiser, T = 4": GAUSSIAN,
    "Gaussian denoiser, T = 1,000": [*GAUSSIAN, "--config.diffusion.num_steps=1000"],
}
SHOWN = 2000  # points of each method's first seed in the figure


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    """Train, evaluate and sample every method."""
    runs = common.sweep(NAME, FLAGS, METHODS, args.at_once)
    points = {method: x.astype(np.float16) for method, x in common.samples(NAME, METHODS, SHOWN).items()}
    common.keep(NAME, "points", points)
    return {"widths": {method: width(x) for method, x in points.items()}, "runs": runs}


def width(points: np.ndarray) -> float:
    """Root mean square distance along an axis of points [N, 2] from their mode, within three standard deviations."""
    distances = np.sqrt(((points[:, None].astype(np.float64) - grid_centres()) ** 2).sum(-1).min(1))
    return float(np.sqrt(np.mean(distances[distances <= 3 * GRID_STD] ** 2) / 2))


def table(results: dict[str, Any]) -> str:
    """Markdown with a row for each method, and all seeds in it."""
    measures = {
        "modes of 25": lambda judged: str(judged["modes"]),
        "high quality, %": lambda judged: f"{100 * judged['high_quality']:.1f}",
        "KL": common.measure("kl", ".2g"),
    }
    return common.method_table(results, METHODS, measures)


def draw_figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draw a scatter plot of each method's first seed, with circles of three standard deviations."""
    plt = figures.pyplot()
    with np.load(path.parent / "points.npz") as arrays:
        points = {name: arrays[name].astype(np.float32) for name in METHODS if name in arrays}
    figure, panels = plt.subplots(2, -(-len(points) // 2), figsize=(14, 7.6), layout="constrained")
    for axis in panels.flat[len(points) :]:
        axis.axis("off")
    for axis, (method, x) in zip(panels.flat, points.items(), strict=False):
        axis.plot(*x.T, ".", markersize=2, alpha=0.5)
        for centre in grid_centres():
            axis.add_patch(plt.Circle(centre, 3 * GRID_STD, fill=False, linewidth=0.6))
        axis.set_title(f"{method}\nwidth {results['widths'][method]:.3f}", fontsize=10)
        axis.set(aspect="equal", xlim=(-5.5, 5.5), ylim=(-5.5, 5.5), xticks=[], yticks=[])
    figures.save_figure(figure, path)


if __name__ == "__main__":
    common.run(__file__, experiment, trains=True)
