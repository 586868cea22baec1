"""The training job: build, restore or initialise, compile, loop; files, progress and signals.

The step is the only clock. Run the same command again and it goes on from the newest checkpoint that is whole, with
the numbers that an unbroken run would have had.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ddgan_jax import automatic, cluster, figures, ops, parallel
from ddgan_jax.build import Built, build, check_batch, labels_of, open_data, settle
from ddgan_jax.data.batches import batches, like_real
from ddgan_jax.data.sources import Data, fingerprint
from ddgan_jax.errors import Fault, Interrupted, UserError
from ddgan_jax.judge import RANKED_BY, judge, open_judge
from ddgan_jax.model import Sampler
from ddgan_jax.storage import checkpoint, paths
from ddgan_jax.storage.log import Log
from ddgan_jax.storage.paths import Path

Metrics = dict[str, Any]

MOST_CURVES = 16  # with more steps T than this, losses are not told apart by t


def say(text: str) -> None:
    """One line for people, from process 0, above the progress bar."""
    if parallel.is_primary():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


# --- Metrics ----------------------------------------------------------------------------------------------------


def summarise(window: list[Metrics]) -> dict[str, float]:
    """Means over a window of steps; `_by_t` sums become one mean for every t that occurred. Host floats."""
    names = {name for metrics in window for name in metrics}
    means = {name: np.mean([np.asarray(m[name], np.float64) for m in window if name in m], axis=0) for name in names}
    summary = {name: float(value) for name, value in means.items() if not name.endswith("_by_t")}
    for network in ("d", "g"):
        if f"{network}_loss_by_t" not in means:  # the Gaussian objective has no D
            continue
        sums, counts = means[f"{network}_loss_by_t"], means[f"{network}_count_by_t"]
        if len(sums) > MOST_CURVES:
            continue
        summary |= {f"{network}_loss_t{t}": float(sums[t] / counts[t]) for t in range(len(sums)) if counts[t] > 0}
    return dict(sorted(summary.items()))


def check_finite(first_step: int, window: list[Metrics], intact: Callable[[], int | None]) -> None:
    """Raise Fault that names the first step and quantity of the window that is not finite, and what `intact` says.

    `intact` is only asked in process 0, of the step of the newest checkpoint that is there.
    """
    for i, metrics in enumerate(window):
        for name, value in sorted(metrics.items()):
            if not np.all(np.isfinite(value)):
                safe = parallel.from_primary(intact)
                raise Fault(
                    f"{name} is not finite at step {first_step + i}: "
                    + (f"the checkpoint of step {safe} is good" if safe is not None else "there is no checkpoint yet")
                )


# --- Signals ----------------------------------------------------------------------------------------------------

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last as SLURM's --signal=USR1@60 sends it
AGAIN = 1.0  # s; launchers send a signal to the process and to its group, which is one signal twice


class Interrupt:
    """Listens for SIGNALS inside a `with`. The first raises Interrupted at once, or within `held` is only noted.

    Another one, a second later or more, ends the process at once.
    """

    def __init__(self) -> None:
        """Nothing has come yet."""
        self.signal = ""
        self._time = 0.0
        self._held = False

    def __enter__(self) -> "Interrupt":
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # no other thread may listen
            self._before = {number: signal.signal(number, self._come) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What is done within goes on when a signal comes, and is to look at `signal`."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _come(self, number: int, frame: Any) -> None:
        if self.signal:
            if time.monotonic() - self._time > AGAIN:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.signal, self._time = signal.Signals(number).name, time.monotonic()
        if not self._held:
            raise Interrupted(f"{self.signal}: nothing was lost; run the same command to go on")


# --- The job ----------------------------------------------------------------------------------------------------


def open_workdir(workdir: Path, config: dict[str, Any]) -> None:
    """Create the workdir and write config.json. Raises UserError if it cannot be written."""
    try:
        old = workdir / "config.json"
        if paths.exists(old):
            before, now = _fields(json.loads(paths.read(old))), _fields(config)
            changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
            if changed:
                say(f"note: {workdir} was started with other values of {', '.join(changed)}")
        paths.write(old, json.dumps(config, indent=2) + "\n")
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"--workdir={workdir} cannot be used: {error}") from error


def _fields(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, {'train.batch_size': 32}."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        fields |= _fields(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return fields


def with_networks_of(path: str, state: Any) -> Any:
    """The host state of a new run, with the networks of the workdir or checkpoint `path`: its D, and the moving average
    of its G, which is what it samples with. UserError if there is none, or it is of another architecture; Fault if it
    is damaged."""
    folder = checkpoint.find(path)
    found = checkpoint.unflatten(checkpoint.read(folder)[0], state, f"the checkpoint {folder} of train.init_from")
    say(f"the networks are those of {folder}")
    return state.replace(gen_params=found.ema_params, ema_params=found.ema_params, disc_params=found.disc_params)


class Steps:
    """The compiled steps, with R1 and without, each waited for when it is first asked for."""

    def __init__(self, built: Built, stop: parallel.Stop, state: Any, batch: Any, r1_every: int):
        """Begin to compile."""
        self._start = time.time()
        one = r1_every == 1 or built.method.objective == "gaussian"  # R1 in every step, or in none
        kinds = [True] if one else [True, False]
        futures = stop.compile(map(built.step, kinds), state, batch)
        self._futures = dict(zip(kinds, futures, strict=True))
        self._announced: set[bool] = set()
        if jax.process_count() > 1:  # none may wait in a step for another that still compiles
            for kind in kinds:
                self(kind)
            parallel.barrier()

    def __call__(self, with_r1: bool) -> Any:
        """The step; says, the first time, how long it took to compile, its work and its memory."""
        several = len(self._futures) > 1
        kind = with_r1 or not several
        step = self._futures[kind].result()
        if kind not in self._announced:
            self._announced.add(kind)
            memory = step.memory_analysis()
            size = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20 if memory else float("nan")
            name = f"the step {'with' if kind else 'without'} R1 " if several else ""
            say(
                f"compiled {name}in {time.time() - self._start:.1f} s: "
                f"{(step.cost_analysis() or {}).get('flops', 0) / 1e9:.3g} GFLOP a step on each device, "
                f"{size:.0f} MiB of device memory"
            )
        return step


def overview(built: Built, shapes: Any, per_device: int, data: Data) -> None:
    """Say what is trained: networks, batch layout, state (of these `shapes`), classes."""
    count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))  # noqa: E731
    megabytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)) / 2**20
    say(
        f"generator {count(shapes.gen_params):,} parameters, discriminator {count(shapes.disc_params):,}; "
        f"the state takes {megabytes:.1f} MiB"
    )
    say(
        f"{len(data.images):,} examples of {'x'.join(map(str, built.image_shape))}; batch {built.batch_size} = "
        f"{jax.process_count()} processes x {jax.local_device_count()} devices x {per_device} "
        f"on {jax.devices()[0].device_kind}"
    )
    if jax.devices()[0].platform == "cpu" and cluster.visible_gpus(os.environ):
        say("note: JAX does not see this machine's NVIDIA GPUs: `pip install -U 'jax[cuda13]'`, or jax[cuda12]")
    if built.num_classes:
        named = [f"{i} {name}" for i, name in enumerate(data.classes) if name != str(i)]
        names = f": {', '.join(named[:20])}{', ...' * (len(named) > 20)}" if named else ""
        say(f"class-conditional on {built.num_classes} classes{names}")


def train(config: Any, workdir: str, data: Data | None = None) -> Any:
    """Train as `config` says in `workdir`, from its newest checkpoint if there is one; returns the last state.

    `data` is trained on instead of what `config.data` names, for instance `Data(images)` of an array in memory.

    Leaves checkpoints/, config.json, metrics.jsonl, results.json, curves.png, samples/ and tensorboard/. Raises
    UserError for settings that cannot be, Fault where something outside went wrong, and Interrupted after SIGTERM,
    SIGINT or SIGUSR1 to any process, with the step at which it came saved.
    """
    with Interrupt() as interrupt:
        return _train(config, workdir, data, interrupt)


def _open(config: Any, opened: Data | None) -> tuple[dict[str, Any], Built, Data]:
    """(settings, method, data) of a run. The data is decoded when it fits the rest. UserErrors as of `train`."""
    settings, chosen = settle(config, opened)
    data = settings["data"]
    built = build(settings)
    check_batch(built.batch_size, settings["train"]["accumulate"])
    for sentence in chosen:
        say(sentence)
    opened = opened or open_data(settings)
    if opened.images.shape[1:] != built.image_shape:
        raise UserError(
            f"dataset {data['name']} has examples of {list(opened.images.shape[1:])}, but model.network="
            f"{settings['model']['network']} is built for {list(built.image_shape)}: choose another network or dataset"
        )
    return settings, built, opened


def facts(settings: dict[str, Any], data: Data) -> dict[str, Any]:
    """What all processes of a run must have the same of: the configuration, the data, the versions."""
    local = ("data.dir", "data.path")  # where a machine has its copy
    found = {f"config.{name}": value for name, value in _fields(settings).items() if name not in local}
    found["the data"] = f"{len(data.images):,} examples, {fingerprint('', '', data.images)}"
    if settings["model"]["num_classes"] and data.labels:
        found["the labels"] = hashlib.sha256(np.ascontiguousarray(data.labels()).tobytes()).hexdigest()[:16]
    return found | {"jax": jax.__version__, "devices": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}"}


def _train(config: Any, workdir: str, opened: Data | None, interrupt: Interrupt) -> Any:
    started = time.time()
    primary, path = parallel.is_primary(), paths.path(workdir)
    settings, built, opened = parallel.everywhere(lambda: _open(config, opened))
    if jax.process_count() > 1:
        parallel.agree(facts(settings, opened))
    train_, log_, eval_, keep = (settings[group] for group in ("train", "log", "eval", "checkpoint"))
    num_steps = train_["num_steps"]
    labels = labels_of(opened, built.num_classes, settings["data"]["name"])
    shapes = jax.eval_shape(built.init_state)
    checkpoints: checkpoint.Checkpoints | None = None
    log: Log | None = None

    def begin() -> Any:
        """In process 0: the files of the run, and its state on the host, restored or initialised, never both."""
        nonlocal checkpoints, log
        open_workdir(path, settings)
        overview(built, shapes, built.batch_size // jax.device_count(), opened)
        checkpoints = checkpoint.Checkpoints(workdir, keep["keep"], keep["keep_period"] or None)
        restored = checkpoints.restore_latest(shapes, say)
        make = ops.jit_once(built.init_state)
        with ThreadPoolExecutor() as background:  # the log imports TensorFlow for seconds, making compiles as long
            made = background.submit(lambda: jax.device_get(make())) if restored is None else None
            log = Log(path, settings, 0 if restored is None else int(restored.step))
        if made is None:
            return restored
        return with_networks_of(train_["init_from"], made.result()) if train_["init_from"] else made.result()

    host_state = parallel.from_primary(begin)
    state = parallel.replicate(host_state)
    step = first = int(host_state.step)
    if step >= num_steps:
        say(f"{workdir} has already finished its {num_steps} steps")
    elif step:
        say(f"going on from step {step}")

    spent = log.seconds if log else 0.0  # before this run of the command
    own = batches(
        opened.images,
        global_batch=built.batch_size,
        seed=built.seed,
        start_step=step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        labels=labels,
    )
    stream, stop = parallel.prefetch(own), parallel.Stop()
    if step < num_steps:
        batch = next(stream)
        steps = Steps(built, stop, state, batch, train_["r1_every"])
        stream = itertools.chain([batch], stream)
    draw = Sampler(built, settings["sample"]["batch_size"])
    judge_ = open_judge(settings, opened) if eval_["every"] else None
    window: list[Metrics] = []
    mark, marked = time.time(), step
    bar = tqdm(total=num_steps, initial=step, unit="step", disable=None if primary else True, file=sys.stdout)

    def samples(name: str) -> None:
        images = draw(jax.device_get(state.ema_params), 0, settings["sample"]["grid"])
        if log:
            grid = figures.picture(images)
            figures.save_image(path / "samples" / name, grid)
            log.image(step, "samples", grid)

    def evaluation() -> dict[str, float]:
        """The measures, {} in all processes but the first; Interrupted within a chunk of a signal."""
        count = eval_["online_samples"]
        asked = like_real(labels, count)
        chunks = until(interrupt, draw.chunks(jax.device_get(state.ema_params), 0, count, asked))
        judged = judge(judge_, chunks, count, labels=asked)  # type: ignore[arg-type]
        return {f"eval/{name}": float(value) for name, value in judged.results.items()} if judged else {}

    def intact() -> int | None:
        """The step of the newest checkpoint, once the one that is being written is there."""
        if checkpoints:
            checkpoints.wait()
        return checkpoints.steps()[-1] if checkpoints and checkpoints.steps() else None

    with interrupt.held():
        while step < num_steps:
            batch = next(stream)
            asked_at = time.time()
            run = steps(step % train_["r1_every"] == 0)
            if (waited := time.time() - asked_at) > 0.1:  # for the compiler: the time to go is that of steps
                mark += waited
                bar.unpause()
            state, metrics = stop.step(run, state, batch, lambda: bool(interrupt.signal))
            window.append(metrics)
            step += 1
            bar.update()
            if step - first <= 3:
                jax.block_until_ready(metrics)
                say(f"step {step} done, {time.time() - started:.1f} s after the start")
            if step - first == 3:
                say(automatic.expected_time(time.time() - asked_at - waited, num_steps - step))

            every = {
                "log": log_["every"],
                "save": keep["every"],
                "eval": eval_["every"],
                "samples": log_["samples_every"],
            }
            due = {name: number > 0 and step % number == 0 for name, number in every.items()}
            last = step == num_steps or stop.now
            if due["log"] or due["save"] or due["eval"] or last:
                window = jax.device_get(window)
                check_finite(step - len(window), window, intact)
                seconds, mark_step = time.time() - mark, step - marked
                values = summarise(window)
                values |= {"images_per_second": mark_step * built.batch_size / max(seconds, 1e-9)}
                window, mark, marked = [], time.time(), step
                if due["eval"] and judge_ and not stop.now:
                    try:
                        values |= evaluation()
                    except Interrupted:
                        stop.now = True
                    mark = time.time()
                if log:
                    log.scalars(step, values | {"seconds": spent + time.time() - started})
                    eta = (num_steps - step) * seconds / max(mark_step, 1)
                    parts = [f"{name[0].upper()} {values[name]:.3f}" for name in ("d_loss", "g_loss") if name in values]
                    line = " ".join([*parts, f"{values['images_per_second']:.0f} images/s"])
                    bar.set_postfix_str(line)
                    if bar.disable:
                        say(f"step {step}/{num_steps}: {line}, {clock(eta)} to go")
            if (due["save"] or due["eval"] or last or stop.now) and checkpoints and log:
                log.flush()
                checkpoints.save(step, state, settings)
                ranked_by = f"eval/{RANKED_BY[eval_['features']]}"
                if ranked_by in values and checkpoints.offer(step, ranked_by, values[ranked_by]):
                    say(f"step {step} is the best so far: {ranked_by} {values[ranked_by]:.4g}")
            if stop.now:
                break
            if due["samples"] and not last:
                samples(f"step_{step:07d}.png")
                mark = time.time()

        bar.close()
        if checkpoints:
            checkpoints.close()
        came = [name for name in parallel.exchange(interrupt.signal) if name]  # and know that the checkpoint is there
    if stop.now and step < num_steps:
        if log:
            log.close()
        raise Interrupted(f"{came[0]}: saved step {step} in {workdir}; run the same command to go on")
    samples("final.png")
    if log:
        figures.curves(path / "metrics.jsonl", path / "curves.png")
        if first < num_steps or not paths.exists(path / "results.json"):  # one that had finished stays as it was
            write_results(path, step, first, spent + time.time() - started)
        log.close()
    parallel.barrier()  # none leaves while process 0 still draws
    say(f"finished {num_steps} steps in {clock(time.time() - started)}: see {path / 'samples' / 'final.png'}")
    return state


def until(interrupt: Interrupt, chunks: Iterator[Any]) -> Iterator[Any]:
    """The chunks, until a signal has come to any process: then Interrupted, in all of them at the same chunk."""
    for chunk in chunks:
        if parallel.any_process(bool(interrupt.signal)):
            raise Interrupted(interrupt.signal)
        yield chunk


def write_results(workdir: Path, step: int, resumed_from: int, seconds: float) -> None:
    """Leave results.json: how the run ended, the `seconds` of all its parts together, and its last metrics."""
    records = figures.read_metrics(workdir / "metrics.jsonl")
    results = {
        "step": step,
        "seconds": round(seconds, 1),
        "resumed_from": resumed_from,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "metrics": records[-1] if records else {},
    }
    paths.write(workdir / "results.json", json.dumps(results, indent=2) + "\n")


def clock(seconds: float) -> str:
    """'1:02:03' or '2:03'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{int(seconds):02d}" if hours else f"{minutes}:{int(seconds):02d}"
