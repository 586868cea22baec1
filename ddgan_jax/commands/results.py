"""Outputs of a training besides checkpoints and records: grids of samples, results.json, and the last evaluation."""

import json
import time

import jax

from ddgan_jax.commands import figures
from ddgan_jax.commands.evaluate import evaluate, without_other_results
from ddgan_jax.commands.progress import clock
from ddgan_jax.commands.run import Run
from ddgan_jax.config.settings import Config, as_dict
from ddgan_jax.devices import processes
from ddgan_jax.devices.processes import say
from ddgan_jax.storage import paths
from ddgan_jax.storage.log import read_metrics


def save_samples(run: Run, file: paths.Path) -> None:
    """Samples a grid on all devices; process 0 writes it, and the curves up to this step."""
    images = run.sample_grid()
    if run.files:
        figures.save_image(file, grid := figures.as_image(images))
        run.files.log.image(run.step, "samples", grid)
        figures.curves(run.path / "metrics.jsonl", run.path / "curves.png")


def finish(run: Run, then: list[str]) -> None:
    """Writes the last samples and results.json, with the commands to try next."""
    final = run.path / "samples" / "final.png"
    save_samples(run, final)
    if run.files:
        # Running the command again leaves the results of a finished run unchanged.
        if run.first_step < run.num_steps or not paths.exists(run.path / "results.json"):
            write_results(run, then)
        run.files.log.close()
    processes.barrier()  # no process exits while process 0 still writes
    duration = f" in {clock(time.time() - run.started)}" if run.first_step < run.step else ""
    say(f"finished {run.step} steps{duration}: see {final}")


def write_results(run: Run, then: list[str]) -> None:
    """Writes results.json: how the run ended, its duration including earlier parts, and its last metrics."""
    records = read_metrics(run.path / "metrics.jsonl")
    results = {
        "step": run.step,
        "seconds": round(run.seconds(), 1),
        "resumed_from": run.first_step,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "metrics": records[-1] if records else {},
        "next": then,
    }
    paths.write(run.path / "results.json", json.dumps(results, indent=2) + "\n")


def evaluate_last(c: Config, workdir: str, step: int) -> None:
    """Evaluates the last checkpoint of a finished training as `--mode=evaluate` does, unless its results are there.

    All processes take part. Raises as `evaluate.evaluate`; the same command then evaluates again.
    """
    folder = str(paths.path(workdir) / "evaluation" / str(step))

    def results_file() -> tuple[str, bool]:
        """The results.json of this evaluation, and whether it is there."""
        file = paths.path(without_other_results(folder, c, c.eval.num_samples)) / "results.json"
        return str(file), paths.exists(file)

    file, exists = processes.broadcast_from_primary(results_file)
    if exists:
        say(f"the evaluation of step {step} is in {file}")
        return
    say(f"evaluating step {step} with {c.eval.num_samples:,} samples")
    evaluate(as_dict(c), workdir)
