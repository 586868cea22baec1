"""Denoising Diffusion GANs in JAX and Flax (Xiao, Kreis and Vahdat, ICLR 2022, arXiv 2112.07804).

model = ddgan_jax.load("runs/digits")  # or one that comes with the package: see ddgan_jax.models()
images = model.sample(64, seed=0)
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Imported when it is asked for, so that the method's files import nothing but what they need."""
    if name in ("load", "models"):
        from ddgan_jax import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
