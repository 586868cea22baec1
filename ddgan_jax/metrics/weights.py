"""Published weights of the feature networks: named arrays of a state dict -> parameters, every one checked.

A state dict comes from a `.pth` file in PyTorch's layout: convolutions (out, in, h, w), linear weights (out, in).
Here they are read from an `.npz` with the same names; whoever has PyTorch may pass the content of the `.pth` itself.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ddgan_jax.errors import Fault, UserError, of_a_file
from ddgan_jax.storage import paths

StateDict = Mapping[str, np.ndarray]
Params = dict[str, dict[str, np.ndarray]]


def content(path: str | os.PathLike) -> bytes:
    """The bytes of a file. UserError if there is none; Fault if it is there and cannot be read."""
    with of_a_file(str(path)):
        return paths.read(paths.path(path))


@contextlib.contextmanager
def parsed(path: str | os.PathLike, otherwise: str) -> Iterator[None]:
    """Turns what fails on bytes that were read from `path` into a UserError: it is `otherwise`."""
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:  # which proves no damage
        raise Fault(f"{path} cannot be read: not enough memory") from error
    except Exception as error:  # no file is read here; damaged archives fail in many ways in zipfile, zlib and numpy
        raise UserError(f"{path} is {otherwise} ({type(error).__name__})") from error


def read(path: str) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` by name. Raises UserError if it is missing, damaged, or holds anything but arrays.

    Fault if it cannot be read.
    """
    return parse(content(path), path)


def parse(found: bytes, path: str) -> dict[str, np.ndarray]:
    """`read` of the bytes of the file `path`."""
    with (
        parsed(path, "damaged, or no .npz file of plain arrays"),
        np.load(io.BytesIO(found), allow_pickle=False) as file,
    ):
        return dict(file)


def shapes(network: nn.Module) -> dict[str, dict[str, tuple[int, ...]]]:
    """{layer: {leaf: shape}} of the parameters of a feature network; nothing is computed."""
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.uint8)
    found = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
    return {layer: {leaf: value.shape for leaf, value in leaves.items()} for layer, leaves in found.items()}


def array(state_dict: StateDict, key: str, shape: tuple[int, ...], file: str) -> np.ndarray:
    """The array at `key`; UserError if it is missing, of another shape or not of floats. `file` is the right one."""
    if key not in state_dict:
        raise UserError(f"the weights lack {key!r}, which {file} holds with shape {shape}")
    value = np.asarray(state_dict[key])
    if value.shape != shape or value.dtype.kind != "f":
        raise UserError(f"the weights hold {key!r} as {value.dtype} of shape {value.shape}; {file} has floats {shape}")
    return value


def kernel(state_dict: StateDict, key: str, shape: tuple[int, ...], file: str) -> np.ndarray:
    """The weight at `key` as the kernel of `shape` (h, w, in, out) or (in, out) that linen has; else as `array`."""
    value = array(state_dict, key, shape[:-3:-1] + shape[:-2], file)
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
