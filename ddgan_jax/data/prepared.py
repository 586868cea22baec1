"""The prepared copy of a folder, zip or LMDB of images: decoded once, in threads, and opened by all later starts.

A copy is a folder with the pixels in images.0.bin, images.1.bin, ...; index.npz with a row for each file; skipped.json
with the files that are no images; and dataset.json, which is written last. The copy of a folder that has grown shares
files of pixels with the earlier copy, as hard links.
"""

import contextlib
import functools
import json
import math
import os
import pathlib
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ddgan_jax.data import folder, headers, keyed, preparing
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.storage import paths


class PreparedImages:
    """Images uint8 [N, H, W, C] in files, read when they are indexed along the first axis.

    Indexing several axes reads all images. Reads use file descriptors: a read that fails raises OSError, after
    retries, whereas in a memory map it would end the process with SIGBUS.
    """

    def __init__(self, files: Sequence[paths.Given], shape: Sequence[int], index: "Index"):
        """Opens images of `shape` (H, W, C) in the rows of `files` that `index` names.

        Raises ValueError if a file is too short for them. Reading an image with another checksum raises Fault.
        """
        self.shape, self.dtype = (len(index.rows), *shape), np.dtype(np.uint8)
        self._files, self._size, self._index = [os.fspath(file) for file in files], math.prod(shape), index
        self._descriptors = []
        for number, file in enumerate(self._files):
            descriptor = paths.retry(file, functools.partial(os.open, file, os.O_RDONLY))
            self._descriptors.append(descriptor)
            weakref.finalize(self, os.close, descriptor)
            rows = index.rows[index.parts == number]
            if len(rows) and os.fstat(descriptor).st_size < (rows.max() + 1) * self._size:
                raise ValueError(f"{file} is too short for {rows.max() + 1} images of {list(shape)}")
            if hasattr(os, "posix_fadvise"):  # reading ahead of a random access reads what is not used
                with contextlib.suppress(OSError):
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    @property
    def checksum(self) -> str:
        """A hash of the checksums of all images."""
        return f"{zlib.crc32(np.ascontiguousarray(self._index.checksums).data):08x}"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice) and key.step in (None, 1):
            return PreparedImages(self._files, self.shape[1:], Index(*(column[key] for column in self._index)))
        if isinstance(key, tuple) or key is Ellipsis:
            return np.asarray(self)[key]
        indices = np.arange(len(self))[key]
        images = paths.retry(self._files[0], lambda: self._read(indices.ravel()))
        return images.reshape(*indices.shape, *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[np.arange(len(self))].astype(dtype or self.dtype, copy=False)

    def _read(self, indices: np.ndarray) -> np.ndarray:
        images = np.empty((len(indices), self._size), np.uint8)
        chosen = [column[indices] for column in self._index]
        for image, part, row, checksum in zip(images, *chosen, strict=True):
            done = 0
            while done < self._size:
                content = os.pread(self._descriptors[part], self._size - done, int(row) * self._size + done)
                if not content:
                    raise OSError(f"{self._files[part]} ends before image {row}")
                image[done : done + len(content)] = np.frombuffer(content, np.uint8)
                done += len(content)
            if zlib.crc32(image.data) != checksum:
                raise Fault(
                    f"image {row} in {self._files[part]} has changed since it was written: remove the "
                    f"folder {os.path.dirname(self._files[part])}, and run the same command again"
                )
        return images


class Index(NamedTuple):
    """Where images are, [N] each: the number of the file, the row in it, and the CRC-32 of the pixels."""

    parts: np.ndarray
    rows: np.ndarray
    checksums: np.ndarray


class Copy(NamedTuple):
    """A prepared copy that has been opened."""

    images: PreparedImages
    labels: np.ndarray  # int32 [N]
    classes: list[str]
    skipped: dict[str, str]  # the files that are no images, with the reason


def inspect(
    path: str, image_size: int | None, channels: int | None, cache_dir: str, max_bad_share: float = 0.01
) -> headers.Inspection:
    """Describes the copy that `open_folder` would open, from headers alone. Raises UserError and Fault as it does."""
    with folder.os_errors(path):
        if is_copy(path):
            found = _open_named(path, image_size, channels)
            size, _, depth = found.images.shape[1:]
            return headers.Inspection(len(found.images), (size, size, depth), found.classes)
    with folder.open_files(path) as files:
        return headers.inspect(files, image_size, channels, cache_dir, max_bad_share)


def open_folder(
    path: str,
    image_size: int | None,
    channels: int | None,
    cache_dir: str,
    max_bad_share: float = 0.01,
    check: Callable[[int], object] = lambda count: None,
) -> tuple[PreparedImages, np.ndarray, list[str]]:
    """Opens the prepared copy of a folder, zip or LMDB, and makes it first if there is none in `cache_dir`.

    `path` may also be a prepared copy. Returns the images uint8 [N, S, S, C] in files, their labels int32 [N], and the
    names of the classes. For `image_size` and `channels` of None see `headers.inspect`. The classes are the top-level
    folders in alphabetical order; a flat folder has the one class ''. Before a copy is made, `check` is called with the
    number of files, and may raise.

    Raises UserError if there is no image, if too many files are bad (`folder.check_skipped`), or if `cache_dir` is no
    place for the copy. Raises Fault if something cannot be read, or if the disk fails.
    """
    with folder.os_errors(path):
        if is_copy(path):
            return _open_named(path, image_size, channels)[:3]
    with folder.open_files(path) as files:
        if image_size is None or channels is None:
            _, (image_size, _, channels), _ = headers.inspect(files, image_size, channels, cache_dir, max_bad_share)
        copy = preparing.copy_path(files, cache_dir, image_size, channels)
        if not paths.exists(copy / "dataset.json"):
            check(len(folder.names_of(files)))  # an LMDB is opened here
            preparing.prepare(files, copy, image_size, channels, max_bad_share)
        found = read_copy(copy)
        with contextlib.suppress(OSError):  # `python -m ddgan_jax.data.copies` shows when a copy was last used
            os.utime(copy / "dataset.json")
        if found.skipped:
            count, listed = len(found.images) + len(found.skipped), f"; all are listed in {copy / 'skipped.json'}"
            print(folder.check_skipped(files, found.skipped, count, max_bad_share, listed), flush=True)
        return found[:3]


def is_copy(path: paths.Given) -> bool:
    """Whether a path is that of a prepared copy on a local disk."""
    return (
        bool(path)
        and not paths.is_remote(path)
        and all(paths.exists(os.path.join(os.path.expanduser(path), name)) for name in ("dataset.json", "index.npz"))
    )


def read_copy(copy: pathlib.Path) -> Copy:
    """Opens a prepared copy. Raises Fault if it is damaged, and OSError if it cannot be read."""
    try:
        skipped = json.loads(paths.read(copy / "skipped.json"))
        about = json.loads(paths.read(copy / "dataset.json"))
        table = keyed.parse(paths.read(copy / "index.npz"), preparing.COLUMNS)
        kept = table["rows"] >= 0
        parts, rows, checksums, labels = (table[name][kept] for name in preparing.COLUMNS)
        if (kept.sum(), isinstance(skipped, dict)) != (about["images"], True) or parts.max(initial=0) >= about["parts"]:
            raise ValueError(f"its files disagree about {about['images']} images")
        files = [copy / f"images.{number}.bin" for number in range(about["parts"])]
        images = PreparedImages(files, about["shape"], Index(parts, rows, checksums))
        return Copy(images, labels, [str(name) for name in about["classes"]], skipped)
    except keyed.DAMAGE as error:
        raise Fault(f"the copy {copy} is damaged ({error}): remove it, and run the same command again") from error


def _open_named(path: str, image_size: int | None, channels: int | None) -> Copy:
    """Opens a copy that `data.path` names. Raises UserError if its images are of another size."""
    found = read_copy(pathlib.Path(path).expanduser())
    size, _, depth = found.images.shape[1:]
    if (image_size or size, channels or depth) != (size, depth):
        raise UserError(
            f"data.path={path} is a prepared copy of images {size}x{size}x{depth}, not of data.image_size={image_size} "
            f"and data.channels={channels}: leave these out, or name the folder of the original images"
        )
    return found
