"""The prepared copy of a folder, zip or LMDB of images: decoded once, in threads, and opened by later starts.

Files that are no images are skipped and listed with the reason.
"""

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

from ddgan_jax.data.decoding import decode
from ddgan_jax.data.folder import (
    cache_place,
    class_of,
    classes_of,
    in_order,
    look_into,
    open_source,
    skipped_text,
)
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.storage import paths


def open_folder(
    path: str, image_size: int | None, channels: int | None, cache_dir: str, max_bad_share: float = 0.01
) -> tuple["Stored", np.ndarray, list[str]]:
    """(images uint8 [N, S, S, C] in a file, labels int32 [N], names of the classes) of a folder, zip or LMDB.

    `image_size` None means the largest power of two not above the median shorter side, and at most 256; `channels`
    None means 3, or 1 if every image is grey. The label of an image is its top-level folder (classes sorted by name;
    one class '' in a flat set). The copy lies in the local `cache_dir`. UserError if there is no image, or if more than
    `max_bad_share` of the files are bad, or if the copy cannot be written; Fault if anything cannot be read.
    """
    with open_source(path) as source:
        if image_size is None or channels is None:
            _, image_size, channels, _ = look_into(source, path, image_size, channels, cache_dir)
        # The first number changes when the rules of this file do.
        copy = cache_place(source, path, cache_dir, f"4 {image_size} {channels}")
        if not paths.exists(copy / "dataset.json"):
            _prepare(source, path, copy, image_size, channels)
        try:
            skipped = json.loads(paths.read(copy / "skipped.json"))
            _report(skipped, len(source.names), max_bad_share, path, copy)
            described = json.loads(paths.read(copy / "dataset.json"))
            images = Stored(copy / "images.bin", described["shape"], described["checksums"])
            return images, np.asarray(described["labels"], np.int32), described["classes"]
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise Fault(f"the copy {copy} is damaged ({error}): remove it, and run the same command again") from error


class Stored:
    """Images uint8 [N, H, W, C] in a file, read as they are indexed along the first axis; more axes read all of them.

    Not by a memory map, in which a read that fails ends the process with SIGBUS: here it is an OSError, after retries.
    """

    def __init__(self, file: paths.Given, shape: Sequence[int], checksums: Any, first: int = 0):
        """The `shape[0]` images from the one of index `first` on, with the CRC-32 of each.

        ValueError if the file is too short for them, or the number of checksums differs. Reading an image whose
        checksum differs is a Fault.
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

    def __getitem__(self, indices: Any) -> Any:
        if isinstance(indices, slice):
            chosen = range(len(self))[indices]
            if chosen.step != 1:
                return self[np.arange(len(self))[indices]]
            shape = (len(chosen), *self.shape[1:])
            return Stored(self.filename, shape, self._checksums[indices], self._first + chosen.start)
        if isinstance(indices, tuple) or indices is Ellipsis:
            return np.asarray(self)[indices]
        chosen = np.arange(len(self))[indices]
        images = paths.retry(self.filename, lambda: self._read(chosen.ravel()))
        return images.reshape(*chosen.shape, *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[np.arange(len(self))].astype(dtype or self.dtype, copy=False)

    def _read(self, indices: np.ndarray) -> np.ndarray:
        images = np.empty((len(indices), self._size), np.uint8)
        for image, index in zip(images, indices.tolist(), strict=True):
            done = 0
            while done < self._size:
                start = (self._first + index) * self._size + done
                part = os.pread(self._descriptor, self._size - done, start)
                if not part:
                    raise OSError(f"{self.filename} ends before image {index}")
                image[done : done + len(part)] = np.frombuffer(part, np.uint8)
                done += len(part)
            if zlib.crc32(image.data) != self._checksums[index]:
                raise Fault(
                    f"image {self._first + index} in {self.filename} has changed since it was written: remove the "
                    f"folder {os.path.dirname(self.filename)}, and run the same command again"
                )
        return images


def _prepare(source: Any, path: str, copy: pathlib.Path, size: int, channels: int) -> None:
    """Decode into a folder aside and rename it: a process that is killed leaves nothing that a later one believes.

    The lock makes a second process wait for the copy of the first. A process that dies loses its lock, and the next
    one begins anew.
    """
    aside = copy.with_name(f"incomplete.{copy.name}")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with copy.with_name(f"{copy.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if paths.exists(copy / "dataset.json"):
                return
            shutil.rmtree(aside, ignore_errors=True)
            needed, free = len(source.names) * size * size * channels, shutil.disk_usage(copy.parent).free
            if needed > free:
                raise UserError(
                    f"the copy of {path} at {size} px takes {math.ceil(needed / 2**20):,} MiB, but {copy.parent} has "
                    f"{free // 2**20:,} MiB free: make room there, or set data.dir to a folder on a larger disk"
                )
            print(f"preparing the {len(source.names):,} files of {path} at {size} px in {copy}, once", flush=True)
            try:
                _decode_all(source, aside, size, channels)
                aside.rename(copy)
            except (OSError, Fault):
                shutil.rmtree(aside, ignore_errors=True)  # under the lock: later it may be that of another process
                raise
    except OSError as error:
        raise UserError(f"the copy of {path} cannot be written to {copy.parent}: {error}; set data.dir") from error


def _decode_all(source: Any, folder: pathlib.Path, size: int, channels: int) -> None:
    """Write the copy of all images into a new folder."""
    folder.mkdir()
    labels, checksums, bad, classes = [], [], {}, classes_of(source)
    with (folder / "images.bin").open("wb") as file:
        read = lambda name: decode(source.read(name), size, channels)  # noqa: E731
        for name, result in in_order(source, read, "decoding"):
            if isinstance(result, str):
                bad[name] = result
            else:
                content = result.tobytes()
                file.write(content)
                checksums.append(zlib.crc32(content))
                labels.append(classes.index(class_of(name)))
    (folder / "skipped.json").write_text(json.dumps(bad, indent=1, sort_keys=True))
    shape = (len(labels), size, size, channels)
    described = {"shape": shape, "classes": classes, "labels": labels, "checksums": checksums}
    (folder / "dataset.json").write_text(json.dumps(described))


def _report(bad: dict[str, str], total: int, max_bad_share: float, path: str, copy: pathlib.Path) -> None:
    """Say which files were skipped; UserError if they are too many."""
    if not bad:
        return
    text = f"{skipped_text(bad, total, path)}; all are listed in {copy / 'skipped.json'}"
    if len(bad) == total or len(bad) > max_bad_share * total:
        raise UserError(f"{text}. That is more than data.max_bad_share={max_bad_share:g} allows")
    print(text, flush=True)
