"""Setting up a training run: what must hold before the work begins, and restoring a run that was interrupted."""

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import jax

from ddgan_jax.commands.checks import check_data, check_memory
from ddgan_jax.commands.health import Monitor
from ddgan_jax.commands.progress import overview
from ddgan_jax.commands.run import Files, Run, ranked_by
from ddgan_jax.commands.signals import Interrupt
from ddgan_jax.config.settings import Config, as_dict, flat, read
from ddgan_jax.data.resolve import check_batch, facts, has_all_numbers, labels_of, resolve_from_data
from ddgan_jax.data.sketch import sketch_of
from ddgan_jax.data.sources import Data, open_data, prepare
from ddgan_jax.devices import compiler, parallel, processes
from ddgan_jax.devices.processes import say
from ddgan_jax.errors import Fault, UserError, of_a_folder
from ddgan_jax.method.build import build, init_state, network_fields, notes_on_levels
from ddgan_jax.method.train_step import Method
from ddgan_jax.metrics.evaluator import open_evaluator
from ddgan_jax.metrics.feature_networks import check_last_evaluation
from ddgan_jax.model.loading import check_is_there, load_initial_networks
from ddgan_jax.model.sampler import Sampler
from ddgan_jax.storage import checkpoint, manager, paths, workdir
from ddgan_jax.storage.log import Log, read_metrics
from ddgan_jax.storage.paths import Path

# Settings that the networks were trained with, and that a comparison of parameters does not reveal.
FIXED = (
    *("data.name", "data.scale", "data.image_size", "data.channels", "model.data_std", "diffusion.num_steps"),
    *("diffusion.kind", "diffusion.beta_min", "diffusion.beta_max", "objective"),
)
# Settings that may be chosen for the data and the devices when a run starts, and belong to it from then on.
CHOSEN = {
    "data": ("image_size", "channels"),
    "diffusion": ("beta_max",),
    "train": ("num_steps", "batch_size", "steps_per_epoch"),
    "checkpoint": ("every",),
    "log": ("samples_every",),
}


def set_up(
    config: Any,
    path: Path,
    interrupt: Interrupt,
    lock: contextlib.ExitStack,
    data: Data | None = None,
    restart: bool = False,
    refuse_other_data: bool = False,
) -> Run:
    """Sets up a run in the workdir `path`, or resumes the one there. Raises as `train.train`.

    `lock` holds the workdir as soon as its files are opened. They are read and written while signals are deferred, so
    that none is left half-done.
    """
    started = time.time()
    with interrupt.deferred():
        before = processes.broadcast_from_primary(lambda: None if restart else checkpoint.config_of(path))
    begun = processes.run_on_all(lambda: as_begun(read(config), before, path))
    given = data is not None
    if not given:  # by process 0 first: the others find what is on a shared disk
        processes.run_on_primary(lambda: prepare(that_fits(begun, is_new=before is None).data))
    c, method, data = processes.run_on_all(lambda: _open(begun, data, path, is_new=before is None))
    if jax.process_count() > 1:
        processes.assert_equal_across_processes(facts(c, data))
    labels = labels_of(data, method.denoiser.num_classes, c.data.name)
    shapes, initialize = compiler.trace_once(functools.partial(init_state, method, c.seed))
    check_memory(method, shapes)
    evaluator = open_evaluator(c, data) if c.eval.every else None  # refuses an evaluation that cannot work
    if c.eval.at_end and not given:
        check_last_evaluation(c, data, evaluator is not None)

    def open_all() -> tuple[Files, Any, Future | None]:
        with interrupt.deferred():
            workdir.lock(path, lock)
            overview(method, shapes, method.batch_size // jax.device_count(), data, c.model.dtype)
            sketch = sketch_of(data, labels)
            checkpoints = None if restart else open_checkpoints(path, c)
            restored, saved = restore(checkpoints, shapes, path, c) if checkpoints else (None, {})
            same_path = bool(c.data.path) and before is not None and before["data"]["path"] == c.data.path
            check_data(saved.get("data"), sketch, path, refuse=refuse_other_data or not (given or same_path))
        # May be refused, so before any change
        initial = begin_new_state(c, shapes, initialize) if restored is None else None
        step = 0 if restored is None else int(restored.step)
        with interrupt.deferred():
            with moved_aside(path) if restart else contextlib.nullcontext():
                checkpoints = checkpoints or open_checkpoints(path, c)
                yardstick = evaluator.yardstick if evaluator else ""
                return open_files(path, c, before, step, checkpoints, sketch, saved, yardstick), restored, initial

    files, state, initial = processes.run_on_primary(open_all) or (None, None, None)
    if jax.process_count() > 1:
        state = processes.broadcast_from_primary(lambda: initial.result() if initial else state)
        initial = None
    run = Run(
        config=c,
        method=method,
        data=data,
        labels=labels,
        path=path,
        state=parallel.replicated_shapes(shapes) if initial else parallel.replicate(state),
        initial=initial,
        step=0 if initial else int(state.step),  # type: ignore[union-attr]
        files=files,
        sampler=Sampler(method.denoiser, c.sample.batch_size),
        started=started,
        evaluator=evaluator,
    )
    say_where(run)
    return run


def say_where(run: Run) -> None:
    """Reports the step that the run resumes from, and where its images appear."""
    if run.step >= run.num_steps:
        say(f"{run.path} is at step {run.step}, and train.num_steps is {run.num_steps}: nothing is left to train")
        return
    if run.step:
        say(f"resuming from step {run.step}")
    every = run.config.log.samples_every
    when = f"every {every:,} steps" if every and every < run.num_steps else "at the end"
    files = f"{run.path / 'samples'} and {run.path / 'curves.png'}"
    say(f"{run.num_steps - run.step:,} steps to train; images {when}: {files}")


# --- Settings, data and memory --------------------------------------------------------------------------------------


def as_begun(c: Config, before: dict[str, Any] | None, path: paths.Given) -> Config:
    """The settings with what was chosen when the run in `path` was started, as `before` records it.

    Raises UserError if that run is on other data, or if its networks have other fields or another diffusion.
    """
    if before is None:
        return c
    old, groups = read(before), {}
    for group, names in CHOSEN.items():
        mine, theirs = getattr(c, group), getattr(old, group)
        taken = {name: getattr(theirs, name) for name in names if getattr(mine, name) is None}
        groups[group] = dataclasses.replace(mine, **taken)
    # A command that leaves these out must not delete what an earlier one asked to keep.
    kept, then = groups["checkpoint"], old.checkpoint
    period = math.gcd(kept.keep_period, then.keep_period)  # whose multiples include those of both; gcd(0, n) = n
    groups["checkpoint"] = dataclasses.replace(kept, keep=max(kept.keep, then.keep), keep_period=period)
    for name in ("keep", "keep_period"):
        if getattr(kept, name) != (value := getattr(groups["checkpoint"], name)):
            say(f"note: checkpoint.{name} is {value}, which keeps what {path} was started to keep: delete the rest")
    c = dataclasses.replace(c, **groups)
    now = flat(as_dict(c))
    _check_same({name: now[name] for name in FIXED}, flat(as_dict(old)), path)
    _check_same(network_fields(c), network_fields(old), path)
    return c


def _check_same(now: dict[str, Any], then: dict[str, Any], path: paths.Given) -> None:
    """Raises UserError if a setting of `now` differs from `then`, of the run in `path`."""
    for name, value in now.items():
        if value != then[name]:
            raise UserError(
                f"--workdir={path} holds a run with {name}={then[name]}, and this configuration has {value}: "
                "name another --workdir, or move that run aside with --restart"
            )


def that_fits(config: Any, is_new: bool = True) -> Config:
    """The settings. Raises UserError for those that fit no dataset, as far as that is known before a download."""
    c = read(config)
    if is_new and c.train.init_from:  # later, those networks may be gone
        check_is_there(c.train.init_from)
    if c.train.batch_size:
        check_batch(c.train.batch_size, c.train.accumulate)
    if has_all_numbers(c):
        build(c)
    return c


def _open(c: Config, data: Data | None, path: Path, is_new: bool) -> tuple[Config, Method, Data]:
    """The settings, method and data of a run. The data is decoded after everything else is known to fit."""
    if data is None and c.data.path and checkpoint.absolute(paths.path(c.data.path)) == checkpoint.absolute(path):
        raise UserError(f"--workdir={path} is also data.path, the folder of the images: name another --workdir")
    c, chosen = resolve_from_data(c, data)
    method = build(c)
    check_batch(method.batch_size, c.train.accumulate)
    for sentence in (*chosen, *(notes_on_levels(c) if is_new else [])):
        say(sentence)
    data = data or open_data(c.data)
    if data.images.shape[1:] != method.denoiser.image_shape:
        raise UserError(
            f"dataset {c.data.name} has examples of {list(data.images.shape[1:])}, but model.network="
            f"{c.model.network} is built for {list(method.denoiser.image_shape)}: choose another network or dataset"
        )
    return c, method, data


# --- The files and the state, in process 0 --------------------------------------------------------------------------


@contextlib.contextmanager
def moved_aside(path: Path) -> Iterator[None]:
    """Moves the files of an earlier run aside, and back if the body raises a UserError, as a dashboard may."""
    if aside := workdir.move_aside(path):
        say(f"the files of the earlier run in {path} are now in {aside}")
    try:
        yield
    except UserError:
        if aside:
            workdir.move_back(path, aside)
            say(f"they are back in {path}")
        raise


def open_checkpoints(path: Path, c: Config) -> manager.Checkpoints:
    """The checkpoints of a workdir, which is created. Raises UserError or Fault if it cannot be."""
    with of_a_folder(f"--workdir={path} cannot be used"):
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    return manager.Checkpoints(os.fspath(path), c.checkpoint.keep, c.checkpoint.keep_period)


def restore(checkpoints: manager.Checkpoints, shapes: Any, path: Path, c: Config) -> tuple[Any, dict[str, Any]]:
    """The state of the newest valid checkpoint, and what the run saved beside it; (None, {}) for a new run.

    Raises UserError where the checkpoints are gone, or of another architecture; Fault where all are damaged.
    """
    try:
        restored, saved = checkpoints.restore_latest(shapes)
    except UserError as error:
        raise UserError(f"{error}; name another --workdir, or move that run aside with --restart") from error
    except checkpoint.Damaged as error:
        raise Fault(f"{error}; --restart moves them aside and starts from step 0") from error
    if restored is None and (evidence := workdir.had_checkpoints(path, c.checkpoint.every or 1)):
        raise UserError(
            f"the checkpoints of the run in {path} are gone, though {evidence}: put them back into "
            f"{checkpoints.directory}, or start from step 0 with --restart"
        )
    if restored is None:
        workdir.check_files(path)
    return restored, saved or {}


def begin_new_state(c: Config, shapes: Any, initialize: Callable[[], Any]) -> Future:
    """Begins to compute the state at step 0, on the host. Raises as `loading.load_initial_networks`, before any work.

    With `train.init_from`, the generator starts from the moving average of another one, which is what that one samples
    with; the discriminator starts from the other's if there is one.
    """
    where, gen_params, disc_params = load_initial_networks(c, shapes) if c.train.init_from else ("", None, None)
    if where:
        lacks = "" if disc_params else ", which holds no discriminator: a new one is initialized"
        say(f"the networks are those of {where}{lacks}")

    def compute() -> Any:
        state = jax.device_get(initialize())
        if not where:
            return state
        discriminator = disc_params or state.disc_params
        return state.replace(gen_params=gen_params, ema_params=gen_params, disc_params=discriminator)

    import grain  # noqa: F401  before a thread imports: while grain is imported, it makes all imports lazy

    return compiler.in_background(compute)


def open_files(
    path: Path,
    c: Config,
    before: dict[str, Any] | None,
    step: int,
    checkpoints: manager.Checkpoints,
    sketch: dict[str, Any],
    saved: dict[str, Any],
    yardstick: str,
) -> Files:
    """Opens the files of a run that is at `step`. `saved` is what it saved beside its checkpoint.

    `yardstick` is that of its evaluations (`Evaluator.yardstick`).
    """
    log = Log(path, as_dict(c), c.log, step)  # may refuse the settings, so before any change
    workdir.remove_unfinished(path)
    trains = step < (c.train.num_steps or 0)
    if trains:
        workdir.write_config(path, as_dict(c), before, say)
        checkpoints.set_damaged_aside(say)
    checkpoints.forget_best_after(step)
    checkpoints.find_best(ranked_by(c), yardstick, functools.partial(read_metrics, log.path))
    if trains or not paths.exists(path / "results.json"):  # a kill at the last step may have left an old checkpoint
        checkpoints.prune()
    if saved and saved["log"] not in (log.checksum, log.checksum_before):
        say(f"note: {log.path} is damaged, or was changed: its records differ from those at the last checkpoint")
    monitor = Monitor(read_metrics(log.path), c, ranked_by(c))
    return Files(checkpoints, log, sketch, monitor, saved.get("unlogged") if log.last.get("step") != step else None)
