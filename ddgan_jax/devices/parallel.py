"""Several devices: the only module that places arrays on them, and the collectives of a training step.

A training step is written for one replica, with `axis_name` for its averages; `map_step` runs it on every device. The
state is replicated without a leading device axis, and the batch is split along its first axis. Random numbers depend on
an example's index in the *global* batch, so results do not depend on the number of devices.
"""

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
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
    """Maps step(state, batch) of one replica over `devices` (None: all devices), with a donated, replicated state."""
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=0, devices=devices)


class Stop:
    """Runs the steps of a loop until any process asks to stop; all processes stop after the same step.

    Each step also sums the processes' flags, as it sums their gradients. The sum is read two steps later, when that
    step is done, so the devices never wait. No process dispatches further ahead than that.
    """

    AHEAD = 2

    def __init__(self) -> None:
        """Starts with `now`, whether to stop, as False."""
        self.now = False
        self._pending: collections.deque = collections.deque()
        self._flags = [split(np.full(jax.local_device_count(), flag, np.float32)) for flag in (0, 1)]

    def step(self, run: Callable, state: Any, batch: Any, flag: Callable[[], bool]) -> tuple[Any, Any]:
        """Calls run(state, batch) -> (state, metrics); `flag` returns whether this process asks to stop."""
        state, metrics = run(state, (batch, self._flags[flag()]))
        self._pending.append(metrics.pop("stop"))
        if len(self._pending) > self.AHEAD:
            self.now = bool(np.asarray(self._pending.popleft()) > 0)
        if jax.process_count() == 1:  # no other process has to agree
            self.now = flag()
        return state, metrics

    @classmethod
    def watched(cls, step: Callable) -> Callable:
        """A step of a replica that also takes a flag with its batch and sums the flags of all replicas."""

        def run(state: Any, inputs: tuple[Any, jax.Array]) -> tuple[Any, Any]:
            batch, flag = inputs
            state, metrics = step(state, batch)
            return state, metrics | {"stop": jax.lax.psum(flag[0], AXIS)}

        return run

    def compile(self, steps: Iterable[Callable], state: Any, batch: Any) -> list[Future]:
        """Compiles steps that `step` runs; see `compile_steps`."""
        return compile_steps(map(self.watched, steps), state, (batch, self._flags[0]))


def compile_steps(steps: Iterable[Callable], state: Any, batch: Any) -> list[Future]:
    """Futures of the mapped and compiled steps, for a state of `replicate` and a batch of `split`.

    With several processes, tracing needs these arrays; with one, `replicated_shapes` of the state are enough. Each
    program is compiled in the background as soon as it is traced, in parallel with the others, since XLA does much of
    its work in one thread per program.
    """
    compile_ = compiler.compiler_for(state)
    with compiler.collector_paused():
        lowered = (map_step(step).lower(state, batch) for step in steps)
        return [compiler.in_background(functools.partial(compile_, program)) for program in lowered]


def _sharding(*axes: str) -> NamedSharding:
    devices = jax.local_devices() if OLD_PMAP else jax.devices()
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(*axes))


def replicate(tree: Any) -> Any:
    """Copies host arrays, the same in every process, to every device of every process, as `map_step` takes them.

    `device_put` would compare every array across all processes, which takes minutes with many processes.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, _sharding())
    return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), _sharding(), lambda _: x), tree)


def replicated_shapes(shapes: Any) -> Any:
    """The shapes of a tree that `replicate` places, for `compile_steps` before there is one. For one process."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding()), shapes)


def split(batch: Any) -> Any:
    """Splits this process's part of a batch, arrays [B, ...], over its devices: global arrays [devices, b, ...].

    With `OLD_PMAP`, the arrays are local to this process. Raises UserError unless B is a multiple of its devices.
    """
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(_sharding(AXIS), _rows(x)), batch)


def prefetch(stream: Iterator[Any], ahead: int = 2) -> Iterator[Any]:
    """Splits the batches of `stream`, and transfers the next `ahead` to the devices while one is used."""
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
    """The indices [batch_size] of a replica's examples in the global batch. Call it inside the replica."""
    replica = 0 if axis_name is None else jax.lax.axis_index(axis_name)
    return replica * batch_size + jnp.arange(batch_size)


def mean(tree: Any, axis_name: str | None) -> Any:
    """Averages a tree over all replicas. Call it inside a replica."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def gather_neighbours(x: jax.Array, axis_name: str | None, multiple: int) -> tuple[jax.Array, jax.Array | int]:
    """All-gathers x from the fewest neighbouring replicas that together hold whole groups. Call it inside a replica.

    Returns the gathered rows [m*b, ...] and the offset of this replica's rows [b, ...] among them. m = 1, without
    communication, when b is already a multiple of `multiple`, or of the whole batch if that is smaller.
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
    """Computes gradients(examples) -> (gradients of a mean, values [B, ...]) in `num` equal parts, one after the other.

    `examples` is a tree of arrays [B, ...]. Equals the result for the whole batch up to rounding, in the memory of one
    part.
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
    """One key for each example, [B], from `key` and its index alone."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)


# --- The devices of one process -------------------------------------------------------------------------------------


def map_local(function: Callable, in_axes: tuple[int | None, ...]) -> Callable:
    """Maps a function over this process's devices, splitting its arguments along `in_axes` (None: not split)."""
    return jax.pmap(function, in_axes=in_axes, devices=jax.local_devices())


def replicate_local(tree: Any) -> Any:
    """Copies arrays to every device of this process, for arguments that `map_local` does not split."""
    return jax.device_put(tree, NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec()))


def work_chunks(total: int, per_device: int) -> Iterator[tuple[np.ndarray, int]]:
    """Divides the items 0..total-1 into chunks over all devices: (this process's indices [n], items in the chunk).

    n is `per_device` times the number of this process's devices. In the last chunk, indices beyond the end repeat the
    last item, and their results are to be dropped. `processes.gather_rows` joins the parts of all processes.
    """
    num, devices = processes.num_processes(), jax.local_device_count()
    mine = min(per_device, -(-total // (num * devices))) * devices
    for start in range(0, total, mine * num):
        first = start + processes.process_index() * mine
        yield np.minimum(np.arange(first, first + mine), total - 1), min(mine * num, total - start)
