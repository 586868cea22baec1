"""The time of a training step and its parts, against the machine's own convolution; a JSON line at the end.

    python -m benchmarks.step --config=configs/cifar10.py --batch=8

Every time is a median of --runs after one that does not count. The plain 3x3 convolution of [8, 32, 32, 128] to 128
channels runs before and after each, so that `of plain` (operations a second over the rate of that convolution at the
time) and `work` (seconds x its TFLOP/s) mean the same on a busy machine as on a quiet one. Operations are those that
the compiler counts where every convolution is done directly, so that doing it in fewer counts as speed. `trace` are the
seconds of tracing and lowering, the second step's less for what it shares with the first, `compile` the compiler's.

--only=step measures the program of that name; --reference=conv,group_norm or =all runs operations of
`ddgan_jax.networks.ops` in their plain form.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure
from benchmarks.measure import Program
from ddgan_jax.devices import compiler
from ddgan_jax.method.build import init_state
from ddgan_jax.method.train_step import Method, make_train_step


def functions(method: Method) -> dict:
    """What is measured, by name: (function of the state and images, is the state donated and handed back?)."""
    batch, denoiser = method.batch_size, method.denoiser
    x, t, z = jnp.zeros((batch, *denoiser.image_shape)), jnp.zeros(batch, jnp.int32), jnp.zeros((batch, denoiser.nz))
    d_part, g_part = measure.phases(method)
    return {
        "step": (make_train_step(method, 0, False), True),
        "step with R1": (make_train_step(method, 0, True), True),
        "D": (lambda state, images: d_part(False, state, images), True),
        "D with R1": (lambda state, images: d_part(True, state, images), True),
        "G": (g_part, True),
        "forward": (lambda state, images: denoiser.gen(state.ema_params, x, t, z), False),
        "sampling": (lambda state, images: measure.sampler(method)(state.ema_params, jnp.arange(batch)), False),
    }


def rows(
    method: Method,
    runs: int,
    plain: Program,
    plain_gflop: float,
    only: str = "",
    describe: Callable[[Any], dict] = lambda call: {},
) -> dict[str, dict]:
    """Compile, time and print each of `functions`, or one, against the rate of the program `plain` before and after.

    What `describe` says of a compiled program is added to its row.
    """
    _, make = compiler.trace_once(partial(init_state, method, 0))
    images = jax.device_put(measure.examples(method, method.batch_size))
    plain.seconds()
    found: dict[str, dict] = {}
    print(
        f"{'':<14}{'seconds':>9}{'GFLOP':>9}{'of plain':>9}{'work':>8}{'trace':>8}{'compile':>9}{'GB memory':>11}"
        f"{'GB moved':>10}"
    )
    for name, (function, keeps) in functions(method).items():
        if only not in ("", name):
            continue
        program = measure.compiled(function, make(), images, keeps=keeps)
        program.seconds()
        gflop, seconds, shares, work = program.gflop, [], [], []
        if name == "sampling":  # the compiler counts the body of a loop once
            gflop *= method.denoiser.schedule.num_steps
        before = measure.rate(plain, plain_gflop)
        for _ in range(runs):
            seconds.append(program.seconds())
            after = measure.rate(plain, plain_gflop)
            shares.append(gflop / seconds[-1] / ((before + after) / 2))
            work.append(seconds[-1] * (before + after) / 2000)
            before = after
        found[name] = row = {
            "seconds": measure.median(seconds),
            "gflop": measure.rounded(gflop),
            "of_plain": measure.median(shares),
            "work": measure.median(work),
            "trace_seconds": round(program.trace_seconds, 1),
            "compile_seconds": round(program.compile_seconds, 1),
            "memory_gb": measure.rounded(program.memory_gb),
            "gigabytes": measure.rounded(program.gigabytes),
        } | describe(program.call)
        print(
            f"{name:<14}{row['seconds']:>9.3f}{row['gflop']:>9.1f}{row['of_plain']:>9.0%}{row['work']:>8.3f}"
            f"{row['trace_seconds']:>8.1f}{row['compile_seconds']:>9.1f}{row['memory_gb']:>11.2f}{row['gigabytes']:>10.1f}",
            flush=True,
        )
        del program
    return found


def main() -> None:
    """Measure and print."""
    config, flags = measure.configuration("configs/cifar10.py", batch=0, runs=5, only="", reference="")
    method = measure.build_for(config, flags.batch)
    conv, matrix = measure.convolution(), measure.matrix_product()
    print(f"{measure.about()['device']}; batch {method.batch_size}")
    with measure.reference(flags.reference):
        found = rows(method, flags.runs, conv, measure.CONV_GFLOP, flags.only)
    matrix.seconds()
    rates = {
        "conv_gflops": round(measure.rate(conv, measure.CONV_GFLOP), 1),
        "matrix_gflops": round(measure.rate(matrix, matrix.gflop), 1),
    }
    print(f"plain convolution {rates['conv_gflops']} GFLOP/s, matrix product {rates['matrix_gflops']} GFLOP/s")
    measure.print_line({"batch": method.batch_size, "reference": flags.reference, "programs": found} | rates)


if __name__ == "__main__":
    measure.run(main)
