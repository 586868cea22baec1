"""The training step and the sampler compiled for a TPU pod slice, with no TPU; a JSON line at the end.

    pip install libtpu
    python -m benchmarks.tpu --topology=v5e:4x4 --config=configs/cifar10.py --config.model.dtype=bfloat16 --batch=64

--batch is that of a chip. Memory, bytes and the time are what the TPU's compiler estimates; nothing runs. The time are
the cycles that it expects of each operation, one after the other, without collectives; `of peak` are the operations,
counted as `benchmarks.step` does, over that time and the chip's peak. --largest=1 doubles the batch until the step no
longer fits a chip.
"""

import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from benchmarks import measure, step
from ddgan_jax import parallel
from ddgan_jax.build import Built
from ddgan_jax.errors import UserError

UNKNOWN = float("nan")
# TFLOP/s in bfloat16, as the maker states them, and GHz, what these mean for the 4, 4 and 8 matrix units of 128x128. To
# JAX half a v4 chip is a device.
CHIPS = {"v4": (137.5, 1.05), "v5e": (197, 1.5), "v5p": (459, 1.75), "v6e": (918, UNKNOWN)}


def describe(compiled: Any, loops: int, clock: float) -> dict[str, float]:
    """What the compiler says of a chip of `clock` GHz. `loops`: how often the body of the program's loop runs."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
    return {
        "memory_gb": round((used - memory.alias_size_in_bytes) / 1e9, 2),
        "gigabytes": round(loops * compiled.cost_analysis()["bytes accessed"] / 1e9, 2),
        "seconds": round(loops * cycles / clock / 1e9, 5) if cycles else UNKNOWN,
    }


def train_step(built: Built, devices: Any, batch: int, with_r1: bool) -> Any:
    """The pmapped training step of `batch` images a chip, lowered."""
    state = jax.eval_shape(built.init_state)
    images = jax.ShapeDtypeStruct((len(devices), batch, *built.image_shape), np.uint8)
    return parallel.map_step(built.step(with_r1), devices).lower(state, images)


def sampler(built: Built, devices: Any, batch: int) -> Any:
    """The sampler of `batch` images a chip, lowered."""
    params = jax.eval_shape(built.init_state).ema_params
    indices = jax.ShapeDtypeStruct((len(devices), batch), jnp.int32)
    return jax.pmap(measure.sampler(built), in_axes=(None, 0), devices=devices).lower(params, indices)


def operations(chip: Built, name: str) -> float:
    """1e9 floating-point operations of one chip's share, which `chip` describes; of a loop its body once."""
    function, _ = step.functions(chip)[name]
    images = jax.ShapeDtypeStruct((chip.batch_size, *chip.image_shape), np.uint8)
    return measure.operations(jax.jit(function).trace(jax.eval_shape(chip.init_state), images))


def compile_for_chip(lowered: Any, batch: int) -> Any:
    """The compiled program. UserError if it needs more memory than a chip has."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = " of ".join(re.findall(r"[\d.]+G\b", str(error))[:2])
        raise UserError(f"--batch={batch} does not fit a chip ({sizes}): take fewer images") from error


def fits(built: Built, devices: Any, batch: int) -> bool:
    """Does the step with R1, which needs more, compile within the memory of a chip?"""
    try:
        compile_for_chip(train_step(built, devices, batch, True), batch)
    except UserError as error:
        print(error, flush=True)
        return False
    print(f"--batch={batch} fits", flush=True)
    return True


def main() -> None:
    """Compile and print."""
    config, flags = measure.configuration("configs/cifar10.py", topology="v5e:4x4", batch=64, largest=0)
    jax.config.update("jax_platforms", "cpu")  # there is no TPU to run on, or to ask
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=flags.topology).devices
    except Exception as error:
        raise UserError(f"no compiler for {flags.topology} (pip install libtpu): {error}") from error
    chip, built = (measure.build_for(config, flags.batch * chips) for chips in (1, len(devices)))
    peak, clock = CHIPS.get(flags.topology.partition(":")[0], (UNKNOWN, UNKNOWN))
    print(
        f"{flags.topology}, {len(devices)} chips of {peak} TFLOP/s at {clock} GHz, {config.model.dtype}, "
        f"{flags.batch} images a chip"
    )
    print(f"{'':<14}{'GB memory':>11}{'GFLOP':>10}{'GB moved':>10}{'ms':>9}{'of peak':>9}{'compile':>9}")
    rows: list[dict[str, Any]] = []
    for name in ("step", "step with R1", "sampling"):
        start = time.perf_counter()
        if name == "sampling":
            lowered, loops = sampler(built, devices, flags.batch), built.schedule.num_steps
        else:
            lowered, loops = train_step(built, devices, flags.batch, name != "step"), 1
        compiled = compile_for_chip(lowered, flags.batch)
        row = {"program": name, "compile_seconds": round(time.perf_counter() - start, 1)}
        row |= describe(compiled, loops, clock)
        row["gflop"] = round(loops * operations(chip, name), 1)
        row["of_peak"] = round(row["gflop"] / row["seconds"] / peak / 1000, 3)
        rows.append(row)
        print(
            f"{name:<14}{row['memory_gb']:>11.2f}{row['gflop']:>10.1f}{row['gigabytes']:>10.2f}"
            f"{1000 * row['seconds']:>9.2f}{row['of_peak']:>9.1%}{row['compile_seconds']:>9.1f}",
            flush=True,
        )
    found = {"topology": flags.topology, "batch_a_chip": flags.batch, "dtype": config.model.dtype, "programs": rows}
    if flags.largest:
        batch = flags.batch
        while fits(built, devices, 2 * batch):
            batch *= 2
        found["largest_batch_a_chip"] = batch
    measure.print_line(found)


if __name__ == "__main__":
    measure.run(main)
