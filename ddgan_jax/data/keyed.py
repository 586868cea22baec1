"""Tables whose rows belong to files, found by a hash of each file's name, size and time."""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ddgan_jax.storage import paths

DAMAGE = (ValueError, KeyError, EOFError, TypeError, OverflowError, zipfile.BadZipFile, zlib.error)  # of an .npz file


def digest(text: str) -> str:
    """A hash of a text, 16 hexadecimal digits. Names of files need not be valid Unicode."""
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def digests(texts: Sequence[str]) -> np.ndarray:
    """Hashes uint64 [N] of texts."""
    found = (hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(found), np.uint64)


def find(known: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The position in `known` of each of `keys`, int64 [N]; -1 where it is not there."""
    if not len(known):
        return np.full(len(keys), -1)
    order = np.argsort(known)
    place = np.searchsorted(known, keys, sorter=order).clip(max=len(known) - 1)
    return np.where(known[order[place]] == keys, order[place], -1)


def parse(content: bytes, columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The columns of a table, with their dtypes, and its "keys". Raises one of DAMAGE for anything else."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        table = {name: file[name].astype(dtype) for name, dtype in {"keys": np.uint64, **columns}.items()}
    if any(column.shape != (len(table["keys"]),) for column in table.values()):
        raise ValueError("its columns differ in length")
    return table


def read(file: paths.Given, columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """`parse` of a file that can be made again: an empty table if it is missing, unreadable or damaged."""
    try:
        return parse(paths.read(file), columns)
    except (OSError, *DAMAGE):
        return empty(columns)


def empty(columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A table without rows."""
    return {name: np.empty(0, dtype) for name, dtype in {"keys": np.uint64, **columns}.items()}


def write(file: paths.Given, table: Mapping[str, np.ndarray]) -> None:
    """Writes a table. Raises OSError if that fails."""
    paths.write(file, lambda opened: np.savez(opened, **table))  # type: ignore[arg-type]
