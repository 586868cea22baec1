"""Checked conversion of published weights, the named arrays of a state dict, to parameters of the feature networks.

A state dict comes from a `.pth` file in PyTorch's layout: convolutions (out, in, h, w), linear weights (out, in).
An `.npz` with the same names serves as well.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ddgan_jax.errors import UserError

StateDict = Mapping[str, np.ndarray]
Params = dict[str, dict[str, np.ndarray]]


def shapes(network: nn.Module) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the parameters of a feature network, {layer: {leaf: shape}}, without computing them."""
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.uint8)
    found = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
    return {layer: {leaf: value.shape for leaf, value in leaves.items()} for layer, leaves in found.items()}


def array(state_dict: StateDict, key: str, shape: tuple[int, ...], file: str) -> np.ndarray:
    """The array `key`. UserError unless it has this `shape` and floats, as it has in the published `file`."""
    if key not in state_dict:
        raise UserError(f"the weights lack {key!r}, which {file} holds with shape {shape}")
    value = np.asarray(state_dict[key])
    if value.shape != shape or value.dtype.kind != "f":
        raise UserError(f"the weights hold {key!r} as {value.dtype} of shape {value.shape}; {file} has floats {shape}")
    return value


def kernel(state_dict: StateDict, key: str, shape: tuple[int, ...], file: str) -> np.ndarray:
    """The weight `key` as a Flax kernel of `shape` (h, w, in, out) or (in, out). UserErrors as of `array`."""
    value = array(state_dict, key, shape[:-3:-1] + shape[:-2], file)
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
