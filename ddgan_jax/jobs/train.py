"""The training job: set up, loop, finish.

The step is the only clock. Run the same command again and it goes on from the newest checkpoint that is whole, with
the numbers that an unbroken run would have had.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ddgan_jax import automatic, figures, ops, parallel, processes
from ddgan_jax.build import Built, build, check_batch, labels_of, settle
from ddgan_jax.config import Config, as_dict, flat, read
from ddgan_jax.data.batches import batches, like_real
from ddgan_jax.data.sources import Data, fingerprint, open_data
from ddgan_jax.errors import Interrupted, UserError
from ddgan_jax.jobs.progress import Meter, clock, losses_line, next_commands, overview, say
from ddgan_jax.jobs.signals import Interrupt, until
from ddgan_jax.metrics.judge import RANKED_BY, Judge, judge, open_judge
from ddgan_jax.model import networks_of
from ddgan_jax.sampler import Sampler
from ddgan_jax.state import norms
from ddgan_jax.storage import checkpoint, paths
from ddgan_jax.storage.log import Log, read_metrics
from ddgan_jax.storage.paths import Path

TIMED = 20  # steps that the time of a run is foretold from


@dataclasses.dataclass
class Run:
    """A run that is set up: what it trains, where it stands, and in process 0 its files."""

    config: Config
    built: Built
    data: Data
    labels: np.ndarray | None  # [N], of a class-conditional model
    path: Path
    state: Any  # on every device
    step: int
    checkpoints: checkpoint.Checkpoints | None
    log: Log | None
    started: float
    draw: Sampler
    judge: Judge | None = None

    def __post_init__(self) -> None:
        self.first = self.step
        self.spent = self.log.seconds if self.log else 0.0  # seconds, before this run of the command

    @property
    def num_steps(self) -> int:
        """Where it ends."""
        return self.config.train.num_steps or 0  # which was chosen, if it was not set

    def due(self, every: int | None) -> bool:
        """Is it the step for what is done `every` so many steps? For 0 it never is."""
        return every is not None and every > 0 and self.step % every == 0

    def seconds(self) -> float:
        """That the run has taken, with all its parts."""
        return self.spent + time.time() - self.started


def train(config: Any, workdir: str, data: Data | None = None) -> Any:
    """Train as `config` says in `workdir`, from its newest checkpoint if there is one; returns the last state.

    `data` is trained on instead of what `config.data` names, for instance `Data(images)` of an array in memory.

    Leaves checkpoints/, config.json, metrics.jsonl, results.json, curves.png, samples/ and tensorboard/. Raises
    UserError for settings that cannot be, Fault where something outside went wrong, and Interrupted after SIGTERM,
    SIGINT or SIGUSR1 to any process, with the step at which it came saved.
    """
    with Interrupt() as interrupt:
        run = begin(config, workdir, data)
        with closed_after_a_fault(run):
            with interrupt.held():
                stopped = loop(run, interrupt)
                if run.checkpoints:
                    run.checkpoints.close()
                # after this all know that the checkpoint is there
                came = [name for name in processes.exchange(interrupt.signal) if name]
            if not stopped:
                finish(run, next_commands(workdir, evaluates=data is None))
            elif run.log:
                run.log.close()
        if stopped:
            raise Interrupted(f"{came[0]}: saved step {run.step} in {workdir}; run the same command to go on")
    return run.state


@contextlib.contextmanager
def closed_after_a_fault(run: Run) -> Iterator[None]:
    """What raises within may end the process at once: what was begun to be written is written first."""
    try:
        yield
    except Exception:
        for part in (run.checkpoints, run.log):
            with contextlib.suppress(Exception):
                if part:
                    part.close()
        raise


# --- Setting up ---------------------------------------------------------------------------------------------------


def _open(config: Any, opened: Data | None) -> tuple[Config, Built, Data]:
    """(settings, method, data) of a run. The data is decoded when it fits the rest. UserErrors as of `train`."""
    c, chosen = settle(read(config), opened)
    built = build(c)
    check_batch(built.batch_size, c.train.accumulate)
    for sentence in chosen:
        say(sentence)
    opened = opened or open_data(c.data)
    if opened.images.shape[1:] != built.image_shape:
        raise UserError(
            f"dataset {c.data.name} has examples of {list(opened.images.shape[1:])}, but model.network="
            f"{c.model.network} is built for {list(built.image_shape)}: choose another network or dataset"
        )
    return c, built, opened


def facts(c: Config, data: Data) -> dict[str, Any]:
    """What all processes of a run must have the same of: the configuration, the data, the versions."""
    local = ("data.dir", "data.path")  # where a machine has its copy
    found = {f"config.{name}": value for name, value in flat(as_dict(c)).items() if name not in local}
    found["the data"] = f"{len(data.images):,} examples, {fingerprint('', '', data.images)}"
    if c.model.num_classes and data.labels:
        found["the labels"] = hashlib.sha256(np.ascontiguousarray(data.labels()).tobytes()).hexdigest()[:16]
    return found | {"jax": jax.__version__, "devices": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}"}


def begin(config: Any, workdir: str, opened: Data | None) -> Run:
    """Set up a run, or take up one that broke off. UserErrors and Faults as of `train`."""
    started, path = time.time(), paths.path(workdir)
    c, built, data = processes.everywhere(lambda: _open(config, opened))
    if jax.process_count() > 1:
        processes.agree(facts(c, data))
    labels, shapes = labels_of(data, built.num_classes, c.data.name), jax.eval_shape(built.init_state)
    checkpoints: checkpoint.Checkpoints | None = None
    log: Log | None = None

    def open_files() -> Any:
        """In process 0: the files of the run, and its state on the host, restored or initialised, never both."""
        nonlocal checkpoints, log
        open_workdir(path, as_dict(c))
        overview(built, shapes, built.batch_size // jax.device_count(), data)
        checkpoints = checkpoint.Checkpoints(workdir, c.checkpoint.keep, c.checkpoint.keep_period)
        restored = checkpoints.restore_latest(shapes, say)
        make = ops.jit_once(built.init_state)
        with ThreadPoolExecutor() as background:  # the log imports TensorFlow for seconds, making compiles as long
            made = background.submit(lambda: jax.device_get(make())) if restored is None else None
            log = Log(path, as_dict(c), c.log, 0 if restored is None else int(restored.step))
        if made is None:
            return restored
        return with_networks_of(c, made.result()) if c.train.init_from else made.result()

    state = processes.from_primary(open_files)
    step, draw = int(state.step), Sampler(built, c.sample.batch_size)
    run = Run(c, built, data, labels, path, parallel.replicate(state), step, checkpoints, log, started, draw)
    if step >= run.num_steps:
        say(f"{workdir} has already finished its {run.num_steps} steps")
    elif step:
        say(f"going on from step {step}")
    if step < run.num_steps:
        every = c.log.samples_every
        when = f"every {every:,} steps" if every else "at the end"
        say(f"{run.num_steps - step:,} steps to train; pictures {when}: {path / 'samples'} and {path / 'curves.png'}")
    if c.eval.every:
        run.judge = open_judge(c, data)
    return run


def open_workdir(workdir: Path, config: dict[str, Any]) -> None:
    """Create the workdir and write config.json. Raises UserError if it cannot be written."""
    try:
        old = workdir / "config.json"
        if paths.exists(old):
            before, now = flat(as_dict(read(json.loads(paths.read(old))))), flat(config)
            changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
            if changed:
                say(f"note: {workdir} was started with other values of {', '.join(changed)}")
        paths.write(old, json.dumps(config, indent=2) + "\n")
    except (OSError, ValueError) as error:
        raise UserError(f"--workdir={workdir} cannot be used: {error}") from error


def with_networks_of(c: Config, state: Any) -> Any:
    """The host state of a new run, with the networks that `train.init_from` names: its D, and the moving average of its
    G, which is what it samples with. UserErrors and Faults as of `model.networks_of`."""
    where, gen_params, disc_params = networks_of(c, state)
    say(f"the networks are those of {where}" + ("" if disc_params else ", which holds no discriminator: D starts anew"))
    return state.replace(gen_params=gen_params, ema_params=gen_params, disc_params=disc_params or state.disc_params)


# --- The loop -----------------------------------------------------------------------------------------------------


class Steps:
    """The compiled steps, with R1 and without, each waited for when it is first asked for."""

    def __init__(self, built: Built, stop: parallel.Stop, state: Any, batch: Any, r1_every: int):
        """Begin to compile."""
        say("compiling the training step: seconds for a small network, minutes for a large one")
        self._start = time.time()
        one = r1_every == 1 or not built.method.objective.trains_disc  # R1 in every step, or in none
        kinds = [True] if one else [True, False]
        futures = stop.compile(map(built.step, kinds), state, batch)
        self._futures = dict(zip(kinds, futures, strict=True))
        self._announced: set[bool] = set()
        if jax.process_count() > 1:  # none may wait in a step for another that still compiles
            for kind in kinds:
                self(kind)
            processes.barrier()

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


def loop(run: Run, interrupt: Interrupt) -> bool:
    """Train to the last step, or until a signal comes to any process: then True. The step is saved in both cases."""
    if run.step >= run.num_steps:
        return False
    stream, stop = parallel.prefetch(batches_of(run)), parallel.Stop()
    first = next(stream)
    c, r1_every = run.config, run.config.train.r1_every
    steps = Steps(run.built, stop, run.state, first, r1_every)
    meter = Meter(run.built.batch_size, run.step)
    hidden = None if processes.is_primary() else True
    with tqdm(
        total=run.num_steps, initial=run.step, desc="compiling", unit="step", disable=hidden, file=sys.stdout
    ) as bar:
        for batch in itertools.chain([first], stream):
            with meter.paused():  # for the compiler: the time to go is that of steps
                step = steps(run.step % r1_every == 0)
            run.state, metrics = stop.step(step, run.state, batch, lambda: bool(interrupt.signal))
            meter.add(metrics)
            run.step += 1
            bar.update()
            if run.step - run.first == 1:
                bar.set_description("training")
            if run.step - run.first <= 3:  # with all that was compiled before
                jax.block_until_ready(metrics)
                bar.unpause()
                say(f"step {run.step} done, {time.time() - run.started:.1f} s after the start")
                warm = time.time()
            elif run.step - run.first == 3 + TIMED:  # the first steps are slower than the rest
                jax.block_until_ready(metrics)
                say(automatic.expected_time((time.time() - warm) / TIMED, run.num_steps - run.step))

            last = run.step == run.num_steps
            keeps = run.due(c.checkpoint.every) or run.due(c.eval.every) or last or stop.now
            if run.due(c.log.every) or keeps:
                values, seconds_per_step = meter.values(lambda: norms_of(run), lambda: intact(run))
                if run.due(c.eval.every) and run.judge and not stop.now:
                    with meter.paused():
                        try:
                            values |= evaluation(run, interrupt)
                        except Interrupted:
                            stop.now = True
                record(run, values, seconds_per_step, bar)
                if keeps or stop.now:
                    save(run, values)
            if stop.now or last:
                return stop.now and not last
            if run.due(c.log.samples_every):
                with meter.paused():
                    pictures(run, f"step_{run.step:07d}.png")
    raise AssertionError("batches are endless")


def batches_of(run: Run) -> Any:
    """This process's part of every batch from the next step on."""
    return batches(
        run.data.images,
        global_batch=run.built.batch_size,
        seed=run.built.seed,
        start_step=run.step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        labels=run.labels,
    )


def norms_of(run: Run) -> dict[str, jax.Array]:
    """The norms of the networks that are trained."""
    trained = "dg" if run.built.method.objective.trains_disc else "g"
    return {name: value for name, value in norms(run.state).items() if name[0] in trained}


def record(run: Run, values: dict[str, float], seconds_per_step: float, bar: tqdm) -> None:
    """Log a record, and tell people."""
    if run.log is None:
        return
    run.log.scalars(run.step, values | {"seconds": run.seconds()})
    line = losses_line(values)
    bar.set_postfix_str(line)
    if bar.disable:
        say(f"step {run.step}/{run.num_steps}: {line}, {clock((run.num_steps - run.step) * seconds_per_step)} to go")


def save(run: Run, values: dict[str, float]) -> None:
    """Begin to save the state; mark it as the best if an evaluation says so."""
    if run.checkpoints is None or run.log is None:
        return
    run.log.flush()
    run.checkpoints.save(run.step, run.state, as_dict(run.config))
    ranked_by = f"eval/{RANKED_BY[run.config.eval.features]}"
    if ranked_by in values and run.checkpoints.offer(run.step, ranked_by, values[ranked_by]):
        say(f"step {run.step} is the best so far: {ranked_by} {values[ranked_by]:.4g}")


def intact(run: Run) -> int | None:
    """In process 0: the step of the newest checkpoint, once the one that is being written is there."""
    assert run.checkpoints
    run.checkpoints.wait()
    return run.checkpoints.steps()[-1] if run.checkpoints.steps() else None


def evaluation(run: Run, interrupt: Interrupt) -> dict[str, float]:
    """The measures of new samples, {} in all processes but the first; Interrupted within a chunk of a signal."""
    assert run.judge
    count = run.config.eval.online_samples
    asked = like_real(run.labels, count)
    chunks = until(interrupt, run.draw.chunks(jax.device_get(run.state.ema_params), 0, count, asked))
    judged = judge(run.judge, chunks, count, labels=asked)
    return {f"eval/{name}": float(value) for name, value in judged.results.items()} if judged else {}


def pictures(run: Run, name: str) -> None:
    """Draw a grid of samples by all devices; process 0 writes it, and the curves so far."""
    images = run.draw(jax.device_get(run.state.ema_params), 0, run.config.sample.grid)
    if run.log:
        grid = figures.picture(images)
        figures.save_image(run.path / "samples" / name, grid)
        run.log.image(run.step, "samples", grid)
        figures.curves(run.path / "metrics.jsonl", run.path / "curves.png")


# --- The end ------------------------------------------------------------------------------------------------------


def finish(run: Run, then: list[str]) -> None:
    """The last pictures and results.json, with the commands to try `then`."""
    pictures(run, "final.png")
    if run.log:
        if run.first < run.num_steps or not paths.exists(run.path / "results.json"):  # a finished one stays as it was
            write_results(run.path, run.step, run.first, run.seconds(), then)
        run.log.close()
    processes.barrier()  # none leaves while process 0 still draws
    end = clock(time.time() - run.started)
    say(f"finished {run.num_steps} steps in {end}: see {run.path / 'samples' / 'final.png'}")
    say("next: " + "\n      ".join(then))


def write_results(workdir: Path, step: int, resumed_from: int, seconds: float, then: list[str]) -> None:
    """Leave results.json: how the run ended, the `seconds` of all its parts together, and its last metrics."""
    records = read_metrics(workdir / "metrics.jsonl")
    results = {
        "step": step,
        "seconds": round(seconds, 1),
        "resumed_from": resumed_from,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "metrics": records[-1] if records else {},
        "next": then,
    }
    paths.write(workdir / "results.json", json.dumps(results, indent=2) + "\n")
