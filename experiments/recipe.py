"""Which recipe learns the digits fastest? Each for the same processor time, beside the paper's and the baselines.

    python -m experiments.recipe --seconds=200 --at_once=2      # three seeds of each

Every recipe gets as many steps as a core takes in so many seconds, which is measured before, without compilation. It
trains and evaluates configs/digits.py:paper, with its changes, in runs/experiments/recipe; what is finished there is
not done again. To try another recipe, add it at the end of RECIPES.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

from configs.digits import get_config
from ddgan_jax import figures
from ddgan_jax.config import as_dict, flat
from experiments import common
from experiments.digits import MEASURES

NAME, FLAGS = "recipe", ["--config=configs/digits.py:paper", "--config.log.samples_every=0"]
OURS = flat(as_dict(get_config()))
PARTS = {  # what configs/digits.py changes, which the table takes away one by one
    part: f"--config.{field}={OURS[field]}"
    for part, field in {
        "x_0 shown to D": "loss.shown",
        "squared error": "loss.reconstruction",
        "less noise": "diffusion.beta_max",
        "T = 3": "diffusion.num_steps",
        "a smaller D": "discriminator.ngf",
        "D learning on": "train.lr_min_d",
    }.items()
}
THIRD = "ours, a third of the time"
RECIPES = {
    "the paper's": [],
    "ours": list(PARTS.values()),
    **{f"ours without {part}": [flag for name, flag in PARTS.items() if name != part] for part in PARTS},
    THIRD: list(PARTS.values()),
    "one-shot GAN": ["--config.diffusion.num_steps=1"],
    "Gaussian, 100 steps": ["--config.objective=gaussian", "--config.diffusion.num_steps=100"],
}
TIMED = 20  # runs of a step


def steps_in(seconds: float, flags: list[str]) -> int:
    """How many steps of the recipe `flags` one core does in so many seconds of processor time. Measured once, kept."""
    path = common.ROOT / "runs" / "experiments" / NAME / "seconds_a_step.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    key = " ".join(flags)
    if key not in known:
        found = {name: measured(flags, name) for name in ("step", "step with R1")}
        plain, with_r1 = (one["programs"][name]["processor_seconds"] for name, one in found.items())
        known[key] = plain + (with_r1 - plain) / found["step"]["r1_every"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=2) + "\n")
    return int(seconds / known[key])


def measured(flags: list[str], program: str) -> dict[str, Any]:
    """What benchmarks.step finds for a program of the recipe `flags`, on one core."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    command = [sys.executable, "-m", "benchmarks.step", *FLAGS, *flags, f"--only={program}", f"--runs={TIMED}"]
    try:
        if cores:
            os.sched_setaffinity(0, {min(cores)})  # which a child inherits
        done = subprocess.run(command, cwd=common.ROOT, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
    return json.loads(done.stdout.splitlines()[-1])


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    """Time, train and evaluate all."""
    seconds = float(args.seconds)
    methods = {}
    for name, flags in RECIPES.items():
        steps = steps_in(seconds / 3 if name == THIRD else seconds, flags)
        methods[name] = [*flags, f"--config.train.num_steps={steps}"]
    return {"seconds": seconds, "runs": common.sweep(NAME, FLAGS, methods, args.at_once)}


def table(results: dict[str, Any]) -> str:
    """Markdown: a row a recipe, the median of the seeds and their range in each cell."""
    lines = [f"| recipe | network calls | steps | {' | '.join(MEASURES.values())} |", "|---|---|---|" + "---|" * 3]
    for recipe in RECIPES:
        runs = common.of_method(results, recipe)
        cells = []
        for measure in MEASURES:
            values, digits = [run["judged"][measure] for run in runs], 1 if measure == "classifier_frechet" else 2
            low, middle, high = (f"{x:.{digits}f}" for x in (min(values), statistics.median(values), max(values)))
            cells.append(f"{middle} ({low} to {high})")
        calls = runs[0]["judged"]["sampling"]["network_calls"]
        lines.append(f"| {recipe} | {calls} | {runs[0]['steps']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """A panel a measure, a row a recipe, every seed a dot."""
    plt = figures.pyplot()
    figure, panels = plt.subplots(1, len(MEASURES), figsize=(13, 0.45 * len(RECIPES) + 1), layout="constrained")
    for axis, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        for row, recipe in enumerate(RECIPES):
            values = [run["judged"][measure] for run in common.of_method(results, recipe)]
            axis.plot(values, [row] * len(values), "o", color=f"C{row % 10}", alpha=0.7)
        axis.set(title=title, yticks=range(len(RECIPES)), yticklabels=list(RECIPES) if axis is panels[0] else [])
        axis.invert_yaxis()
        axis.grid(alpha=0.3)
    panels[0].set_xscale("log")
    figures.save_figure(figure, path)


if __name__ == "__main__":
    common.run(__file__, experiment, trains=True, seconds="processor time of a training")
