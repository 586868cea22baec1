"""The log of a run: metrics.jsonl, one record per line, and the dashboards that are enabled."""

import contextlib
import functools
import importlib.util
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ddgan_jax.config.settings import LogConfig
from ddgan_jax.devices.processes import say
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.storage import paths
from ddgan_jax.storage.dashboards import TensorBoard, WeightsAndBiases
from ddgan_jax.storage.paths import Path

SECONDS_BETWEEN_UPLOADS = 30  # a file in a bucket cannot be appended to, so it is rewritten


def as_json(value: Any, **how: Any) -> str:
    """JSON with null for NaN and infinity, which JSON lacks; `how` are options of json.dumps."""
    return json.dumps(json.loads(json.dumps(value, default=float), parse_constant=lambda _: None), **how)


def as_recorded(values: dict[str, float]) -> dict[str, float]:
    """The values with the digits that a record has, six."""
    return {name: float(f"{value:.6g}") for name, value in values.items()}


def read_metrics(path: paths.Given, at_most: int | None = None) -> list[dict]:
    """The records of a metrics.jsonl without damaged lines, such as a truncated last one.

    None stands for a value that was not finite. `at_most` limits the number of records: evenly spaced ones, and all
    that hold an evaluation.
    """
    lines = paths.read(path).splitlines() if paths.exists(path) else []
    every = max(1, math.ceil(len(lines) / at_most)) if at_most else 1
    records = []
    for i, line in enumerate(lines, start=1 - len(lines)):  # so that the last is always included
        if i % every and b'"eval/' not in line:
            continue
        with contextlib.suppress(ValueError):
            record = json.loads(line, parse_constant=lambda _: None)  # of older logs, which hold NaN
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def _checksum(lines: str, before: int = 0) -> int:
    """CRC-32 of lines in the form of older logs, with NaN for null: checkpoints hold checksums of that form."""
    return zlib.crc32(lines.replace(": null", ": NaN").encode(), before)


class Log:
    """The metrics and images of a run, in process 0.

    A record is in a local file immediately, in a bucket within half a minute, and everywhere after `flush`.
    """

    def __init__(self, workdir: Path, config: dict[str, Any], settings: LogConfig, start_step: int):
        """Opens the log and drops the records after `start_step`, which an interrupted run left.

        Raises UserError if an enabled dashboard is not installed, before anything is changed; Fault if the log cannot
        be written.
        """
        self.path = workdir / "metrics.jsonl"
        records = [record for record in read_metrics(self.path) if record["step"] <= start_step]
        # The finite values of the last record that stays
        self.last = {k: v for k, v in records[-1].items() if v is not None} if records else {}
        lines = [json.dumps(record) + "\n" for record in records]
        self.checksum = _checksum("".join(lines))  # over all records
        earlier = lines[:-1] if self.last.get("step") == start_step else lines
        self.checksum_before = _checksum("".join(earlier))  # over those before `start_step`
        self._dashboards: list[TensorBoard | WeightsAndBiases] = []
        self._open_tensorboard = self._tensorboard(workdir, config, settings.tensorboard, start_step)
        if settings.wandb and importlib.util.find_spec("wandb") is None:
            raise UserError(f"log.wandb={settings.wandb} needs wandb: run `pip install wandb`")
        if settings.wandb:
            self._dashboards.append(WeightsAndBiases(workdir, config, settings.wandb, start_step))
        self._uploads, self._uploaded, self._file = paths.BackgroundWrites(), time.time(), None
        with self._guard():
            paths.write(self.path, "".join(lines))
            if not paths.is_remote(self.path):
                self._file = open(self.path, "a")
        self._lines = lines if self._file is None else []  # the content of the file, where it is in a bucket

    def open_dashboards(self) -> None:
        """Opens TensorBoard, if it is not open. Raises Fault if it cannot be written.

        It is otherwise opened at the first record, because it imports TensorFlow, which takes seconds.
        """
        if opening := self._open_tensorboard:
            self._open_tensorboard = None
            try:
                with self._guard():
                    self._dashboards.append(opening())
            except ImportError as error:  # of an installation that is broken
                say(f"note: no events for TensorBoard are written: {error}")

    def scalars(self, step: int, values: dict[str, float], about: dict[str, Any] | None = None) -> None:
        """Appends one record, with texts, or lists of them, `about` it. Raises Fault if it cannot be written."""
        line = as_json({"step": step} | as_recorded(values) | (about or {})) + "\n"
        self.checksum = _checksum(line, self.checksum)
        with self._guard():
            if self._file:
                self._file.write(line)
                self._file.flush()
            else:
                self._lines.append(line)
                if time.time() - self._uploaded > SECONDS_BETWEEN_UPLOADS:
                    self._upload()
        self.open_dashboards()
        for dashboard in self._dashboards:
            dashboard.scalars(step, values)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Shows an image, uint8 [H, W, 3], in the dashboards."""
        self.open_dashboards()
        for dashboard in self._dashboards:
            dashboard.image(step, name, image)

    def flush(self) -> None:
        """Returns when all records are written. Raises Fault if they cannot be."""
        with self._guard():
            if not self._file:
                self._upload()
                self._uploads.wait()
            for dashboard in self._dashboards:
                dashboard.flush()

    def close(self) -> None:
        """Writes pending records and closes. Raises Fault if they cannot be written."""
        with self._guard():
            if self._file:
                self._file.close()
            else:
                self._upload()
                self._uploads.wait()
            for dashboard in self._dashboards:
                dashboard.close()

    @staticmethod
    def _tensorboard(workdir: Path, config: dict, wanted: bool | None, step: int) -> Callable[[], TensorBoard] | None:
        """A function that opens TensorBoard, or None. Raises UserError if it is `wanted` and not installed."""
        missing = [name for name in ("clu", "tensorflow", "tensorboard") if importlib.util.find_spec(name) is None]
        if missing and wanted:
            raise UserError(
                f"log.tensorboard=True needs {missing[0]}: run `pip install clu tensorflow tensorboard`, "
                "or set it to False"
            )
        return None if missing or wanted is False else functools.partial(TensorBoard, workdir, config, step)

    def _upload(self) -> None:
        self._uploads.write(self.path, "".join(self._lines))
        self._uploaded = time.time()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise Fault(f"{error}; the checkpoints are intact") from error
