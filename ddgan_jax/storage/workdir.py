"""The folder of a run: its lock, its configuration, and what an earlier run left in it."""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Callable
from typing import Any

from ddgan_jax.config.settings import as_dict, flat
from ddgan_jax.errors import UserError, of_a_folder
from ddgan_jax.storage import manager, paths
from ddgan_jax.storage.log import read_metrics
from ddgan_jax.storage.paths import Path

# Files and folders that a run writes into its workdir, the checkpoints first: until they are moved, a restart can be
# repeated.
WRITTEN = (
    *("checkpoints", "damaged", "best.json", "metrics.jsonl", "results.json", "config.json", "curves.png"),
    *(manager.FIRST, "samples", "tensorboard", "wandb_id.txt", "wandb", "evaluation"),
)


def lock(path: Path, held: contextlib.ExitStack) -> None:
    """Creates a local workdir and locks it until `held` is closed or the process ends.

    Raises UserError if another process trains there, or if the path cannot be used; Fault if the disk fails. In a
    bucket there are no locks.
    """
    remote = paths.is_remote(path)
    reserved = set("[]\\") & set(str(path if remote else path.resolve()))
    if reserved:  # Orbax takes them for patterns when it looks for the parts of a checkpoint
        raise UserError(
            f"--workdir={path} has {' '.join(sorted(reserved))} in its path, below which no checkpoint can be "
            "written: choose another name"
        )
    if path.name.endswith((".pth", ".safetensors")):
        raise UserError(f"--workdir={path} has the name of a file of weights: choose another name for the folder")
    if remote:
        return
    try:
        str(path.resolve()).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"--workdir={str(path)!r} is not valid UTF-8, as Orbax needs: choose another name") from error
    with of_a_folder(f"--workdir={path} cannot be used"):
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
    held.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another process trains in --workdir={path}: name another, or wait for its end") from error
    except OSError:  # of a file system without locks
        pass


def move_aside(path: Path) -> Path | None:
    """Moves what an earlier run wrote to a folder before-N of the workdir, which is returned; None without any.

    If the process is killed meanwhile, the next call continues in the same folder; in a bucket, where files are copied
    first, in another one. The checkpoints are moved first, and a new run creates their folder first.
    """
    found = [entry for entry in WRITTEN if paths.exists(path / entry)]
    if not found:
        return None
    number = 1
    while paths.exists(path / f"before-{number}"):
        number += 1
    last = path / f"before-{number - 1}"
    interrupted = number > 1 and "checkpoints" not in found and not any(paths.exists(last / entry) for entry in found)
    target = last if interrupted else path / f"before-{number}"
    for entry in found:
        paths.move(path / entry, target / entry)
    return target


def move_back(path: Path, aside: Path) -> None:
    """Undoes `move_aside` for a command that is refused: the files replace those that it has written since."""
    for entry in reversed(WRITTEN):
        if paths.exists(aside / entry):
            paths.move(aside / entry, path / entry)
    if not paths.is_remote(path):
        aside.rmdir()


def had_checkpoints(path: Path, every: int) -> str:
    """Why a run without checkpoints must have had some, or ''. `every` is the number of steps between two."""
    for name in (manager.FIRST, "best.json", "results.json", "damaged"):
        if paths.exists(path / name):
            return f"it has {name}"
    records = read_metrics(path / "metrics.jsonl")
    last = records[-1]["step"] if records else 0
    # The second save waits for the first, and the record of its step may be written before it.
    return f"metrics.jsonl has step {last}" if last > 2 * every else ""


def check_files(path: Path) -> None:
    """Raises UserError if a workdir without checkpoints has a config.json or metrics.jsonl that no run wrote."""
    config = paths.read(path / "config.json") if paths.exists(path / "config.json") else None
    log = paths.exists(path / "metrics.jsonl") and paths.read(path / "metrics.jsonl")
    try:
        ours = config is not None and {"data", "train", "diffusion"} <= {*json.loads(config)}
    except (ValueError, TypeError):
        ours = False
    if not ours and (log or config is not None):
        name = "metrics.jsonl" if config is None else "config.json"
        raise UserError(
            f"--workdir={path} has a {name} that is not of a run: name another --workdir, or move it aside with "
            "--restart"
        )


def remove_unfinished(path: Path) -> None:
    """Removes the files that a kill of an earlier part of the run left half-written."""
    paths.remove_unfinished(path, "|".join(map(re.escape, WRITTEN)))
    paths.remove_unfinished(path / "samples", r"(step_[0-9]+|final)\.png")


def write_config(
    path: Path, config: dict[str, Any], before: dict[str, Any] | None, report: Callable[[str], None]
) -> None:
    """Writes config.json, reports which fields differ from `before`, and removes results.json of an earlier end.

    Raises OSError if they cannot be written.
    """
    if before is not None:
        then, now = flat(as_dict(before)), flat(config)
        if changed := sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name)):
            report(f"note: {path} was started with other values of {', '.join(changed)}")
    paths.write(path / "config.json", json.dumps(config, indent=2) + "\n")
    with contextlib.suppress(FileNotFoundError):  # of an earlier end, after which the run continues
        (path / "results.json").unlink()
