"""A digest of the lowered training step of each configuration, to show that a change moves code and no number.

    python -m benchmarks.digest > before.txt
    (change the code)
    python -m benchmarks.digest > after.txt; diff before.txt after.txt

One line a configuration: SHA-256 of the StableHLO of `Built.step(True)`, the step with R1, for a CPU, a GPU and a TPU.
Nothing is compiled. The names of functions inside the program are replaced by numbers, so that renaming one in Python
changes no digest. `--only=cifar10` takes the configurations whose names hold that; --text=DIR keeps the programs.
"""

import hashlib
import importlib
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure
from ddgan_jax import parallel
from ddgan_jax.build import Built, build

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


def named(name: str, variant: str, changes: dict[str, Any]) -> str:
    """What a line calls the configuration."""
    return " ".join([f"{name}:{variant}", *(f"{key}={value}" for key, value in changes.items())])


def lowered(built: Built, platform: str) -> str:
    """The StableHLO of the training step with R1, mapped over one device where that is a CPU."""
    jax.clear_caches()  # functions that an earlier program has traced would be shared differently
    state = jax.eval_shape(built.init_state)
    dtype = jnp.uint8 if len(built.image_shape) == 3 else jnp.float32

    def batch(*leading: int) -> Any:
        images = jax.ShapeDtypeStruct((*leading, built.batch_size, *built.image_shape), dtype)
        labels = jax.ShapeDtypeStruct((*leading, built.batch_size), jnp.int32)
        return (images, labels) if built.num_classes else images

    if platform == "cpu":
        return parallel.map_step(built.step(True), jax.local_devices()[:1]).lower(state, batch(1)).as_text()
    return jax.jit(built.step(True, None)).trace(state, batch()).lower(lowering_platforms=(platform,)).as_text()


def normalised(text: str) -> str:
    """`text` with every function named by the order in which functions appear."""
    numbers: dict[str, str] = {}

    def number(match: re.Match) -> str:
        return numbers.setdefault(match[0], f"@{len(numbers)}")

    defined = set(re.findall(r"func\.func \w+ (@[\w.$-]+|@\"[^\"]+\")", text))
    return re.sub(r"@[\w.$-]+", lambda match: number(match) if match[0] in defined else match[0], text)


def main() -> None:
    """Print the digests."""
    options = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
    print(f"{'':<44}{''.join(f'{platform:<18}' for platform in PLATFORMS)}")
    for name, variant, changes in CONFIGS:
        label = named(name, variant, changes)
        if options.get("only", "") not in label:
            continue
        config = importlib.import_module(f"configs.{name}").get_config(variant)
        for key, value in changes.items():
            config.update_from_flattened_dict({key: value})
        built, digests = build(config), []
        for platform in PLATFORMS:
            text = normalised(lowered(built, platform))
            digests.append(hashlib.sha256(text.encode()).hexdigest()[:16])
            if folder := options.get("text"):
                pathlib.Path(folder, f"{label} {platform}.mlir").write_text(text)
        print(f"{label:<44}{'  '.join(digests)}", flush=True)


if __name__ == "__main__":
    measure.run(main)
