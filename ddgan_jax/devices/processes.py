"""Several processes that run one command: joining, comparing arguments, sharing what process 0 reads, exiting."""

import contextlib
import itertools
import json
import os
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from ddgan_jax.devices import cluster
from ddgan_jax.errors import Fault, UserError

T = TypeVar("T")
# Seconds for which a process that has finished waits for the others; JAX's default of 300 if unset.
SHUTDOWN_TIMEOUT = "DDGAN_SHUTDOWN_TIMEOUT"


def num_cores() -> int:
    """The number of processor cores that this process may use, which a scheduler may have restricted."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def initialize() -> None:
    """Joins the other processes that the launcher started, if there are any; see `cluster`.

    Call it before anything uses a device. Raises UserError if there are other processes and it cannot join them.
    """
    on_tpu = cluster.on_tpu()
    arguments = cluster.arguments(os.environ, on_tpu, 0 if on_tpu else cluster.visible_gpus(os.environ))
    if arguments is None:
        if tasks := cluster.unused_tasks(os.environ):
            print(f"note: SLURM gave this job {tasks} tasks, but `srun` did not start this process: it runs alone")
        return
    if "coordinator_address" in arguments:
        arguments["cluster_detection_method"] = "deactivate"  # everything is given
    if seconds := os.environ.get(SHUTDOWN_TIMEOUT):
        if not seconds.isdigit():
            raise UserError(f"{SHUTDOWN_TIMEOUT}={seconds} must be a number of seconds")
        arguments["shutdown_timeout_seconds"] = int(seconds)
    _client()  # UserError before the others wait for this process
    before = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(**arguments)
    except Exception as error:  # of whatever finds the others: gRPC, requests, Kubernetes' client, SLURM's variables
        if _no_metadata(error):
            print(
                "note: this host is no Cloud TPU VM whose metadata list the hosts of a pod: it runs alone", flush=True
            )
            return
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"this process could not join the others: {reason}; {cluster.BY_HAND}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # JAX handles it for its preemption service, which ends nothing
    barrier()


def _no_metadata(error: BaseException) -> bool:
    """Whether JAX failed to reach the metadata server of Cloud TPU VMs."""
    return type(error).__module__.startswith("requests") and "metadata" in str(error)


# --- Communication --------------------------------------------------------------------------------------------------
# Small values go through the store of JAX's coordination service, which waits as long as necessary, and fails when a
# process has died. A collective of devices may time out after 30 s if its processes do not enter it together.

_DAY = 24 * 60 * 60 * 1000  # ms
_calls = itertools.count()
_single = False


def num_processes() -> int:
    """The number of processes that run this command together: all that joined, or 1 within `single_process`."""
    return 1 if _single else jax.process_count()


def process_index() -> int:
    """The index of this process among them."""
    return 0 if _single else jax.process_index()


def is_primary() -> bool:
    """Whether this is process 0, the only one that writes."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints one line, in process 0, above a progress bar if there is one."""
    if is_primary():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def _client() -> Any:
    """The client of JAX's coordination service; None before joining. Raises UserError if this JAX does not have it."""
    try:
        from jax._src.distributed import global_state  # as Orbax does; there is no public name for it

        return global_state.client
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"jax {jax.__version__} has no coordination service that this version of ddgan_jax knows: install "
            "another version of jax, or train with one process"
        ) from error


def exchange(value: Any) -> list[Any]:
    """All-gathers small JSON values: those of all processes, in their order, in every process."""
    if num_processes() == 1:
        return [value]
    name, client = f"ddgan_jax/{next(_calls)}", _client()
    client.key_value_set(f"{name}/{jax.process_index()}", json.dumps(value))
    return [json.loads(client.blocking_key_value_get(f"{name}/{i}", _DAY)) for i in range(jax.process_count())]


def barrier() -> None:
    """Waits for the other processes, for up to a day."""
    exchange(None)


def _attempt(action: Callable[[], T]) -> tuple[T | None, list[str], Exception | None]:
    """Calls `action`: (result, [], None), or (None, [kind of error, message], the error if it needs a traceback)."""
    try:
        return action(), [], None
    except (UserError, Fault) as error:
        return None, [type(error).__name__, str(error)], None
    except OSError as error:  # of a disk or a bucket
        return None, ["Fault", str(error)], None
    except Exception as error:  # whatever it is, the other processes wait for an answer
        return None, ["Fault", f"failed with {type(error).__name__}: {error}"], error


def _error(outcome: list[str], prefix: str = "") -> Exception:
    kind, message = outcome
    return (UserError if kind == "UserError" else Fault)(prefix + message)


def run_on_all(action: Callable[[], T]) -> T:
    """Calls `action` in every process. If it raises in any process, all raise the error of the first such process."""
    if num_processes() == 1:
        return action()
    made, outcome, unexpected = _attempt(action)
    others = exchange(outcome)
    if unexpected:
        raise unexpected
    for index, other in enumerate(others):
        if other:
            raise _error(other, f"process {index}: ")
    return made  # type: ignore[return-value]


def broadcast_from_primary(action: Callable[[], T]) -> T:
    """Calls `action` in process 0 and returns its result in every process. If it raises, all processes raise."""
    if num_processes() == 1:
        return action()
    name, client, content, unexpected = f"ddgan_jax/{next(_calls)}", _client(), b"", None
    if is_primary():
        with single_process():
            made, outcome, unexpected = _attempt(action)
        content = pickle.dumps(made)
        client.key_value_set(name, json.dumps([outcome, len(content)]))
    outcome, size = json.loads(client.blocking_key_value_get(name, _DAY))
    if unexpected:
        raise unexpected
    if outcome:
        raise _error(outcome)
    return pickle.loads(_broadcast(content, size))


def run_on_primary(action: Callable[[], T]) -> T | None:
    """Calls `action` in process 0 while the others wait, and return None. If it raises, all processes raise."""
    made: T | None = None

    def do() -> None:
        nonlocal made
        made = action()

    broadcast_from_primary(do)
    return made


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """A context in which this process works alone, on its own devices, and does not wait for the others."""
    global _single
    before, _single = _single, True
    try:
        yield
    finally:
        _single = before


def _broadcast(content: bytes, size: int) -> bytes:
    """Broadcasts `size` bytes of process 0 through the devices, in parts that do not fill their memory."""
    part = min(max(size, 1), 2**26)
    received = []
    for start in range(0, size, part):
        row = np.zeros(-(-part // 4) * 4, np.uint8)
        mine = np.frombuffer(content[start : start + part], np.uint8)
        row[: len(mine)] = mine
        received.append(np.asarray(multihost_utils.broadcast_one_to_all(row.view(np.uint32))).view(np.uint8)[:part])
    return np.concatenate(received).tobytes()[:size] if received else b""


def assert_equal_across_processes(facts: dict[str, Any]) -> None:
    """Raises UserError in every process unless all have the same facts, {name: JSON value}; it names a difference."""
    others = exchange(facts)
    for index, theirs in enumerate(others):
        for name in sorted(others[0].keys() | theirs.keys()):
            if theirs.get(name) != others[0].get(name):
                raise UserError(
                    f"the processes do not run the same command: {name} is {others[0].get(name)} in process 0 and "
                    f"{theirs.get(name)} in process {index}: give each the same arguments, data and versions"
                )


def any_process(flag: bool) -> bool:
    """Whether any process has set its flag. Every process must call it at the same point."""
    return any(exchange(bool(flag)))


def gather_rows(tree: Any) -> Any:
    """All-gathers host arrays [n, ...] of this process: [processes * n, ...], in the order of the processes."""
    return tree if num_processes() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def is_lost_process(error: BaseException) -> bool:
    """Whether a collective or the coordination service raised this because another process has ended.

    If the connection breaks while jit starts a program, JAX raises a ValueError with the status ("UNKNOWN: ...").
    """
    is_status = isinstance(error, ValueError) and re.match("[A-Z_]+: ", str(error)) is not None
    return (
        jax.distributed.is_initialized()
        and (is_status or isinstance(error, jax.errors.JaxRuntimeError))
        and any(
            sign in str(error)
            for sign in ("Gloo", "NCCL", "coordination service", "Connection", "UNAVAILABLE", "heartbeat")
        )
    )


def exit_process(exit_code: int, at_once: bool = False) -> None:
    """Exits immediately if there are other processes: a normal exit would wait for them, and they for this one.

    Also exits immediately with `at_once`: a normal exit would wait minutes for threads that compile or write.

    Process 0 exits last, if the others exit within 10 s: when it exits first, JAX aborts them. It waits another half
    second, since a process that is aborted just before its end has the wrong exit code.
    """
    if not (jax.distributed.is_initialized() or at_once):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized():
        with contextlib.suppress(Exception):  # the others, or the service, may be gone: this process ends all the same
            if is_primary():
                for index in range(1, jax.process_count()):
                    _client().blocking_key_value_get(f"ddgan_jax/left/{index}", 10_000)
                time.sleep(0.5)
            else:
                _client().key_value_set(f"ddgan_jax/left/{jax.process_index()}", "left")
    os._exit(exit_code)
