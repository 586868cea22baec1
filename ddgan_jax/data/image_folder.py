"""Anyone's own images: a folder (nested or flat), a zip or an LMDB of JPEG, PNG, WebP and BMP files, as one array.

`look` reads headers: how many images there are, and how large. The first use decodes every file once, in threads, into
a memory-mapped copy; later starts open the copy. Files that are no images are skipped and listed with the reason.
Nothing outside the folder or zip is read, not even by a link. Folders and zips may lie in a bucket.
"""

import collections
import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ddgan_jax.data.decoding import decode, look_at
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.storage import paths

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_BYTES = 2**30  # of one file: beyond it is more likely an attack on the memory than a photograph
WINDOW = 256  # files that are decoded ahead of the one that is written
HEAD = 2**16  # bytes of a file that nearly always hold its header, with the preview that a camera puts before it
MOST_SIZE = 256  # px, unless more is asked for: the paper's largest; above it training takes more than one device
BUCKET_THREADS = 32  # they wait for the network most of the time
# What one broken file raises; anything else in a bucket is the network, and no reason to skip a file.
BROKEN = (ValueError, RuntimeError, EOFError, FileNotFoundError, zipfile.BadZipFile, zlib.error)


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

    def _inside(self, name: str) -> pathlib.Path:
        target = (self.root / name).resolve()
        if not target.is_relative_to(self.root):
            raise ValueError("it is a link to a file outside the folder")
        if target.exists() and not target.is_file():  # a pipe would be waited for, and a device never ends
            raise ValueError("it is not a regular file")
        return target

    def head(self, name: str) -> bytes:
        """The first HEAD bytes of a file."""
        return paths.read_start(self._inside(name), HEAD)

    def read(self, name: str) -> bytes:
        target = self._inside(name)
        if target.stat().st_size > MAX_BYTES:
            raise ValueError("it is larger than 1 GiB")
        return target.read_bytes()

    def close(self) -> None:
        pass


class _Bucket:
    """The image files below a folder of a bucket."""

    def __init__(self, path: paths.Path):
        self.root = path
        files = paths.files_below(path)
        if "data.mdb" in files:
            raise UserError(_lmdb_in_a_bucket(path))
        self.files = {name: about for name, about in files.items() if _is_image_name(name)}
        self.names = sorted(self.files)

    def signature(self) -> list[str]:
        return [f"{name}\0{size} {updated}" for name, (size, updated) in sorted(self.files.items())]

    def head(self, name: str) -> bytes:
        return paths.read_start(self.root / name, min(HEAD, self.files[name][0])) if self.files[name][0] else b""

    def read(self, name: str) -> bytes:
        if self.files[name][0] > MAX_BYTES:
            raise ValueError("it is larger than 1 GiB")
        return paths.read(self.root / name)

    def close(self) -> None:
        pass


class _Zip:
    """The image files inside a zip, read in place: nothing is ever extracted to the disk."""

    def __init__(self, path: pathlib.Path | paths.Path):
        self.remote, self.opened = paths.is_remote(path), path.open("rb")
        try:
            self.file = zipfile.ZipFile(self.opened)
        except (zipfile.BadZipFile, ValueError) as error:  # gcsfs raises the latter for a file that is too small
            self.opened.close()
            raise UserError(f"data.path={path} is neither a folder nor a zip file nor an LMDB") from error
        self.names = sorted(info.filename for info in self.file.infolist() if _is_image_name(info.filename))

    def signature(self) -> list[str]:
        infos = (self.file.getinfo(name) for name in self.names)
        return [f"{info.filename}\0{info.file_size} {info.CRC}" for info in infos]

    def _check(self, name: str) -> None:
        if name.startswith("/") or ".." in name.replace("\\", "/").split("/"):
            raise ValueError("its name points outside the zip")
        if self.file.getinfo(name).file_size > MAX_BYTES:
            raise ValueError("it is larger than 1 GiB")

    def head(self, name: str) -> bytes:
        self._check(name)
        with self.file.open(name) as file:
            return file.read(HEAD)

    def read(self, name: str) -> bytes:
        self._check(name)
        return self.file.read(name)

    def close(self) -> None:
        self.file.close()
        self.opened.close()


_WALK = """
import sys, lmdb
with lmdb.open(sys.argv[1], subdir=sys.argv[2] == "True", readonly=True, lock=False).begin(buffers=True) as transaction:
    for key in transaction.cursor().iternext(values=False):
        bytes(transaction.get(key)[-1:])  # the end of each value: what is between is no part of the structure
"""


class _Lmdb:
    """The values of an LMDB, each the bytes of an image file, in the order of their keys: LSUN as it is published."""

    def __init__(self, path: pathlib.Path):
        try:
            import lmdb
        except ImportError:
            raise UserError(f"data.path={path} is an LMDB: to read it run `pip install lmdb`") from None
        # Of a damaged file the library reads anything, up to the end of the process: so another process reads it first.
        walk = [sys.executable, "-c", _WALK, str(path), str(path.is_dir())]
        if subprocess.run(walk, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
            raise UserError(f"data.path={path} cannot be read as an LMDB: it is damaged, or none")
        try:
            # Without its lock file, so that nothing is written beside somebody's data.
            self.environment = lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False)
            with self.environment.begin() as transaction:
                keys = transaction.cursor().iternext(values=False)
                self.names = [key.decode("utf-8", "surrogateescape") for key in keys]
        except lmdb.Error as error:
            raise UserError(f"data.path={path} cannot be read as an LMDB: {error}") from error
        self.file = path / "data.mdb" if path.is_dir() else path

    def signature(self) -> list[str]:
        stat = self.file.stat()
        return [f"{stat.st_size} {stat.st_mtime_ns}"]

    def head(self, name: str) -> bytes:
        with self.environment.begin(buffers=True) as transaction:
            return bytes((transaction.get(name.encode("utf-8", "surrogateescape")) or b"")[:HEAD])

    def read(self, name: str) -> bytes:
        with self.environment.begin() as transaction:
            return transaction.get(name.encode("utf-8", "surrogateescape")) or b""

    def close(self) -> None:
        self.environment.close()


@contextlib.contextmanager
def _open_source(path: str) -> Iterator[Any]:
    """What `path` names, open. UserError if it does not exist, cannot be read, or holds no image."""
    remote = paths.is_remote(path)
    try:
        with paths.os_errors(path):
            given: Any = paths.path(path) if remote else pathlib.Path(paths.path(path))
            if not path or not given.exists():
                raise UserError(f"data.path={path!r} does not exist: name a folder, a zip or an LMDB of images")
            if remote and given.suffix == ".mdb":
                raise UserError(_lmdb_in_a_bucket(given))
            if not remote and (given.suffix == ".mdb" or (given / "data.mdb").exists()):
                source: Any = _Lmdb(given)
            elif given.is_dir():
                source = _Bucket(given) if remote else _Folder(given)
            else:
                source = _Zip(given)
    except OSError as error:
        raise UserError(f"data.path={path} cannot be read: {error}") from error
    try:
        if not source.names:
            raise UserError(f"there is no image in {path}: it needs files that end in {', '.join(SUFFIXES)}")
        yield source
    finally:
        source.close()


def _lmdb_in_a_bucket(path: paths.Path) -> str:
    return f"data.path={path} is an LMDB, which is read from a local disk only: copy it to one, and name the copy"


def _is_image_name(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    hidden = any(part.startswith(".") and part not in (".", "..") for part in parts) or "__MACOSX" in parts
    return not hidden and parts[-1].lower().endswith(SUFFIXES)


# --- What the headers say -------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """What is known of a set before anything is decoded."""

    num_images: int  # files whose headers are those of images; a damaged one among them is found when it is decoded
    size: int
    channels: int
    classes: list[str]


def look(path: str, image_size: int | None, channels: int | None, cache_dir: str) -> Look:
    """Look at the headers of a folder, zip or LMDB. `image_size` and `channels` as in `open_folder`.

    What was seen is kept in `cache_dir` for the next time. UserError if there is no image.
    """
    with _open_source(path) as source:
        return _look(source, path, image_size, channels, cache_dir)


def _look(source: Any, path: str, image_size: int | None, channels: int | None, cache_dir: str) -> Look:
    file = _place(source, path, cache_dir, "look 1").with_suffix(".json")
    try:
        seen = json.loads(file.read_text())
    except (OSError, ValueError):
        seen = _see(source, path)
        with contextlib.suppress(OSError):  # without it, the next start looks again
            paths.write(file, json.dumps(seen))
    size = image_size or min(2 ** int(np.log2(seen["side"])), MOST_SIZE)
    return Look(seen["images"], size, channels or (1 if seen["grey"] else 3), _classes(source))


def _see(source: Any, path: str) -> dict[str, Any]:
    """How many images there are, their median shorter side, and whether all are grey."""

    def header(name: str) -> tuple[int, bool]:
        head = source.head(name)
        try:
            return look_at(head)
        except ValueError:
            if len(head) < HEAD:
                raise
            return look_at(source.read(name))  # its header may be longer

    found, bad = [], {}
    for name, result in _in_order(source, header, "looking"):
        if isinstance(result, str):
            bad[name] = result
        else:
            found.append(result)
    if not found:
        raise UserError(f"{_skipped(bad, len(source.names), path)}. It needs at least one image")
    sides, greys = zip(*found, strict=True)
    return {"images": len(found), "side": float(np.median(sides)), "grey": all(greys)}


def _classes(source: Any) -> list[str]:
    return sorted({_class_of(name) for name in source.names})


def _class_of(name: str) -> str:
    return name.split("/")[0] if "/" in name else ""


def _place(source: Any, path: str, cache_dir: str, settings: str) -> pathlib.Path:
    """Where something is kept that was made of these very files with these settings."""
    lines = [settings, *source.signature()]
    key = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    given = paths.path(path)
    stem = given.stem if paths.is_remote(path) else pathlib.Path(given).resolve().stem
    return pathlib.Path(cache_dir) / "image_folder" / f"{stem}-{key}"


# --- The copy -----------------------------------------------------------------------------------------------------


def open_folder(
    path: str, image_size: int | None, channels: int | None, cache_dir: str, max_bad_share: float = 0.01
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(images uint8 [N, S, S, C] memory-mapped, labels int32 [N], names of the classes) of a folder, zip or LMDB.

    `image_size` None means the largest power of two not above the median shorter side, and at most 256; `channels`
    None means 3, or 1 if every image is grey. The label of an image is its top-level folder (classes sorted by name;
    one class '' in a flat set). The copy lies in the local `cache_dir`. UserError if there is no image, or if more than
    `max_bad_share` of the files are bad; Fault if a bucket stops answering.
    """
    with _open_source(path) as source:
        if image_size is None or channels is None:
            _, image_size, channels, _ = _look(source, path, image_size, channels, cache_dir)
        # The first number changes when the rules of this file do.
        copy = _place(source, path, cache_dir, f"4 {image_size} {channels}")
        if not (copy / "dataset.json").exists():
            _prepare(source, path, copy, image_size, channels)
        total = len(source.names)
    _report(json.loads((copy / "skipped.json").read_text()), total, max_bad_share, path, copy)
    described = json.loads((copy / "dataset.json").read_text())
    images = np.memmap(copy / "images.bin", np.uint8, "r", shape=tuple(described["shape"]))
    return images, np.asarray(described["labels"], np.int32), described["classes"]


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
            if (copy / "dataset.json").exists():
                return
            print(f"preparing the {len(source.names):,} files of {path} at {size} px in {copy}, once", flush=True)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            labels, bad, classes = [], {}, _classes(source)
            with (aside / "images.bin").open("wb") as file:
                read = lambda name: decode(source.read(name), size, channels)  # noqa: E731
                for name, result in _in_order(source, read, "decoding"):
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
        raise UserError(f"the copy of {path} cannot be written to {copy.parent}: {error}; set data.dir") from error
    except Fault:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _in_order(source: Any, do: Callable[[str], Any], what: str) -> Iterator[tuple[str, Any]]:
    """(name, do(name), or the reason why it cannot be) in the order of the names; in threads, with a bar.

    Fault where a bucket does not answer: that is not the fault of a file.
    """
    remote = isinstance(source, _Bucket) or (isinstance(source, _Zip) and source.remote)
    broken = BROKEN if remote else (*BROKEN, OSError)

    def attempt(name: str) -> Any:
        try:
            return do(name)
        except broken as error:
            return str(error) or type(error).__name__
        except Exception as error:
            if not remote:
                raise
            reason = f"{type(error).__name__} {error}".splitlines()[0][:200]
            raise Fault(f"{name} in the bucket cannot be read: {reason}; run the same command again") from error

    pool = concurrent.futures.ThreadPoolExecutor(BUCKET_THREADS if remote else os.cpu_count())
    try:
        pending: collections.deque = collections.deque()
        for name in tqdm(source.names, what, unit="img", disable=None):
            pending.append((name, pool.submit(attempt, name)))
            if len(pending) >= WINDOW:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _skipped(bad: dict[str, str], total: int, path: str) -> str:
    example = next(iter(bad))
    text = f"{len(bad)} of {total} files in {path} were skipped (the first, {example}: {bad[example]})"
    return text.encode("utf-8", "replace").decode()  # names need not be valid Unicode


def _report(bad: dict[str, str], total: int, max_bad_share: float, path: str, copy: pathlib.Path) -> None:
    """Say which files were skipped; UserError if they are too many."""
    if not bad:
        return
    text = f"{_skipped(bad, total, path)}; all are listed in {copy / 'skipped.json'}"
    if len(bad) == total or len(bad) > max_bad_share * total:
        raise UserError(f"{text}. That is more than data.max_bad_share={max_bad_share:g} allows")
    print(text, flush=True)
