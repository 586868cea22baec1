"""The only file that knows there is more than one device.

A train step is written for one replica, with `axis_name` for its averages; `map_step` runs it on every device.
The state is replicated without a leading device axis, the batch is split along its first axis. Randomness belongs
to examples, by their index in the *global* batch, so that the numbers do not depend on how many devices share it.
"""

import collections
import contextlib
import gc
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddgan_jax.errors import UserError

AXIS = "batch"


def map_step(step: Callable, devices: Any = None) -> Any:
    """step(state, batch) of one replica -> on all `devices` (None: all there are), the state donated and replicated."""
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=0, devices=devices)


def compiler_options(runs_once: bool = False, arguments: Any = ()) -> dict[str, Any]:
    """For a training step. On a CPU the highest level compiles longer (33 s against 19 s), for no faster a step.

    Or for what `runs_once`, as making a state does: the random bits of every layer take long to optimise. A program
    whose `arguments`, the state, hold over 2^26 numbers is ordered for little memory: each operation of such large
    networks fills a CPU's threads by itself. Those of small ones do not, and in XLA's own order several run at once.
    """
    if jax.default_backend() != "cpu":
        return {}
    options: dict[str, Any] = {"xla_backend_optimization_level": 0 if runs_once else 1}
    if sum(x.size for x in jax.tree.leaves(arguments)) > 2**26:
        options["xla_cpu_scheduler_type"] = "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    return options


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection, which takes a quarter of tracing and lowering: nearly all that they make is kept."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def compile_steps(steps: Iterable[Callable], state: Any, batch: Any) -> list[Future]:
    """`map_step` of each, compiled for a `replicate`d state and a `split` batch: they take arrays of all processes.

    pmap itself is traced with this process's part of a batch, in host memory (a mere shape fails in several processes).
    Each program is compiled in the background as soon as it is traced, beside the others: XLA does much of its work in
    one thread a program.
    """
    local = jax.tree.map(lambda x: np.zeros((jax.local_device_count(), *x.shape[1:]), x.dtype), batch)
    options = compiler_options(arguments=state)
    threads = ThreadPoolExecutor()
    with collector_paused():
        lowered = (map_step(step).lower(state, local) for step in steps)
        futures = [threads.submit(program.compile, compiler_options=options) for program in lowered]
    threads.shutdown(wait=False)
    return futures


def _sharding(*axes: str) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()), (AXIS,)), PartitionSpec(*axes))


def replicate(tree: Any) -> Any:
    """Arrays of this process -> arrays on every device of every process."""
    return jax.device_put(tree, _sharding())


def split(batch: Any) -> Any:
    """This process's part of a batch: of arrays [B, ...], arrays on the devices of all processes, [devices, b, ...].

    Raises UserError unless B divides by this process's devices.
    """
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(_sharding(AXIS), _rows(x)), batch)


def prefetch(stream: Iterator[Any], ahead: int = 2) -> Iterator[Any]:
    """The batches of `stream`, `split`; the next `ahead` are on their way to the devices while one is used."""
    placed = collections.deque(split(batch) for batch in itertools.islice(stream, ahead))
    while placed:
        placed.extend(split(batch) for batch in itertools.islice(stream, 1))
        yield placed.popleft()


def _rows(batch: np.ndarray) -> np.ndarray:
    n = jax.local_device_count()
    if batch.shape[0] % n:
        raise UserError(f"a batch of {batch.shape[0]} images does not divide by {n} devices: choose a multiple of {n}")
    return batch.reshape(n, batch.shape[0] // n, *batch.shape[1:])


def global_indices(batch_size: int, axis_name: str | None) -> jax.Array:
    """Inside a replica: the indices [batch_size] of its examples in the global batch."""
    replica = 0 if axis_name is None else jax.lax.axis_index(axis_name)
    return replica * batch_size + jnp.arange(batch_size)


def mean(tree: Any, axis_name: str | None) -> Any:
    """Inside a replica: the average over all replicas."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def gather(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Inside a replica: the rows [b, ...] of all replicas, [B, ...], in the order of the global batch."""
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


def previous(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Inside a replica: for each of its rows [b, ...] the one before it in the global batch, for the first the last."""
    before = x[-1:]
    if axis_name is not None:
        n = jax.lax.axis_size(axis_name)
        before = jax.lax.ppermute(before, axis_name, [(i, (i + 1) % n) for i in range(n)])
    return jnp.concatenate([before, x[:-1]])


def example_keys(key: jax.Array, indices: jax.Array) -> jax.Array:
    """One key [B] for each example, from its index alone."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)


def initialize() -> None:
    """Join the other processes, if there are any: on a TPU pod unasked, elsewhere as the environment says.

    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID name the group. Call it before anything
    touches a device. Raises UserError if only some of the three are set.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if os.environ.get(name)]
    if given and len(given) < len(names):
        raise UserError(f"several processes need {', '.join(names)}, but only {', '.join(given)} is set")
    if given:
        address, count, index = (os.environ[name] for name in names)
        if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
            raise UserError(f"JAX_PROCESS_ID={index} must be a number below JAX_NUM_PROCESSES={count}")
        jax.distributed.initialize(address, int(count), int(index))
        barrier()
    elif "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()
        barrier()


def barrier() -> None:
    """Wait for the other processes. Where they meet for the first time in a program, they give up after 30 s."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("barrier")


def leave(exit_code: int) -> None:
    """End this process at once if others work with it: at a usual exit it would wait for them, and they for it."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def is_primary() -> bool:
    """Is this process 0, the only one that writes?"""
    return jax.process_index() == 0


def from_primary(tree: Any) -> Any:
    """Host arrays of process 0, in every process."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def any_process(flag: bool) -> bool:
    """Has any process set its flag? Every process must ask at the same step."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


def map_local(function: Callable, in_axes: tuple[int | None, ...]) -> Callable:
    """`function` of one device -> the same on all of this process's, split along the axes that `in_axes` names."""
    return jax.pmap(function, in_axes=in_axes, devices=jax.local_devices())


def replicate_local(tree: Any) -> Any:
    """Arrays on every device of this process, for what `map_local` does not split."""
    return jax.device_put(tree, NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec()))
