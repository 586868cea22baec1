"""The training step and the sampler compiled for a GPU or a TPU that is not there, and the time that a model expects.

    pip install 'jax[cuda12]'    # for GPUs; for TPUs: pip install libtpu
    python -m benchmarks.aot --target=h100 --config=configs/cifar10.py --config.model.dtype=bfloat16 --batch=256
    python -m benchmarks.aot --target=v5e:4x4 --config=configs/cifar10.py --config.model.dtype=bfloat16 --batch=64

Nothing runs. --batch is that of one device. Memory is the compiler's: the state, with the images, and temporaries.
Kernels, the bytes that they move and their products are read from the compiled program; operations are counted as
`benchmarks.step` does. The expected time is a model, to compare programs with, and no measurement:

* on a GPU the sum over all kernels of max(bytes / bandwidth, products / rate) + a launch, where products reach 70 % of
  the card's peak for their type, and bytes its whole bandwidth;
* on a TPU the cycles that its compiler expects of each operation, one after the other.

It leaves out: autotuning and cuDNN's choice of algorithm and its workspace, which need a card; kernels that run beside
each other; caches; elementwise arithmetic on GPUs; and collectives between devices. The hours are those of all images
of the configuration's schedule on these devices, with R1 every `train.r1_every` steps.

--only=step compiles the programs of that name (step, step with R1, sampling); --reference=conv,group_norm or =all runs
operations of `ddgan_jax.networks.ops` in their plain form; --largest=1 doubles the batch until the step no longer fits.
"""

import collections
import dataclasses
import os
import re
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from benchmarks import hlo, measure, step
from ddgan_jax.devices import parallel
from ddgan_jax.errors import UserError
from ddgan_jax.method.build import init_state
from ddgan_jax.method.train_step import Method, make_train_step

UNKNOWN = float("nan")
REACHED = 0.7  # of the peak, by the matrix products and convolutions of libraries
LAUNCH = 2e-6  # seconds a kernel takes if it does nothing
USABLE = 0.9  # of a GPU's memory; the rest is the context's and the libraries'
PROGRAMS = ("step", "step with R1", "sampling")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A card by its public numbers: what its compiler asks for, and dense TFLOP/s by the type of a product."""

    name: str  # as the driver says it
    capability: tuple[int, int]
    cores: int
    clock: float  # GHz
    memory: float  # GiB
    bandwidth: float  # bytes a second
    cache: int  # MiB
    shared: tuple[int, int]  # KiB of shared memory of a core, and of a block that asks for it
    peak: dict[str, float]  # f32: with inputs rounded to TF32, where the card can; highest: not rounded
    threads: int = 2048  # of a core

    def description(self) -> str:
        """The card as XLA's GpuTargetConfigProto."""
        shared, block = (1024 * kib for kib in self.shared)
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {self.threads}
              shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {block}
              core_count: {self.cores} fpus_per_core: {64 if self.capability in ((7, 5), (8, 0)) else 128}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth:.0f} l2_cache_size: {self.cache * 2**20} clock_rate_ghz: {self.clock}
              device_memory_size: {self.memory * 2**30:.0f} registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              cuda_compute_capability {{ major: {self.capability[0]} minor: {self.capability[1]} }}
            }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{self.name}"
        """

    def seconds(self, kernel: hlo.Kernel) -> float:
        """The model's time of one kernel."""
        products = sum(number / self.peak.get(kind, self.peak["highest"]) for kind, number in kernel.operations.items())
        return max(kernel.bytes / self.bandwidth, products / REACHED / 1e12) + (0 if kernel.is_copy else LAUNCH)

    def of_type(self, dtype: str) -> float:
        """The peak for a network of `dtype`."""
        return self.peak["bf16" if dtype == "bfloat16" else "f32"]


_HOPPER = {"bf16": 989, "f16": 989, "f32": 494, "highest": 67}
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 79.1, 3.352e12, 50, (228, 227), _HOPPER),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 1.98, 140, 4.8e12, 50, (228, 227), _HOPPER),
    "a100": Gpu(
        *("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 79.2, 2.039e12, 40, (164, 163)),
        {"bf16": 312, "f16": 312, "f32": 156, "highest": 19.5},
    ),
    "l4": Gpu(
        *("NVIDIA L4", (8, 9), 58, 2.04, 22, 3e11, 48, (100, 99)),
        {"bf16": 121, "f16": 121, "f32": 60, "highest": 30.3},
        threads=1536,
    ),
    "rtx4090": Gpu(
        *("NVIDIA GeForce RTX 4090", (8, 9), 128, 2.52, 23.5, 1.008e12, 72, (100, 99)),
        {"bf16": 165, "f16": 165, "f32": 82.6, "highest": 82.6},
        threads=1536,
    ),
    "t4": Gpu(  # without bfloat16, which it computes in float32
        *("Tesla T4", (7, 5), 40, 1.59, 14.6, 3.2e11, 4, (64, 64)),
        {"bf16": 8.1, "f16": 65, "f32": 8.1, "highest": 8.1},
        threads=1024,
    ),
}


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A chip; to JAX half a v4 chip is a device."""

    peak: float  # TFLOP/s in bfloat16, as the maker states them
    clock: float  # GHz, what these mean for its 4, 4 or 8 matrix units of 128x128

    def seconds(self, kernel: hlo.Kernel) -> float:
        """The time of the cycles that the compiler expects of one kernel."""
        return kernel.cycles / self.clock / 1e9

    def of_type(self, dtype: str) -> float:
        """The peak: products are of bfloat16 whatever the type of a network is."""
        return self.peak


TPUS = {"v4": Tpu(137.5, 1.05), "v5e": Tpu(197, 1.5), "v5p": Tpu(459, 1.75), "v6e": Tpu(918, UNKNOWN)}


# --- The target and its programs --------------------------------------------------------------------------------


def target(name: str) -> tuple[Gpu | Tpu, Any]:
    """(what `name` is, its devices, which are not there). UserError where its compiler is not installed."""
    kind = name.partition(":")[0]
    if kind not in GPUS | TPUS:
        raise UserError(f"--target={name} is not known: it is {', '.join(GPUS)}, or a topology as v5e:4x4")
    jax.config.update("jax_platforms", "cpu")  # there is no such device to run on, or to ask
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    try:
        if gpu := GPUS.get(name):
            options = {"target_config": gpu.description(), "topology": "1x1x1"}  # partitions x hosts x devices
            return gpu, topologies.get_topology_desc("one card", "cuda", **options).devices
        return TPUS[kind], topologies.get_topology_desc(name, "tpu").devices
    except Exception as error:
        package = "'jax[cuda12]'" if name in GPUS else "libtpu"
        raise UserError(f"no compiler for {name} (pip install {package}): {error}") from error


def lowered(method: Method, devices: Any, batch: int, name: str) -> Any:
    """The program `name` of `batch` images a device."""
    state = jax.eval_shape(partial(init_state, method, 0))
    if name == "sampling":
        indices = jax.ShapeDtypeStruct((len(devices), batch), jnp.int32)
        program = jax.pmap(measure.sampler(method), in_axes=(None, 0), devices=devices)
        return program.lower(state.ema_params, indices)
    shape = method.denoiser.image_shape
    images = jax.ShapeDtypeStruct((len(devices), batch, *shape), np.uint8 if len(shape) == 3 else np.float32)
    train_step = make_train_step(method, 0, name != "step", parallel.AXIS)
    return parallel.map_step(train_step, devices).lower(state, images)


def compile_for(device: Gpu | Tpu, lowered: Any, batch: int) -> Any:
    """The compiled program. UserError if it needs more memory than a device has."""
    sizes = ""
    try:
        program = lowered.compile()
        if isinstance(device, Tpu) or sum(memory_gb(program)) * 1e9 < USABLE * device.memory * 2**30:
            return program
        sizes = f"{sum(memory_gb(program)):.1f} GB of {USABLE * device.memory * 2**30 / 1e9:.1f}"
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = " of ".join(re.findall(r"[\d.]+G\b", str(error))[:2])
    raise UserError(f"--batch={batch} does not fit a device ({sizes}): take fewer images")


def memory_gb(program: Any) -> tuple[float, float]:
    """(what a compiled program is given, what it needs beside that), 1e9 bytes."""
    memory = program.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes  # the state comes back in its own place
    return memory.argument_size_in_bytes / 1e9, (memory.temp_size_in_bytes + results) / 1e9


def operations(chip: Method, name: str) -> float:
    """1e9 floating-point operations of one device's share, which `chip` describes."""
    function, _ = step.functions(chip)[name]
    images = jax.ShapeDtypeStruct((chip.batch_size, *chip.denoiser.image_shape), np.uint8)
    once = measure.operations(function, jax.eval_shape(partial(init_state, chip, 0)), images)
    return once * (chip.denoiser.schedule.num_steps if name == "sampling" else 1)  # of a loop the body is counted once


# --- The model --------------------------------------------------------------------------------------------------


def module(op_name: str) -> str:
    """Where a kernel comes from: 'Generator up_block conv, gradient'. Numbers of blocks and layers are left out."""
    before, network, after = re.fullmatch(r"(.*?)(?:(Generator|Discriminator)/(.*))?", op_name).groups()
    *parts, _ = (after if network else before).split("/")  # the last part is the operation
    path = [re.sub(r"_\d+", "", part) for part in parts if re.fullmatch(r"[a-z]\w*", part)]
    path = [
        part for part in path if not part.startswith(("branch", "cond", "while", "body", "closed_call", "shard_map"))
    ]
    if not network:
        return " ".join(path) or ("other" if op_name else "copies")
    gradient = ", gradient" if "transpose(" in before else ""
    return " ".join([network, *dict.fromkeys(path)]) + gradient


def expected(program: Any, device: Gpu | Tpu) -> dict[str, Any]:
    """What the model says of a compiled program: kernels, bytes, time, and the ten costliest groups of kernels."""
    groups: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
    for kernel in hlo.kernels(program.as_text()):
        row = groups[module(kernel.op_name)]
        row[0] += 0 if kernel.is_copy else kernel.times
        row[1] += kernel.times * kernel.bytes / 1e9
        row[2] += kernel.times * device.seconds(kernel) * 1e3
    kernels, gigabytes, ms = (sum(column) for column in zip(*groups.values(), strict=True))
    costliest = sorted(groups.items(), key=lambda item: -item[1][2])[:10]
    return {
        "kernels": kernels,
        "gigabytes": measure.rounded(gigabytes),
        "ms": measure.rounded(ms) or UNKNOWN,
        "groups": [
            {"module": name, "kernels": row[0], "gigabytes": measure.rounded(row[1]), "ms": measure.rounded(row[2])}
            for name, row in costliest
        ],
    }


def hours(config_steps: int, r1_every: int, share: float, ms: dict[str, float]) -> float:
    """Of a whole training of `config_steps`, each `share` of the batch of these devices."""
    return config_steps * share * measure.mean_step(ms["step"], ms["step with R1"], r1_every) / 3.6e6


def print_groups(rows: list[dict[str, Any]]) -> None:
    """The costliest groups of each program."""
    for row in rows:
        print(f"\n{row['program']}: the costliest of {row['kernels']} kernels")
        print(f"{'ms':>9}{'GB moved':>10}{'kernels':>9}  of")
        for group in row["groups"]:
            print(f"{group['ms']:>9.3f}{group['gigabytes']:>10.3f}{group['kernels']:>9}  {group['module']}")


def fits(method: Method, device: Gpu | Tpu, devices: Any, batch: int) -> bool:
    """Does the step with R1, which needs more, fit the memory of a device?"""
    try:
        compile_for(device, lowered(method, devices, batch, "step with R1"), batch)
    except UserError as error:
        print(error, flush=True)
        return False
    print(f"--batch={batch} fits", flush=True)
    return True


def row_of(name: str, chip: Method, method: Method, device: Gpu | Tpu, devices: Any, dtype: str) -> dict[str, Any]:
    """Compile one program, print its line."""
    start = time.perf_counter()
    program = compile_for(device, lowered(method, devices, chip.batch_size, name), chip.batch_size)
    row: dict[str, Any] = {"program": name, "compile_seconds": round(time.perf_counter() - start, 1)}
    row |= dict(zip(("state_gb", "temporaries_gb"), map(measure.rounded, memory_gb(program)), strict=True))
    row |= expected(program, device) | {"gflop": round(operations(chip, name), 1)}
    row["of_peak"] = round(row["gflop"] / row["ms"] / device.of_type(dtype), 3)
    print(
        f"{name:<14}{row['state_gb']:>10.2f}{row['temporaries_gb']:>13.2f}{row['kernels']:>9}{row['gigabytes']:>10.2f}"
        f"{row['gflop']:>10.1f}{row['ms']:>9.2f}{row['of_peak']:>9.1%}{row['compile_seconds']:>9.1f}",
        flush=True,
    )
    return row


def main() -> None:
    """Compile and print."""
    defaults = {"target": "h100", "batch": 64, "only": "", "reference": "", "largest": 0}
    config, flags = measure.configuration("configs/cifar10.py", **defaults)
    device, devices = target(flags.target)
    schedule, dtype = (config.train.num_steps, config.train.r1_every, config.train.batch_size), config.model.dtype
    chip, method = (measure.build_for(config, flags.batch * n) for n in (1, len(devices)))
    print(f"{flags.target}: {len(devices)} of {device.of_type(dtype)} TFLOP/s, {dtype}, {flags.batch} images on each")
    header = f"{'':<14}{'GB state':>10}{'temporaries':>13}{'kernels':>9}{'GB moved':>10}{'GFLOP':>10}"
    print(f"{header}{'ms':>9}{'of peak':>9}{'compile':>9}")
    with measure.reference(flags.reference):
        names = [name for name in PROGRAMS if flags.only in ("", name)]
        rows = [row_of(name, chip, method, device, devices, dtype) for name in names]
        found = {"target": flags.target, "devices": len(devices), "batch_a_device": flags.batch, "dtype": dtype}
        found |= {"reference": flags.reference, "programs": rows}
        ms = {row["program"]: row["ms"] for row in rows}
        if "step" in ms and "step with R1" in ms:
            share = schedule[2] / method.batch_size
            found["hours_of_training"] = measure.rounded(hours(*schedule[:2], share, ms))
            print(f"{schedule[0]:,} steps of {schedule[2]}, so many images here: {found['hours_of_training']} h")
        print_groups(rows)
        if flags.largest:
            batch = flags.batch
            while fits(method, device, devices, 2 * batch):
                batch *= 2
            found["largest_batch_a_device"] = batch
    measure.print_line(found)


if __name__ == "__main__":
    measure.run(main)
