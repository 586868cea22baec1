"""A generator in one .safetensors file: its weights, and as metadata what they are.

The metadata are `config` (the JSON of the training's configuration), `step`, `checksum`, for a class-conditional model
`classes` (a JSON list of their names), and any further text. Such a file contains only numbers and text: reading it
runs no code.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ddgan_jax.errors import Fault, UserError, of_a_file
from ddgan_jax.storage import paths

Arrays = dict[str, np.ndarray]
OWN = ("config", "step", "checksum")  # the metadata that every file has
RESERVED = (*OWN, "classes")  # names of the metadata that `Model.save` writes; others are free


def write(file: paths.Given, arrays: Arrays, config: Mapping[str, Any], step: int, about: Mapping[str, str]) -> None:
    """Write float arrays by name, and the metadata, `about` among them. Raises OSError if it cannot be written."""
    metadata = {"config": json.dumps(config), "step": str(step)}
    metadata["checksum"] = _checksum(arrays, metadata)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    paths.write(file, safetensors.numpy.save(arrays, {**about, **metadata}))


def read(file: paths.Given) -> tuple[Arrays, dict[str, Any], int, dict[str, str]]:
    """(arrays by name as float32, configuration, step, further metadata).

    Raises:
        UserError: there is no file, or this project did not write it.
        Fault: the file is damaged or cannot be read.
    """
    with of_a_file(str(file)):
        content = paths.read(file)
        try:
            arrays = safetensors.numpy.load(content)
            found = _metadata(content)
        except (safetensors.SafetensorError, ValueError) as error:
            raise Fault(f"{file} is damaged, or no safetensors file: {error}") from error
        except KeyError as error:  # a type that NumPy lacks
            raise UserError(f"{file} was not written by ddgan_jax: it contains numbers of type {error}") from error
    if not found.keys() >= set(OWN):
        raise UserError(f"{file} was not written by ddgan_jax: it has no configuration; name a file of --mode=export")
    if _checksum(arrays, found) != found["checksum"]:
        raise Fault(f"{file} is damaged: its checksum is wrong; copy or export it again")
    try:
        config, step = json.loads(found["config"]), int(found["step"])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} was not written by ddgan_jax: its configuration or step cannot be read") from error
    weights = {name: array.astype(np.float32) for name, array in arrays.items()}
    return weights, config, step, {name: text for name, text in found.items() if name not in OWN}


def metadata(file: paths.Given) -> dict[str, str]:
    """The metadata of a file, read without its weights."""
    size = 8 + int.from_bytes(paths.read_start(file, 8), "little")
    return _metadata(paths.read_start(file, size))


def _metadata(content: bytes) -> dict[str, str]:
    """The metadata in the JSON at the start of a file, after 8 bytes with the JSON's length."""
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}


def _checksum(arrays: Arrays, metadata: Mapping[str, str]) -> str:
    """CRC-32 of the configuration, the step, and the names, types and bytes of the arrays."""
    crc = zlib.crc32(f"{metadata['config']} {metadata['step']}".encode())
    for name in sorted(arrays):
        crc = zlib.crc32(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), crc)
    return f"{crc:08x}"
