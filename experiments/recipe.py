"""Which recipe learns the digits fastest? Each for the same processor time, beside the paper's and the baselines.

    python -m experiments.recipe --seconds=60 --at_once=2       # three seeds of each

Every recipe gets the number of steps that one core takes in `--seconds`, which is measured first, without compilation.
A recipe is configs/digits.py:paper with changes, trained and evaluated in runs/experiments/recipe; finished runs are
not repeated. To try another recipe, add it at the end of RECIPES.
"""

import argparse
import functools
import json
import multiprocessing
import os
import pathlib
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
from tqdm import tqdm

from benchmarks import measure
from ddgan_jax.commands import figures
from ddgan_jax.config import presets
from ddgan_jax.config.settings import as_dict, flat
from ddgan_jax.devices import compiler
from ddgan_jax.method.build import build, init_state
from ddgan_jax.method.train_step import make_train_step
from experiments import common

NAME, FLAGS = "recipe", ["--config=configs/digits.py:paper", "--config.log.samples_every=0"]
OURS = flat(as_dict(presets.get("digits")))
PARTS = {  # what configs/digits.py changes: the name of the recipe without this change, and the field
    "D sees x_t": "loss.discriminator_input",
    "no squared error": "loss.reconstruction",
    "the paper's noise": "diffusion.beta_max",
    "T = 4": "diffusion.num_steps",
    "the paper's D": "discriminator.ngf",
    "D's rate falls to nearly 0": "train.lr_min_d",
}


def ours(but: str = "") -> dict[str, Any]:
    """The fields of our recipe, without the part `but`."""
    return {field: OURS[field] for part, field in PARTS.items() if part != but}


THIRD = "ours, a third of the time"
RECIPES: dict[str, dict[str, Any]] = {  # the fields of configs/digits.py:paper that each changes
    "the paper's": {},
    "ours": ours(),
    **{f"ours, but {part}": ours(but=part) for part in PARTS},
    THIRD: ours(),
    "ours with T = 1": ours() | {"diffusion.num_steps": 1},
    "one-shot GAN": {"diffusion.num_steps": 1},
    "Gaussian, 100 steps": {"objective": "gaussian", "diffusion.num_steps": 100},
}
MEASURES = {"classifier_frechet": "classifier distance", "precision": "precision", "recall": "recall"}
TIMED = 60  # timed runs of a step


def seconds_a_step() -> dict[str, float]:
    """Mean processor time of a step of each recipe on one core, including R1. It is measured once, and kept."""
    path = common.ROOT / "runs" / "experiments" / NAME / "seconds_a_step.json"
    if not path.exists():
        with ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn")
        ) as one:  # in a process of its own, on one core
            found = one.submit(measured).result()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
    return json.loads(path.read_text())


def measured() -> dict[str, float]:
    """Measure `seconds_a_step`. The recipes alternate, so that other work on the computer slows all of them equally."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    programs: dict[tuple[str, bool], tuple[measure.Program, list[float]]] = {}
    r1_every = {}
    for recipe in tqdm([recipe for recipe in RECIPES if recipe != THIRD], desc="compiling"):
        config = presets.get("digits:paper")
        config.update_from_flattened_dict(RECIPES[recipe])
        method, r1_every[recipe] = build(config), config.train.r1_every
        _, make = compiler.trace_once(functools.partial(init_state, method, 0))
        images = measure.examples(method, method.batch_size)
        for with_r1 in (False, True):
            step = measure.compiled(make_train_step(method, 0, with_r1), make(), jax.device_put(images), keeps=True)
            programs[recipe, with_r1] = step, []
    for round_ in range(TIMED + 1):
        for program, seconds in programs.values():
            start = time.process_time()
            program.seconds()
            if round_:  # the first is slower
                seconds.append(time.process_time() - start)
    found = {}
    for recipe in r1_every:
        plain, with_r1 = (statistics.median(programs[recipe, kind][1]) for kind in (False, True))
        found[recipe] = measure.mean_step(plain, with_r1, r1_every[recipe])
    return found


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    """Time, train and evaluate every recipe."""
    seconds, methods = float(args.seconds), {}
    one_step = seconds_a_step()
    for name, fields in RECIPES.items():
        steps = int(seconds / 3 / one_step["ours"] if name == THIRD else seconds / one_step[name])
        methods[name] = common.flags_of(fields | {"train.num_steps": steps})
    return {"seconds": seconds, "runs": common.sweep(NAME, FLAGS, methods, args.at_once)}


def table(results: dict[str, Any]) -> str:
    """Markdown with a row for each recipe, and the median of the seeds and their range in each cell."""
    lines = [f"| recipe | network calls | steps | {' | '.join(MEASURES.values())} |", "|---|---|---|" + "---|" * 3]
    for recipe in RECIPES:
        runs = common.of_method(results, recipe)
        cells = []
        for name in MEASURES:
            values, digits = [run["judged"][name] for run in runs], 1 if name == "classifier_frechet" else 2
            low, middle, high = (f"{x:.{digits}f}" for x in (min(values), statistics.median(values), max(values)))
            cells.append(f"{middle} ({low} to {high})")
        calls = runs[0]["judged"]["sampling"]["network_calls"]
        lines.append(f"| {recipe} | {calls} | {runs[0]['steps']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draw a panel for each measure with a row for each recipe and a dot for each seed."""
    plt = figures.pyplot()
    figure, panels = plt.subplots(1, len(MEASURES), figsize=(13, 0.45 * len(RECIPES) + 1), layout="constrained")
    for axis, (name, title) in zip(panels, MEASURES.items(), strict=True):
        for row, recipe in enumerate(RECIPES):
            values = [run["judged"][name] for run in common.of_method(results, recipe)]
            axis.plot(values, [row] * len(values), "o", color=f"C{row % 10}", alpha=0.7)
        axis.set(title=title, yticks=range(len(RECIPES)), yticklabels=list(RECIPES) if axis is panels[0] else [])
        axis.invert_yaxis()
        axis.grid(alpha=0.3)
    panels[0].set_xscale("log")
    figures.save_figure(figure, path)


if __name__ == "__main__":
    common.run(__file__, experiment, trains=True, seconds="processor time of a training")
