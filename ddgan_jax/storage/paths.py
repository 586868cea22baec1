"""Files and folders, local or in a bucket (`gs://bucket/run`): reading, listing, moving, and one atomic write.

gcsfs reads and writes buckets, with the credentials of the host (`gcloud auth application-default login`) and without
TensorFlow.
"""

import concurrent.futures
import contextlib
import functools
import importlib.util
import io
import os
import re
import secrets
import stat
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any

# Set before etils is imported: it would open buckets with TensorFlow if that is installed, and import it for seconds.
os.environ.setdefault("EPATH_USE_TF", "false")

from etils import epath

from ddgan_jax.errors import UserError, is_missing
from ddgan_jax.storage.buckets import Given, bucket_reader, is_remote, os_errors, retry, silence_gcsfs

Path = epath.Path
UNFINISHED: set[str] = set()  # files that `writing` has begun, which a process that is ended removes
# Held while a file is begun. A process that is ended keeps it, so that other threads begin no more files. Reentrant,
# since a signal's handler runs in the main thread, which may hold it.
BEGINNING = threading.RLock()


def path(given: Given) -> epath.Path:
    """The path that a user names: local, with `~`, or `gs://bucket/name`.

    Raises UserError for another scheme, such as https://, or if gcsfs is missing.
    """
    text = os.fspath(given)
    scheme = re.match(r"([\w.+-]+):/", text)
    if scheme and scheme[1] != "gs":
        raise UserError(f"{text}: paths are local or gs://bucket/name, not {scheme[1]}://")
    if not scheme:
        return epath.Path(text).expanduser()
    if not text.startswith("gs://") or len(text) == len("gs://"):
        raise UserError(f"{text}: a path in a bucket is gs://bucket/name")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text} is in a bucket, which needs gcsfs: run `pip install gcsfs`")
    silence_gcsfs()
    return epath.Path(text)


def read(file: Given) -> bytes:
    """The content of a file. Raises OSError if it cannot be read, also after retries."""
    if is_remote(file):
        return retry(file, lambda: bucket_reader().cat_file(os.fspath(file)))
    return retry(file, epath.Path(file).read_bytes)


def read_exactly(file: Given, size: int) -> bytes:
    """The content of a file of `size` bytes. Raises OSError as `read`, and if it has another size."""
    content = read(file)
    if len(content) != size:
        raise OSError(f"{len(content):,} bytes of {file} were read, but it has {size:,}")
    return content


def size_of(file: Given) -> int:
    """The size of a file in bytes. Raises ValueError unless it is a regular file, and OSError as `read`."""
    if is_remote(file):
        return int(retry(file, lambda: bucket_reader().info(os.fspath(file)))["size"])
    found = retry(file, lambda: os.stat(file))
    if not stat.S_ISREG(found.st_mode):  # reading a pipe would block, and a device may have no end
        raise ValueError("it is not a regular file")
    return found.st_size


def _mode(file: Given) -> int:
    """The mode bits of a local file or folder, 0 if there is none. pathlib reports some failures as absence."""
    try:
        return retry(file, lambda: os.stat(file).st_mode)
    except OSError as error:
        if is_missing(error):
            return 0
        raise


def exists(file: Given) -> bool:
    """Whether there is such a file or folder. Raises OSError if the disk or bucket does not answer."""
    if is_remote(file):
        return retry(file, lambda: bucket_reader().exists(os.fspath(file)))
    return bool(_mode(file))


def is_dir(path: Given) -> bool:
    """Whether there is such a folder. Raises OSError if the disk or bucket does not answer."""
    if is_remote(path):
        return retry(path, lambda: bucket_reader().isdir(os.fspath(path)))
    return stat.S_ISDIR(_mode(path))


def names(folder: Given) -> list[str]:
    """The sorted names in a folder; [] if there is no such folder. Raises OSError if it cannot be listed."""
    if is_remote(folder):
        return sorted({name.partition("/")[0] for name in files_below(folder)})
    try:
        return sorted(retry(folder, lambda: os.listdir(folder)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_start(file: Given, size: int) -> bytes:
    """The first `size` bytes of a file; a bucket transfers no more than these. Raises OSError as `read`."""

    def start() -> bytes:
        if is_remote(file):
            return bucket_reader().cat_file(os.fspath(file), start=0, end=size)
        with open(file, "rb") as opened:
            return opened.read(size)

    return retry(file, start)


def files_below(folder: Given) -> dict[str, tuple[int, str]]:
    """{name: (size, time of the last change)} of all files below a folder; one request for a bucket.

    {} if there is no such folder. Raises OSError if it cannot be listed.
    """
    if not is_remote(folder):
        return _local_files_below(folder)
    prefix, files = os.fspath(folder).removeprefix("gs://").rstrip("/") + "/", {}
    try:
        found = retry(folder, lambda: bucket_reader().find(os.fspath(folder), detail=True))
    except FileNotFoundError:  # the whole bucket
        return {}
    for name, info in found.items():
        if name.startswith(prefix) and not name.endswith("/"):
            files[name.removeprefix(prefix)] = int(info["size"]), str(info.get("updated", ""))
    return files


def _local_files_below(folder: Given, prefix: str = "") -> dict[str, tuple[int, str]]:
    files: dict[str, tuple[int, str]] = {}
    for name in names(folder):
        entry = os.path.join(folder, name)
        found = retry(entry, functools.partial(os.stat, entry))
        if stat.S_ISDIR(found.st_mode):
            files |= _local_files_below(entry, f"{prefix}{name}/")
        else:
            files[prefix + name] = (found.st_size, str(found.st_mtime_ns))
    return files


def fetch(source: Given, target: Given, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Copies the files below a folder, local or in a bucket, whose names are `wanted` to the local folder `target`.

    Raises OSError if any cannot be read, also after retries, or differs in size from its listing.
    """
    sizes = {name: size for name, (size, _) in files_below(source).items() if wanted(name)}

    def copy(name: str) -> None:
        content = read_exactly(epath.Path(source) / name, sizes[name])
        file = os.path.join(target, name)
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(file, "wb") as opened:
            opened.write(content)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        copies = [pool.submit(copy, name) for name in sizes]
        try:
            for done in concurrent.futures.as_completed(copies):
                done.result()
        except OSError:
            pool.shutdown(cancel_futures=True)
            raise


def write(file: Given, content: str | bytes | Callable[[IO[bytes]], Any], sync: bool = True) -> None:
    """Writes a file atomically: at any moment it is the old one or the new one. Creates its folder.

    `content` may be a function that writes to an open binary file. `sync` is that of `writing`. Raises OSError, which
    names the file, if it cannot be written; the old file is then unchanged.
    """
    with writing(file, sync) as opened:
        if callable(content):
            content(opened)
        else:
            opened.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def writing(file: Given, sync: bool = True) -> Iterator[IO[bytes]]:
    """An open binary file that becomes `file` when the body ends; after an exception, the old file is unchanged.

    Without `sync`, a local file may be lost in a power failure: call `os.sync` after many files. What is written to a
    bucket is held in memory until the end. Raises OSError, which names the file, if it cannot be written.
    """
    target = epath.Path(file)
    try:
        if is_remote(target):  # a bucket shows a file only when it is complete
            yield (buffer := io.BytesIO())
            with os_errors(target):
                target.write_bytes(buffer.getvalue())
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        # `remove_unfinished` knows the name. Two containers may have equal process ids.
        aside = target.parent / f".{target.name}.{secrets.randbits(48)}.tmp"
        try:
            with BEGINNING:
                UNFINISHED.add(os.fspath(aside))
                opened = open(aside, "wb")
            with opened:
                yield opened
                opened.flush()
                if sync:
                    os.fsync(opened.fileno())
            os.replace(aside, target)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(aside)
            UNFINISHED.discard(os.fspath(aside))
    except OSError as error:
        reason = error.strerror or str(error).strip().partition("\n")[0] or type(error).__name__
        raise OSError(f"{target} cannot be written: {reason}") from error


class BackgroundWrites:
    """Writes files in a thread, one after the other."""

    def __init__(self) -> None:
        self._pool, self._pending = concurrent.futures.ThreadPoolExecutor(1), list[concurrent.futures.Future]()

    def write(self, file: Given, content: str | bytes) -> None:
        """Begins to write a file. Raises OSError if an earlier one could not be written."""
        for done in [write for write in self._pending if write.done()]:
            self._pending.remove(done)
            done.result()
        self._pending.append(self._pool.submit(write, file, content))

    def wait(self) -> None:
        """Returns when all files are written. Raises OSError if one could not be."""
        pending, self._pending = self._pending, []
        for begun in pending:
            begun.result()


def remove_unfinished(folder: Given, pattern: str) -> None:
    """Removes what killed writes of files whose names match `pattern` left in a local folder. In a bucket nothing is.

    Another process must not write these files: those of other names may be in progress.
    """
    if not is_remote(folder):
        for name in names(folder):
            file = os.path.join(folder, name)
            if re.fullmatch(rf"\.({pattern})\.[0-9]+\.tmp", name) and stat.S_ISREG(os.lstat(file).st_mode):
                os.unlink(file)


def move(source: Given, target: Given) -> None:
    """Moves a file or folder; an existing target is replaced. A bucket cannot rename folders: files are copied."""
    old, new = epath.Path(source), epath.Path(target)
    with os_errors(old):
        if is_dir(new):
            new.rmtree()
        if not is_remote(old):
            new.parent.mkdir(parents=True, exist_ok=True)
            if os.path.islink(old):  # a relative link would lead elsewhere from its new place
                new.unlink(missing_ok=True)
                os.symlink(os.path.realpath(old), new)
                os.unlink(old)
            else:
                os.replace(old, new)  # epath refuses to replace a file
        elif is_dir(old):
            for name in files_below(old):
                write(new / name, read(old / name))
            old.rmtree()
        else:
            write(new, read(old))
            old.unlink()


def cache_dir(data_dir: str) -> str:
    """The folder of prepared copies and caches: `data_dir` if it is local, else the user's cache on this host."""
    return user_cache() if is_remote(data_dir) else data_dir


def user_cache() -> str:
    """The folder of this project in the user's cache, ~/.cache/ddgan_jax."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ddgan_jax")
