"""A digest of the lowered training step of each configuration, to show that a change moves code and no number.

    python -m benchmarks.digest > before.txt
    (change the code)
    python -m benchmarks.digest > after.txt; diff before.txt after.txt

One line a configuration: a digest of the step with R1 for a CPU, a GPU and a TPU. Nothing is compiled or run. It is of
the graph of operations that the results follow from, so that neither the names of functions, nor where one function
calls another, nor what nobody uses changes it. `--only=cifar10` takes the configurations whose names hold that.
"""

import hashlib
import re
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure
from ddgan_jax.config import presets
from ddgan_jax.config.settings import read
from ddgan_jax.devices import parallel
from ddgan_jax.method.build import build, init_state, noise_seed
from ddgan_jax.method.train_step import Method, make_train_step

PLATFORMS = ("cpu", "cuda", "tpu")
# (configuration, variant, changes)
CONFIGS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("cifar10", "paper", {}),
    ("cifar10", "paper", {"model.dtype": "bfloat16"}),
    ("cifar10", "smoke", {}),
    ("cifar10", "smoke", {"model.dtype": "bfloat16"}),
    ("cifar10", "smoke", {"model.remat": True}),
    ("cifar10", "smoke", {"train.accumulate": 2}),
    ("celeba_hq_256", "paper", {"train.batch_size": 4}),
    ("celeba_hq_256", "smoke", {}),
    ("lsun_church_256", "smoke", {}),
    ("digits", "", {}),
    ("digits", "smoke", {}),
    ("digits", "conditional", {}),
    ("gaussians", "", {}),
    ("gaussians", "smoke", {}),
    ("stacked_mnist", "mnist_5k", {}),
    ("stacked_mnist", "smoke", {}),
    ("image_folder", "smoke", {}),
)


def lowered(method: Method, seed: int, platform: str) -> Any:
    """The training step with R1 as a StableHLO module, mapped over one device where that is a CPU."""
    jax.clear_caches()  # or what an earlier program has traced is shared
    state = jax.eval_shape(partial(init_state, method, 0))
    shape = method.denoiser.image_shape

    def batch(*leading: int) -> Any:
        images = jax.ShapeDtypeStruct(
            (*leading, method.batch_size, *shape), jnp.uint8 if len(shape) == 3 else jnp.float32
        )
        labels = jax.ShapeDtypeStruct((*leading, method.batch_size), jnp.int32)
        return (images, labels) if method.denoiser.num_classes else images

    if platform == "cpu":
        step = make_train_step(method, seed, True, parallel.AXIS)
        program = parallel.map_step(step, jax.local_devices()[:1]).lower(state, batch(1))
    else:
        traced = jax.jit(make_train_step(method, seed, True)).trace(state, batch())
        program = traced.lower(lowering_platforms=(platform,))
    return program.compiler_ir(dialect="stablehlo")


def digest(*parts: Any) -> str:
    """Sixteen digits for `parts`."""
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:16]


class Graph:
    """Every value of a module as the digest of the operation that makes it, and of the values which that takes."""

    def __init__(self, module: Any):
        self._module = module  # which owns the operations
        functions = (op for op in module.body.operations if op.operation.name == "func.func")
        self._functions = {op.attributes["sym_name"].value: op for op in functions}
        self._calls: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        self._constants: dict[str, int] = {}

    def results(self) -> list[str]:
        """The digests of what the module's main function returns."""
        arguments = self._functions["main"].regions[0].blocks[0].arguments
        return self._call("main", tuple(digest("argument", i) for i, _ in enumerate(arguments)))

    def _call(self, name: str, arguments: tuple[str, ...]) -> list[str]:
        key = name, arguments
        if key not in self._calls:
            self._calls[key] = self._block(self._functions[name].regions[0].blocks[0], {}, arguments)
        return self._calls[key]

    def _block(self, block: Any, values: dict[Any, str], arguments: Sequence[str]) -> list[str]:
        values |= zip(block.arguments, arguments, strict=True)
        *operations, end = block.operations
        for view in operations:
            op = view.operation
            values |= zip(op.results, self._operation(op, [values[x] for x in op.operands], values), strict=True)
        return [values[x] for x in end.operation.operands]

    def _operation(self, op: Any, operands: list[str], values: dict[Any, str]) -> list[str]:
        if op.name == "func.call":
            return self._call(op.attributes["callee"].value, tuple(operands))
        if op.name == "stablehlo.case" and operands[0] in self._constants:  # the branch of a platform
            branch = op.regions[self._constants[operands[0]]]
            return self._block(branch.blocks[0], values, [])
        if op.name in ("stablehlo.add", "stablehlo.multiply"):
            operands.sort()
        blocks = [block for region in op.regions for block in region.blocks]
        inner = [
            self._block(block, values, [digest("argument", depth, i) for i, _ in enumerate(block.arguments)])
            for depth, block in enumerate(blocks)
        ]
        made = digest(op.name, named(op), operands, inner, [str(x.type) for x in op.results])
        results = [digest(made, i) for i, _ in enumerate(op.results)]
        if integer := re.fullmatch(r"dense<(\d+)> : tensor<i32>", named(op).get("value", "")):
            self._constants[results[0]] = int(integer[1])
        return results


def named(op: Any) -> dict[str, str]:
    """The attributes of an operation."""
    names = [getattr(name, "name", name) for name in op.attributes]
    return {name: str(op.attributes[name]) for name in sorted(names)}


def main() -> None:
    """Print the digests."""
    options = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
    print(f"{'':<44}{''.join(f'{platform:<18}' for platform in PLATFORMS)}")
    for name, variant, changes in CONFIGS:
        label = " ".join([f"{name}:{variant}", *(f"{key}={value}" for key, value in changes.items())])
        if options.get("only", "") not in label:
            continue
        config = presets.get(f"{name}:{variant}")
        for key, value in changes.items():
            config.update_from_flattened_dict({key: value})
        c = read(config)
        method, digests = build(c), []
        for platform in PLATFORMS:
            digests.append(digest(*Graph(lowered(method, noise_seed(c), platform)).results()))
        print(f"{label:<44}{'  '.join(digests)}", flush=True)


if __name__ == "__main__":
    measure.run(main)
