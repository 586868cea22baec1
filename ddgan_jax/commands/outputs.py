"""How the results of a model are written: grids, animations, arrays, and numbered files."""

import collections
import concurrent.futures
import contextlib
import itertools
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ddgan_jax.commands import figures
from ddgan_jax.data.folder import UNFINISHED, Folder
from ddgan_jax.devices import processes
from ddgan_jax.errors import UserError
from ddgan_jax.storage import paths

KINDS = {
    ".png": "a grid",
    ".gif": "an animation",
    ".npz": "an array",
    ".bin": "the sampler for jax alone",
    ".onnx": "the sampler for ONNX runtimes",
    ".safetensors": "the generator in one file",
    ".pth": "weights for the PyTorch reference",
    "": "a directory",
}


def check_out(out: str, *kinds: str, num: int = 0, flag: str = "--out") -> None:
    """Raises UserError unless `out` of `flag` ends in one of `kinds` and, if it is a directory, can take `num` images.

    Call it before the work.
    """
    if paths.path(out).suffix not in kinds:
        endings = ", ".join(f"in {kind} ({KINDS[kind]})" for kind in kinds if kind)
        raise UserError(f"{flag}={out} must end {endings}" + (" or name a directory" if "" in kinds else ""))
    if num:
        processes.run_on_primary(lambda: _check_directory(out, num))


def _check_directory(out: str, num: int) -> None:
    """Refuses a directory with images that `num` new ones would not replace: an evaluation would count them."""
    path = paths.path(out)
    if path.suffix or not paths.is_dir(path):
        return
    for name in paths.retry(path, lambda: Folder(path)).names:
        stem = name.removesuffix(".png")
        if not (stem.isdecimal() and int(stem) < num and name == file_name(int(stem))):
            raise UserError(f"--out={out} holds other images, such as {name}: name an empty directory")


def file_name(index: int) -> str:
    """The name of image `index` in a directory of samples."""
    return f"{index:06d}.png"


def save(images: np.ndarray, out: str | os.PathLike) -> None:
    """Write uint8 images [N, H, W, C] as one grid (.png), an animation (.gif), an array (.npz), or numbered files.

    Points [N, d] become a scatter plot or an array.
    """
    path = paths.path(out)
    if path.suffix == ".png":
        figures.save_image(path, figures.as_image(images))
    elif path.suffix == ".gif":
        frames = figures.enlarged(images) if images.ndim == 4 else figures.as_frames(list(images[:, None]))
        figures.save_gif(path, list(frames))
    else:
        with into(os.fspath(out), images.shape, images.dtype) as add:
            add(images)


def save_with_input(given: np.ndarray, images: np.ndarray, out: str) -> None:
    """`save`, with the input image [H, W, C] first in a grid, or the input point [d] marked in a scatter plot."""
    if out.endswith(".png") and images.ndim == 2:
        figures.save_image(paths.path(out), figures.scatter(images, given))
    else:
        save(np.concatenate([given[None], images]) if out.endswith(".png") else images, out)


def into(out: str, shape: Sequence[int], dtype: Any) -> AbstractContextManager[Callable[[np.ndarray], Any]]:
    """A function that adds images [n, ...] to an .npz, or to a directory: `shape` [N, ...] and `dtype` in all."""
    return into_npz(out, shape, dtype) if out.endswith(".npz") else into_directory(out)


@contextlib.contextmanager
def into_npz(out: str, shape: Sequence[int], dtype: Any) -> Iterator[Callable[[np.ndarray], Any]]:
    """A function that appends samples [n, ...] to the array `images`, of `shape` and `dtype`, of a compressed .npz."""
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(paths.writing(paths.path(out)))
        archive = stack.enter_context(zipfile.ZipFile(opened, "w", zipfile.ZIP_DEFLATED, compresslevel=1))
        entry = stack.enter_context(archive.open("images.npy", "w", force_zip64=True))
        about = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "shape": tuple(shape), "fortran_order": False}
        np.lib.format.write_array_header_1_0(entry, about)
        yield lambda images: entry.write(np.ascontiguousarray(images).data.cast("B"))


@contextlib.contextmanager
def into_directory(out: str) -> Iterator[Callable[[np.ndarray], Any]]:
    """A function that writes uint8 images [n, H, W, C] as the next numbered files, in threads.

    Until all are written, a file UNFINISHED in the directory says that it may hold samples of two models.
    """
    pending: collections.deque[list[concurrent.futures.Future]] = collections.deque()
    count, mark = itertools.count(), paths.path(out) / UNFINISHED
    paths.write(mark, "")
    with concurrent.futures.ThreadPoolExecutor(processes.num_cores()) as pool:

        def add(images: np.ndarray) -> None:
            pending.append(
                [pool.submit(_save_sample, image, paths.path(out) / file_name(next(count))) for image in images]
            )
            while len(pending) > 2:  # bounds the memory
                wait(pending.popleft())

        def wait(files: list[concurrent.futures.Future]) -> None:
            for file in files:
                file.result()

        try:
            yield add
            for files in pending:
                wait(files)
        except BaseException:  # whatever it is, it is raised again
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if not paths.is_remote(out):
        os.sync()
    mark.unlink()


def _save_sample(image: np.ndarray, path: paths.Path) -> None:
    """Writes a PNG. Level 1 takes half the time of the default, for files that are a sixth larger."""
    figures.save_image(path, image, sync=False, compress_level=1)
