"""Dashboards of a run: TensorBoard and Weights & Biases, with the same methods.

Both are optional, and imported where they are used: metrics.jsonl holds the same numbers.
"""

import contextlib
import json
import logging
import os
import shlex
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np

from ddgan_jax.errors import UserError
from ddgan_jax.storage import paths
from ddgan_jax.storage.paths import Path


class TensorBoard:
    """Events in `workdir`/tensorboard. Raises ModuleNotFoundError without clu or TensorFlow.

    TensorFlow keeps every Python number that it is given, 0.8 KB each, but not NumPy's numbers.
    """

    def __init__(self, workdir: Path, config: dict[str, Any], step: int):
        with quiet():  # it imports TensorFlow
            from clu import metric_writers
        self._writers, self._events = metric_writers, workdir / "tensorboard"
        # TensorFlow would write to a bucket with credentials of its own, so it writes locally and a thread uploads.
        self._local = tempfile.TemporaryDirectory(prefix="tensorboard") if paths.is_remote(workdir) else None
        self._uploads = paths.BackgroundWrites()
        self._open()
        text = "    " + json.dumps(config, indent=2).replace("\n", "\n    ")  # indented, which Markdown shows as code
        self._writer.write_texts(step, {"config": text})

    def _open(self) -> None:
        folder = self._local.name if self._local else str(self._events)
        self._writer = self._writers.AsyncWriter(self._writers.SummaryWriter(folder))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Shows the metrics of a step."""
        self._writer.write_scalars(np.int64(step), {name: np.float32(value) for name, value in values.items()})

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Shows an image, uint8 [H, W, 3]."""
        self._writer.write_images(np.int64(step), {name: image[None]})

    def flush(self) -> None:
        """Returns when everything is written, or, for a bucket, on its way. Raises OSError if it cannot be.

        TensorBoard reads any number of files. In a bucket, each flush therefore ends a file, which is uploaded once.
        """
        self._writer.flush()
        if self._local:
            self._writer.close()
            self._upload()
            self._open()

    def _upload(self) -> None:
        for name in os.listdir(self._local.name) if self._local else ():
            file = os.path.join(self._local.name, name)  # type: ignore[union-attr]
            with open(file, "rb") as opened:
                self._uploads.write(self._events / name, opened.read())
            os.unlink(file)

    def close(self) -> None:
        """Writes pending events and closes. Raises OSError if they cannot be written."""
        self._writer.flush()
        self._writer.close()
        self._upload()
        self._uploads.wait()
        if self._local:
            self._local.cleanup()


class WeightsAndBiases:
    """A run in a project of Weights & Biases, continued after a resume. Raises ModuleNotFoundError without wandb.

    wandb's own variables choose the account and the server; WANDB_MODE=offline keeps the run in `workdir`.
    """

    def __init__(self, workdir: Path, config: dict[str, Any], project: str, step: int):
        import wandb

        name = workdir / "wandb_id.txt"
        if step == 0 or not paths.exists(name):
            paths.write(name, uuid.uuid4().hex[:8])
        if os.environ.get("WANDB_MODE") == "offline" and paths.is_remote(workdir):
            raise UserError(
                f"WANDB_MODE=offline keeps the run of log.wandb={project} in a local workdir, not in {workdir}: "
                "unset one of the two, or name a local --workdir"
            )
        self._local = tempfile.TemporaryDirectory(prefix="wandb") if paths.is_remote(workdir) else None
        try:
            self._run = wandb.init(
                project=project,
                id=paths.read(name).decode(),
                resume="allow",
                name=workdir.name,
                dir=self._local.name if self._local else str(workdir),
                config=config,
                settings=wandb.Settings(silent=True),
            )
        except wandb.errors.Error as error:  # for instance without an account or a network
            raise UserError(
                f"log.wandb={project}: {error}; log in with `wandb login`, or set WANDB_MODE=offline, which keeps the "
                "run in the workdir"
            ) from error
        self._image = wandb.Image

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Shows the metrics of a step."""
        self._run.log(values, step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Shows an image, uint8 [H, W, 3]."""
        self._run.log({name: self._image(image)}, step=step)

    def flush(self) -> None:
        """Does nothing: wandb sends in the background."""

    def close(self) -> None:
        """Sends pending data and closes."""
        self._run.finish()
        if self._run.offline and not self._local:
            print(f"W&B was offline: `wandb sync {shlex.quote(os.path.dirname(self._run.dir))}` uploads the run")
        if self._local:
            self._local.cleanup()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the notes that TensorFlow and tfds print when they are imported; exceptions are raised.

    TensorFlow 2.21 writes to the file descriptor before it reads any setting of its own.
    """
    absl = logging.getLogger("absl")
    level, stderr, nowhere = absl.level, os.dup(2), os.open(os.devnull, os.O_WRONLY)
    absl.setLevel(logging.ERROR)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
        absl.setLevel(level)
