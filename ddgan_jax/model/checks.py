"""Checks of a caller's arguments."""

import contextlib
import operator
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ddgan_jax.config.types import MAX_SEED
from ddgan_jax.errors import UserError
from ddgan_jax.method.sampling import Denoiser
from ddgan_jax.model.sampler import POSTERIORS
from ddgan_jax.storage import safetensors


def as_integer(name: str, value: Any, low: int, high: int, text: str = "") -> int:
    """An integer of Python, NumPy or JAX as one of Python. Raises UserError unless it is one from `low` to `high`."""
    with contextlib.suppress(TypeError):  # raised for everything that is no integer
        if not isinstance(value, bool) and low <= operator.index(value) <= high:
            return operator.index(value)
    raise UserError(f"{name}={value!r} must be {text or f'an integer from {low} to {high}'}")


def as_seed(seed: Any) -> int:
    """A seed as a Python integer. Raises UserError for an invalid seed."""
    return as_integer("seed", seed, 0, MAX_SEED)


def as_posterior(posterior: Any, denoiser: Denoiser) -> str:
    """The name of a posterior. Raises UserError for an unknown name, or one that this generator does not have."""
    if not isinstance(posterior, str) or posterior not in POSTERIORS:
        raise UserError(f"posterior={posterior!r} is not supported: it is {' or '.join(POSTERIORS)}")
    if denoiser.predicts_x_t and posterior != "gaussian":
        raise UserError(f"posterior={posterior!r} is for a generator of x_0, and this one outputs x_t: leave it out")
    return posterior


def as_path(path: Any) -> str:
    """A path as text. Raises UserError for a value that is no path."""
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"path={path!r:.100} must be text or a path, such as 'runs/digits'")
    if "\0" in (text := os.fspath(path)):
        raise UserError(f"path={path!r:.100} contains a null character, which no path has")
    return text


def as_array(name: str, value: Any) -> np.ndarray:
    """An array-like value as a NumPy array. Raises UserError for lists of different lengths."""
    try:
        return np.asarray(value)
    except ValueError as error:
        raise UserError(f"{name} is no array: {error}") from error


def as_half(name: str, array: np.ndarray) -> np.ndarray:
    """An array as float16. Raises UserError if it has numbers that float16 cannot hold."""
    with np.errstate(over="ignore"):  # an overflow gives infinity
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(f"half=True: {name} has numbers that float16 cannot hold: save them in full")
    return half


def as_count(name: str, value: Any, least: int, most: int, bytes_each: int) -> int:
    """A number of images as a Python integer.

    Raises UserError unless it is one from `least` to `most`, and that many times `bytes_each` fit into the free memory.
    """
    num = as_integer(name, value, least, most)
    need, free = num * bytes_each, free_memory()
    if need > free:
        raise UserError(
            f"{name}={num} needs at least {need / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free: "
            f"ask for at most {num * free // need}"
        )
    return num


def check_about(about: Mapping[str, str]) -> None:
    """Raises UserError unless further metadata of a file are text, by names that the file does not use itself."""
    if not isinstance(about, Mapping):
        raise UserError(f"about={about!r:.100} must be a dict of texts by name")
    for name, text in about.items():
        if not isinstance(name, str) or not isinstance(text, str) or name in safetensors.RESERVED:
            own = ", ".join(safetensors.RESERVED)
            raise UserError(f"about has {name!r}: {text!r}, and must be text by names other than {own}")


def free_memory() -> int:
    """An upper bound of the bytes that this process may still use: available in the system, and the container's limit.

    Of the limit, other processes of the container may have used a part.
    """
    bounds = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file, pattern, unit in (
        ("/proc/meminfo", r"MemAvailable: +(\d+) kB", 1024),
        ("/sys/fs/cgroup/memory.max", r"(\d+)", 1),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", r"(\d+)", 1),  # version 1 of control groups
    ):
        with contextlib.suppress(OSError):
            bounds += [unit * int(number) for number in re.findall(pattern, pathlib.Path(file).read_text())]
    return min(bounds)
