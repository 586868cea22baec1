"""The format of a checkpoint, and reading one. `manager` saves them.

A checkpoint `workdir/checkpoints/<step>/` holds three items: `state` (every array of the training state except the
moving average), `ema` (the moving average, all that sampling needs) and `config` (JSON: the configuration, a checksum
of every array, and metadata of the training command). Process 0 alone writes arrays from host memory under their paths,
so a checkpoint restores on any number of devices and processes.

Checksums detect later damage. A checkpoint counts as damaged only if its files were read without an error and their
content is wrong. A read that fails is an OSError, and nothing is moved, deleted or overwritten for it.
"""

import errno
import functools
import json
import logging
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from ddgan_jax.errors import Fault, UserError, is_out_of_memory, reason_of
from ddgan_jax.storage import paths
from ddgan_jax.storage.paths import Path

Arrays = dict[str, np.ndarray]
EMA = "ema_params/"


def flatten(tree: Any) -> Arrays:
    """The arrays of a tree, on the host, by their paths with slashes."""
    return {path: np.asarray(leaf) for path, leaf in _by_path(jax.device_get(tree)).items()}


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(arrays: Arrays, like: Any, what: str = "the checkpoint") -> Any:
    """The tree of `like` from arrays by path. Raises UserError where paths, shapes or types differ."""
    expected = _by_path(like)
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


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of arrays by path with slashes."""
    return traverse_util.unflatten_dict(arrays, sep="/")


def check_like(tree: Any, like: Any, what: str) -> None:
    """Raises UserError unless both trees have the same paths, shapes and types."""
    unflatten(flatten(tree), like, what)


def this_process_only() -> ocp.options.MultiprocessingOptions:
    """Options with which Orbax does not wait for the other processes, which do not call it."""
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix="one"
    )


class Damaged(Fault):
    """A file that was read without an error, and whose content is wrong."""


def best(workdir: Path) -> dict[str, Any]:
    """The content of `workdir`/best.json: the step of the best checkpoint, the measure and its value; {} without one.

    Raises OSError if it cannot be read, Damaged if its content is wrong.
    """
    file = workdir / "best.json"
    if not paths.exists(file):
        return {}
    try:
        found = unsealed(json.loads(paths.read(file)))
        if not found.keys() >= {"step", "measure", "value"}:
            raise ValueError("it lacks a field")
        return found
    except ValueError as error:
        raise Damaged(f"{file} is damaged: {error}") from error


def sealed(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON fields with their checksum."""
    return fields | {"checksum": zlib.crc32(json.dumps(fields, sort_keys=True).encode())}


def unsealed(fields: Any) -> dict[str, Any]:
    """The fields of `sealed`, or of an older file without a checksum. Raises ValueError for other fields."""
    if not isinstance(fields, dict):
        raise ValueError("it is no JSON object")
    if "checksum" in fields and sealed({k: v for k, v in fields.items() if k != "checksum"}) != fields:
        raise ValueError("the checksum is wrong")
    of_best = {"step", "measure", "value", "yardstick", "earlier"}
    if not fields.keys() <= of_best | {"config", "checksums", "of_job", "checksum"}:
        raise ValueError("it has other fields")
    return fields


@functools.cache  # once: abandoned reads may report from other threads after the error was handled
def _silence_abandoned_reads() -> None:
    """Silences the reads that Orbax abandons, and closes its event loop on, when one array cannot be read.

    Each of them would print a traceback about the closed loop beside the error that is raised.
    """
    before = sys.unraisablehook

    def hook(what: Any) -> None:
        if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"):
            before(what)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(lambda record: "tensorstore" not in record.getMessage())


def read(path: Path, ema_only: bool = False) -> tuple[Arrays, dict[str, Any]]:
    """The arrays by path, on the host, and the item `config` of one checkpoint directory.

    Raises Damaged if its content is wrong, OSError if it cannot be read.
    """
    if not paths.is_remote(path):
        try:
            return _restore(path.resolve(), ema_only)
        except Exception as error:  # Orbax and TensorStore raise anything, for failed reads as for wrong content
            logging.getLogger(__name__).info("%s is read again: %s", path, reason_of(error))
    # Orbax reads a copy of the files: making the copy finds files that cannot be read, and the rest is damage.
    with tempfile.TemporaryDirectory(prefix="checkpoint") as copy:
        try:
            paths.fetch(path, copy, lambda name: not (ema_only and name.startswith("state/")))
        except MemoryError as error:
            raise OSError(f"the checkpoint {path} cannot be read: {reason_of(error)}") from error
        if not paths.files_below(path):  # a training run deletes its old checkpoints
            if paths.exists(path):
                raise Damaged(f"the checkpoint {path} is damaged (it is empty)")
            raise FileNotFoundError(errno.ENOENT, "The checkpoint was deleted meanwhile", str(path))
        try:
            return _restore(paths.Path(copy), ema_only)
        except Exception as error:  # as above
            if is_out_of_memory(error):
                raise OSError(f"the checkpoint {path} cannot be read: {reason_of(error)}") from error
            reason = reason_of(error).replace(copy, str(path))
            raise Damaged(f"the checkpoint {path} is damaged ({reason})") from error


def _restore(path: Path, ema_only: bool) -> tuple[Arrays, dict[str, Any]]:
    """`read` of a local directory. Raises anything where its content is wrong or cannot be read."""
    _silence_abandoned_reads()
    alone = {"multiprocessing_options": this_process_only()}
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
    arrays = {EMA + key: np.asarray(value) for key, value in found["ema"].items()}
    arrays |= {} if ema_only else {key: np.asarray(value) for key, value in found["state"].items()}
    metadata = unsealed(found["config"])
    for key, checksum in metadata["checksums"].items():
        if (key in arrays or not ema_only) and zlib.crc32(np.ascontiguousarray(arrays[key]).tobytes()) != checksum:
            raise ValueError(f"the checksum of {key} is wrong")
    if not isinstance(metadata["config"], dict):
        raise ValueError("it has no configuration")
    return arrays, metadata


def absolute(path: Path) -> Path:
    """A path that no longer depends on the working directory."""
    return path if paths.is_remote(path) else path.resolve()


def _is_step(name: str) -> bool:
    """Whether a folder of this name may be a checkpoint: a step as `save` writes it, without leading zeros."""
    return re.fullmatch("0|[1-9][0-9]*", name) is not None


def finished(folder: Path, delete_unfinished: bool = False) -> list[int]:
    """The steps of the complete checkpoints in a folder, ascending; [] where there is no such folder.

    A folder named by a number is not enough: the checkpoint must have been written to its end. In a bucket, where
    Orbax writes in place, `delete_unfinished` deletes the others. Raises OSError if the folder cannot be listed.
    """
    marks = ("_CHECKPOINT_METADATA", "config", "ema")
    if paths.is_remote(folder):
        files = paths.files_below(folder)
        found = {name.partition("/")[0] for name in files if "/" in name and _is_step(name.partition("/")[0])}
        done = {step for step in found if f"{step}/commit_success.txt" in files}
        for step in found - done if delete_unfinished else ():
            (folder / step).rmtree()
    else:
        found = {name for name in paths.names(folder) if _is_step(name)}
        done = {step for step in found if any(paths.exists(folder / step / mark) for mark in marks)}
    return sorted(map(int, done))


def find(path: str | os.PathLike) -> Path:
    """The checkpoint directory that `path` names: itself, the newest of a workdir, or the best, as WORKDIR/best.

    Only complete checkpoints count. Raises UserError if there is none, OSError if it cannot be read.
    """
    given = paths.path(path)
    if given.name == "best" and (marked := best(given.parent)):
        given = given.parent / "checkpoints" / str(marked["step"])
    for folder in (given / "checkpoints", given):
        if steps := finished(folder):
            return folder / str(steps[-1])
    if _is_step(given.name) and int(given.name) in finished(given.parent):
        return given
    if given.name == "best" and finished(given.parent / "checkpoints"):
        raise UserError(
            f"there is no best checkpoint in {given.parent}: training marks it with --config.eval.every=N; "
            f"name the latest instead, {given.parent}"
        )
    raise UserError(f"there is no checkpoint in {path}: train there first, or name another workdir or checkpoint")


def metadata_of(directory: Path) -> dict[str, Any]:
    """The item `config` of a checkpoint, with `of_job` of its training. Raises ValueError or OSError."""
    return unsealed(json.loads(paths.read(directory / "config" / "metadata")))


def config_of(workdir: Path) -> dict[str, Any] | None:
    """The configuration in the newest checkpoint of a workdir whose configuration is valid; None without one.

    Raises OSError if it cannot be read.
    """
    for step in reversed(finished(workdir / "checkpoints")):
        try:
            return metadata_of(workdir / "checkpoints" / str(step))["config"]
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError):
            continue  # damaged, which restoring the checkpoint reports
    return None


def restore_ema(path: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The generator's moving average on the host, the item `config` and the step, of a workdir or a checkpoint.

    Raises UserError if there is no checkpoint, Damaged if its content is wrong, OSError if it cannot be read.
    """
    directory = find(path)
    try:
        arrays, metadata = read(directory, ema_only=True)
    except FileNotFoundError:  # a training run has deleted it, after it saved a newer one
        if (newer := find(path)) == directory:
            raise
        directory = newer
        arrays, metadata = read(directory, ema_only=True)
    ema = {key.removeprefix(EMA): value for key, value in arrays.items() if key.startswith(EMA)}
    return nested(ema), metadata, int(directory.name)
