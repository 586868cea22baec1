"""25 Gaussians: who covers the modes, and how cleanly? Each method has the same networks, steps and data.

    python -m experiments.gaussians --at_once=2                 # three seeds of each

Trains and evaluates configs/gaussians.py in runs/experiments/gaussians; what is finished there is not done again.
"""

import pathlib
from typing import Any

import numpy as np

import ddgan_jax
from ddgan_jax import figures
from ddgan_jax.metrics.modes import grid_centres
from experiments import common

CONFIG = "--config=configs/gaussians.py"
SEEDS = (0, 1, 2)
PLAIN = ["--config.generator.octaves=0", "--config.discriminator.octaves=0"]
METHODS = {
    "DDGAN, T = 4": [],
    "one-shot GAN (T = 1)": ["--config.diffusion.num_steps=1"],
    "DDGAN without z, T = 4": ["--config.generator.nz=0"],
    "DDGAN, T = 4, random-path sliced Wasserstein": ["--config.loss.generator=rpsw", "--config.loss.projections=100"],
    "DDGAN, T = 4, networks without waves": PLAIN,
    "one-shot GAN (T = 1), networks without waves": ["--config.diffusion.num_steps=1", *PLAIN],
    "Gaussian denoiser, T = 4": ["--config.objective=gaussian"],
    "Gaussian denoiser, T = 1,000": ["--config.objective=gaussian", "--config.diffusion.num_steps=1000"],
}
SHOWN = 2000  # points of each method's first seed in the figure


def experiment(at_once: int) -> dict[str, Any]:
    """Train, evaluate and sample all."""
    folder = common.ROOT / "runs" / "experiments" / "gaussians"
    jobs = {(i, seed): folder / f"{i}_seed{seed}" for i in range(len(METHODS)) for seed in SEEDS}
    flags = list(METHODS.values())
    found = common.run_all({path: [CONFIG, f"--config.seed={s}", *flags[i]] for (i, s), path in jobs.items()}, at_once)
    names = list(METHODS)
    runs = [{"method": names[i], "seed": seed} | run for (i, seed), run in zip(jobs, found, strict=True)]
    points = {names[i]: ddgan_jax.load(str(path)).sample(SHOWN) for (i, s), path in jobs.items() if s == SEEDS[0]}
    target = common.RESULTS / "gaussians"
    target.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(target / "points.npz", **{name: x.astype(np.float16) for name, x in points.items()})
    return {"command": f"python -m experiments.gaussians --at_once={at_once}", "runs": runs}


def table(results: dict[str, Any]) -> str:
    """Markdown: a row a method, all seeds in it."""
    lines = [
        "| method | network calls | modes of 25 | high quality | KL | training | sampling 100 |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        runs = [run for run in results["runs"] if run["method"] == method]
        judged = [run["judged"] for run in runs]
        modes = ", ".join(str(j["modes"]) for j in judged)
        quality = ", ".join(f"{100 * j['high_quality']:.1f}" for j in judged)
        kl = ", ".join(f"{j['kl']:.2g}" for j in judged)
        seconds = [run["train_seconds"] for run in runs]
        sampling = max(j["sampling"]["seconds_per_100"] for j in judged)
        calls = judged[0]["sampling"]["network_calls"]
        lines.append(
            f"| {method} | {calls:,} | {modes} | {quality} % | {kl} | {min(seconds):.0f} to {max(seconds):.0f} s "
            f"| {1000 * sampling:.2g} ms |"
        )
    return "\n".join(lines)


def draw_figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """A scatter plot of each method's first seed, with the circles of three standard deviations."""
    plt = figures.pyplot()
    with np.load(path.parent / "points.npz") as arrays:
        points = {name: arrays[name].astype(np.float32) for name in METHODS if name in arrays}
    figure, panels = plt.subplots(1, len(points), figsize=(3.2 * len(points), 3.5), constrained_layout=True)
    for axis, (method, x) in zip(np.atleast_1d(panels), points.items(), strict=True):
        axis.plot(*x.T, ".", markersize=2, alpha=0.5)
        for centre in grid_centres():
            axis.add_patch(plt.Circle(centre, 0.15, fill=False, linewidth=0.6))
        axis.set(title=method, aspect="equal", xlim=(-5.5, 5.5), ylim=(-5.5, 5.5), xticks=[], yticks=[])
    figures.save_figure(figure, path)


if __name__ == "__main__":
    common.run(__file__, experiment)
