"""The training job: set up, loop, finish.

The step is the only clock. Run the same command again and it goes on from the newest checkpoint that is whole, with
the numbers that an unbroken run would have had.
"""

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ddgan_jax.commands import figures
from ddgan_jax.commands.progress import Meter, clock, expected_time, losses_line, next_commands, overview, say
from ddgan_jax.commands.signals import Interrupt, until
from ddgan_jax.config.settings import Config, as_dict, flat, read
from ddgan_jax.data.batches import batches, evenly_spaced, like_real
from ddgan_jax.data.resolve import check_batch, facts, labels_of, resolve_from_data
from ddgan_jax.data.sources import Data, open_data
from ddgan_jax.devices import compiler, parallel, processes
from ddgan_jax.errors import Fault, Interrupted, UserError
from ddgan_jax.method.build import Built, build
from ddgan_jax.method.state import norms, num_bytes
from ddgan_jax.metrics.evaluator import RANKED_BY, Judge, judge, open_judge
from ddgan_jax.model.model import networks_of
from ddgan_jax.model.sampler import Sampler
from ddgan_jax.storage import checkpoint, paths
from ddgan_jax.storage.log import Log, read_metrics
from ddgan_jax.storage.paths import Path

SKETCHED = 64  # examples by which the data of a run is compared with that of its start
TIMED = 20  # steps that the time of a run is foretold from
# Files and folders that a run writes into its workdir, the checkpoints first: until they are moved, a restart can be
# repeated.
WRITTEN = (
    *("checkpoints", "damaged", "best.json", "metrics.jsonl", "results.json", "config.json", "curves.png"),
    *(checkpoint.FIRST, "samples", "tensorboard", "wandb_id.txt", "wandb", "evaluation"),
)
# Settings that the networks were trained with, and that a comparison of parameters does not reveal.
FIXED = (
    *("data.name", "data.scale", "data.image_size", "data.channels", "model.data_std", "diffusion.num_steps"),
    *("diffusion.kind", "diffusion.beta_min", "diffusion.beta_max"),
)
# Settings that may be chosen for the data and the devices when a run starts, and belong to it from then on.
CHOSEN = {
    "data": ("image_size", "channels"),
    "diffusion": ("beta_max",),
    "train": ("num_steps", "batch_size", "steps_per_epoch"),
    "checkpoint": ("every",),
    "log": ("samples_every",),
}


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
    unlogged: dict[str, Any] | None = None  # in process 0: metrics of steps before this one that are in no record yet
    sketch: dict[str, Any] | None = None  # in process 0: of the data
    judge: Judge | None = None

    def __post_init__(self) -> None:
        self.first = self.step
        self.spent = self.log.last.get("seconds", 0.0) if self.log else 0.0  # before this run of the command

    @property
    def num_steps(self) -> int:
        """Where it ends."""
        return self.config.train.num_steps or 0  # which was chosen, if it was not set

    def due(self, every: int | None) -> bool:
        """Is it the step for what is done `every` so many steps? For 0 it never is."""
        return every is not None and every > 0 and self.step % every == 0

    def keeps(self) -> bool:
        """Is it a step with a checkpoint?"""
        c = self.config
        return self.due(c.checkpoint.every) or self.due(c.eval.every) or self.step == self.num_steps

    def logs(self) -> bool:
        """Is it a step with a record?"""
        return self.due(self.config.log.every) or self.keeps()

    def draws(self) -> bool:
        """Is it a step with a picture? The last picture, final.png, is another one."""
        return self.due(self.config.log.samples_every) and self.step < self.num_steps

    def seconds(self) -> float:
        """That the run has taken, with all its parts."""
        return self.spent + time.time() - self.started


def train(config: Any, workdir: str, data: Data | None = None, restart: bool = False) -> Any:
    """Train as `config` says in `workdir`, from its newest checkpoint if there is one; returns the last state.

    `data` is trained on instead of what `config.data` names, for instance `Data(images)` of an array in memory.
    `restart` moves what an earlier run left in `workdir` to `workdir`/before-1 and starts from step 0.

    Leaves checkpoints/, config.json, metrics.jsonl, results.json, curves.png, samples/ and tensorboard/. Raises
    UserError for settings that cannot be, Fault where something outside went wrong, and Interrupted after SIGTERM,
    SIGINT or SIGUSR1 to any process, with the step at which it came saved.
    """
    with Interrupt() as interrupt, contextlib.ExitStack() as lock:
        run = begin(config, workdir, interrupt, lock, data, restart)
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
            same = "the same command without --restart" if restart else "the same command"
            raise Interrupted(f"{came[0]}: saved step {run.step} in {workdir}; run {same} to continue")
    return run.state


@contextlib.contextmanager
def closed_after_a_fault(run: Run) -> Iterator[None]:
    """What raises within may end the process at once: what was begun to be written is written first."""
    try:
        yield
    except BaseException:  # whatever it is, it is raised again
        for part in (run.checkpoints, run.log):
            with contextlib.suppress(Exception):  # the first error is the one to report
                if part:
                    part.close()
        raise


# --- Setting up ---------------------------------------------------------------------------------------------------


def as_begun(c: Config, before: dict[str, Any] | None, workdir: str) -> Config:
    """The settings with what was chosen when the run in `workdir` was started, as `before` records it.

    UserError if that run is on other data, or if its networks know another diffusion.
    """
    if before is None:
        return c
    old, groups = read(before), {}
    for group, names in CHOSEN.items():
        mine, theirs = getattr(c, group), getattr(old, group)
        taken = {name: getattr(theirs, name) for name in names if getattr(mine, name) is None}
        groups[group] = dataclasses.replace(mine, **taken)
    if old.data.name == c.data.name:
        c = dataclasses.replace(c, **groups)
    now, then = flat(as_dict(c)), flat(as_dict(old))
    for name in FIXED:
        if now[name] != then[name]:
            raise UserError(
                f"--workdir={workdir} holds a run with {name}={then[name]}, and this configuration has {now[name]}: "
                "name another --workdir, or move that run aside with --restart"
            )
    return c


def _open(config: Any, opened: Data | None, before: dict[str, Any] | None, workdir: str) -> tuple[Config, Built, Data]:
    """(settings, method, data) of a run. The data is decoded when it fits the rest. UserErrors as of `train`."""
    c, chosen = resolve_from_data(as_begun(read(config), before, workdir), opened)
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


def begin(
    config: Any,
    workdir: str,
    interrupt: Interrupt,
    lock: contextlib.ExitStack,
    opened: Data | None = None,
    restart: bool = False,
) -> Run:
    """Set up a run, or resume one that was interrupted; `lock` will hold the workdir. UserErrors, Faults as of `train`.

    Files are read and written while signals are deferred: in the middle of a restore, an exception is taken for damage.
    """
    started, path = time.time(), paths.path(workdir)
    with interrupt.deferred():
        before = processes.from_primary(lambda: None if restart else checkpoint.config_of(path))
    c, built, data = processes.everywhere(lambda: _open(config, opened, before, workdir))
    if jax.process_count() > 1:
        processes.agree(facts(c, data))
    labels, shapes = labels_of(data, built.num_classes, c.data.name), jax.eval_shape(built.init_state)
    check_memory(built, shapes)
    opened_judge = open_judge(c, data) if c.eval.every else None  # an evaluation that cannot work is refused here
    checkpoints: checkpoint.Checkpoints | None = None
    log: Log | None = None
    unlogged: dict[str, Any] | None = None
    seen: dict[str, Any] | None = None

    def open_files() -> Any:
        """In process 0: the files of the run, and its state on the host, restored or initialised, never both."""
        nonlocal checkpoints, log, unlogged, seen
        restored = saved = None
        with interrupt.deferred():
            lock_workdir(path, lock)
            overview(built, shapes, built.batch_size // jax.device_count(), data)
            seen = sketch(data)
            if not restart:
                checkpoints = open_checkpoints(path, c)
                restored, saved = restore(checkpoints, shapes, path, c)
                same_path = bool(c.data.path) and before is not None and before["data"]["path"] == c.data.path
                check_data((saved or {}).get("data"), seen, path, refuse=opened is None and not same_path)
        state = new_state(c, built, shapes) if restored is None else restored  # which may be refused
        with interrupt.deferred():
            if restart and (aside := paths.move_aside(path, WRITTEN, "before")):
                say(f"what an earlier run left in {workdir} is now in {aside}")
            checkpoints = checkpoints or open_checkpoints(path, c)
            step = int(state.step)
            if step < (c.train.num_steps or 0):
                open_workdir(path, as_dict(c), before)
            log = Log(path, as_dict(c), c.log, step)
            checkpoints.forget_best_after(step)
            checkpoints.find_best(ranked_by(c), functools.partial(read_metrics, log.path))
        if saved:
            unlogged = saved["unlogged"] if log.last.get("step") != step else None
            if saved["log"] not in (log.checksum, log.checksum_before):
                say(
                    f"note: {log.path} is damaged, or was changed: its records differ from those at the last checkpoint"
                )
        return state

    state = processes.from_primary(open_files)
    arrays = parallel.replicate(state)
    step, draw = int(state.step), Sampler(built, c.sample.batch_size)
    run = Run(c, built, data, labels, path, arrays, step, checkpoints, log, started, draw, unlogged, seen)
    run.judge = opened_judge
    if step >= run.num_steps:
        say(f"{workdir} has already finished its {run.num_steps} steps")
    elif step:
        say(f"going on from step {step}")
    if step < run.num_steps:
        every = c.log.samples_every
        when = f"every {every:,} steps" if every else "at the end"
        say(f"{run.num_steps - step:,} steps to train; pictures {when}: {path / 'samples'} and {path / 'curves.png'}")
    return run


def lock_workdir(workdir: Path, lock: contextlib.ExitStack) -> None:
    """Lock a local workdir, which is created, until `lock` is closed or the process ends.

    UserError if another process trains there, or if it cannot be created.
    """
    remote = paths.is_remote(workdir)
    reserved = set("[]\\") & set(str(workdir if remote else workdir.resolve()))
    if reserved:  # Orbax takes them for patterns when it looks for the parts of a checkpoint
        raise UserError(
            f"--workdir={workdir} has {' '.join(sorted(reserved))} in its path, below which no checkpoint can be "
            "written: choose another name"
        )
    if remote:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(workdir, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be used: {error}") from error
    lock.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another process trains in --workdir={workdir}: name another, or wait for its end") from error
    except OSError:  # of a file system without locks
        pass


def sketch(data: Data) -> dict[str, Any]:
    """The number of examples, and the means of up to SKETCHED of them, by which two sets are told apart.

    Another version of an image decoder hardly changes them.
    """
    count = len(data.images)
    some = data.images[evenly_spaced(count, SKETCHED)]
    means = some.reshape(len(some), -1).mean(axis=1, dtype=np.float64)
    close = 2.0 if data.images.dtype == np.uint8 else 1e-3
    return {"count": count, "means": [round(float(mean), 4) for mean in means], "close": close}


def check_data(before: dict[str, Any] | None, now: dict[str, Any], workdir: Path, refuse: bool) -> None:
    """Compare the `sketch` of the data with that `before`, of the checkpoint. Raises UserError, or prints a note.

    Checkpoints of earlier versions hold none.
    """
    if not before or not (other := how_different(before, now)):
        return
    if refuse:
        raise UserError(
            f"--workdir={workdir} holds a run on other data ({other}): name another --workdir, which "
            f"--config.train.init_from={workdir} begins with the networks of this one, or pass --restart"
        )
    say(f"note: the data is not that of the start of the run: {other}")


def how_different(before: dict[str, Any], now: dict[str, Any]) -> str:
    """How two sketches of data differ, or ''."""
    if now["count"] != before["count"]:
        return f"{before['count']:,} examples then, {now['count']:,} now"
    far = sum(abs(a - b) > now["close"] for a, b in zip(now["means"], before["means"], strict=True))
    return f"{far} of {len(now['means'])} examples that are compared differ" if far else ""


def check_memory(built: Built, shapes: Any) -> None:
    """UserError if the state, or a batch, is larger than the memory of a device."""
    device = jax.local_devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf(
        "SC_PAGE_SIZE"
    )
    batch = 4 * math.prod((built.batch_size // jax.device_count(), *built.image_shape))
    for size, what, lower in (
        (
            num_bytes(shapes),
            "the state of networks of this size",
            "generator.nf and discriminator.ngf, or width and depth",
        ),
        (batch, f"a batch of {built.batch_size:,}", "train.batch_size"),
    ):
        if size > memory:
            raise UserError(
                f"{what} takes {size / 2**30:,.0f} GiB, of {memory / 2**30:,.0f} GiB of memory: lower {lower}"
            )


def open_checkpoints(workdir: Path, c: Config) -> checkpoint.Checkpoints:
    """The checkpoints of a workdir, which is created. UserError if it cannot be."""
    try:
        (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be used: {error}") from error
    return checkpoint.Checkpoints(os.fspath(workdir), c.checkpoint.keep, c.checkpoint.keep_period)


def restore(checkpoints: checkpoint.Checkpoints, shapes: Any, workdir: Path, c: Config) -> tuple[Any, Any]:
    """As `checkpoints.restore_latest`; UserError where the checkpoints are gone, or of another architecture."""
    try:
        restored, saved = checkpoints.restore_latest(shapes, say)
    except UserError as error:
        raise UserError(f"{error}; name another --workdir, or move that run aside with --restart") from error
    except checkpoint.Damaged as error:
        raise Fault(f"{error}; --restart moves them aside and starts from step 0") from error
    if restored is None and (evidence := had_checkpoints(workdir, c.checkpoint.every or 1)):
        raise UserError(
            f"the checkpoints of the run in {workdir} are gone, though {evidence}: put them back into "
            f"{checkpoints.directory}, or start from step 0 with --restart"
        )
    return restored, saved


def had_checkpoints(workdir: Path, every: int) -> str:
    """Why a run without checkpoints must have had some, or ''. `every` is the number of steps between two."""
    for name in (checkpoint.FIRST, "best.json", "results.json", "damaged"):
        if paths.exists(workdir / name):
            return f"it has {name}"
    records = read_metrics(workdir / "metrics.jsonl")
    last = records[-1]["step"] if records else 0
    # The second save waits for the first, and the record of its step may be written before it.
    return f"metrics.jsonl has step {last}" if last > 2 * every else ""


def open_workdir(workdir: Path, config: dict[str, Any], before: dict[str, Any] | None) -> None:
    """Write config.json, and note what differs from the configuration `before`. UserError if it cannot be written."""
    if before is not None:
        then, now = flat(as_dict(before)), flat(config)
        if changed := sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name)):
            say(f"note: {workdir} was started with other values of {', '.join(changed)}")
    try:
        paths.write(workdir / "config.json", json.dumps(config, indent=2) + "\n")
        for folder in (workdir, workdir / "samples"):
            paths.remove_unfinished(folder)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be used: {error}") from error


def new_state(c: Config, built: Built, shapes: Any) -> Any:
    """The host state that a run begins with. UserErrors and Faults as of `model.networks_of`, before any work.

    `train.init_from` names other networks than new ones: a D, and the moving average of a G, which is what it samples
    with.
    """
    named = networks_of(c, shapes) if c.train.init_from else None
    state = jax.device_get(compiler.jit_once(built.init_state)())
    if named is None:
        return state
    where, gen_params, disc_params = named
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

    def wait(self, with_r1: bool, check: Callable[[], None]) -> None:
        """Return when the step is compiled; asks `check` until then, which may raise."""
        future = self._futures[with_r1 or len(self._futures) == 1]
        while not future.done():
            check()
            time.sleep(0.05)

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
    meter = Meter(run.built.batch_size, run.step, run.unlogged)
    try:
        catch_up(run, meter, interrupt)
    except Interrupted:
        return True
    if run.step >= run.num_steps:
        return False
    stream, stop = parallel.prefetch(batches_of(run)), parallel.Stop()
    first = next(stream)
    r1_every = run.config.train.r1_every
    steps = Steps(run.built, stop, run.state, first, r1_every)
    hidden = None if processes.is_primary() else True
    with tqdm(
        total=run.num_steps, initial=run.step, desc="compiling", unit="step", disable=hidden, file=sys.stdout
    ) as bar:
        for batch in itertools.chain([first], stream):
            with meter.paused():  # for the compiler: the time to go is that of steps
                if run.step == run.first and jax.process_count() == 1:
                    steps.wait(run.step % r1_every == 0, interrupt.check)
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
                say(expected_time((time.time() - warm) / TIMED, run.num_steps - run.step))

            values: dict[str, float] | None = {}
            if run.keeps() or stop.now:  # before the evaluation, which may fail
                save(run, meter)
            if run.logs():
                values = record(run, meter, interrupt, stop.now, bar)
                stop.now = stop.now or values is None
                offer(run, values or {})
            if stop.now or run.step == run.num_steps:
                return values is None or run.step < run.num_steps
            if run.draws():
                with meter.paused():
                    pictures(run, picture_of(run))
            if run.logs() or run.draws():
                processes.barrier()  # a collective of the next step may give up while process 0 still writes
    raise AssertionError("batches are endless")


def catch_up(run: Run, meter: Meter, interrupt: Interrupt) -> None:
    """Do what a run that broke off has not done at its step: the record, the mark of the best, the picture.

    Interrupted, where a signal ends an evaluation.
    """

    def lacks() -> tuple[bool, bool]:
        assert run.log
        recorded, drawn = run.log.last.get("step") == run.step, paths.exists(run.path / "samples" / picture_of(run))
        return run.logs() and not recorded, run.draws() and not drawn

    if not run.step:
        return
    lacks_record, lacks_picture = processes.from_primary(lacks)
    if lacks_record and record(run, meter, interrupt, False) is None:
        raise Interrupted(interrupt.signal)
    if run.checkpoints and run.log:
        offer(run, run.log.last)
    if lacks_picture:
        pictures(run, picture_of(run))


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


def record(
    run: Run, meter: Meter, interrupt: Interrupt, stops: bool, bar: tqdm | None = None
) -> dict[str, float] | None:
    """Evaluate if it is time, log a record, tell people, and return its values.

    None, with nothing logged, where a signal ended the evaluation, or came before it (`stops`).
    """
    meter.check(lambda: intact(run))
    judged: dict[str, float] = {}
    if run.due(run.config.eval.every) and run.judge:
        try:
            with meter.paused():
                judged = {} if stops else evaluation(run, interrupt)
        except Interrupted:
            stops = True
        if stops:
            return None
    values, seconds_per_step = meter.values(norms_of(run), lambda: intact(run))
    values |= judged
    if run.log:
        run.log.scalars(run.step, values | {"seconds": run.seconds()})
        line = losses_line(values)
        if bar is not None:
            bar.set_postfix_str(line)
        if bar is None or bar.disable:
            left = clock((run.num_steps - run.step) * seconds_per_step)
            say(f"step {run.step}/{run.num_steps}: {line}, {left} to go")
    return values


def save(run: Run, meter: Meter) -> None:
    """Begin to save the state, with the metrics that are in no record yet. Fault, and no save, if it is not finite."""
    meter.check(lambda: intact(run), norms_of(run))
    if run.checkpoints and run.log:
        run.log.flush()
        of_job = {"unlogged": meter.unlogged(), "log": run.log.checksum, "data": run.sketch}
        run.checkpoints.save(run.step, run.state, as_dict(run.config), of_job)


def offer(run: Run, values: dict[str, float]) -> None:
    """Mark the checkpoint of this step as the best if an evaluation among `values` says so."""
    name = ranked_by(run.config)
    if run.checkpoints and name in values and run.checkpoints.offer(run.step, name, values[name]):
        say(f"step {run.step} is the best so far: {name} {values[name]:.4g}")


def ranked_by(c: Config) -> str:
    """The metric of an evaluation while training that says which checkpoint is the best: the smallest."""
    return f"eval/{RANKED_BY[c.eval.features]}"


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
    try:
        judged = judge(run.judge, chunks, count, labels=asked)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:  # of settings, a device, a disk
        if jax.process_count() > 1:  # the others may wait for this process in the middle of it
            raise
        say(f"note: the evaluation at step {run.step} failed, and training continues: {error}")
        return {}
    return {f"eval/{name}": float(value) for name, value in judged.results.items()} if judged else {}


def picture_of(run: Run) -> str:
    """The name of the picture of this step."""
    return f"step_{run.step:07d}.png"


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
