"""The bundled models: trained, written at half precision, and evaluated in that form.

    python -m experiments.pretrained --path=cifar10             # about five hours of one core

`--path` is a folder or zip with one folder for each class: the 50,000 training images of CIFAR-10 saved as files.
For `stacked_mnist`, MNIST is downloaded with tfds.
Writes ddgan_jax/model/pretrained/NAME.safetensors, whose metadata record how each was made and what it measures. A
model whose file exists stays unchanged. Delete the file to make it again, from its training in
runs/experiments/pretrained if there is one.
"""

import argparse
import dataclasses
import json
import pathlib
import shlex
from typing import Any

import numpy as np

import ddgan_jax
from ddgan_jax.commands import figures
from ddgan_jax.model.loading import PRETRAINED
from experiments import common

NAME = "pretrained"
# {name: (what it is, the flags of its training)}
MODELS = {
    "mnist": ("handwritten digits by class, 32x32", ["--config=mnist"]),
    "digits": ("handwritten digits, 8x8", ["--config=digits:long"]),
    "digits_conditional": ("handwritten digits by class, 8x8", ["--config=digits:conditional"]),
    "gaussians": ("the mixture of 25 Gaussians, points", ["--config=gaussians"]),
    "stacked_mnist": ("three digits in the colour channels, 32x32", ["--config=stacked_mnist:small"]),
    "cifar10_small": ("CIFAR-10's images by a small network, 32x32", ["--config=image_folder:small"]),
}
MEASURES = ("classifier_frechet", "precision", "recall", "modes", "kl", "high_quality", "num_samples")
SHOWN = 32
MEGABYTES = 9  # of all models together


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    """Train, write and evaluate each model."""
    results = common.RESULTS / NAME / "results.json"
    found = json.loads(results.read_text()) if results.exists() else {"models": {}, "machine": common.machine()}
    before, machines, runs = found["models"], {found["machine"], common.machine()}, {}
    for name, (what, flags) in MODELS.items():
        if name in before and (PRETRAINED / f"{name}.safetensors").exists():
            runs[name] = before[name]
            continue
        path = args.path if name == "cifar10_small" else None
        flags = [*flags, f"--config.data.path={path}"] if path else flags
        workdir = common.ROOT / "runs" / "experiments" / NAME / name
        common.main(*flags, f"--workdir={workdir}")
        model, file = ddgan_jax.load(workdir), PRETRAINED / f"{name}.safetensors"
        data = dataclasses.replace(model.config.data, dir=None, path=path)  # without the paths of this computer
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, data=data))
        about = {"summary": what, "command": shlex.join(["python", "main.py", *flags])}
        PRETRAINED.mkdir(exist_ok=True)
        model.save(file, half=True, about=about)
        common.main(*flags, "--mode=evaluate", f"--checkpoint={file}", f"--out={workdir}/evaluation")
        judged = json.loads((workdir / "evaluation" / "results.json").read_text())
        measures = {measure: judged[measure] for measure in MEASURES if measure in judged}
        model.save(file, half=True, about=about | {"measures": json.dumps(measures)})
        seconds = json.loads((workdir / "results.json").read_text())["seconds"]
        runs[name] = about | {"step": model.step, "train_seconds": seconds, "bytes": file.stat().st_size} | measures
    size = sum(run["bytes"] for run in runs.values()) / 1e6
    assert size <= MEGABYTES, f"{size:.1f} MB are too much for a package"
    count = {"gaussians": 2_000}
    common.keep(NAME, "samples", {name: ddgan_jax.load(name).sample(count.get(name, SHOWN)) for name in MODELS})
    return {"models": runs, "machine": " or ".join(sorted(machines))}  # of these models, and of those that stayed


def table(results: dict[str, Any]) -> str:
    """Markdown with a row for each model."""
    lines = [
        "| name | what | steps | training | MB | classifier distance | precision | recall | modes | KL |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, m in results["models"].items():
        shares = (f"{m[measure]:.2f}" if measure in m else "" for measure in ("precision", "recall"))
        frechet = f"{m['classifier_frechet']:.3g}" if "classifier_frechet" in m else ""
        modes, kl = (
            f"{m[measure]:{form}}" if measure in m else "" for measure, form in (("modes", ","), ("kl", ".3f"))
        )
        cells = [f"`{name}`", m["summary"], f"{m['step']:,}", f"{m['train_seconds'] / 60:.0f} min"]
        cells += [f"{m['bytes'] / 1e6:.1f}", frechet, *shares, modes, kl]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draw samples of each model."""
    plt = figures.pyplot()
    figure, panels = plt.subplots(1, len(MODELS), figsize=(3.2 * len(MODELS), 6.4), layout="constrained")
    with np.load(path.parent / "samples.npz") as arrays:
        for axis, name in zip(panels, MODELS, strict=True):
            samples = arrays[name]
            if samples.ndim == 2:
                axis.scatter(*samples.T, s=1)
                axis.set_aspect("equal")
            else:
                axis.imshow(figures.grid(samples, columns=4))
                axis.axis("off")
            axis.set_title(name)
    figures.save_figure(figure, path)


if __name__ == "__main__":
    common.run(__file__, experiment, path="CIFAR-10's images: a folder or zip with one folder a class")
