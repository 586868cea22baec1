"""The training step and sampling on one GPU, in float32 (as TF32) and bfloat16; a JSON line at the end.

    python -m benchmarks.gpu --config=configs/cifar10.py --batch=64

As `benchmarks.step`, against a matrix product of the same type; besides the seconds for 100 samples, as in the paper's
Table 1 (0.21 s on a V100 for CIFAR-10), and the hours that the configuration's whole training would take on this GPU.
Beside the measured time of each program is that of the model of `benchmarks.aot`, if it knows the card. Where there is
no GPU it says so.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import aot, measure, step
from ddgan_jax.method.build import DTYPES, init_state

SAMPLES = 100


def main() -> None:
    """Measure and print."""
    config, flags = measure.configuration("configs/cifar10.py", batch=64, runs=10)
    if jax.default_backend() != "gpu":
        print("no GPU here: nothing measured (jax needs its CUDA plugin, pip install 'jax[cuda13]', to see one)")
        measure.print_line({"gpu": None})
        return
    print(measure.about()["device"])
    card = next((gpu for gpu in aot.GPUS.values() if gpu.name == jax.devices()[0].device_kind), None)

    def modelled(call: Any) -> dict[str, Any]:
        """What the model says of a compiled program."""
        return {"model": aot.expected(call, card)} if card else {}

    schedule = config.train.num_steps, config.train.batch_size, config.train.r1_every
    found = {}
    for name, dtype in DTYPES.items():
        config.model.dtype = name
        method = measure.build_for(config, flags.batch)
        matrix = measure.matrix_product(8192, dtype)
        print(f"{name}, batch {method.batch_size}; 'plain' is a matrix product of 8192 rows")
        programs = step.rows(method, flags.runs, matrix, matrix.gflop, describe=modelled)
        if card:
            pairs = ((key, row["seconds"], row["model"]["ms"] / 1000) for key, row in programs.items())
            print("of the model's time:", ", ".join(f"{key} {seconds / model:.0%}" for key, seconds, model in pairs))
        params = jax.jit(partial(init_state, method, 0))().ema_params
        sampling = measure.compiled(measure.sampler(method), params, jnp.arange(SAMPLES))
        sampling.seconds()
        per_100 = measure.median([sampling.seconds() for _ in range(flags.runs)])
        num_steps, batch_size, r1_every = schedule
        plain, with_r1 = (programs[key]["seconds"] for key in ("step", "step with R1"))
        hours = num_steps * batch_size / method.batch_size * measure.mean_step(plain, with_r1, r1_every) / 3600
        tflops = programs["step"]["gflop"] / plain / 1000
        matrix_tflops = measure.rate(matrix, matrix.gflop) / 1000
        found[name] = {
            "programs": programs,
            "tflops": round(tflops, 2),
            "matrix_tflops": round(matrix_tflops, 1),
            "seconds_per_100_samples": per_100,
            "hours_of_training": round(hours, 1),
        }
        print(
            f"step {tflops:.1f} TFLOP/s of {matrix_tflops:.1f}; 100 samples in {per_100:.3f} s; "
            f"{num_steps:,} steps of {batch_size} would take {hours:.1f} h\n"
        )
    ratio = found["float32"]["programs"]["step"]["seconds"] / found["bfloat16"]["programs"]["step"]["seconds"]
    print(f"bfloat16 is {ratio:.2f} times as fast as float32")
    measure.print_line({"batch": flags.batch, "types": found})


if __name__ == "__main__":
    measure.run(main)
