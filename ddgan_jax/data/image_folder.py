"""Anyone's own images: a folder (nested or flat), a zip or an LMDB of JPEG, PNG, WebP and BMP files, as one array.

The first use decodes every file once, in threads, into a memory-mapped copy; later starts open the copy. Files that
are no images are skipped and listed with the reason. Nothing outside the folder or zip is read, not even by a link.
"""

import collections
import concurrent.futures
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from ddgan_jax.data.decoding import MIN_SIDE, fit, is_grey, open_image
from ddgan_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_BYTES = 2**30  # of one file: beyond it is more likely an attack on the memory than a photograph
WINDOW = 256  # files that are decoded ahead of the one that is written


# --- Files --------------------------------------------------------------------------------------------------------


class _Folder:
    """The image files below a folder. Links are followed to files inside the folder only, and to no other folder."""

    def __init__(self, path: pathlib.Path):
        self.root = path.resolve()
        names = []
        for folder, folders, files in os.walk(self.root, followlinks=False):
            folders[:] = [name for name in folders if not name.startswith(".")]
            names += [os.path.relpath(os.path.join(folder, name), self.root) for name in files]
        self.names = sorted(name.replace(os.sep, "/") for name in names if _is_image_name(name))

    def signature(self) -> list[str]:
        """Changes when any file does."""
        stats = ((name, os.lstat(self.root / name)) for name in self.names)
        return [f"{name}\0{stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]

    def read(self, name: str) -> bytes:
        target = (self.root / name).resolve()
        if not target.is_relative_to(self.root):
            raise ValueError("it is a link to a file outside the folder")
        if target.stat().st_size > MAX_BYTES:
            raise ValueError("it is larger than 1 GiB")
        return target.read_bytes()

    def close(self) -> None:
        pass


class _Zip:
    """The image files inside a zip, read in place: nothing is ever extracted to the disk."""

    def __init__(self, path: pathlib.Path):
        try:
            self.file = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise UserError(f"data.path={path} is neither a folder nor a zip file nor an LMDB") from error
        self.names = sorted(info.filename for info in self.file.infolist() if _is_image_name(info.filename))

    def signature(self) -> list[str]:
        infos = (self.file.getinfo(name) for name in self.names)
        return [f"{info.filename}\0{info.file_size} {info.CRC}" for info in infos]

    def read(self, name: str) -> bytes:
        if name.startswith("/") or ".." in name.replace("\\", "/").split("/"):
            raise ValueError("its name points outside the zip")
        if self.file.getinfo(name).file_size > MAX_BYTES:
            raise ValueError("it is larger than 1 GiB")
        return self.file.read(name)

    def close(self) -> None:
        self.file.close()


class _Lmdb:
    """The values of an LMDB, each the bytes of an image file, in the order of their keys: LSUN as it is published."""

    def __init__(self, path: pathlib.Path):
        try:
            import lmdb
        except ImportError:
            raise UserError(f"data.path={path} is an LMDB: to read it run `pip install lmdb`") from None
        try:
            # Without its lock file, so that nothing is written beside somebody's data.
            self.environment = lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False)
            with self.environment.begin() as transaction:
                self.names = [key.decode("utf-8", "surrogateescape") for key, _ in transaction.cursor()]
        except lmdb.Error as error:
            raise UserError(f"data.path={path} cannot be read as an LMDB: {error}") from error
        self.file = path / "data.mdb" if path.is_dir() else path

    def signature(self) -> list[str]:
        stat = self.file.stat()
        return [f"{stat.st_size} {stat.st_mtime_ns}"]

    def read(self, name: str) -> bytes:
        with self.environment.begin() as transaction:
            return transaction.get(name.encode("utf-8", "surrogateescape")) or b""

    def close(self) -> None:
        self.environment.close()


def _open_source(path: pathlib.Path) -> Any:
    if (path / "data.mdb").exists() or path.suffix == ".mdb":
        return _Lmdb(path)
    return _Folder(path) if path.is_dir() else _Zip(path)


def _is_image_name(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    hidden = any(part.startswith(".") and part not in (".", "..") for part in parts) or "__MACOSX" in parts
    return not hidden and parts[-1].lower().endswith(SUFFIXES)


# --- The copy -----------------------------------------------------------------------------------------------------


def open_folder(
    path: str, image_size: int, channels: int, cache_dir: str, max_bad_share: float = 0.01
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(images uint8 [N, S, S, C] memory-mapped, labels int32 [N], names of the classes) of a folder or zip.

    `image_size` 0 means the largest power of two not above the median shorter side; `channels` 0 means 3, or 1 if every
    image is grey. The label of an image is its top-level folder (classes sorted by name; one class '' in a flat set).
    UserError if there is no image, or if more than `max_bad_share` of the files are bad.
    """
    given = pathlib.Path(path).expanduser()
    if not path or not given.exists():
        raise UserError(f"data.path={path!r} does not exist: name a folder, a zip or an LMDB of images")
    try:
        source: Any = _open_source(given)
    except OSError as error:
        raise UserError(f"data.path={path} cannot be read: {error}") from error
    try:
        if not source.names:
            raise UserError(f"there is no image in {path}: it needs files that end in {', '.join(SUFFIXES)}")
        settings = f"2 {image_size} {channels}"  # the first number changes when the rules of this file do
        lines = [settings, *source.signature()]
        key = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        copy = pathlib.Path(cache_dir) / "image_folder" / f"{given.resolve().stem}-{key}"
        if not (copy / "dataset.json").exists():
            _prepare(source, given, copy, image_size, channels)
    finally:
        source.close()
    _report(json.loads((copy / "skipped.json").read_text()), len(source.names), max_bad_share, given, copy)
    described = json.loads((copy / "dataset.json").read_text())
    images = np.memmap(copy / "images.bin", np.uint8, "r", shape=tuple(described["shape"]))
    return images, np.asarray(described["labels"], np.int32), described["classes"]


def _prepare(source: Any, given: pathlib.Path, copy: pathlib.Path, image_size: int, channels: int) -> None:
    """Decode into a folder aside and rename it: a process that is killed leaves nothing that a later one believes.

    The lock makes a second process wait for the copy of the first. A process that dies loses its lock, and the next
    one begins anew.
    """
    aside = copy.with_name(f"incomplete.{copy.name}")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with copy.with_name(f"{copy.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (copy / "dataset.json").exists():
                return
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            size, channels = _shape(source, image_size, channels)
            labels, bad = [], {}
            classes = sorted({_class_of(name) for name in source.names})
            with (aside / "images.bin").open("wb") as file:
                decode = lambda name: fit(open_image(source.read(name)), size, channels)  # noqa: E731
                for name, result in _in_order(source.names, decode, f"decoding {given.name}"):
                    if isinstance(result, str):
                        bad[name] = result
                    else:
                        file.write(result.tobytes())
                        labels.append(classes.index(_class_of(name)))
            (aside / "skipped.json").write_text(json.dumps(bad, indent=1, sort_keys=True))
            shape = (len(labels), size, size, channels)
            (aside / "dataset.json").write_text(json.dumps({"shape": shape, "classes": classes, "labels": labels}))
            aside.rename(copy)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"the copy of {given} cannot be written to {copy.parent}: {error}; set data.dir") from error


def _class_of(name: str) -> str:
    return name.split("/")[0] if "/" in name else ""


def _in_order(names: list[str], decode: Callable[[str], Any], what: str) -> Iterator[tuple[str, Any]]:
    """(name, decode(name), or the reason why it cannot be) in the order of the names; in threads, with a bar."""

    def attempt(name: str) -> Any:
        try:
            return decode(name)
        except (ValueError, OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            return str(error) or type(error).__name__

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        pending: collections.deque = collections.deque()
        for name in tqdm(names, what, unit="img", disable=None):
            pending.append((name, pool.submit(attempt, name)))
            if len(pending) >= WINDOW:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()


def _shape(source: Any, image_size: int, channels: int) -> tuple[int, int]:
    """Size and channels, from the images where they are not given."""
    if image_size and channels:
        return image_size, channels

    def look(name: str) -> tuple[int, bool]:
        image = open_image(source.read(name))
        return min(image.size), is_grey(image)

    found = [result for _, result in _in_order(source.names, look, "looking") if not isinstance(result, str)]
    if not found:
        return image_size or MIN_SIDE, channels or 3  # all are bad, as the report will say
    side = float(np.median([side for side, _ in found]))
    return image_size or 2 ** int(np.log2(side)), channels or (1 if all(grey for _, grey in found) else 3)


def _report(bad: dict[str, str], total: int, max_bad_share: float, given: pathlib.Path, copy: pathlib.Path) -> None:
    """Say which files were skipped; UserError if they are too many."""
    if not bad:
        return
    example = next(iter(bad))
    text = (
        f"{len(bad)} of {total} files in {given} were skipped (the first, {example}: {bad[example]}); "
        f"all are listed in {copy / 'skipped.json'}"
    )
    text = text.encode("utf-8", "replace").decode()  # names need not be valid Unicode
    if len(bad) == total or len(bad) > max_bad_share * total:
        raise UserError(f"{text}. That is more than data.max_bad_share={max_bad_share:g} allows")
    print(text, flush=True)
