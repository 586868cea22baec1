"""What a run says while it trains: metrics.jsonl, one record a line, and TensorBoard."""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from ddgan_jax.data.sources import quiet
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.storage import paths
from ddgan_jax.storage.paths import Path

SECONDS_BETWEEN_UPLOADS = 30  # a file in a bucket cannot be appended to: it is written whole


def read_metrics(path: paths.Given) -> list[dict]:
    """The records of a metrics.jsonl; a last line that was cut off is left out."""
    records = []
    for line in paths.read(path).decode().splitlines() if paths.exists(path) else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Log:
    """The metrics and pictures of a run, for process 0.

    A record in a local file is there at once, in a bucket within half a minute, and everywhere after `flush`.
    """

    def __init__(self, workdir: Path, config: dict[str, Any], tensorboard: bool | None, start_step: int):
        """Open the log; records of steps after `start_step`, from a run that broke off, are dropped.

        With `tensorboard`, or None and clu installed, it also writes for TensorBoard. UserError if it is to, and clu is
        missing; Fault if it cannot be written.
        """
        self.path = workdir / "metrics.jsonl"
        records = [record for record in read_metrics(self.path) if record["step"] <= start_step]
        self.seconds = records[-1].get("seconds", 0.0) if records else 0.0  # that the steps so far took, with all else
        lines = [json.dumps(record) + "\n" for record in records]
        self._uploaded, self._file, self._writer = time.time(), None, None
        with self._guard():
            paths.write(self.path, "".join(lines))
            if not paths.is_remote(self.path):
                self._file = open(self.path, "a")
        self._lines = lines if self._file is None else []  # in a bucket: what the file is to hold
        if tensorboard is False:
            return
        try:
            with quiet():  # it imports TensorFlow
                from clu import metric_writers
        except ModuleNotFoundError as error:
            if tensorboard is None:
                return
            raise UserError(
                f"log.tensorboard=True needs {error.name}: run `pip install clu tensorflow-cpu tensorboard`, or set it "
                "to False"
            ) from error
        self._events = workdir / "tensorboard"
        # TensorFlow has its own way to a bucket, with its own credentials: what it writes goes there by ours.
        self._local = tempfile.TemporaryDirectory(prefix="tensorboard") if paths.is_remote(workdir) else None
        folder = self._local.name if self._local else str(self._events)
        self._writer = metric_writers.AsyncWriter(metric_writers.SummaryWriter(folder))
        text = "    " + json.dumps(config, indent=2).replace("\n", "\n    ")  # indented: Markdown shows it as it is
        self._writer.write_texts(start_step, {"config": text})

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Append one record. Raises Fault if it cannot be written."""
        line = json.dumps({"step": step} | {k: float(f"{v:.6g}") for k, v in values.items()}) + "\n"
        with self._guard():
            if self._file:
                self._file.write(line)
                self._file.flush()
            else:
                self._lines.append(line)
                if time.time() - self._uploaded > SECONDS_BETWEEN_UPLOADS:
                    self._upload()
        if self._writer:
            self._writer.write_scalars(step, values)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Show uint8 [H, W, 3] in TensorBoard."""
        if self._writer:
            self._writer.write_images(step, {name: image[None]})

    def flush(self) -> None:
        """Return when all records are where they belong. Raises Fault if they cannot be written."""
        with self._guard():
            if not self._file:
                self._upload()
            if self._writer:
                self._writer.flush()
                for name in os.listdir(self._local.name) if self._local else ():
                    with open(os.path.join(self._local.name, name), "rb") as file:  # type: ignore[union-attr]
                        paths.write(self._events / name, file.read())

    def close(self) -> None:
        """Write what is pending. Raises Fault if it cannot be written."""
        self.flush()
        if self._file:
            self._file.close()
        if self._writer:
            self._writer.close()
            if self._local:
                self._local.cleanup()

    def _upload(self) -> None:
        paths.write(self.path, "".join(self._lines))
        self._uploaded = time.time()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise Fault(f"{error}; the checkpoints are intact") from error
