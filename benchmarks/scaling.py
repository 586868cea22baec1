"""What a step costs on more devices: its collectives and its work, from compiled programs; a JSON line at the end.

    python -m benchmarks.scaling --config=configs/digits.py --batch=64

The training step is compiled for 1, 2, 4 and 8 devices of a host, and for 2 processes of 1 and of 4, at one global
batch. Host devices share the processor, so no time is measured: the work of each device must fall with their number,
and the collectives must stay as few and as large as one average of each network's gradients.
"""

import collections
import json
import os
import re
import socket
import subprocess
import sys
from functools import partial

import jax
import numpy as np

from benchmarks import measure
from ddgan_jax.devices import parallel, processes
from ddgan_jax.method.build import init_state
from ddgan_jax.method.train_step import make_train_step

LAYOUTS = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 4))  # processes, devices of each
KINDS = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
WIDTHS = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "u8": 1, "f64": 8, "s64": 8, "u64": 8}


def collectives(program: str) -> list[tuple[str, int]]:
    """(kind, bytes of its result) of every collective between devices in the text of a compiled program."""
    found = []
    for shapes, kind, options in re.findall(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\((.*)", program):
        if "replica_groups={{0}}" in options:  # on one device: XLA keeps it, but nothing moves
            continue
        size = 0
        for element, dimensions in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            count = 1
            for dimension in filter(None, dimensions.split(",")):
                count *= int(dimension)
            size += WIDTHS[element] * count
        found.append((kind, size))
    return found


def layout() -> None:
    """In a process of its own: compile the step for the devices there are, and print what it is made of."""
    processes.initialize()
    config, flags = measure.configuration("configs/digits.py", batch=0)
    method = measure.build_for(config, flags.batch)
    shapes = jax.eval_shape(partial(init_state, method, 0))
    state = parallel.replicate(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))
    local = measure.examples(method, method.batch_size // jax.process_count())
    step = make_train_step(method, 0, False, parallel.AXIS)
    program = parallel.Stop().compile([step], state, parallel.split(local))[0].result()
    found = collectives(program.as_text())
    sizes = {name: sum(x.size for x in jax.tree.leaves(getattr(state, f"{name}_params"))) for name in ("gen", "disc")}
    if processes.is_primary():
        print(
            json.dumps(
                {
                    "collectives": len(found),
                    "kinds": dict(collections.Counter(kind for kind, _ in found)),
                    "bytes": sum(size for _, size in found),
                    "largest": sorted((size for _, size in found), reverse=True)[:3],
                    "gradient_bytes": {name: 4 * size for name, size in sizes.items()},
                    "gflop_a_device": round((program.cost_analysis() or {}).get("flops", float("nan")) / 1e9, 3),
                }
            ),
            flush=True,
        )
    processes.barrier()


def compiled_for(processes: int, devices: int) -> dict:
    """What `layout` prints for so many processes and devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    group = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)}
    started = []
    for i in range(processes):
        env = os.environ | (group | {"JAX_PROCESS_ID": str(i)} if processes > 1 else {})
        env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        command = [sys.executable, "-m", "benchmarks.scaling", *sys.argv[1:]]
        env["DDGAN_SCALING_LAYOUT"] = "1"
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{processes} processes of {devices} devices failed")
    return json.loads(outputs[0].splitlines()[-1])


def main() -> None:
    """Compile for every layout and print."""
    print(f"{'processes x devices':<22}{'collectives':>12}{'MB':>9}{'of gradients':>14}{'GFLOP a device':>16}")
    rows = []
    for count, devices in LAYOUTS:
        row = compiled_for(count, devices)
        rows.append({"processes": count, "devices_each": devices} | row)
        gradients = sum(row["gradient_bytes"].values())
        print(
            f"{f'{count} x {devices}':<22}{row['collectives']:>12}{row['bytes'] / 1e6:>9.3f}"
            f"{row['bytes'] / gradients:>14.2f}{row['gflop_a_device']:>16.3f}",
            flush=True,
        )
    measure.print_line({"layouts": rows})


if __name__ == "__main__":
    measure.run(layout if os.environ.get("DDGAN_SCALING_LAYOUT") else main)
