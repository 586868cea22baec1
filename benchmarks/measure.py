"""What the benchmarks share: a configuration's programs, compiled; their times; and the machine's own rates."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from ddgan_jax import errors
from ddgan_jax.config import presets
from ddgan_jax.devices import compiler
from ddgan_jax.method import sampling, train_step
from ddgan_jax.method.build import build
from ddgan_jax.method.losses import Phase
from ddgan_jax.method.train_step import Method
from ddgan_jax.networks import ops

CONV = (8, 32, 32, 128)  # a 3x3 convolution of this to as many channels, zero-padded
CONV_GFLOP = 2 * 9 * math.prod(CONV) * CONV[-1] / 1e9  # the padding counted too


def cpu() -> str:
    """The processor's name."""
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def about() -> dict[str, Any]:
    """Device, versions and threads, as a benchmark states them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = jax.devices()[0].device_kind
    device = f"{cpu()}, {cores} cores" if jax.default_backend() == "cpu" else f"{jax.device_count()} x {kind}"
    return {"device": device, "jax": jax.__version__, "python": platform.python_version()}


def configuration(default: str, **options: int | str) -> tuple[Any, Any]:
    """(config, flags) of the command line: --config as main.py takes it, and `options` with their defaults.

    UserError for what is neither.
    """
    for name, value in options.items():
        (flags.DEFINE_string if isinstance(value, str) else flags.DEFINE_integer)(name, value, "")
    presets.read_flags(sys.argv, default)
    return flags.FLAGS.config, flags.FLAGS


def reference(operations: str) -> AbstractContextManager[None]:
    """A context with the plain forms of `operations`, such as 'conv,group_norm'; 'all': of all, '': of none."""
    if not operations:
        return contextlib.nullcontext()
    return ops.use_reference(*([] if operations == "all" else operations.split(",")))


@dataclasses.dataclass
class Program:
    """A compiled function, what it was compiled for, and what the compiler says of it."""

    function: Callable
    call: Any
    args: tuple[Any, ...]
    trace_seconds: float  # Python's part: tracing and lowering
    compile_seconds: float  # the compiler's
    keeps: bool  # its first argument is donated and comes back as its first result

    @functools.cached_property
    def gflop(self) -> float:
        """See `operations`, which trace it again."""
        return operations(self.function, *self.args)

    @property
    def gigabytes(self) -> float:
        """Bytes read and written, 1e9; of a loop its body once."""
        return (self.call.cost_analysis() or {}).get("bytes accessed", float("nan")) / 1e9

    @property
    def memory_gb(self) -> float:
        """Arguments, which hold the state, and temporaries, 1e9 bytes."""
        memory = self.call.memory_analysis()
        return (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9 if memory else float("nan")

    def seconds(self) -> float:
        """One call, until its result is there."""
        start = time.perf_counter()
        result = jax.block_until_ready(self.call(*self.args))
        seconds = time.perf_counter() - start
        if self.keeps:
            self.args = (result[0], *self.args[1:])
        return seconds


def compiled(function: Callable, *args: Any, keeps: bool = False) -> Program:
    """`function` for one device, compiled with the options of training."""
    jax.block_until_ready(args)  # or making them takes time from the compiler
    start = time.perf_counter()
    with compiler.collector_paused():
        lowered = jax.jit(function, donate_argnums=(0,) if keeps else ()).lower(*args)
    middle = time.perf_counter()
    call = compiler.compiler_for(args)(lowered)
    seconds = middle - start, time.perf_counter() - middle
    return Program(function, call, args, *seconds, keeps)


def operations(function: Callable, *args: Any) -> float:
    """Floating-point operations of a function of arrays or shapes, 1e9, as the reference forms do them; of a loop its
    body once."""
    with ops.use_reference():
        traced = jax.jit(function).trace(*args)
    # As a GPU has it: the compiled program has no count of what a GPU's libraries do, nor, on a CPU, of whole loops of
    # fewer operations.
    counted = traced.lower(lowering_platforms=("cuda",)).cost_analysis() or {}
    return counted.get("flops", float("nan")) / 1e9


def phases(method: Method) -> tuple[Callable, Callable]:
    """The two parts of a step, D's (with R1 or without) and G's, as functions of the state and images."""

    def d_part(with_r1: bool, state: Any, images: jax.Array) -> Any:
        x0, _, keys, _ = train_step.prepare(method, images, 0, state.step)
        return train_step.update_d(method, state, Phase(x0, train_step.draw(method, keys)), with_r1)

    def g_part(state: Any, images: jax.Array) -> Any:
        x0, _, _, keys = train_step.prepare(method, images, 0, state.step)
        return train_step.update_g(method, state, Phase(x0, train_step.draw(method, keys)))

    return d_part, g_part


def mean_step(plain: float, with_r1: float, r1_every: int) -> float:
    """The time of a step, from those without R1 and with it, which every `r1_every`-th has."""
    return plain + (with_r1 - plain) / r1_every


def sampler(method: Method) -> Callable:
    """(params, indices [B]) -> samples x_0."""
    return lambda params, indices: sampling.sample(method.denoiser, params, jax.random.key(0), indices)


def convolution() -> Program:
    """The machine's plain convolution, of CONV_GFLOP operations."""
    x, kernel = np.ones(CONV, np.float32), np.full((3, 3, CONV[-1], CONV[-1]), 1e-3, np.float32)
    dimensions = ("NHWC", "HWIO", "NHWC")
    return compiled(
        lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions),
        jax.device_put(x),
        jax.device_put(kernel),
    )


def matrix_product(size: int = 2048, dtype: Any = jnp.float32) -> Program:
    """Of two square matrices."""
    return compiled(lambda a, b: a @ b, *(jnp.ones((size, size), dtype) for _ in range(2)))


def rate(program: Program, gflop: float, settle: float = 0.3) -> float:
    """GFLOP/s of a program that takes milliseconds: the best of all calls in `settle` seconds, the machine undisturbed.

    On a CPU it must not be less: for the first 0.07 s after a large program the threads of the next may share a core,
    and a convolution then runs at exactly half its rate.
    """
    start, calls = time.perf_counter(), []
    while len(calls) < 5 or time.perf_counter() < start + settle:
        calls.append(program.seconds())
    return gflop / min(calls)


def examples(method: Method, num: int) -> np.ndarray:
    """Made data [num, ...] as training sees it: uint8 images, or float32 points."""
    kind = np.uint8 if len(method.denoiser.image_shape) == 3 else np.float32
    return np.random.default_rng(0).integers(0, 2, (num, *method.denoiser.image_shape)).astype(kind)


def build_for(config: Any, batch: int) -> Method:
    """What `config` describes, at another batch size if it is above 0."""
    if batch:
        config.train.batch_size = batch
    return build(config)


def run(main: Callable[[], None]) -> None:
    """Run a benchmark: a mistake is told in one sentence, with exit code 2."""
    try:
        main()
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def print_line(found: dict[str, Any]) -> None:
    """`found` and `about` as the one line of JSON that a benchmark ends with; what is not a number is null there."""
    print(json.dumps(json.loads(json.dumps(found | about()), parse_constant=lambda _: None)))


def rounded(number: float) -> float:
    """`number` to four digits."""
    return float(f"{number:.4g}")


def median(numbers: list[float]) -> float:
    """The median, to four digits."""
    return rounded(statistics.median(numbers))
