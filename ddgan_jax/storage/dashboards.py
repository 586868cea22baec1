"""Where people look at a run from afar: TensorBoard and Weights & Biases, with the same methods.

They are optional, and imported where they are asked for: metrics.jsonl holds the same numbers.
"""

import contextlib
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np

from ddgan_jax.errors import UserError
from ddgan_jax.storage import paths
from ddgan_jax.storage.paths import Path


class TensorBoard:
    """Events in `workdir`/tensorboard. ModuleNotFoundError without clu or TensorFlow.

    TensorFlow keeps every Python number that it was ever given, 0.8 KB each, but not those of NumPy.
    """

    def __init__(self, workdir: Path, config: dict[str, Any], step: int):
        with quiet():  # it imports TensorFlow
            from clu import metric_writers
        self._events = workdir / "tensorboard"
        # TensorFlow has its own way to a bucket, with its own credentials: what it writes goes there by ours.
        self._local = tempfile.TemporaryDirectory(prefix="tensorboard") if paths.is_remote(workdir) else None
        folder = self._local.name if self._local else str(self._events)
        self._writer = metric_writers.AsyncWriter(metric_writers.SummaryWriter(folder))
        text = "    " + json.dumps(config, indent=2).replace("\n", "\n    ")  # indented: Markdown shows it as it is
        self._writer.write_texts(step, {"config": text})

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Show the metrics of a step."""
        self._writer.write_scalars(np.int64(step), {name: np.float32(value) for name, value in values.items()})

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Show uint8 [H, W, 3]."""
        self._writer.write_images(np.int64(step), {name: image[None]})

    def flush(self) -> None:
        """Return when all is where it belongs. OSError if it cannot be written."""
        self._writer.flush()
        for name in os.listdir(self._local.name) if self._local else ():
            with open(os.path.join(self._local.name, name), "rb") as file:  # type: ignore[union-attr]
                paths.write(self._events / name, file.read())

    def close(self) -> None:
        """Write what is pending."""
        self.flush()
        self._writer.close()
        if self._local:
            self._local.cleanup()


class WeightsAndBiases:
    """The run in a project of Weights & Biases, the same one after a resume. ModuleNotFoundError without wandb.

    Where it goes, and under whose name, is told by wandb's own variables: WANDB_MODE=offline keeps it in `workdir`.
    """

    def __init__(self, workdir: Path, config: dict[str, Any], project: str, step: int):
        import wandb

        name = workdir / "wandb_id.txt"
        if step == 0 or not paths.exists(name):
            paths.write(name, uuid.uuid4().hex[:8])
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
        except wandb.errors.Error as error:  # of an account, a network
            raise UserError(f"log.wandb={project}: {error}; WANDB_MODE=offline keeps the run here") from error
        self._image = wandb.Image

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Show the metrics of a step."""
        self._run.log(values, step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Show uint8 [H, W, 3]."""
        self._run.log({name: self._image(image)}, step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        """Send what is pending."""
        self._run.finish()
        if self._local:
            self._local.cleanup()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the notes of TensorFlow and tfds on what they find and how they were built; exceptions come through.

    TensorFlow 2.21 writes to the file descriptor, before any setting of its own is read.
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
