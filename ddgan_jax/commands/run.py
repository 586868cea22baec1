"""The record of a training run, and the questions that its loop asks at each step."""

import dataclasses
import enum
import time
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from ddgan_jax.commands.health import Monitor
from ddgan_jax.config.settings import Config
from ddgan_jax.data.sources import Data
from ddgan_jax.devices import parallel
from ddgan_jax.method.train_step import Method
from ddgan_jax.metrics.evaluator import Evaluator, ranking_measure
from ddgan_jax.model.sampler import Sampler
from ddgan_jax.storage import manager, paths
from ddgan_jax.storage.log import Log
from ddgan_jax.storage.paths import Path


class Outcome(enum.Enum):
    """How a part of a run ended: to its end, or at a signal to any process."""

    DONE = enum.auto()
    STOPPED = enum.auto()


DONE, STOPPED = Outcome


@dataclasses.dataclass
class Files:
    """The files of a run, which process 0 writes."""

    checkpoints: manager.Checkpoints
    log: Log
    sketch: dict[str, Any]  # of the data, to recognise it when the run is resumed
    monitor: Monitor
    unlogged: dict[str, Any] | None = None  # metrics since the last record, from the interrupted part of the run


@dataclasses.dataclass
class Run:
    """A run that is set up: what it trains, and where it stands."""

    config: Config
    method: Method
    data: Data
    labels: np.ndarray | None  # [N], of a class-conditional model
    path: Path
    state: Any  # on every device; its shapes while it is `initial`
    step: int
    files: Files | None  # None in all processes except the first
    sampler: Sampler
    started: float  # time.time()
    evaluator: Evaluator | None = None  # None without evaluations while training
    initial: Future | None = None  # the state at step 0, on the host, while it is computed

    def __post_init__(self) -> None:
        self.first_step = self.step
        self.warm = self.started  # time.time() after the first steps
        self._grid: tuple[int, np.ndarray] | None = None  # the last grid of samples [N, ...], and its step
        self._seconds_before = self.files.log.last.get("seconds", 0.0) if self.files else 0.0

    def open_dashboards(self) -> None:
        """Opens the dashboards of the log, in process 0."""
        if self.files:
            self.files.log.open_dashboards()

    def place_initial_state(self) -> None:
        """Waits for the state of a new run, and copies it to every device."""
        if self.initial:
            self.state, self.initial = parallel.replicate(self.initial.result()), None

    @property
    def num_steps(self) -> int:
        """The step at which the run ends."""
        return self.config.train.num_steps or 0  # a number by now: `resolve_from_data` chose one if none was set

    def is_every(self, every: int | None) -> bool:
        """Whether the step is a multiple of `every`; False for 0 and None."""
        return bool(every) and self.step % every == 0  # type: ignore[operator]

    def is_evaluation_step(self) -> bool:
        """Whether samples are evaluated at this step."""
        return self.evaluator is not None and self.is_every(self.config.eval.every)

    def is_checkpoint_step(self) -> bool:
        """Whether the state is saved at this step."""
        every, c = self.is_every, self.config
        return every(c.checkpoint.every) or every(c.eval.every) or self.step == self.num_steps

    def is_log_step(self) -> bool:
        """Whether a record is logged at this step."""
        return self.is_every(self.config.log.every) or self.is_checkpoint_step()

    def is_sample_step(self) -> bool:
        """Whether a grid of samples is saved at this step. The grid of the last step is final.png instead."""
        return self.is_every(self.config.log.samples_every) and self.step < self.num_steps

    @property
    def samples_file(self) -> Path:
        """The grid of samples of this step."""
        return self.path / "samples" / f"step_{self.step:07d}.png"

    def has_samples(self) -> bool:
        """Whether the grid of samples of this step is saved."""
        return paths.exists(self.samples_file)

    def sample_grid(self) -> np.ndarray:
        """The grid of samples of this step [N, ...], generated once, on all devices."""
        if self._grid is None or self._grid[0] != self.step:
            self._grid = self.step, self.sampler(jax.device_get(self.state.ema_params), 0, self.config.sample.grid)
        return self._grid[1]

    def last_complete_step(self) -> int | None:
        """The step of the newest checkpoint, after the one that is being written; in process 0 alone."""
        assert self.files
        self.files.checkpoints.wait()
        steps = self.files.checkpoints.steps()
        return steps[-1] if steps else None

    def seconds(self) -> float:
        """Wall-clock seconds of the run, including its earlier parts."""
        return self._seconds_before + time.time() - self.started


def ranked_by(c: Config) -> str:
    """The metric that ranks the checkpoints of a run: the smallest value is the best."""
    return f"eval/{ranking_measure(c.eval.features)}"
