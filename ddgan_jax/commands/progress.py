"""The lines that a training run prints, and the metrics since the last record."""

import contextlib
import math
import os
import pathlib
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ddgan_jax.commands.run import Run
from ddgan_jax.config.settings import Config
from ddgan_jax.data.sources import Data
from ddgan_jax.devices import cluster, processes
from ddgan_jax.devices.processes import say
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.method.state import num_bytes
from ddgan_jax.method.train_step import Method
from ddgan_jax.metrics.feature_networks import check_can_evaluate

Metrics = dict[str, Any]

LARGE = 5_000_000  # parameters of a generator: days on a CPU
TIMED = 20  # steps from which the duration of a run is estimated
MAX_CURVES = 16  # with more denoising steps T, losses are not recorded for each t


def clock(seconds: float) -> str:
    """A duration as '1:02:03' or '2:03'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{int(seconds):02d}" if hours else f"{minutes}:{int(seconds):02d}"


def next_commands(workdir: str, c: Config, data: Data | None) -> tuple[list[str], str]:
    """Commands to try with a finished run, in the form in which this program was called, and a note of what they lack.

    The command that evaluates is left out without `data`, if the run evaluates itself at its end, and where it cannot
    run: a note then says why.
    """
    root = pathlib.Path(__file__).resolve().parents[2]
    ours = {root / "main.py": shlex.quote(sys.argv[0]), root / "ddgan_jax" / "__main__.py": "-m ddgan_jax"}
    script = ours.get(pathlib.Path(sys.argv[0]).resolve())  # of another program, None
    if script is None and not shutil.which("ddgan-jax"):  # a program in a checkout, which does not install the command
        script = "-m ddgan_jax"
    program = f"{shlex.quote(sys.orig_argv[0])} {script}" if script else "ddgan-jax"
    modes, note = {"sample": "", "evaluate": "", "demo": ""}, ""
    if ":" in c.eval.features:  # a function of the user's runs only where a flag names it
        modes["evaluate"] = f" --config.eval.features={shlex.quote(c.eval.features)}"
    try:
        if data is not None:
            check_can_evaluate(c, data)
    except UserError as error:
        data, note = None, f"\nnote: --mode=evaluate cannot run yet: {error}"
    if data is None or c.eval.at_end:  # the run evaluates it itself
        del modes["evaluate"]
    return [f"{program} --mode={mode} --workdir={shlex.quote(workdir)}{flag}" for mode, flag in modes.items()], note


def overview(method: Method, shapes: Any, per_device: int, data: Data, dtype: str) -> None:
    """Prints what is trained: networks, batch layout, the size of the state, classes."""
    count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))  # noqa: E731
    say(
        f"generator {count(shapes.gen_params):,} parameters, discriminator {count(shapes.disc_params):,}; "
        f"the state takes {num_bytes(shapes) / 2**20:.1f} MiB"
    )
    shape, device = "x".join(map(str, method.denoiser.image_shape)), jax.devices()[0]
    say(
        f"{len(data.images):,} examples of {shape}; batch {method.batch_size} = {jax.process_count()} processes x "
        f"{jax.local_device_count()} devices x {per_device} on {device.device_kind}"
    )
    if device.platform == "cpu" and cluster.visible_gpus(os.environ):
        say("note: JAX does not see this machine's NVIDIA GPUs: `pip install -U 'jax[cuda13]'`, or jax[cuda12]")
    large = count(shapes.gen_params) > LARGE
    if device.platform == "cpu" and large:
        say("note: networks of this size train for days on a CPU; configs/image_folder.py:small takes 2 to 3 hours")
    without_bfloat16 = str(getattr(device, "compute_capability", "")).startswith(("5.", "6.", "7."))  # V100, T4
    if device.platform != "cpu" and large and dtype == "float32" and not without_bfloat16:
        say(
            "note: --config.model.dtype=bfloat16 is 1.9 times as fast by a model of an H100 (docs/reproduce.md, What "
            "bfloat16 does)"
        )
    if method.denoiser.num_classes:
        named = [f"{i} {name}" for i, name in enumerate(data.classes) if name != str(i)]
        names = f": {', '.join(named[:20])}{', ...' * (len(named) > 20)}" if named else ""
        say(f"class-conditional on {method.denoiser.num_classes} classes{names}")


# --- Metrics ----------------------------------------------------------------------------------------------------


def summarise(window: list[Metrics]) -> dict[str, float]:
    """Means over a window of steps, as floats; `_by_t` sums become one mean for each t that occurred."""
    names = {name for metrics in window for name in metrics}
    means = {name: np.mean([np.asarray(m[name], np.float64) for m in window if name in m], axis=0) for name in names}
    summary = {name: float(value) for name, value in means.items() if not name.endswith("_by_t")}
    for network in ("d", "g"):
        if f"{network}_loss_by_t" not in means:  # Gaussian denoising has no discriminator
            continue
        sums, counts = means[f"{network}_loss_by_t"], means[f"{network}_count_by_t"]
        if len(sums) > MAX_CURVES:
            continue
        summary |= {f"{network}_loss_t{t}": float(sums[t] / counts[t]) for t in range(len(sums)) if counts[t] > 0}
    return dict(sorted(summary.items()))


def check_finite(first_step: int, window: list[Metrics], last_complete: Callable[[], int | None]) -> None:
    """Raises Fault if a metric of the window is not finite: which one, at which step, and what helps.

    `last_complete` returns the step of the newest checkpoint; only process 0 calls it.
    """
    for i, metrics in enumerate(window):
        for name, value in sorted(metrics.items()):
            if not np.all(np.isfinite(value)):
                safe = processes.broadcast_from_primary(last_complete)
                raise Fault(f"{name} is not finite at step {first_step + i}: {_what_helps(safe)}")


def _what_helps(safe: int | None) -> str:
    """Advice after a loss that is not finite; `safe` is the step of the newest checkpoint."""
    if safe is None:
        return "there is no checkpoint yet; lower --config.train.lr_g and lr_d, or raise --config.train.r1_gamma"
    return (
        f"the checkpoint of step {safe} is valid, but the same command ends here again; resume from it with other "
        "noise (--config.train.noise_seed=1), a lower --config.train.lr_g and lr_d, or a higher --config.train.r1_gamma"
    )


class Meter:
    """The metrics of the steps since the last record, and the time that these took."""

    def __init__(self, batch_size: int, step: int, unlogged: dict[str, Any] | None = None):
        """Starts at `step`, with what `unlogged` returned if a run was interrupted there."""
        self._batch_size = batch_size
        self._window: list[Metrics] = list(unlogged["steps"]) if unlogged else []
        self._from = step - len(self._window)
        self._mark = time.time() - (unlogged["seconds"] if unlogged else 0)

    def add(self, metrics: Metrics) -> None:
        """Adds the metrics of one step, which are still on the devices."""
        self._window.append(metrics)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count as training time."""
        since = time.time()
        yield
        self._mark += time.time() - since

    def check(self, last_complete: Callable[[], int | None], last: Callable[[], Metrics] = dict) -> None:
        """Waits for the steps. Raises Fault if a metric, or one that `last` returns, is not finite.

        The time that `last` takes does not count as training time.
        """
        self._window = jax.device_get(self._window)
        check_finite(self._from, self._window, last_complete)
        with self.paused():
            check_finite(self._from + len(self._window) - 1, [jax.device_get(last())], last_complete)

    def values(
        self, last: Callable[[], Metrics], last_complete: Callable[[], int | None]
    ) -> tuple[dict[str, float], float]:
        """The means since the last record with the metrics of `last`, and the seconds per step; resets the meter.

        Call it after `check`. Raises Fault if one of `last` is not finite.
        """
        steps, seconds = len(self._window), time.time() - self._mark  # without `last`, which compiles at first
        final = jax.device_get(last())
        check_finite(self._from + steps - 1, [final], last_complete)
        speed = {"images_per_second": steps * self._batch_size / max(seconds, 1e-9)}
        values = summarise(self._window) | summarise([final]) | speed
        self._window, self._from, self._mark = [], self._from + steps, time.time()
        return values, seconds / max(steps, 1)

    def unlogged(self) -> dict[str, Any]:
        """The metrics that are in no record yet, as JSON, with which an interrupted run resumes."""
        steps = [{name: np.asarray(value).tolist() for name, value in metrics.items()} for metrics in self._window]
        return {"steps": steps, "seconds": time.time() - self._mark}


def report_first_steps(run: Run, metrics: Any, bar: tqdm) -> None:
    """Reports the first steps, which are slower than the rest, and from the next ones the duration of the run."""
    done = run.step - run.first_step
    if done == 1:
        bar.set_description("training")
    if done <= 3:  # among them those that wait for a compilation
        jax.block_until_ready(metrics)
        bar.unpause()
        run.warm = time.time()
        say(f"step {run.step} done, {run.warm - run.started:.1f} s after the start")
    elif done == 3 + TIMED:
        jax.block_until_ready(metrics)
        say(expected_time((time.time() - run.warm) / TIMED, run.num_steps - run.step))


def losses_line(values: dict[str, float]) -> str:
    """The losses and the speed as 'D 1.386 G 0.693 512 images/s'."""
    parts = [f"{name[0].upper()} {values[name]:.3f}" for name in ("d_loss", "g_loss") if name in values]
    return " ".join([*parts, f"{values['images_per_second']:.0f} images/s"])


def rounded(count: int) -> str:
    """A number as '5k' for 5,000, or '1797'."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)


def expected_time(seconds_per_step: float, steps: int) -> str:
    """A duration as 'about 3 h 20 min for 56,250 steps'."""
    minutes = round(seconds_per_step * steps / 60)
    days, hours = divmod(minutes // 60, 24)
    if days:
        text = f"{days} d {hours} h"
    elif hours:
        text = f"{hours} h {minutes % 60} min"
    else:
        text = f"{max(minutes, 1)} min"
    return f"about {text} for {steps:,} steps"
