"""Denoising Diffusion GANs in JAX and Flax (Xiao, Kreis and Vahdat, ICLR 2022, arXiv 2112.07804).

model = ddgan_jax.load("runs/mnist")  # or the name of a bundled model: see ddgan_jax.models()
images = model.sample(64, seed=0)

model = ddgan_jax.train(images, labels, workdir="runs/mine")
measures = ddgan_jax.evaluate(model, images, labels)
"""

import importlib
from typing import Any

_PUBLIC = {  # name: the module that defines it
    "load": "model.loading",
    "models": "model.loading",
    "Model": "model.model",
    "train": "commands.api",
    "evaluate": "commands.api",
    "Data": "data.sources",
}
_MODULES = {"presets": "config.presets", "figures": "commands.figures"}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that importing the package is quick."""
    if name == "__version__":
        return _version()
    if name in _MODULES:
        return importlib.import_module(f"ddgan_jax.{_MODULES[name]}")
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"ddgan_jax.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    """The version of the installed package, or else of the checkout."""
    import pathlib
    import tomllib
    from importlib import metadata

    try:
        return metadata.version("ddgan_jax")
    except metadata.PackageNotFoundError:
        project = pathlib.Path(__file__).parent.parent / "pyproject.toml"
        return tomllib.loads(project.read_text())["project"]["version"]
