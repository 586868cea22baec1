"""The only file that knows there is more than one device.

A train step is written for one replica, with `axis_name` for its averages; `map_step` runs it on every device.
The state is replicated without a leading device axis, the batch is split along its first axis. Randomness belongs
to examples, by their index in the *global* batch, so that the numbers do not depend on how many devices share it.
"""

import collections
import contextlib
import itertools
import json
import math
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddgan_jax import cluster, ops
from ddgan_jax.errors import Fault, UserError

AXIS = "batch"
T = TypeVar("T")


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
    """`map_step` of each, compiled for a `replicate`d state and a `split` batch: they take arrays of all processes.

    pmap itself is traced with this process's part of a batch, in host memory (a mere shape fails in several processes).
    Each program is compiled in the background as soon as it is traced, beside the others: XLA does much of its work in
    one thread a program.
    """
    local = jax.tree.map(lambda x: np.zeros((jax.local_device_count(), *x.shape[1:]), x.dtype), batch)
    compiler, threads = ops.compiler_for(state), ThreadPoolExecutor()
    with ops.collector_paused():
        lowered = (map_step(step).lower(state, local) for step in steps)
        futures = [threads.submit(compiler, program) for program in lowered]
    threads.shutdown(wait=False)
    return futures


def _sharding(*axes: str) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()), (AXIS,)), PartitionSpec(*axes))


def replicate(tree: Any) -> Any:
    """Host arrays, the same in every process -> arrays on every device of every process.

    `device_put` would compare every array over all processes, which takes minutes where they are many.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, _sharding())
    return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), _sharding(), lambda _: x), tree)


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


def accumulate(gradients: Callable[[Any], tuple[Any, Any]], examples: Any, num: int) -> tuple[Any, Any]:
    """`gradients(examples)` -> (gradients of a mean, numbers [B, ...]), from `num` equal parts, one after the other.

    `examples` is a tree of arrays [B, ...]. The results are those of the whole to rounding, in the memory of one part.
    """
    if num == 1:
        return gradients(examples)
    split = jax.tree.map(lambda x: x.reshape(num, -1, *x.shape[1:]), examples)
    shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], split))[0]

    def add(total: Any, part: Any) -> tuple[Any, Any]:
        found, numbers = gradients(part)
        return jax.tree.map(jnp.add, total, found), numbers

    total, numbers = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), split)
    return jax.tree.map(lambda g: g / num, total), jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), numbers)


def example_keys(key: jax.Array, indices: jax.Array) -> jax.Array:
    """One key [B] for each example, from its index alone."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)


def initialize() -> None:
    """Join the other processes that the launcher of this one started, if there are any; see cluster.py.

    Call it before anything touches a device. Raises UserError if there are others and it cannot join them.
    """
    from jax._src import cloud_tpu_init  # what JAX itself goes by; there is no public name for it

    gpus = 0 if cloud_tpu_init.running_in_cloud_tpu_vm else cluster.visible_gpus(os.environ)
    arguments = cluster.arguments(os.environ, cloud_tpu_init.running_in_cloud_tpu_vm, gpus)
    if arguments is None:
        if tasks := cluster.unused_tasks(os.environ):
            print(f"note: SLURM gave this job {tasks} tasks, but `srun` did not start this process: it runs alone")
        return
    if "coordinator_address" in arguments:
        arguments["cluster_detection_method"] = "deactivate"  # everything is given
    try:
        jax.distributed.initialize(**arguments)
    except Exception as error:
        if _no_metadata(error):
            print(
                "note: this TPU is on no Cloud TPU VM that says which hosts belong together: it runs alone", flush=True
            )
            return
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"this process could not join the others: {reason}; {cluster.BY_HAND}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX has taken it for a service of its own, which ends nothing
    barrier()


def _no_metadata(error: BaseException) -> bool:
    """Did JAX ask the metadata server of Cloud TPU VMs, where there is none?"""
    return type(error).__module__.startswith("requests") and "metadata" in str(error)


# --- Processes: what they tell each other -------------------------------------------------------------------------
# Small things go through the store of JAX's coordination service, which waits for as long as it takes, and fails where
# a process has died; a collective of devices may give up after 30 s where its processes do not come at once.

_DAY = 24 * 60 * 60 * 1000  # ms
_calls = itertools.count()
_apart = False


def num_processes() -> int:
    """How many processes do this job together: all that were joined, or 1 within `apart`."""
    return 1 if _apart else jax.process_count()


def process_index() -> int:
    """The index of this one among them."""
    return 0 if _apart else jax.process_index()


def is_primary() -> bool:
    """Is this process 0, the only one that writes?"""
    return jax.process_index() == 0


def _client() -> Any:
    from jax._src import distributed  # as Orbax does; there is no public name for it

    return distributed.global_state.client


def exchange(value: Any) -> list[Any]:
    """Small JSON values of all processes, in their order, in each of them."""
    if num_processes() == 1:
        return [value]
    name, client = f"ddgan_jax/{next(_calls)}", _client()
    client.key_value_set(f"{name}/{jax.process_index()}", json.dumps(value))
    return [json.loads(client.blocking_key_value_get(f"{name}/{i}", _DAY)) for i in range(jax.process_count())]


def barrier() -> None:
    """Wait for the other processes, for a day if need be."""
    exchange(None)


def _attempt(action: Callable[[], T]) -> tuple[T | None, list[str]]:
    """(what it returns, []), or (None, [kind of error, message]) for what people are told in a sentence."""
    try:
        return action(), []
    except (UserError, Fault) as error:
        return None, [type(error).__name__, str(error)]
    except OSError as error:  # of a disk or a bucket
        return None, ["Fault", str(error)]


def _error(outcome: list[str], prefix: str = "") -> Exception:
    kind, message = outcome
    return (UserError if kind == "UserError" else Fault)(prefix + message)


def everywhere(action: Callable[[], T]) -> T:
    """`action()` in every process. Where it raises UserError or Fault in one, all raise that of the first such."""
    if num_processes() == 1:
        return action()
    made, outcome = _attempt(action)
    for index, other in enumerate(exchange(outcome)):
        if other:
            raise _error(other, f"process {index}: ")
    return made  # type: ignore[return-value]


def from_primary(action: Callable[[], T]) -> T:
    """What `action()` returns in process 0, in every process; its UserError or Fault is raised in all."""
    if num_processes() == 1:
        return action()
    name, client, content = f"ddgan_jax/{next(_calls)}", _client(), b""
    if is_primary():
        with apart():
            made, outcome = _attempt(action)
        content = pickle.dumps(made)
        client.key_value_set(name, json.dumps([outcome, len(content)]))
    outcome, size = json.loads(client.blocking_key_value_get(name, _DAY))
    if outcome:
        raise _error(outcome)
    return pickle.loads(_broadcast(content, size))


def by_primary(action: Callable[[], Any]) -> None:
    """Do it in process 0, while the others wait; its UserError or Fault is raised in all."""

    def do() -> None:
        action()  # what it returns is for nobody

    from_primary(do)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """What is done within is done by this process alone, with its own devices: it does not wait for others."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def _broadcast(content: bytes, size: int) -> bytes:
    """`size` bytes of process 0, in every process, by its devices; in parts, which do not fill their memory."""
    part = min(max(size, 1), 2**26)
    received = []
    for start in range(0, size, part):
        row = np.zeros(-(-part // 4) * 4, np.uint8)
        mine = np.frombuffer(content[start : start + part], np.uint8)
        row[: len(mine)] = mine
        received.append(np.asarray(multihost_utils.broadcast_one_to_all(row.view(np.uint32))).view(np.uint8)[:part])
    return np.concatenate(received).tobytes()[:size] if received else b""


def agree(facts: dict[str, Any]) -> None:
    """UserError, in every process, unless all have the same facts, {name: JSON value}; it names what differs."""
    others = exchange(facts)
    for index, theirs in enumerate(others):
        for name in sorted(others[0].keys() | theirs.keys()):
            if theirs.get(name) != others[0].get(name):
                raise UserError(
                    f"the processes do not train the same: {name} is {others[0].get(name)} in process 0 and "
                    f"{theirs.get(name)} in process {index}: give each the same command, data and versions"
                )


def any_process(flag: bool) -> bool:
    """Has any process set its flag? Every process must ask at the same point."""
    return any(exchange(bool(flag)))


def gather_rows(tree: Any) -> Any:
    """Host arrays [n, ...] of this process -> those of all processes, [processes n, ...], in their order."""
    return tree if num_processes() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def lost_others(error: BaseException) -> bool:
    """Is this what a collective or the coordination service raises where another process has ended?"""
    return (
        jax.distributed.is_initialized()
        and isinstance(error, jax.errors.JaxRuntimeError)
        and any(
            sign in str(error)
            for sign in ("Gloo", "NCCL", "coordination service", "Connection", "UNAVAILABLE", "heartbeat")
        )
    )


def leave(exit_code: int, at_once: bool = False) -> None:
    """End this process at once if others work with it: at a usual exit it would wait for them, and they for it.

    Or if that is asked for: it would wait for its threads too, which may compile for minutes.

    Process 0 is the last, if the others leave within 2 s too: without it they are aborted before they have spoken.
    """
    if not (jax.distributed.is_initialized() or at_once):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized():
        with contextlib.suppress(Exception):
            if is_primary():
                for index in range(1, jax.process_count()):
                    _client().blocking_key_value_get(f"ddgan_jax/left/{index}", 2000)
            else:
                _client().key_value_set(f"ddgan_jax/left/{jax.process_index()}", "left")
    os._exit(exit_code)


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
    item again, and their results are to be dropped. `gather_rows` puts the parts together.
    """
    mine = min(per_device, -(-total // (num_processes() * jax.local_device_count()))) * jax.local_device_count()
    for start in range(0, total, mine * num_processes()):
        first = start + process_index() * mine
        yield np.minimum(np.arange(first, first + mine), total - 1), min(mine * num_processes(), total - start)
