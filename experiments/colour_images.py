"""Real colour images: training to evaluation on a folder of CIFAR-10's images, with a small network on a CPU core.

    python -m experiments.colour_images --path=cifar10      # about an hour; the same command resumes

`--path` is a folder or zip with one folder for each class: the 50,000 training images of CIFAR-10 saved as files. The
result shows that training, sampling and evaluation work on natural images. It is not the paper's, whose network is 40
times as large, and its classifier distance is in the features of a classifier of these classes: not an FID.
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from ddgan_jax.commands import figures
from ddgan_jax.config import presets
from ddgan_jax.config.settings import read
from ddgan_jax.data import sources
from ddgan_jax.storage.log import read_metrics
from experiments import common

NAME = "colour_images"
SHOWN = (0.1, 0.3, 1.0)  # fractions of the training after which samples are shown
REAL = 5_000  # real images that are compared with all real images, for reference


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    """Train, evaluate samples, and evaluate real images."""
    path = str(pathlib.Path(args.path).resolve())
    flags = ["--config=configs/image_folder.py:small", f"--config.data.path={path}"]
    workdir = common.ROOT / "runs" / "experiments" / NAME
    found = common.train_and_evaluate(workdir, *flags)
    config = presets.get("image_folder:small")
    config.data.path = path
    images = sources.open_data(read(config).data).images
    chosen = np.sort(np.random.default_rng(0).choice(len(images), REAL, replace=False))
    np.savez(workdir / "real.npz", np.stack([images[i] for i in chosen]))
    common.main(*flags, "--mode=evaluate", f"--samples={workdir}/real.npz", f"--out={workdir}/real")
    real = json.loads((workdir / "real/results.json").read_text())

    records = read_metrics(workdir / "metrics.jsonl")
    keep = ("step", "d_loss", "g_loss", "images_per_second", "eval/classifier_frechet", "eval/recall")
    way = [{name: record[name] for name in keep if name in record} for record in records]
    evaluated = [record["step"] for record in way if "eval/classifier_frechet" in record]
    steps = [min(evaluated, key=lambda step, share=share: abs(step - share * found["steps"])) for share in SHOWN]
    names = [f"step_{step:07d}.png" if step < found["steps"] else "final.png" for step in steps]
    grids = {f"{s:,}": np.asarray(Image.open(workdir / "samples" / n)) for s, n in zip(steps, names, strict=True)}
    common.keep(NAME, "samples", grids)
    shared = {"run": found | {"flags": flags[:1]}, "on_the_way": way, "samples": config.eval.num_samples}
    return shared | {"real": {k: real[k] for k in ("classifier_frechet", "precision", "recall")}}


def table(results: dict[str, Any]) -> str:
    """Markdown with a row for the samples and one for real images."""
    run, real = results["run"], results["real"]
    judged = run["judged"]
    lines = [
        "| images | steps | training | classifier distance | precision | recall | sampling 100, s |",
        "|---|---|---|---|---|---|---|",
    ]
    hours, time = f"{run['train_seconds'] / 3600:.2f} h", f"{judged['sampling']['seconds_per_100']:.2g}"
    numbers = lambda of: f"{of['classifier_frechet']:.2f} | {of['precision']:.2f} | {of['recall']:.2f}"  # noqa: E731
    made = f"{results['samples']:,} samples, T = {judged['sampling']['network_calls']}"
    lines.append(f"| {made} | {run['steps']:,} | {hours} | {numbers(judged)} | {time} |")
    lines.append(f"| {REAL:,} of the real images | | | {numbers(real)} | |")
    return "\n".join(lines)


def draw_figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draw losses and distance during training, and samples after three steps."""
    plt = figures.pyplot()
    way = results["on_the_way"]
    figure, panels = plt.subplots(1, 2 + len(SHOWN), figsize=(4.2 * (2 + len(SHOWN)), 4.2), layout="constrained")
    for name in ("d_loss", "g_loss"):
        panels[0].plot([r["step"] for r in way], [r[name] for r in way], label=name[0].upper())
    panels[0].set(title="losses", xlabel="step")
    panels[0].legend()
    judged = [r for r in way if "eval/classifier_frechet" in r]
    panels[1].plot([r["step"] for r in judged], [r["eval/classifier_frechet"] for r in judged], ".-")
    panels[1].axhline(results["real"]["classifier_frechet"], linestyle="--", color="k", label="real images")
    panels[1].set(title="classifier distance, of fewer samples", xlabel="step", yscale="log")
    panels[1].legend()
    panels[1].locator_params(axis="x", nbins=5)
    with np.load(path.parent / "samples.npz") as arrays:
        for axis, step in zip(panels[2:], arrays.files, strict=True):
            axis.imshow(arrays[step])
            axis.set_title(f"step {step}")
            axis.axis("off")
    figures.save_figure(figure, path)


if __name__ == "__main__":
    common.run(__file__, experiment, path="the images: a folder or zip with one folder a class")
