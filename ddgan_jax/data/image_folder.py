"""Anyone's own images: a folder (nested or flat), a zip or an LMDB of JPEG, PNG, WebP and BMP files, as one array.

`look` reads headers: how many images there are, and how large. The first use decodes every file once, in threads, into
a copy; later starts open the copy. Files that are no images are skipped and listed with the reason.
Nothing outside the folder or zip is read, not even by a link. Folders and zips may lie in a bucket.

What was read and is no image is a ValueError inside this file, and a reason to skip one file. What could not be read is
an OSError, and ends the work with a Fault: skipped files would be missing in the copy for good.
"""

import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import json
import lzma
import math
import os
import pathlib
import posixpath
import shutil
import stat
import struct
import subprocess
import sys
import weakref
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ddgan_jax.data.batches import evenly_spaced
from ddgan_jax.data.decoding import decode, look_at
from ddgan_jax.errors import Fault, UserError, is_missing
from ddgan_jax.storage import paths

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_BYTES = 2**30  # of one file: beyond it is more likely an attack on the memory than a photograph
WINDOW = 256  # files that are decoded ahead of the one that is written
HEAD = 2**16  # bytes of a file that nearly always hold its header, with the preview that a camera puts before it
SAMPLED = 8  # files whose first bytes distinguish two sets with the same names, sizes and times
MOST_SIZE = 256  # px, unless more is asked for: the paper's largest; above it training takes more than one device
BUCKET_THREADS = 32  # they wait for the network most of the time


# --- Files --------------------------------------------------------------------------------------------------------


class _Folder:
    """The image files below a folder. Links are followed to files inside the folder only, and to no other folder."""

    def __init__(self, path: pathlib.Path):
        self.root = path.resolve()
        names, links = [], []
        for folder, folders, files in os.walk(self.root, onerror=_raise, followlinks=False):
            folders[:] = [name for name in folders if not name.startswith(".")]
            names += [os.path.relpath(os.path.join(folder, name), self.root) for name in files]
            linked = (path for path in (os.path.join(folder, name) for name in folders) if os.path.islink(path))
            links += [os.path.relpath(path, self.root) for path in linked]
        self.outside: Collection[str] = {name.replace(os.sep, "/") for name in links}  # listed, but never read
        self.names = sorted({name.replace(os.sep, "/") for name in names if _is_image_name(name)} | self.outside)

    def signature(self) -> list[str]:
        """Changes when any file does."""
        stats = ((name, os.lstat(self.root / name)) for name in self.names)
        return [f"{name}\0{stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]

    def _inside(self, name: str) -> pathlib.Path:
        """The file of a name. ValueError for a link that leads outside or nowhere, and for what is no regular file."""
        if name in self.outside:
            raise ValueError("it is a link to a folder, which is not followed")
        link = self.root / name
        try:
            target = link.resolve()
            if not target.is_relative_to(self.root):
                raise ValueError("it is a link to a file outside the folder")
            regular = stat.S_ISREG(os.stat(target).st_mode)
        except (OSError, RuntimeError) as error:  # until Python 3.12 the latter, of a link to itself
            if link.is_symlink() and (isinstance(error, RuntimeError) or is_missing(error)):
                raise ValueError(f"it is a link that leads nowhere ({error})") from error
            raise
        if not regular:  # a pipe would be waited for, and a device never ends
            raise ValueError("it is not a regular file")
        return target

    def head(self, name: str) -> bytes:
        """The first HEAD bytes of a file."""
        return paths.read_start(self._inside(name), HEAD)

    def read(self, name: str) -> bytes:
        target = self._inside(name)
        return _whole(target, target.stat().st_size)

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
        # A path that begins with a slash would be one of this machine.
        self.outside = {name for name in self.names if name.startswith(("/", "../")) or "//" in name}

    def signature(self) -> list[str]:
        return [f"{name}\0{size} {updated}" for name, (size, updated) in sorted(self.files.items())]

    def _inside(self, name: str) -> paths.Path:
        if name in self.outside:
            raise ValueError("its name is no path below the folder")
        return self.root / name

    def head(self, name: str) -> bytes:
        file = self._inside(name)
        return paths.read_start(file, min(HEAD, self.files[name][0])) if self.files[name][0] else b""

    def read(self, name: str) -> bytes:
        return _whole(self._inside(name), self.files[name][0])

    def close(self) -> None:
        pass


def _whole(file: paths.Given, size: int) -> bytes:
    """As `paths.read_exactly`; ValueError for a file that is too large to be read."""
    if size > MAX_BYTES:
        raise ValueError("it is larger than 1 GiB")
    return paths.read_exactly(file, size)


class _Zip:
    """The image files inside a zip, read in place: nothing is ever extracted to the disk."""

    def __init__(self, path: pathlib.Path | paths.Path):
        self.remote = paths.is_remote(path)
        self.opened: Any = _Remote(path) if self.remote else path.open("rb")
        try:
            with self._reasons():
                self.file = zipfile.ZipFile(self.opened)
        except ValueError as error:
            self.opened.close()
            raise UserError(
                f"data.path={path} is neither a folder nor a zip file nor an LMDB, or a zip that is damaged ({error})"
            ) from error
        # Windows programs write backslashes. Of two entries of one name the last counts, as where a zip is unpacked.
        self.infos = {
            posixpath.normpath(info.filename.replace("\\", "/")): info
            for info in self.file.infolist()
            if _is_image_name(info.filename)
        }
        self.names = sorted(self.infos)
        self.outside = {name for name in self.names if name.startswith(("/", "../"))}

    def signature(self) -> list[str]:
        return [f"{name}\0{self.infos[name].file_size} {self.infos[name].CRC}" for name in self.names]

    @contextlib.contextmanager
    def _reasons(self) -> Iterator[None]:
        """Turns errors of zipfile about content (damaged, encrypted, of an unknown compression) into a ValueError."""
        try:
            yield
        except (RuntimeError, EOFError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
            raise ValueError(str(error) or type(error).__name__) from error
        except OSError as error:
            # bz2 raises it for damage, without a number, and EINVAL is a wrong place in the file.
            if self.remote or error.errno not in (None, errno.EINVAL):
                raise
            raise ValueError(str(error)) from error

    def head(self, name: str) -> bytes:
        return self._start(name, HEAD)

    def read(self, name: str) -> bytes:
        return self._start(name, -1)

    def _start(self, name: str, size: int) -> bytes:
        """The first `size` bytes of an entry, -1: all."""
        if name in self.outside:
            raise ValueError("its name points outside the zip")
        if self.infos[name].file_size > MAX_BYTES:
            raise ValueError("it is larger than 1 GiB")
        with self._reasons(), self.file.open(self.infos[name]) as file:
            return file.read(size)

    def close(self) -> None:
        self.file.close()
        self.opened.close()


class _Remote:
    """An open file in a bucket, of which whatever gcsfs raises while it reads is an OSError."""

    def __init__(self, path: Any):
        self._path, self._file = path, path.open("rb")

    def read(self, size: int = -1) -> bytes:
        with paths.os_errors(self._path):
            return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _raise(error: OSError) -> None:
    """For os.walk, which leaves out what it cannot list."""
    raise error


_WALK = """
import sys, lmdb
with lmdb.open(sys.argv[1], subdir=sys.argv[2] == "True", readonly=True, lock=False).begin(buffers=True) as transaction:
    for key in transaction.cursor().iternext(values=False):
        bytes(transaction.get(key)[-1:])  # the end of each value: what is between is no part of the structure
"""


class _Lmdb:
    """The values of an LMDB, each the bytes of an image file, in the order of their keys: LSUN as it is published."""

    outside: Collection[str] = ()

    def __init__(self, path: pathlib.Path):
        try:
            import lmdb
        except ImportError:
            raise UserError(f"data.path={path} is an LMDB: to read it run `pip install lmdb`") from None
        self.file, self.error = path / "data.mdb" if path.is_dir() else path, lmdb.Error
        # Of a damaged file the library reads anything, up to the end of the process: so another process reads it first.
        walk = [sys.executable, "-c", _WALK, str(path), str(path.is_dir())]
        walked = subprocess.run(walk, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
        if walked.returncode:
            with self.file.open("rb") as opened:  # an OSError here is of a disk that fails
                while opened.read(2**24):
                    pass
            reason = (walked.stderr.strip().splitlines() or ["it is damaged, or none"])[-1]
            raise UserError(f"data.path={path} cannot be read as an LMDB: {reason}")
        with self._os_errors():
            # Without its lock file, so that nothing is written beside somebody's data.
            self.environment = lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False)
            with self.environment.begin() as transaction:
                keys = transaction.cursor().iternext(values=False)
                self.names = [key.decode("utf-8", "surrogateescape") for key in keys]

    @contextlib.contextmanager
    def _os_errors(self) -> Iterator[None]:
        """Turns errors of LMDB into an OSError: the structure is sound, since another process has just read it."""
        try:
            yield
        except self.error as error:
            raise OSError(f"{self.file}: {error}") from error

    def signature(self) -> list[str]:
        stat = self.file.stat()
        return [f"{stat.st_size} {stat.st_mtime_ns}"]

    def head(self, name: str) -> bytes:
        with self._os_errors(), self.environment.begin(buffers=True) as transaction:
            return bytes((transaction.get(name.encode("utf-8", "surrogateescape")) or b"")[:HEAD])

    def read(self, name: str) -> bytes:
        with self._os_errors(), self.environment.begin() as transaction:
            return transaction.get(name.encode("utf-8", "surrogateescape")) or b""

    def close(self) -> None:
        self.environment.close()


@contextlib.contextmanager
def _open_source(path: str) -> Iterator[Any]:
    """Opens the folder, zip, LMDB or bucket at `path`.

    Raises UserError if it does not exist or holds no image, and Fault for any OSError in the body of the `with`.
    """
    try:
        source = paths.retry(path, lambda: _source(path))
        try:
            if not source.names:
                raise UserError(f"there is no image in {path}: it needs files that end in {', '.join(SUFFIXES)}")
            yield source
        finally:
            source.close()
    except OSError as error:
        raise Fault(f"data.path={path} cannot be read: {error}; run the same command again") from error


def _source(path: str) -> Any:
    remote = paths.is_remote(path)
    given: Any = paths.path(path) if remote else pathlib.Path(paths.path(path))
    if not path or not paths.exists(given):
        raise UserError(f"data.path={path!r} does not exist: name a folder, a zip or an LMDB of images")
    if remote and given.suffix == ".mdb":
        raise UserError(_lmdb_in_a_bucket(given))
    if not remote and (given.suffix == ".mdb" or paths.exists(given / "data.mdb")):
        return _Lmdb(given)
    if paths.is_dir(given):
        return _Bucket(given) if remote else _Folder(given)
    return _Zip(given)


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
        seen = json.loads(file.read_bytes())
        count, side, grey = int(seen["images"]), float(seen["side"]), bool(seen["grey"])
    except (OSError, ValueError, KeyError, TypeError):  # it is not there, or no more: looking again finds the same
        seen = _see(source, path)
        count, side, grey = seen["images"], seen["side"], seen["grey"]
        with contextlib.suppress(OSError):  # without it, the next start looks again
            paths.write(file, json.dumps(seen))
    size = image_size or min(2 ** int(np.log2(side)), MOST_SIZE)
    return Look(count, size, channels or (1 if grey else 3), _classes(source))


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
    return sorted({_class_of(name) for name in source.names if name not in source.outside})


def _class_of(name: str) -> str:
    return name.split("/")[0] if "/" in name else ""


def _place(source: Any, path: str, cache_dir: str, settings: str) -> pathlib.Path:
    """Where something is kept that was made of these very files with these settings."""
    lines = [settings, *source.signature()]
    for index in evenly_spaced(len(source.names), SAMPLED):
        head = _attempt(source.head, source.names[index])
        if isinstance(head, bytes):  # otherwise the file is bad, and skipped later
            lines.append(hashlib.sha256(head).hexdigest())
    key = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    given = paths.path(path)
    stem = given.stem if paths.is_remote(path) else pathlib.Path(given).resolve().stem
    return pathlib.Path(cache_dir) / "image_folder" / f"{stem}-{key}"


# --- The copy -----------------------------------------------------------------------------------------------------


def open_folder(
    path: str, image_size: int | None, channels: int | None, cache_dir: str, max_bad_share: float = 0.01
) -> tuple["Stored", np.ndarray, list[str]]:
    """(images uint8 [N, S, S, C] in a file, labels int32 [N], names of the classes) of a folder, zip or LMDB.

    `image_size` None means the largest power of two not above the median shorter side, and at most 256; `channels`
    None means 3, or 1 if every image is grey. The label of an image is its top-level folder (classes sorted by name;
    one class '' in a flat set). The copy lies in the local `cache_dir`. UserError if there is no image, or if more than
    `max_bad_share` of the files are bad, or if the copy cannot be written; Fault if anything cannot be read.
    """
    with _open_source(path) as source:
        if image_size is None or channels is None:
            _, image_size, channels, _ = _look(source, path, image_size, channels, cache_dir)
        # The first number changes when the rules of this file do.
        copy = _place(source, path, cache_dir, f"4 {image_size} {channels}")
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
    labels, checksums, bad, classes = [], [], {}, _classes(source)
    with (folder / "images.bin").open("wb") as file:
        read = lambda name: decode(source.read(name), size, channels)  # noqa: E731
        for name, result in _in_order(source, read, "decoding"):
            if isinstance(result, str):
                bad[name] = result
            else:
                content = result.tobytes()
                file.write(content)
                checksums.append(zlib.crc32(content))
                labels.append(classes.index(_class_of(name)))
    (folder / "skipped.json").write_text(json.dumps(bad, indent=1, sort_keys=True))
    shape = (len(labels), size, size, channels)
    described = {"shape": shape, "classes": classes, "labels": labels, "checksums": checksums}
    (folder / "dataset.json").write_text(json.dumps(described))


def _attempt(do: Callable[[str], Any], name: str) -> Any:
    """do(name), or the reason why it cannot be; Fault where the file cannot be read, which is not its own fault."""
    try:
        return do(name)
    except ValueError as error:
        return str(error) or type(error).__name__
    except (OSError, MemoryError) as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0][:200]
        raise Fault(f"{name} cannot be read: {reason}; run the same command again") from error


def _in_order(source: Any, do: Callable[[str], Any], what: str) -> Iterator[tuple[str, Any]]:
    """(name, do(name), or the reason why it cannot be) in the order of the names; in threads, with a bar.

    Fault as in `_attempt`.
    """
    remote = isinstance(source, _Bucket) or (isinstance(source, _Zip) and source.remote)

    pool = concurrent.futures.ThreadPoolExecutor(BUCKET_THREADS if remote else os.cpu_count())
    try:
        pending: collections.deque = collections.deque()
        for name in tqdm(source.names, what, unit="img", disable=None):
            pending.append((name, pool.submit(_attempt, do, name)))
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
