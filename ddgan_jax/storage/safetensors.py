"""A generator in one .safetensors file: its weights, and as metadata what it is.

The metadata are `config` (the JSON of its training's configuration), `step`, `checksum`, and whatever else is told of
it. Such a file holds numbers and text: reading it runs nothing.
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
OWN = ("config", "step", "checksum")  # the metadata of every file


def write(file: paths.Given, arrays: Arrays, config: Mapping[str, Any], step: int, about: Mapping[str, str]) -> None:
    """Write float arrays by name, and the metadata. OSError if it cannot be written."""
    metadata = {"config": json.dumps(config), "step": str(step)}
    metadata["checksum"] = _checksum(arrays, metadata)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    paths.write(file, safetensors.numpy.save(arrays, {**about, **metadata}))


def read(file: paths.Given) -> tuple[Arrays, dict[str, Any], int, dict[str, str]]:
    """(arrays by name as float32, configuration, step, what else is told of it).

    UserError if there is no file, or one that this project did not write; Fault if it is damaged or cannot be read.
    """
    with of_a_file(str(file)):
        content = paths.read(file)
        try:
            arrays = safetensors.numpy.load(content)
            about = _header(content).get("__metadata__", {})
        except (safetensors.SafetensorError, ValueError) as error:
            raise Fault(f"{file} is damaged, or no safetensors file: {error}") from error
        except KeyError as error:  # a type that numpy lacks
            raise UserError(f"{file} was not written by ddgan_jax: it holds numbers of type {error}") from error
    if not about.keys() >= set(OWN):
        raise UserError(f"{file} was not written by ddgan_jax: it does not tell its configuration")
    if _checksum(arrays, about) != about["checksum"]:
        raise Fault(f"{file} is damaged: its checksum is wrong")
    weights = {name: array.astype(np.float32) for name, array in arrays.items()}
    told = {name: text for name, text in about.items() if name not in OWN}
    return weights, json.loads(about["config"]), int(about["step"]), told


def about(file: paths.Given) -> dict[str, str]:
    """What is told of the generator in a file, without its weights."""
    size = 8 + int.from_bytes(paths.read_start(file, 8), "little")
    return _header(paths.read_start(file, size)).get("__metadata__", {})


def _header(content: bytes) -> dict[str, Any]:
    """The JSON at the start, after 8 bytes that give its length."""
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def _checksum(arrays: Arrays, metadata: Mapping[str, str]) -> str:
    """CRC-32 of the configuration, the step, and the names, types and bytes of the arrays."""
    crc = zlib.crc32(f"{metadata['config']} {metadata['step']}".encode())
    for name in sorted(arrays):
        crc = zlib.crc32(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), crc)
    return f"{crc:08x}"
