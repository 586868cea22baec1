"""Arrays from `.npz` files, and the errors of files that are missing, unreadable or damaged."""

import io
import os
from collections.abc import Container

import numpy as np

from ddgan_jax.errors import Fault, UserError, of_a_file
from ddgan_jax.storage import paths


def read_bytes(path: str | os.PathLike) -> bytes:
    """The content of a file. UserError if there is no such file; Fault if it exists and cannot be read."""
    with of_a_file(str(path)):
        return paths.read(paths.path(path))


def read_npz(path: str | os.PathLike, names: Container[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` by name; with `names`, only those of them that the file holds.

    Raises UserError if the file is missing, damaged, or holds anything but arrays; Fault if it cannot be read.
    """
    return parse_npz(read_bytes(path), path, names)


def parse_npz(content: bytes, path: str | os.PathLike, names: Container[str] | None = None) -> dict[str, np.ndarray]:
    """`read_npz` of the content of the file `path`."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return {name: file[name] for name in file if names is None or name in names}
    except MemoryError as error:  # which is no evidence of damage
        raise Fault(f"{path} cannot be read: not enough memory") from error
    except Exception as error:  # no file is read here; damaged archives fail in many ways in zipfile, zlib and numpy
        raise UserError(
            f"{path} is damaged, or no .npz file of plain arrays, as np.savez writes ({type(error).__name__})"
        ) from error
