"""The only file that knows there is more than one device; `processes` knows of more than one process.

A train step is written for one replica, with `axis_name` for its averages; `map_step` runs it on every device.
The state is replicated without a leading device axis, the batch is split along its first axis. Randomness belongs
to examples, by their index in the *global* batch, so that the numbers do not depend on how many devices share it.
"""

import collections
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddgan_jax.devices import compiler, processes
from ddgan_jax.errors import UserError

AXIS = "batch"
OLD_PMAP = jax.__version_info__ < (0, 8)  # its compiled program takes and returns arrays of one process, not of all


def map_step(step: Callable, devices: Any = None) -> Any:
    """step(state, batch) of one replica -> on all `devices` (None: all there are), the state donated and replicated."""
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=0, devices=devices)


class Stop:
    """Runs the steps of a loop, and says after which one it is to stop: after the same in every process.

    The processes tell each other with their gradients: the flags of all are added up in each step, and read two steps
    later, when that step is done, so that the devices never wait. No process runs further ahead of them than that.
    """

    AHEAD = 2

    def __init__(self) -> None:
        """Not yet."""
        self.now = False
        self._pending: collections.deque = collections.deque()
        self._flags = [split(np.full(jax.local_device_count(), flag, np.float32)) for flag in (0, 1)]

    def step(self, run: Callable, state: Any, batch: Any, flag: Callable[[], bool]) -> tuple[Any, Any]:
        """run(state, batch) -> (state, metrics); `flag` says whether this process wants to stop."""
        state, metrics = run(state, (batch, self._flags[flag()]))
        self._pending.append(metrics.pop("stop"))
        if len(self._pending) > self.AHEAD:
            self.now = bool(np.asarray(self._pending.popleft()) > 0)
        if jax.process_count() == 1:  # there is nobody to wait for
            self.now = flag()
        return state, metrics

    @classmethod
    def watched(cls, step: Callable) -> Callable:
        """A step of a replica that takes a flag beside its batch, and adds up those of all."""

        def run(state: Any, inputs: tuple[Any, jax.Array]) -> tuple[Any, Any]:
            batch, flag = inputs
            state, metrics = step(state, batch)
            return state, metrics | {"stop": jax.lax.psum(flag[0], AXIS)}

        return run

    def compile(self, steps: Iterable[Callable], state: Any, batch: Any) -> list[Future]:
        """`compile_steps` of steps that are run by `step`."""
        return compile_steps(map(self.watched, steps), state, (batch, self._flags[0]))


def compile_steps(steps: Iterable[Callable], state: Any, batch: Any) -> list[Future]:
    """`map_step` of each, compiled for a `replicate`d state and a `split` batch.

    It is traced with these arrays (a mere shape fails in several processes). Each program is compiled in the background
    as soon as it is traced, beside the others: XLA does much of its work in one thread a program.
    """
    compile_, threads = compiler.compiler_for(state), ThreadPoolExecutor()
    with compiler.collector_paused():
        lowered = (map_step(step).lower(state, batch) for step in steps)
        futures = [threads.submit(compile_, program) for program in lowered]
    threads.shutdown(wait=False)
    return futures


def _sharding(*axes: str) -> NamedSharding:
    devices = jax.local_devices() if OLD_PMAP else jax.devices()
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(*axes))


def replicate(tree: Any) -> Any:
    """Host arrays, the same in every process -> arrays on every device of every process, as `map_step` takes them.

    `device_put` would compare every array over all processes, which takes minutes where they are many.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, _sharding())
    return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), _sharding(), lambda _: x), tree)


def split(batch: Any) -> Any:
    """This process's part of a batch: of arrays [B, ...], arrays on the devices of all processes, [devices, b, ...].

    With `OLD_PMAP`, arrays on the devices of this process. Raises UserError unless B divides by this process's devices.
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


def gather_neighbours(x: jax.Array, axis_name: str | None, multiple: int) -> tuple[jax.Array, jax.Array | int]:
    """Inside a replica: (rows [m b, ...] of m neighbouring replicas, where its own [b, ...] begin among them).

    m is the smallest number for which m b is a multiple of `multiple` (or of the whole batch, if that is smaller), so
    1, without any communication, where b is one already.
    """
    replicas = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    multiple = min(multiple, replicas * x.shape[0])
    m = multiple // math.gcd(multiple, x.shape[0])
    if m == 1 or replicas % m:
        return x, 0
    groups = [list(range(i, i + m)) for i in range(0, replicas, m)]
    rows = jax.lax.all_gather(x, axis_name, axis_index_groups=groups, tiled=True)
    return rows, jax.lax.axis_index(axis_name) % m * x.shape[0]


def accumulate(gradients: Callable[[Any], tuple[Any, Any]], examples: Any, num: int) -> tuple[Any, Any]:
    """`gradients(examples)` -> (gradients of a mean, numbers [B, ...]), from `num` equal parts, one after the other.

    `examples` is a tree of arrays [B, ...]. The results are those of the whole to rounding, in the memory of one part.
    """
    if num == 1:
        return gradients(examples)
    split = jax.tree.map(lambda x: x.reshape(num, len(x) // num, *x.shape[1:]), examples)
    shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], split))[0]

    def add(total: Any, part: Any) -> tuple[Any, Any]:
        found, numbers = gradients(part)
        return jax.tree.map(jnp.add, total, found), numbers

    total, numbers = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), split)
    return jax.tree.map(lambda g: g / num, total), jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), numbers)


def example_keys(key: jax.Array, indices: jax.Array) -> jax.Array:
    """One key [B] for each example, from its index alone."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)


# --- What every process does with its own devices -----------------------------------------------------------------


def map_local(function: Callable, in_axes: tuple[int | None, ...]) -> Callable:
    """`function` of one device -> the same on all of this process's, split along the axes that `in_axes` names."""
    return jax.pmap(function, in_axes=in_axes, devices=jax.local_devices())


def replicate_local(tree: Any) -> Any:
    """Arrays on every device of this process, for what `map_local` does not split."""
    return jax.device_put(tree, NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec()))


def rounds(total: int, per_device: int) -> Iterator[tuple[np.ndarray, int]]:
    """Rounds in which all devices share the items 0..total-1: (indices of this process's part [n], items of the round).

    n is `per_device` times this process's devices in every round; in the last one indices beyond the end are the last
    item again, and their results are to be dropped. `processes.gather_rows` puts the parts together.
    """
    num, devices = processes.num_processes(), jax.local_device_count()
    mine = min(per_device, -(-total // (num * devices))) * devices
    for start in range(0, total, mine * num):
        first = start + processes.process_index() * mine
        yield np.minimum(np.arange(first, first + mine), total - 1), min(mine * num, total - start)
