"""How programs are compiled: XLA's options, Python's garbage collector while they are traced, and their cache.

`benchmarks/NOTES.md` has the measurements behind each option.
"""

import contextlib
import gc
import importlib.util
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax


def compiler_options(runs_once: bool = False, arguments: Any = ()) -> dict[str, Any]:
    """XLA's options for a training step, or for a program that `runs_once`, such as the initialization of a state.

    On a CPU, steps are compiled at level 1: the highest level takes a third longer and does not make them faster. A
    program that runs once is not optimized, since the random bits of every layer take long. If the `arguments` hold
    more than 2^26 numbers, operations are scheduled for little memory: each operation of such large networks fills a
    CPU's threads. Those of small networks do not, and XLA's default schedule runs several at once.
    """
    if jax.default_backend() != "cpu":
        return {}
    options: dict[str, Any] = {"xla_backend_optimization_level": 0 if runs_once else 1}
    if sum(x.size for x in jax.tree.leaves(arguments)) > 2**26:
        options["xla_cpu_scheduler_type"] = "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    return options


def jit_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """jax.jit for a function that runs once, such as the initialization of a state: it compiles quickly."""
    return jax.jit(function, compiler_options=compiler_options(runs_once=True))


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
            cut = [file for file in folder.glob("*-cache") if not _decompresses(file.read_bytes())]
        for file in cut:
            file.unlink(missing_ok=True)
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
