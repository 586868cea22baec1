"""The reference's state dicts <-> parameters here, by the tables in `names`; values keep their bits."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from ddgan_jax.errors import UserError
from ddgan_jax.storage.torch import names

Params = dict[str, Any]
StateDict = Mapping[str, np.ndarray]


def arrays_of(state_dict: StateDict) -> dict[str, np.ndarray]:
    """A state dict without the 'module.' that DistributedDataParallel puts before its keys; UserError if it is none."""
    if not isinstance(state_dict, Mapping):
        raise UserError(f"a state dict has arrays by name, but this is a {type(state_dict).__name__}")
    arrays = {str(key).removeprefix("module."): value for key, value in state_dict.items()}
    for key, value in arrays.items():
        if not isinstance(value, np.ndarray):
            raise UserError(f"a state dict holds arrays only, but {key!r} is a {type(value).__name__}")
        if value.dtype != np.float32:
            raise UserError(f"the state dict holds {key!r} as {value.dtype}: convert it to float32 first")
    return arrays


def to_ours(table: Iterable[names.Row], arrays: StateDict) -> Params:
    """The parameters that a table finds in the arrays of a state dict."""
    params = {path: np.einsum(f"{layout}->{names.here(layout)}", arrays[key]) for key, path, layout in table}
    return traverse_util.unflatten_dict({path: np.ascontiguousarray(v) for path, v in params.items()}, sep="/")


def to_theirs(table: Iterable[names.Row], flat: StateDict) -> dict[str, np.ndarray]:
    """The state dict that a table finds in parameters, which are given by their paths."""
    arrays = {key: np.einsum(f"{names.here(layout)}->{layout}", flat[path]) for key, path, layout in table}
    return {key: np.ascontiguousarray(value) for key, value in arrays.items()}


def generator_params(state_dict: StateDict) -> Params:
    """Parameters of a Generator from the reference's state dict, with or without 'module.' before its keys.

    Kernels change from (out, in) and (out, in, h, w) to (in, out) and (h, w, in, out). Raises UserError unless the
    state dict has exactly the arrays of a generator, as float32.
    """
    arrays = arrays_of(state_dict)
    return to_ours(names.generator(arrays, 0)[0], arrays)


def generator_state_dict(params: Params) -> dict[str, np.ndarray]:
    """The inverse of `generator_params`: keys in the reference's order, without 'module.'. Raises UserError too."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return to_theirs(names.generator(flat, 1)[0], flat)


def discriminator_params(state_dict: StateDict) -> Params:
    """Parameters of a Discriminator, as `generator_params` gives those of a Generator."""
    arrays = arrays_of(state_dict)
    return to_ours(names.discriminator(arrays, 0), arrays)


def discriminator_state_dict(params: Params) -> dict[str, np.ndarray]:
    """The inverse of `discriminator_params`. Raises UserError likewise."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return to_theirs(names.discriminator(flat, 1), flat)
