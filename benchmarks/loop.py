"""How many steps a second the training loop sustains where a step costs nothing; a JSON line at the end.

    python -m benchmarks.loop --config=configs/cifar10.py

Everything that `train` does between two steps is done: batches are gathered and placed, the step is dispatched on
the whole state, metrics are kept, a record is written every `config.log.every` steps. Only the step itself is replaced
by one that counts. Where a device's own step is faster than this, it waits for the host. --profile=1 prints what the
host's time goes to. No checkpoint and no picture is made on the way.
"""

import cProfile
import pathlib
import pstats
import tempfile
import time
import types
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from ddgan_jax.commands import compiled, train
from ddgan_jax.commands.health import Monitor
from ddgan_jax.commands.progress import say
from ddgan_jax.commands.run import Files, Run, ranked_by
from ddgan_jax.commands.signals import Interrupt
from ddgan_jax.config.settings import LogConfig, read
from ddgan_jax.data.sources import Data
from ddgan_jax.devices import parallel
from ddgan_jax.method.build import init_state
from ddgan_jax.method.train_step import make_train_step
from ddgan_jax.model.sampler import Sampler
from ddgan_jax.storage.log import Log, read_metrics

IMAGES = 50_000


def make_free_step(*args: Any) -> Callable:
    """A step that only counts, with metrics of the names and shapes of `make_train_step(*args)`."""
    real = make_train_step(*args)

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        metrics = jax.eval_shape(real, state, batch)[1]
        first = jax.tree.leaves(batch)[0].ravel()[0].astype(jnp.float32)  # so that the batch must be on the device
        return state.replace(step=state.step + 1), {
            name: jnp.full(m.shape, 1, m.dtype) + 0 * first.astype(m.dtype) for name, m in metrics.items()
        }

    return step


def main() -> None:
    """Run the loop and print."""
    config, flags = measure.configuration("configs/cifar10.py", steps=2_000, profile=0)
    config.train.num_steps = config.checkpoint.every = config.log.samples_every = flags.steps
    config.log.tensorboard = False
    method = measure.build_for(config, config.train.batch_size)
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, *method.denoiser.image_shape), np.uint8)
    shapes = jax.eval_shape(partial(init_state, method, 0))
    state = parallel.replicate(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))
    with tempfile.TemporaryDirectory() as folder, Interrupt() as interrupt:
        path = pathlib.Path(folder)
        c = read(config)
        log = Log(path, {}, LogConfig(tensorboard=False), 0)
        draw = Sampler(method.denoiser, c.sample.batch_size)
        nowhere = types.SimpleNamespace(save=lambda *_: None, wait=lambda: None, steps=list)
        files = Files(nowhere, log, {}, Monitor([], c, ranked_by(c)))
        run = Run(c, method, Data(images), None, path, state, 0, files, draw, time.time())
        profile = cProfile.Profile() if flags.profile else None
        if profile:
            profile.enable()
        with mock.patch.object(compiled, "make_train_step", make_free_step):
            train.loop(run, interrupt)
        if profile:
            profile.disable()
        rates = [record["images_per_second"] / method.batch_size for record in read_metrics(path / "metrics.jsonl")]
    if profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(15)
    found = {"batch": method.batch_size, "steps_per_second": measure.median(rates)}
    say(f"{found['steps_per_second']} steps a second of {method.batch_size} images, the median of {len(rates)} records")
    measure.print_line(found)


if __name__ == "__main__":
    measure.run(main)
