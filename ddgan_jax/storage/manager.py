"""The checkpoints of one training run: saving, which ones stay, the best one, and restoring the newest valid one.

Orbax writes in the background, and a checkpoint is there when it is complete: a folder is renamed into place; in a
bucket a file `commit_success.txt` is written last.
"""

import contextlib
import functools
import json
import logging
import math
import types
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from ddgan_jax.errors import Fault, reason_of
from ddgan_jax.storage import paths
from ddgan_jax.storage.checkpoint import (
    EMA,
    Damaged,
    absolute,
    best,
    finished,
    flatten,
    read,
    sealed,
    this_process_only,
    unflatten,
)

FIRST = "first_checkpoint.json"


class _Best(managers.PreservationPolicy):
    """A preservation policy that keeps the best checkpoint, and the best by earlier yardsticks, with which it does not
    compare; or all of them while the best is not known.

    `marked` is the content of best.json, {} without one, and None while it is not known.
    """

    def __init__(self) -> None:
        self.marked: dict[str, Any] | None = {}
        self.earlier: list[dict[str, Any]] = []  # the best by each of the earlier yardsticks, as in best.json

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        best = [mark.get("step") for mark in (*self.earlier, self.marked or {})]
        return [self.marked is None or checkpoint.step in best for checkpoint in checkpoints]


def _compares(mark: dict[str, Any], measure: str, yardstick: str) -> bool:
    """Whether a value of `measure` by `yardstick` compares with that of a mark."""
    return mark.get("measure") == measure and _one_yardstick(mark, yardstick)


def _one_yardstick(before: dict[str, Any], yardstick: str) -> bool:
    """Whether a record or best.json may have this yardstick; older ones have none."""
    return not yardstick or before.get("yardstick", yardstick) == yardstick


def _is_no_traceback_of_orbax(record: logging.LogRecord) -> bool:
    """Whether a log record may be printed. Orbax logs a traceback of a background fault and also raises the fault."""
    return not (record.exc_info and "orbax" in record.pathname)


class Checkpoints:
    """The checkpoints of one run, for process 0; `close` waits for the last save."""

    def __init__(self, workdir: str, keep: int = 3, keep_period: int = 0):
        """Opens `workdir`/checkpoints, which is created.

        Keeps the last `keep` checkpoints, those whose step is a multiple of `keep_period` (0: none), and the best one.
        """
        self.directory = absolute(paths.path(workdir)) / "checkpoints"
        self._best = _Best()
        policies = [managers.LatestN(keep), self._best]
        policies += [managers.EveryNSteps(keep_period)] if keep_period else []
        self._policy = managers.AnyPreservationPolicy(policies)
        self.directory.mkdir(parents=True, exist_ok=True)
        logging.getLogger("absl").addFilter(_is_no_traceback_of_orbax)
        self._damaged: list[tuple[int, Damaged]] = []
        self._manager, self._noted = paths.retry(self.directory, self._open), False
        try:
            # Without best.json, an earlier part of the run may have had a best checkpoint: `find_best` knows.
            self._best.marked = best(self.directory.parent) or (None if self.steps() else {})
            earlier = (self._best.marked or {}).get("earlier", [])  # steps alone in an older best.json
            self._best.earlier = [mark if isinstance(mark, dict) else {"step": mark} for mark in earlier]
        except Damaged:
            self._best.marked = None

    def _open(self) -> ocp.CheckpointManager:
        """Orbax's manager of the checkpoints on disk. Raises OSError where it does not see all that are listed."""
        steps = finished(self.directory, delete_unfinished=True)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            cleanup_tmp_directories=not paths.is_remote(self.directory),
            multiprocessing_options=this_process_only(),
            create=False,  # Orbax creates directories only if all processes take part
        )
        manager = ocp.CheckpointManager(self.directory, options=options)
        if unseen := set(steps) - set(manager.all_steps()):  # Orbax takes what it cannot read for missing
            manager.close()
            for name in paths.files_below(folder := self.directory / str(max(unseen))):
                paths.read(folder / name)  # raises the cause
            raise OSError(f"the checkpoint {folder} is not seen by Orbax")
        return manager

    def close(self) -> None:
        """Waits until everything is on disk. Raises Fault if it could not be written."""
        self.wait()
        self._manager.close()

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, config: dict[str, Any], of_job: dict[str, Any] | None = None) -> None:
        """Starts to save, and returns when the arrays are copied. Raises Fault if this save or the previous one fails.

        `of_job` is JSON that `restore_latest` returns with the state.
        """
        if step in self.steps():
            return
        arrays = flatten(state)
        checksums = {path: zlib.crc32(np.ascontiguousarray(array).tobytes()) for path, array in arrays.items()}
        ema = {path.removeprefix(EMA): array for path, array in arrays.items() if path.startswith(EMA)}
        rest = {path: array for path, array in arrays.items() if not path.startswith(EMA)}
        metadata = sealed({"config": config, "checksums": checksums, "of_job": of_job})
        self._guard(
            lambda: self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(rest),
                    ema=ocp.args.StandardSave(ema),
                    config=ocp.args.JsonSave(metadata),
                ),
            )
        )

    def update_best(self, step: int, measure: str, value: float, yardstick: str = "") -> bool:
        """Marks the checkpoint of `step` as the best if `value` of `measure` is the smallest so far; returns whether.

        It is then `workdir`/best for `find`, and is kept. NaN and infinity are never the best. Values compare only if
        they are of one measure and `yardstick`, such as the networks and images that samples are compared with; ''
        stands for any. With another one, the best by that one is marked, and the best one so far is kept. Waits until
        the save is complete.
        """
        value = float(f"{value:.6g}")  # rounded as in metrics.jsonl, from which a resumed run takes it
        if not math.isfinite(value):
            return False
        before, steps = self._best.marked or {}, self.steps()
        known = [mark for mark in (before, *self._best.earlier) if mark.get("step") in steps]
        compared = min(
            (mark for mark in known if _compares(mark, measure, yardstick)), key=lambda mark: mark["value"], default={}
        )
        is_best = value < compared.get("value", math.inf)
        if not is_best and compared is before:
            return False
        others = [mark for mark in known if mark is not compared and not _compares(mark, measure, yardstick)]
        self._best.earlier = [{k: v for k, v in mark.items() if k not in ("earlier", "checksum")} for mark in others]
        if is_best:
            self._mark_best(step, measure, value, yardstick)
        else:
            self._mark_best(compared["step"], measure, compared["value"], compared.get("yardstick", ""))
        self.prune()
        return is_best

    @property
    def best(self) -> dict[str, Any]:
        """The marked checkpoint: its `step`, `measure` and `value`; {} if there is none, or if it is not known."""
        return self._best.marked or {}

    def _mark_best(self, step: int, measure: str, value: float, yardstick: str) -> None:
        self.wait()
        further = {"yardstick": yardstick, "earlier": self._best.earlier}
        marked: dict[str, Any] = {"step": step, "measure": measure, "value": value}
        marked |= {name: value for name, value in further.items() if value}
        paths.write(self.directory.parent / "best.json", json.dumps(sealed(marked)) + "\n")
        self._best.marked = marked

    def forget_best_after(self, step: int) -> None:
        """Forgets a best checkpoint after `step`, from which the run resumes."""
        if self._best.marked and self._best.marked["step"] > step:
            self._best.marked = None

    def find_best(self, measure: str, yardstick: str, read_records: Callable[[], list[dict[str, Any]]]) -> None:
        """Marks the best again from the records of the run, if best.json is missing, damaged or forgotten.

        It also does so if the best checkpoint was deleted.
        """
        steps, marked = set(self.steps()), self._best.marked
        if marked == {} or (marked and marked["step"] in steps):
            return
        records = [record for record in read_records() if _one_yardstick(record, yardstick)]
        values = [(record[measure], record["step"]) for record in records if record.get(measure) is not None]
        for value, step in sorted(values):
            if step in steps and not math.isnan(value):
                self._mark_best(step, measure, value, yardstick)
                return
        self._best.marked = {}
        with contextlib.suppress(FileNotFoundError):
            (self.directory.parent / "best.json").unlink()

    def prune(self) -> None:
        """Deletes what Orbax would delete only at the next save: the previous best, or what a kill left."""
        found = [types.SimpleNamespace(step=step) for step in self.steps()]
        for info, stays in zip(found, self._policy.should_preserve(found, context=None), strict=True):
            if not stays:
                self._guard(functools.partial(self._manager.delete, info.step))

    def wait(self) -> None:
        """Returns when everything is on disk. Raises Fault if it could not be written."""
        self._guard(self._manager.wait_until_finished)
        if self.steps():
            self._guard(self._mark_first)

    def _mark_first(self) -> None:
        """Records beside the checkpoints that there was one, so that a later start notices if they are gone."""
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
                f"a checkpoint could not be written to {self.directory} ({reason_of(error)}); "
                + (f"the one of step {safe[-1]} is intact" if safe else "there is no earlier one")
            ) from error

    def restore_latest(self, like: Any) -> tuple[Any, dict[str, Any] | None]:
        """The state of the newest valid checkpoint, in the tree of `like`, and what was saved as its `of_job`.

        Returns (None, None) without any checkpoint. Changes nothing: `set_damaged_aside` moves newer, damaged ones.

        Raises Damaged if all are damaged; OSError if one cannot be read; UserError if it is of another architecture.
        """
        damaged: list[tuple[int, Damaged]] = []
        for step in reversed(self.steps()):
            try:
                arrays, metadata = read(self.directory / str(step))
            except Damaged as error:
                damaged.append((step, error))
                continue
            self._damaged = damaged
            state = unflatten(arrays, like, f"the checkpoint of step {step} in {self.directory}")
            return state, metadata.get("of_job")
        if damaged:
            raise Damaged(f"no checkpoint in {self.directory} is valid, and none was moved: {damaged[0][1]}")
        return None, None

    def set_damaged_aside(self, report: Callable[[str], None]) -> None:
        """Moves the damaged checkpoints that `restore_latest` found after the one it restored to `workdir`/damaged."""
        for step, damage in self._damaged:
            target = self.directory.parent / "damaged" / str(step)
            paths.move(self.directory / str(step), target)
            report(f"{damage}; it is moved to {target}, and the run continues from an earlier checkpoint")
        if self._damaged:
            self._manager.reload()
        self._damaged = []
