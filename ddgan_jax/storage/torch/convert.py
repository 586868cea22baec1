"""State dicts of the reference <-> parameter trees of this project. Values keep their bits.

The reference numbers a generator's layers, `all_modules.N`, in the order of the forward pass; here they have names,
such as `down_0_block_1`. Kernels are (out, in) and (out, in, h, w) there, and (in, out) and (h, w, in, out) here.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from ddgan_jax.errors import UserError

Params = dict[str, Any]
StateDict = Mapping[str, np.ndarray]

# The parts of a layer here and in the reference, in the order of the reference's state dicts. NIN is a dense layer
# on the channels, whose weight W is (in, out) in the reference as well.
ATTENTION = {"norm": "GroupNorm_0", "q": "NIN_0", "k": "NIN_1", "v": "NIN_2", "out": "NIN_3"}
BLOCK = {"norm_0/style": "GroupNorm_0.style", "conv_0": "Conv_0", "time": "Dense_0"}
BLOCK |= {"norm_1/style": "GroupNorm_1.style", "norm_1": "GroupNorm_1", "conv_1": "Conv_1", "shortcut": "Conv_2"}
RESAMPLE = {"fir_conv": "Conv2d_0", "conv": "Conv_0"}
GENERATOR = {"": ""} | ATTENTION | BLOCK | RESAMPLE
DDPM_GENERATOR = GENERATOR | {"shortcut": "NIN_0"}
COMBINE = {"": "Conv_0"}
DISCRIMINATOR = {"": "", "conv_0": "conv1.0", "conv_1": "conv2.0", "time": "dense_t1", "shortcut": "skip.0"}


def from_state_dict(state_dict: StateDict, like: Params) -> Params:
    """A network's parameters from the reference's state dict, with or without 'module.' before its keys.

    `like` is the tree of the parameters' shapes: `jax.eval_shape` of the `init` of a Generator or a Discriminator.

    Raises:
        UserError: the state dict does not have exactly these arrays, as float32.
    """
    arrays, keys, shapes = _arrays(state_dict), _keys(like), traverse_util.flatten_dict(like, sep="/")
    params = {}
    for key in [*keys, *sorted(arrays.keys() - keys)]:
        fault = ""
        if key not in arrays or key not in keys:
            fault = f"{key} is {'unknown' if key in arrays else 'missing'}"
        else:
            path = keys[key]
            params[path] = _transposed(key, arrays[key], (2, 3, 1, 0))
            if params[path].shape != shapes[path].shape:
                fault = f"{key} ({path}) is {list(params[path].shape)}, not {list(shapes[path].shape)}"
        if fault:
            raise UserError(f"the weights do not fit: {fault}; name the configuration or the hints of their training")
    return traverse_util.unflatten_dict(params, sep="/")


def to_state_dict(params: Params) -> dict[str, np.ndarray]:
    """The inverse of `from_state_dict`: keys in the reference's order, without 'module.'.

    Raises:
        UserError: the parameters have a layer that the reference's networks lack.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    return {key: _transposed(key, np.asarray(flat[path]), (3, 2, 0, 1)) for key, path in _keys(params).items()}


def _transposed(key: str, array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """An array with the axes in the other order, which for convolutions is `axes`."""
    if not key.endswith(".W"):
        array = array.transpose(axes) if array.ndim == 4 else array.T
    return np.ascontiguousarray(array)


def _arrays(state_dict: Any) -> dict[str, np.ndarray]:
    """A state dict without the 'module.' that DistributedDataParallel puts before its keys."""
    if not isinstance(state_dict, Mapping):
        raise UserError(f"a state dict must hold arrays by name, but this is a {type(state_dict).__name__}")
    for key, value in state_dict.items():
        if not isinstance(value, np.ndarray):
            raise UserError(f"a state dict holds only arrays, but {key!r} is a {type(value).__name__}")
        if value.dtype != np.float32:
            raise UserError(f"the state dict holds {key!r} as {value.dtype}: convert it to float32 first")
    return {str(key).removeprefix("module."): value for key, value in state_dict.items()}


def _keys(params: Params) -> dict[str, str]:
    """{key in the reference: path here} of all arrays of a network, in the order of the reference's state dicts."""
    layers = list(_generator_layers(params) if "z_0" in params else _discriminator_layers(params))
    if other := sorted(params.keys() - {name for name, _, _ in layers}):
        raise UserError(f"the reference's networks have no layer {other[0]}: write a .safetensors instead")
    keys = {}
    for name, prefix, parts in layers:
        found = [path.rpartition("/") for path in traverse_util.flatten_dict(params.get(name, {}), sep="/")]
        for part, slash, leaf in sorted(found, key=lambda path: (list(parts).index(path[0]), path[2] == "bias")):
            theirs = "bias" if leaf == "bias" else "weight"
            if parts[part].startswith("NIN"):
                theirs = {"kernel": "W", "bias": "b"}[leaf]
            keys[".".join(filter(None, (prefix, parts[part], theirs)))] = f"{name}/{part}{slash}{leaf}"
    return keys


def _generator_layers(params: Params) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """(name here, key in the reference, parts) of every layer of a generator."""
    first_up = params.get("up_0_block_0", {}).get("shortcut", {}).get("kernel", np.zeros(0))
    ddpm, number = len(first_up.shape) == 2, 0
    for name in _forward_order(params):
        if name in params or (ddpm and name.endswith("_resample")):  # numbered even if it has no parameters
            parts = COMBINE if name.endswith("_combine") else DDPM_GENERATOR if ddpm else GENERATOR
            yield name, f"all_modules.{number}", parts
            number += 1
    for i in range(sum(name.startswith("z_") for name in params)):
        yield f"z_{i}", f"z_transform.{2 * i + 1}", GENERATOR


def _forward_order(params: Params) -> Iterator[str]:
    """The names that the layers of a generator may have, in the order of its forward pass."""
    levels = sum(name.startswith("down_") and name.endswith("_block_0") for name in params)
    blocks = sum(name.startswith("down_0_block_") for name in params)
    yield from ("time_0", "time_1", "conv_in")
    for level in range(levels):
        for i in range(blocks):
            yield from (f"down_{level}_block_{i}", f"down_{level}_attn_{i}")
        if level < levels - 1:
            yield from (f"down_{level}_{name}" for name in ("resample", "combine", "pyramid"))
    yield from ("mid_block_0", "mid_attn", "mid_block_1")
    for level in reversed(range(levels)):
        yield from (f"up_{level}_block_{i}" for i in range(blocks + 1))
        yield from (f"up_{level}_{name}" for name in ("attn", "image_norm", "image_conv"))
        if level > 0:
            yield f"up_{level}_resample"
    yield from ("out_norm", "out_conv")


def _discriminator_layers(params: Params) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """(name here, key in the reference, parts) of every layer of a discriminator."""
    keys = {"time_0": "t_embed.main.0", "time_1": "t_embed.main.2", "conv_in": "start_conv"}
    keys |= {f"stage_{i}": f"conv{i + 1}" for i in range(sum(name.startswith("stage_") for name in params))}
    keys |= {"conv_out": "final_conv", "out": "end_linear"}
    return ((name, key, DISCRIMINATOR) for name, key in keys.items())
