"""How programs are compiled and run: XLA's options, Python's garbage collector while they are traced, their cache, and
the memory of a CPU.

`benchmarks/NOTES.md` has the measurements behind each option.
"""

import contextlib
import ctypes
import functools
import gc
import importlib.util
import os
import pathlib
import platform
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

MAX_CACHE = 4 * 2**30  # bytes of compiled programs in the default folder; a large network's step takes 30 MB


def compiler_options(arguments: Any = ()) -> dict[str, Any]:
    """XLA's options for a training step.

    On a CPU, steps are compiled at level 1 unless XLA_FLAGS names a level: the highest level takes a third longer and
    does not make them faster. If the `arguments` hold more than 2^26 numbers, operations are scheduled for little
    memory: each operation of such large networks fills a CPU's threads. Those of small networks do not, and XLA's
    default schedule runs several at once.
    """
    if jax.default_backend() != "cpu":
        return {}
    level = "xla_backend_optimization_level"
    options: dict[str, Any] = {} if level in os.environ.get("XLA_FLAGS", "") else {level: 1}
    if sum(x.size for x in jax.tree.leaves(arguments)) > 2**26:
        options["xla_cpu_scheduler_type"] = "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    return options


def trace_once(function: Callable[[], Any]) -> tuple[Any, Callable[[], Any]]:
    """Traces a function that runs once, such as the initialization of a state.

    Returns the shapes of its result, and the function, which is compiled when it is first called and runs on the host's
    CPU. The random bits of every layer take an accelerator's compiler as long as a training step. Here they are
    compiled without optimization.
    """
    options: dict[str, Any] | None = {"xla_backend_optimization_level": 0}
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names another platform alone
        cpu = options = None
    with jax.default_device(cpu):
        traced = jax.jit(function, compiler_options=options).trace()
    compiled = functools.cache(lambda: traced.lower().compile())

    def run() -> Any:
        with jax.default_device(cpu):
            return compiled()()

    return traced.out_info, run


def in_background(function: Callable[[], Any]) -> Future:
    """A future of what `function` returns, which a thread computes."""
    threads = ThreadPoolExecutor(1)
    future = threads.submit(function)
    threads.shutdown(wait=False)
    return future


def compiler_for(arguments: Any) -> Callable[[Any], Any]:
    """A function that compiles a lowered training step of `arguments`, a tree of arrays."""
    options = compiler_options(arguments=arguments)
    return lambda lowered: lowered.compile(compiler_options=options)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pauses garbage collection, which takes a quarter of tracing and lowering and frees almost nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def keep_freed_memory() -> None:
    """Lets this process keep freed memory for its next step. Without glibc, nothing changes.

    glibc gives buffers of megabytes back to Linux at each step, which clears them before the next one.
    """
    with contextlib.suppress(OSError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: buffers below 1 GiB come from the heap
        mallopt(-2, 2**26)  # M_TOP_PAD: a heap keeps 64 MiB more than it uses


def default_cache() -> pathlib.Path | None:
    """The folder of compiled programs in the user's cache, or None where others could write programs that run here.

    A home may be shared by hosts, so each kind of processor has a folder of its own. The oldest programs are removed
    when all take more than MAX_CACHE bytes.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    kind = platform.machine()
    with contextlib.suppress(OSError):  # not on Linux
        features = re.search(r"^(flags|Features)\s*:(.*)", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        kind += f"-{zlib.crc32(features[2].encode()):08x}" if features else ""
    folder = pathlib.Path(home, "ddgan_jax", "programs", kind)
    try:
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
        for part in (folder.parent, folder):
            part.mkdir(exist_ok=True, mode=0o700)
            found = part.stat()
            if found.st_uid != os.getuid() or found.st_mode & 0o022:
                return None
        remove_oldest(folder)
    except OSError:  # a home that cannot be written
        return None
    return folder


def remove_oldest(folder: pathlib.Path, limit: int = MAX_CACHE) -> None:
    """Removes the files of `folder` that were read least recently until the others take at most `limit` bytes."""
    found = []
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            found.append((file, file.stat()))
    total = 0
    for file, info in sorted(found, key=lambda pair: -pair[1].st_atime):
        total += info.st_size
        if total > limit:
            file.unlink(missing_ok=True)


def cache_programs(folder: Any) -> None:
    """Caches compiled programs in `folder`, a path, for the next start.

    JAX warns about a truncated entry and never replaces it. It is removed when JAX warns, before JAX compiles and
    writes the program again. The warning does not name the entry, so all entries are checked.
    """
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    show = warnings.showwarning

    def heal(message: Warning | str, *rest: Any, **options: Any) -> None:
        cut = []
        if "Error reading persistent compilation cache entry" in str(message):
            for file in folder.glob("*-cache"):
                with contextlib.suppress(OSError):  # of another user, or removed meanwhile: JAX compiles the program
                    if not _decompresses(file.read_bytes()):
                        file.unlink()
                        cut.append(file)
        for file in cut:
            print(f"note: {file} is truncated, and is removed: its program is compiled again", flush=True)
        if not cut:
            show(message, *rest, **options)

    warnings.showwarning = heal


def _decompresses(content: bytes) -> bool:
    """Whether an entry of JAX's cache is complete. JAX compresses entries with zstandard if that is installed."""
    decompress: Callable[[bytes], bytes] = zlib.decompress
    cut_short: type[Exception] = zlib.error
    if content.startswith(b"\x28\xb5\x2f\xfd"):
        if not importlib.util.find_spec("zstandard"):
            return True  # written by another environment, and never read by this one
        import zstandard

        decompress, cut_short = zstandard.ZstdDecompressor().decompress, zstandard.ZstdError
    try:
        decompress(content)
    except cut_short:
        return False
    return True
