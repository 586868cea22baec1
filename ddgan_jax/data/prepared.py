"""The prepared copy of a folder, zip or LMDB of images: decoded once, in threads, and opened by all later starts.

Files that are not images are skipped, and listed with the reason in skipped.json.
"""

import contextlib
import fcntl
import json
import math
import os
import pathlib
import shutil
import weakref
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddgan_jax.data import folder
from ddgan_jax.data.archives import ImageFiles, class_of
from ddgan_jax.data.decoding import decode
from ddgan_jax.errors import Fault, UserError, of_a_folder
from ddgan_jax.storage import paths

FORMAT = 6  # of the copy; a change of how files are found or decoded raises it


class PreparedImages:
    """Images uint8 [N, H, W, C] in a file, read when they are indexed along the first axis.

    Indexing several axes reads all images. Reads use a file descriptor: a read that fails raises OSError, after
    retries, whereas in a memory map it would end the process with SIGBUS.
    """

    def __init__(self, file: paths.Given, shape: Sequence[int], checksums: Any, first: int = 0):
        """Opens the `shape[0]` images that begin with image `first`, with the CRC-32 of each in `checksums`.

        Raises ValueError if the file is too short for them, or if the number of checksums differs. Reading an image
        with another checksum raises Fault.
        """
        self.shape, self.dtype = tuple(shape), np.dtype(np.uint8)
        self.filename, self._first, self._size = os.fspath(file), first, math.prod(shape[1:])
        self._checksums = np.asarray(checksums, np.uint32)
        if self._checksums.shape != self.shape[:1]:
            raise ValueError(f"{file} has {len(self)} images, but {self._checksums.size} checksums")
        self._descriptor = paths.retry(file, lambda: os.open(file, os.O_RDONLY))
        weakref.finalize(self, os.close, self._descriptor)
        if os.fstat(self._descriptor).st_size < (first + len(self)) * self._size:
            raise ValueError(f"{file} is too short for {first + len(self)} images of {list(self.shape[1:])}")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice) and key.step in (None, 1):
            part = range(len(self))[key]
            shape = (len(part), *self.shape[1:])
            return PreparedImages(self.filename, shape, self._checksums[key], self._first + part.start)
        if isinstance(key, tuple) or key is Ellipsis:
            return np.asarray(self)[key]
        indices = np.arange(len(self))[key]
        images = paths.retry(self.filename, lambda: self._read(indices.ravel()))
        return images.reshape(*indices.shape, *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[np.arange(len(self))].astype(dtype or self.dtype, copy=False)

    def _read(self, indices: np.ndarray) -> np.ndarray:
        images = np.empty((len(indices), self._size), np.uint8)
        for image, index in zip(images, indices + self._first, strict=True):
            done = 0
            while done < self._size:
                part = os.pread(self._descriptor, self._size - done, int(index) * self._size + done)
                if not part:
                    raise OSError(f"{self.filename} ends before image {index}")
                image[done : done + len(part)] = np.frombuffer(part, np.uint8)
                done += len(part)
            if zlib.crc32(image.data) != self._checksums[index - self._first]:
                raise Fault(
                    f"image {index} in {self.filename} has changed since it was written: remove the "
                    f"folder {os.path.dirname(self.filename)}, and run the same command again"
                )
        return images


def open_folder(
    path: str, image_size: int | None, channels: int | None, cache_dir: str, max_bad_share: float = 0.01
) -> tuple[PreparedImages, np.ndarray, list[str]]:
    """Opens the prepared copy of a folder, zip or LMDB, and makes it first if there is none in `cache_dir`.

    Returns the images uint8 [N, S, S, C] in a file, their labels int32 [N], and the names of the classes. For
    `image_size` and `channels` of None see `folder.inspect`. The classes are the top-level folders in alphabetical
    order; a flat folder has the one class ''.

    Raises UserError if there is no image, if more than the fraction `max_bad_share` of the files are bad, or if
    `cache_dir` is no place for the copy. Raises Fault if something cannot be read, or if the disk fails.
    """
    with folder.open_files(path) as files:
        if image_size is None or channels is None:
            _, (image_size, _, channels) = folder.inspect(files, image_size, channels, cache_dir)
        copy = folder.cache_path(files, cache_dir, f"{FORMAT} {image_size} {channels}")
        if not paths.exists(copy / "dataset.json"):
            _prepare(files, copy, image_size, channels)
        try:
            skipped = json.loads(paths.read(copy / "skipped.json"))
            about = json.loads(paths.read(copy / "dataset.json"))
            images = PreparedImages(copy / "images.bin", about["shape"], about["checksums"])
            labels, classes = np.asarray(about["labels"], np.int32), about["classes"]
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise Fault(f"the copy {copy} is damaged ({error}): remove it, and run the same command again") from error
        if skipped:
            text = f"{folder.describe_skipped(files, skipped)}; all are listed in {copy / 'skipped.json'}"
            if not len(images) or len(skipped) > max_bad_share * len(files.names):
                raise UserError(f"{text}. That is more than data.max_bad_share={max_bad_share:g} allows")
            print(text, flush=True)
        return images, labels, classes


def _prepare(files: ImageFiles, copy: pathlib.Path, size: int, channels: int) -> None:
    """Decodes all files into a temporary folder and renames it to `copy`, so that a killed process leaves no copy.

    The lock makes a second process wait for the copy of the first. A process that ends loses its lock, and the next one
    starts again.
    """
    aside = copy.with_name(f"incomplete.{copy.name}")
    with of_a_folder(f"the copy of {files.path} cannot be written to {copy.parent}", "set data.dir to another folder"):
        copy.parent.mkdir(parents=True, exist_ok=True)
        with copy.with_name(f"{copy.name}.lock").open("w") as lock:
            with contextlib.suppress(OSError):  # of a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if paths.exists(copy / "dataset.json"):
                return
            shutil.rmtree(aside, ignore_errors=True)
            needed, free = len(files.names) * size * size * channels, shutil.disk_usage(copy.parent).free
            if needed > free:
                raise UserError(
                    f"the copy of {files.path} at {size} px takes {math.ceil(needed / 2**20):,} MiB, but {copy.parent} "
                    f"has {free // 2**20:,} MiB free: make room there, or set data.dir to a folder on a larger disk"
                )
            print(f"preparing the {len(files.names):,} files of {files.path} at {size} px in {copy}, once", flush=True)
            try:
                _decode_all(files, aside, size, channels)
                shutil.rmtree(copy, ignore_errors=True)  # a copy that has lost its dataset.json
                aside.rename(copy)
            except (OSError, Fault):
                shutil.rmtree(aside, ignore_errors=True)  # while this process still has the lock
                raise


def _decode_all(files: ImageFiles, copy: pathlib.Path, size: int, channels: int) -> None:
    """Writes images.bin, dataset.json and skipped.json into a new folder."""
    copy.mkdir()
    names, checksums, skipped = [], [], {}  # type: ignore[var-annotated]
    with (copy / "images.bin").open("wb") as opened:
        action = lambda name: decode(files.read(name), size, channels).tobytes()  # noqa: E731
        for name, pixels in folder.process_files(files, action, "decoding", skipped):
            opened.write(pixels)
            checksums.append(zlib.crc32(pixels))
            names.append(class_of(name))
    classes = sorted(set(names))
    label = {name: index for index, name in enumerate(classes)}
    labels = [label[name] for name in names]
    (copy / "skipped.json").write_text(json.dumps(skipped, indent=1, sort_keys=True))
    shape = (len(labels), size, size, channels)
    about = {"shape": shape, "classes": classes, "labels": labels, "checksums": checksums}
    (copy / "dataset.json").write_text(json.dumps(about))
