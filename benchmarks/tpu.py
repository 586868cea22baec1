"""The training step and the sampler compiled for a TPU pod slice, with no TPU; a JSON line at the end.

    pip install libtpu
    python -m benchmarks.tpu --topology=v5e:4x4 --config=configs/cifar10.py --config.model.dtype=bfloat16 --batch=64

--batch is that of a chip. Memory, operations, bytes and the time are what the TPU's compiler estimates; nothing runs.
`bound` is the least time a chip can take for so many operations and bytes, whichever of the two takes longer; `of peak`
are the operations over the compiler's time, or over the bound where the compiler knows none, and the chip's peak.
--largest=1 doubles the batch until the step no longer fits a chip.
"""

import math
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from benchmarks import measure
from ddgan_jax import parallel
from ddgan_jax.build import Built
from ddgan_jax.errors import UserError

# TFLOP/s in bfloat16 and GB/s of memory of a chip, as its maker states them
CHIPS = {"v4": (275, 1228), "v5e": (197, 819), "v5p": (459, 2765), "v6e": (918, 1640)}


def describe(name: str, start: float, compiled: Any, loops: int = 1) -> dict[str, Any]:
    """What the compiler says of a chip. `loops`: how often the body of the program's loop runs."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    estimate = cost["optimal_seconds"]  # below zero for CIFAR-10's step by libtpu 0.0.52: not known then
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return {
        "program": name,
        "compile_seconds": round(time.perf_counter() - start, 1),
        "memory_gb": round((used - memory.alias_size_in_bytes) / 1e9, 2),
        "gflop": round(loops * cost["flops"] / 1e9, 1),
        "gigabytes": round(loops * cost["bytes accessed"] / 1e9, 2),
        "seconds": round(loops * estimate, 5) if estimate > 0 else float("nan"),
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
    built = measure.build_for(config, flags.batch * len(devices))
    peak, bandwidth = CHIPS.get(flags.topology.partition(":")[0], (float("nan"), float("nan")))
    print(
        f"{flags.topology}, {len(devices)} chips of {peak} TFLOP/s and {bandwidth} GB/s, {config.model.dtype}, "
        f"{flags.batch} images a chip"
    )
    print(f"{'':<14}{'GB memory':>11}{'GFLOP':>10}{'GB moved':>10}{'ms':>9}{'bound':>9}{'of peak':>9}{'compile':>9}")
    rows = []
    for name in ("step", "step with R1", "sampling"):
        start = time.perf_counter()
        if name == "sampling":
            lowered, loops = sampler(built, devices, flags.batch), built.schedule.num_steps
        else:
            lowered, loops = train_step(built, devices, flags.batch, name != "step"), 1
        row = describe(name, start, compile_for_chip(lowered, flags.batch), loops)
        row["bound_seconds"] = round(max(row["gflop"] / peak / 1000, row["gigabytes"] / bandwidth), 5)
        seconds = row["bound_seconds"] if math.isnan(row["seconds"]) else row["seconds"]
        row["of_peak"] = round(row["gflop"] / seconds / peak / 1000, 3)
        rows.append(row)
        print(
            f"{name:<14}{row['memory_gb']:>11.2f}{row['gflop']:>10.1f}{row['gigabytes']:>10.2f}"
            f"{1000 * row['seconds']:>9.2f}{1000 * row['bound_seconds']:>9.2f}{row['of_peak']:>9.1%}"
            f"{row['compile_seconds']:>9.1f}",
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
