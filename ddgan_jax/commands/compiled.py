"""The compiled training steps of a run."""

import time
from collections.abc import Callable
from typing import Any

import jax

from ddgan_jax.devices import parallel, processes
from ddgan_jax.devices.processes import say
from ddgan_jax.method.train_step import Method, make_train_step

FROM_CACHE = 8  # seconds that a step takes at most, from the start of tracing, if its program is in the cache


class CompiledSteps:
    """The training steps with and without R1, compiled in the background."""

    def __init__(self, method: Method, seed: int, r1_every: int, stop: parallel.Stop, state: Any, batch: Any):
        """Starts to compile the steps. One step serves where R1 is in every step or in none."""
        say("compiling the training step: seconds for a small network, minutes for a large one")
        self._start = time.time()
        one = r1_every == 1 or not method.losses.has_discriminator
        kinds = [True] if one else [True, False]
        steps = (make_train_step(method, seed, with_r1, parallel.AXIS) for with_r1 in kinds)
        futures = stop.compile(steps, state, batch)
        self._futures = dict(zip(kinds, futures, strict=True))
        self._reported: set[bool] = set()
        if jax.process_count() > 1:  # no process may wait inside a step for another one that still compiles
            for kind in kinds:
                self.get(kind)
            processes.barrier()

    def wait(self, with_r1: bool, check: Callable[[], None], meanwhile: Callable[[], None]) -> None:
        """Returns when the step is compiled. Until then, calls `check`, which may raise.

        Calls `meanwhile` if that takes longer than a program from the cache.
        """
        while not self._futures[self._kind(with_r1)].done():
            check()
            if time.time() - self._start > FROM_CACHE:
                meanwhile()
            time.sleep(0.05)

    def get(self, with_r1: bool) -> Any:
        """The step. The first time, reports the seconds until it was compiled or read from the cache, and its size."""
        kind = self._kind(with_r1)
        step = self._futures[kind].result()
        if kind not in self._reported:
            self._reported.add(kind)
            memory = step.memory_analysis()
            size = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20 if memory else float("nan")
            name = f"the step {'with' if kind else 'without'} R1 " if len(self._futures) > 1 else "the step "
            say(
                f"{name}is ready after {time.time() - self._start:.1f} s: "
                f"{(step.cost_analysis() or {}).get('flops', 0) / 1e9:.3g} GFLOP a step on each device, "
                f"{size:.0f} MiB of device memory"
            )
        return step

    def _kind(self, with_r1: bool) -> bool:
        return with_r1 or len(self._futures) == 1
