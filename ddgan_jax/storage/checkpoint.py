"""Checkpoints: the only file that knows Orbax.

A checkpoint `workdir/checkpoints/<step>/` holds three items: `state` (every array of the training state but the moving
average), `ema` (the moving average, all that sampling needs) and `config` (JSON: the configuration, a checksum of every
array, and what the job wants to find there). Arrays are written from host memory under their paths, by process 0
alone, so that a checkpoint restores on any number of devices and processes. Orbax writes in the background, and a
checkpoint is there when it is finished: a folder is renamed into place, in a bucket a file `commit_success.txt` is
written last.

Checksums detect a checkpoint that was damaged later. One is called damaged only if its files were read without an error
and their content is wrong. A read that fails is an OSError, and nothing is moved, deleted or overwritten for it.
"""

import contextlib
import functools
import json
import logging
import math
import os
import sys
import tempfile
import types
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from ddgan_jax.errors import Fault, UserError, is_out_of_memory
from ddgan_jax.storage import paths
from ddgan_jax.storage.paths import Path

Arrays = dict[str, np.ndarray]
_EMA = "ema_params/"
FIRST = "first_checkpoint.json"


def flatten(tree: Any) -> Arrays:
    """{path with slashes: host array} of a tree of arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def unflatten(arrays: Arrays, like: Any, what: str = "the checkpoint") -> Any:
    """The tree of `like` (arrays or shapes) from {path: array}; UserError where paths, shapes or types differ."""
    expected = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(like)
    }
    for path in sorted(expected.keys() | arrays.keys()):
        if path not in arrays or path not in expected:
            raise UserError(
                f"{what} is of another architecture than the configuration: {path} is only in "
                f"{'the configuration' if path in expected else what}"
            )
        if arrays[path].shape != expected[path].shape or arrays[path].dtype != expected[path].dtype:
            raise UserError(
                f"{what} is of another architecture than the configuration: {path} is "
                f"{arrays[path].dtype}{list(arrays[path].shape)} there and "
                f"{expected[path].dtype}{list(expected[path].shape)} here"
            )
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in expected])


def check_like(tree: Any, like: Any, what: str) -> None:
    """UserError unless both trees have the same paths, shapes and types."""
    unflatten(flatten(tree), like, what)


def nested(arrays: Arrays) -> dict[str, Any]:
    """The tree of {path with slashes: array}."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return tree


def _alone() -> ocp.options.MultiprocessingOptions:
    """Orbax works in this process only; else it would wait for the other processes, which do not call it."""
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix="one"
    )


class Damaged(Fault):
    """A file that was read without an error, and whose content is wrong."""


class _Best(managers.PreservationPolicy):
    """Keeps the best checkpoint, and every one while it is not known which is the best.

    `marked` is the content of best.json, {} without one, and None while it is not known.
    """

    def __init__(self) -> None:
        self.marked: dict[str, Any] | None = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [self.marked is None or checkpoint.step == self.marked.get("step") for checkpoint in checkpoints]


def best(workdir: Path) -> dict[str, Any]:
    """The content of `workdir`/best.json: the step of the best checkpoint, the measure and its value; {} without one.

    OSError if it cannot be read, Damaged if its content is wrong.
    """
    file = workdir / "best.json"
    if not paths.exists(file):
        return {}
    try:
        return _unsealed(json.loads(paths.read(file)))
    except ValueError as error:
        raise Damaged(f"{file} is damaged: {error}") from error


def _sealed(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON fields, with their checksum."""
    return fields | {"checksum": zlib.crc32(json.dumps(fields, sort_keys=True).encode())}


def _unsealed(fields: Any) -> dict[str, Any]:
    """The fields that were `_sealed`, or were written before there were checksums. ValueError if they are others."""
    fields = dict(fields)
    if "checksum" in fields and _sealed({k: v for k, v in fields.items() if k != "checksum"}) != fields:
        raise ValueError("the checksum is wrong")
    if not fields.keys() <= {"step", "measure", "value", "config", "checksums", "of_job", "checksum"}:
        raise ValueError("it has other fields")
    return fields


def _untold(record: logging.LogRecord) -> bool:
    """Orbax logs the traceback of what goes wrong in the background, and raises it again, which is told as a Fault."""
    return not (record.exc_info and "orbax" in record.pathname)


@functools.cache  # for the whole process, since they come from other threads, also after an error is handled
def _silence_reads_that_go_on() -> None:
    """Where one array cannot be read, a Fault says so, and nobody asks for the others: Orbax closes its event loop.

    Each of their reads would print a traceback, that the loop is closed, or that nobody asked.
    """
    before = sys.unraisablehook

    def hook(what: Any) -> None:
        if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"):
            before(what)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(lambda record: "tensorstore" not in record.getMessage())


class Checkpoints:
    """The checkpoints of one run, for process 0; `close` waits for the last save."""

    def __init__(self, workdir: str, keep: int = 3, keep_period: int = 0):
        """Open `workdir`/checkpoints.

        The last `keep` stay, every one whose step `keep_period` divides (0: none), and the one that `offer` found best.
        """
        self.directory = _absolute(paths.path(workdir)) / "checkpoints"
        self._best = _Best()
        policies = [managers.LatestN(keep), self._best]
        policies += [managers.EveryNSteps(keep_period)] if keep_period else []
        self._policy = managers.AnyPreservationPolicy(policies)
        self.directory.mkdir(parents=True, exist_ok=True)
        logging.getLogger("absl").addFilter(_untold)
        try:
            self._best.marked = best(self.directory.parent)
        except Damaged:
            self._best.marked = None
        self._manager, self._noted = paths.retry(self.directory, self._open), False

    def _open(self) -> ocp.CheckpointManager:
        """The manager of the checkpoints that are there. OSError where it sees others than are listed."""
        steps = finished(self.directory, delete_unfinished=True)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            cleanup_tmp_directories=not paths.is_remote(self.directory),
            multiprocessing_options=_alone(),
            create=False,  # Orbax does not create directories for a part of the processes
        )
        manager = ocp.CheckpointManager(self.directory, options=options)
        if not set(steps) <= set(manager.all_steps()):  # Orbax takes what it cannot read for missing
            manager.close()
            raise OSError(f"{self.directory} cannot be listed")
        return manager

    def close(self) -> None:
        """Wait until everything is on disk. Raises Fault if it could not be written."""
        self.wait()
        self._manager.close()

    def steps(self) -> list[int]:
        """The steps that have a finished checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, config: dict[str, Any], of_job: dict[str, Any] | None = None) -> None:
        """Begin to save; returns when the arrays are copied. Raises Fault if this save or the one before fails.

        `of_job` is JSON that `restore_latest` returns.
        """
        if step in self.steps():
            return
        arrays = flatten(state)
        checksums = {path: zlib.crc32(np.ascontiguousarray(array).tobytes()) for path, array in arrays.items()}
        ema = {path.removeprefix(_EMA): array for path, array in arrays.items() if path.startswith(_EMA)}
        rest = {path: array for path, array in arrays.items() if not path.startswith(_EMA)}
        told = _sealed({"config": config, "checksums": checksums, "of_job": of_job})
        self._guard(
            lambda: self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(rest),
                    ema=ocp.args.StandardSave(ema),
                    config=ocp.args.JsonSave(told),
                ),
            )
        )

    def offer(self, step: int, measure: str, value: float) -> bool:
        """Mark the checkpoint of `step` as the best if `value` of `measure` is the smallest so far. Is it?

        It is then `workdir`/best for `find`, and stays. NaN is never the best. Waits until the checkpoint is there.
        """
        value = float(f"{value:.6g}")  # as metrics.jsonl has it, from which a run that broke off offers it again
        before = self._best.marked or {}
        if not value < (before["value"] if before.get("measure") == measure else math.inf):
            return False
        self.wait()
        marked = {"step": step, "measure": measure, "value": value}
        paths.write(self.directory.parent / "best.json", json.dumps(_sealed(marked)) + "\n")
        self._best.marked = marked
        self._prune()
        return True

    def forget_best_after(self, step: int) -> None:
        """Forget a best checkpoint of a later step than `step`, to which a run has gone back."""
        if self._best.marked and self._best.marked["step"] > step:
            self._best.marked = None

    def find_best(self, measure: str, read_records: Callable[[], list[dict[str, Any]]]) -> None:
        """Mark the best again from the records of the run, if best.json is damaged or forgotten; else read nothing."""
        if self._best.marked is not None:
            return
        steps = set(self.steps())
        values = [(record[measure], record["step"]) for record in read_records() if record.get(measure) is not None]
        for value, step in sorted(values):
            if step in steps and self.offer(step, measure, value):
                return
        self._best.marked = {}
        with contextlib.suppress(FileNotFoundError):
            (self.directory.parent / "best.json").unlink()

    def _prune(self) -> None:
        """Delete now what Orbax would delete at the next save: the best so far when another is, or after a kill."""
        found = [types.SimpleNamespace(step=step) for step in self.steps()]
        for info, stays in zip(found, self._policy.should_preserve(found, context=None), strict=True):
            if not stays:
                self._guard(functools.partial(self._manager.delete, info.step))

    def wait(self) -> None:
        """Return when everything is on disk. Raises Fault if it could not be written."""
        self._guard(self._manager.wait_until_finished)
        if self.steps():
            self._guard(self._mark_first)

    def _mark_first(self) -> None:
        """Note beside the checkpoints that there was one, for a start after they are gone."""
        file = self.directory.parent / FIRST
        if not self._noted and not paths.exists(file):
            paths.write(file, json.dumps({"step": self.steps()[0]}) + "\n")
        self._noted = True

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # a full disk surfaces as OSError, ValueError or an XLA error, depending on where
            safe = self.steps()
            raise Fault(
                f"a checkpoint could not be written to {self.directory} ({_reason(error)}); "
                + (f"the one of step {safe[-1]} is intact" if safe else "there is no earlier one")
            ) from error

    def restore_latest(self, like: Any, report: Callable[[str], None]) -> tuple[Any, dict[str, Any] | None]:
        """(the state of the newest valid checkpoint in the tree of `like`, what was saved as `of_job`).

        (None, None) where there is no checkpoint. Newer ones that are damaged are then moved to `workdir`/damaged.

        Raises Damaged, with nothing moved, if all are; OSError if one cannot be read; UserError if it is of
        another architecture.
        """
        damaged: list[tuple[int, Damaged]] = []
        for step in reversed(self.steps()):
            try:
                arrays, told = _read(self.directory / str(step))
            except Damaged as error:
                damaged.append((step, error))
                continue
            state = unflatten(arrays, like, f"the checkpoint of step {step} in {self.directory}")
            for other, damage in damaged:
                target = self.directory.parent / "damaged" / str(other)
                paths.move(self.directory / str(other), target)
                report(f"{damage}; it is moved to {target}, and the run continues from an earlier checkpoint")
            if damaged:
                self._manager.reload()
            self._prune()
            return state, told.get("of_job")
        if damaged:
            raise Damaged(f"no checkpoint in {self.directory} is valid, and none was moved: {damaged[0][1]}")
        return None, None


def read(path: Path, ema_only: bool = False) -> tuple[Arrays, dict[str, Any]]:
    """({path: array}, config) of one checkpoint directory, on the host.

    Raises Damaged if its content is wrong, OSError if it cannot be read.
    """
    arrays, told = _read(path, ema_only)
    return arrays, told["config"]


def _read(path: Path, ema_only: bool = False) -> tuple[Arrays, dict[str, Any]]:
    """({path: array}, what `save` wrote as JSON) of one checkpoint directory. Errors as of `read`."""
    if not paths.is_remote(path):
        try:
            return _restore(path.resolve(), ema_only)
        except Exception as error:  # Orbax and TensorStore raise anything, for failed reads as for wrong content
            logging.getLogger(__name__).info("%s is read again: %s", path, _reason(error))
    # From a copy of its files: if one of them cannot be read, this says so, and what is wrong with the copy is damage.
    with tempfile.TemporaryDirectory(prefix="checkpoint") as copy:
        try:
            paths.fetch(path, copy, lambda name: not (ema_only and name.startswith("state/")))
        except MemoryError as error:
            raise OSError(f"the checkpoint {path} cannot be read: {_reason(error)}") from error
        try:
            return _restore(paths.Path(copy), ema_only)
        except Exception as error:  # as above
            if is_out_of_memory(error):
                raise OSError(f"the checkpoint {path} cannot be read: {_reason(error)}") from error
            reason = _reason(error).replace(copy, str(path))
            raise Damaged(f"the checkpoint {path} is damaged ({reason})") from error


def _reason(error: Exception) -> str:
    """The first line of an error's message, with its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _restore(path: Path, ema_only: bool) -> tuple[Arrays, dict[str, Any]]:
    """`_read` of a local directory. Raises anything where its content is wrong or cannot be read."""
    _silence_reads_that_go_on()
    alone = {"multiprocessing_options": _alone()}
    handlers: dict[str, Any] = {
        "ema": ocp.StandardCheckpointHandler(**alone),
        "config": ocp.JsonCheckpointHandler(**alone),
    }
    items: dict[str, Any] = {"ema": ocp.args.StandardRestore(), "config": ocp.args.JsonRestore()}
    if not ema_only:
        handlers["state"] = ocp.StandardCheckpointHandler(**alone)
        items["state"] = ocp.args.StandardRestore()
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(**alone), **handlers)
    with ocp.Checkpointer(handler, **alone) as checkpointer:
        found = checkpointer.restore(path, args=ocp.args.Composite(**items))
    arrays = {_EMA + key: np.asarray(value) for key, value in found["ema"].items()}
    arrays |= {} if ema_only else {key: np.asarray(value) for key, value in found["state"].items()}
    told = _unsealed(found["config"])
    for key, checksum in told["checksums"].items():
        if (key in arrays or not ema_only) and zlib.crc32(np.ascontiguousarray(arrays[key]).tobytes()) != checksum:
            raise ValueError(f"the checksum of {key} is wrong")
    if not isinstance(told["config"], dict):
        raise ValueError("it has no configuration")
    return arrays, told


def _absolute(path: Path) -> Path:
    return path if paths.is_remote(path) else path.resolve()


def finished(folder: Path, delete_unfinished: bool = False) -> list[int]:
    """The steps of the finished checkpoints in a folder, ascending; [] where there is no such folder.

    A folder that only has a number for its name is none, nor is one that was not written to its end. In a bucket, where
    Orbax writes in place, `delete_unfinished` deletes the latter. OSError if the folder cannot be listed.
    """
    marks = ("_CHECKPOINT_METADATA", "config", "ema")
    if paths.is_remote(folder):
        files = paths.files_below(folder)
        found = {name.partition("/")[0] for name in files if "/" in name and name.partition("/")[0].isdigit()}
        done = {step for step in found if f"{step}/commit_success.txt" in files}
        for step in found - done if delete_unfinished else ():
            (folder / step).rmtree()
    else:
        found = {name for name in paths.names(folder) if name.isdigit()}
        done = {step for step in found if any(paths.exists(folder / step / mark) for mark in marks)}
    return sorted(map(int, done))


def find(path: str | os.PathLike) -> Path:
    """The checkpoint directory that `path` names: itself, the newest of a workdir, or the best, as WORKDIR/best.

    One that was not written to its end is none. Raises UserError if there is none, OSError if it cannot be read.
    """
    given = paths.path(path)
    if given.name == "best" and (marked := best(given.parent)):
        given = given.parent / "checkpoints" / str(marked["step"])
    for folder in (given / "checkpoints", given):
        if steps := finished(folder):
            return folder / str(steps[-1])
    if given.name.isdigit() and int(given.name) in finished(given.parent):
        return given
    raise UserError(f"there is no checkpoint in {path}: train there first, or name another workdir or checkpoint")


def config_of(workdir: Path) -> dict[str, Any] | None:
    """The configuration in the newest checkpoint of a workdir, of those where it is not damaged; None without one.

    OSError if it cannot be read.
    """
    for step in reversed(finished(workdir / "checkpoints")):
        try:
            file = workdir / "checkpoints" / str(step) / "config" / "metadata"
            return _unsealed(json.loads(paths.read(file)))["config"]
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError):
            continue  # damaged, as restoring it will say
    return None


def restore_ema(path: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """(moving-average parameters of G, configuration, step) of a workdir or a checkpoint, on the host.

    Needs neither data nor TensorFlow, tfds, clu or ml_collections. Raises UserError if there is none, Fault if damaged.
    """
    directory = find(path)
    arrays, config = read(directory, ema_only=True)
    ema = {key.removeprefix(_EMA): value for key, value in arrays.items() if key.startswith(_EMA)}
    return nested(ema), config, int(directory.name)
