"""Images of a folder (nested or flat), a zip or an LMDB: finding them, their classes, and what their headers say.

Nothing outside the folder or zip is read, not even by a link. Folders and zips may lie in a bucket.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ddgan_jax.data.archives import HEAD, MAX_BYTES, SUFFIXES, Lmdb, Zip, is_image_name
from ddgan_jax.data.batches import evenly_spaced
from ddgan_jax.data.decoding import look_at
from ddgan_jax.errors import Fault, UserError, is_missing
from ddgan_jax.storage import paths

WINDOW = 256  # files that are decoded ahead of the one that is written
SAMPLED = 8  # files whose first bytes distinguish two sets with the same names, sizes and times
MOST_SIZE = 256  # px, unless more is asked for: the paper's largest; above it training takes more than one device
BUCKET_THREADS = 32  # they wait for the network most of the time


class Folder:
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
        self.names = sorted({name.replace(os.sep, "/") for name in names if is_image_name(name)} | self.outside)

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


def _raise(error: OSError) -> None:
    """For os.walk, which leaves out what it cannot list."""
    raise error


class Bucket:
    """The image files below a folder of a bucket."""

    def __init__(self, path: paths.Path):
        self.root = path
        files = paths.files_below(path)
        if "data.mdb" in files:
            raise UserError(_lmdb_in_a_bucket(path))
        self.files = {name: about for name, about in files.items() if is_image_name(name)}
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


@contextlib.contextmanager
def open_source(path: str) -> Iterator[Any]:
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
        return Lmdb(given)
    if paths.is_dir(given):
        return Bucket(given) if remote else Folder(given)
    return Zip(given)


def _lmdb_in_a_bucket(path: paths.Path) -> str:
    return f"data.path={path} is an LMDB, which is read from a local disk only: copy it to one, and name the copy"


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
    with open_source(path) as source:
        return look_into(source, path, image_size, channels, cache_dir)


def look_into(source: Any, path: str, image_size: int | None, channels: int | None, cache_dir: str) -> Look:
    """`look` at a source that is open."""
    file = cache_place(source, path, cache_dir, "look 1").with_suffix(".json")
    try:
        seen = json.loads(file.read_bytes())
        count, side, grey = int(seen["images"]), float(seen["side"]), bool(seen["grey"])
    except (OSError, ValueError, KeyError, TypeError):  # it is not there, or no more: looking again finds the same
        seen = _see(source, path)
        count, side, grey = seen["images"], seen["side"], seen["grey"]
        with contextlib.suppress(OSError):  # without it, the next start looks again
            paths.write(file, json.dumps(seen))
    size = image_size or min(2 ** int(np.log2(side)), MOST_SIZE)
    return Look(count, size, channels or (1 if grey else 3), classes_of(source))


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
    for name, result in in_order(source, header, "looking"):
        if isinstance(result, str):
            bad[name] = result
        else:
            found.append(result)
    if not found:
        raise UserError(f"{skipped_text(bad, len(source.names), path)}. It needs at least one image")
    sides, greys = zip(*found, strict=True)
    return {"images": len(found), "side": float(np.median(sides)), "grey": all(greys)}


def classes_of(source: Any) -> list[str]:
    """The names of the classes, sorted."""
    return sorted({class_of(name) for name in source.names if name not in source.outside})


def class_of(name: str) -> str:
    """The top-level folder of a file, \'\' without any."""
    return name.split("/")[0] if "/" in name else ""


def cache_place(source: Any, path: str, cache_dir: str, settings: str) -> pathlib.Path:
    """Where something is kept that was made of these very files with these settings."""
    lines = [settings, *source.signature()]
    for index in evenly_spaced(len(source.names), SAMPLED):
        head = attempt(source.head, source.names[index])
        if isinstance(head, bytes):  # otherwise the file is bad, and skipped later
            lines.append(hashlib.sha256(head).hexdigest())
    key = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    given = paths.path(path)
    stem = given.stem if paths.is_remote(path) else pathlib.Path(given).resolve().stem
    return pathlib.Path(cache_dir) / "image_folder" / f"{stem}-{key}"


def attempt(do: Callable[[str], Any], name: str) -> Any:
    """do(name), or the reason why it cannot be; Fault where the file cannot be read, which is not its own fault."""
    try:
        return do(name)
    except ValueError as error:
        return str(error) or type(error).__name__
    except (OSError, MemoryError) as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0][:200]
        raise Fault(f"{name} cannot be read: {reason}; run the same command again") from error


def in_order(source: Any, do: Callable[[str], Any], what: str) -> Iterator[tuple[str, Any]]:
    """(name, do(name), or the reason why it cannot be) in the order of the names; in threads, with a bar.

    Fault as in `attempt`.
    """
    remote = isinstance(source, Bucket) or (isinstance(source, Zip) and source.remote)

    pool = concurrent.futures.ThreadPoolExecutor(BUCKET_THREADS if remote else os.cpu_count())
    try:
        pending: collections.deque = collections.deque()
        for name in tqdm(source.names, what, unit="img", disable=None):
            pending.append((name, pool.submit(attempt, do, name)))
            if len(pending) >= WINDOW:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def skipped_text(bad: dict[str, str], total: int, path: str) -> str:
    """How many files were skipped, and the first of them with the reason."""
    example = next(iter(bad))
    text = f"{len(bad)} of {total} files in {path} were skipped (the first, {example}: {bad[example]})"
    return text.encode("utf-8", "replace").decode()  # names need not be valid Unicode
