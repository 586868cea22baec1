"""Paths that users give, local or in a bucket (`gs://bucket/run`) alike, and the one atomic write of the project.

A bucket is read and written by gcsfs, with the credentials of the machine (`gcloud auth application-default login`),
without TensorFlow.
"""

import contextlib
import importlib.util
import io
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import IO, Any

# Before etils looks: it would open buckets with TensorFlow wherever that is installed, and import it for seconds.
os.environ.setdefault("EPATH_USE_TF", "false")

from etils import epath

from ddgan_jax.errors import UserError

Path = epath.Path
Given = str | os.PathLike


def path(given: Given) -> epath.Path:
    """A path as a user gives it: local, with `~`, or `gs://bucket/name`.

    UserError for another scheme, such as https://, or where gcsfs is missing.
    """
    text = os.fspath(given)
    scheme = re.match(r"(\w+):/", text)
    if scheme and scheme[1] != "gs":
        raise UserError(f"{text}: paths are local or gs://bucket/name, not {scheme[1]}://")
    if not scheme:
        return epath.Path(text).expanduser()
    if not text.startswith("gs://") or len(text) == len("gs://"):
        raise UserError(f"{text}: a path in a bucket is gs://bucket/name")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text} is in a bucket, which needs gcsfs: run `pip install gcsfs`")
    for name in ("gcsfs", "google.auth"):  # they warn of every way to credentials that they try before the right one
        logging.getLogger(name).setLevel(logging.ERROR)
    return epath.Path(text)


def is_remote(given: Given) -> bool:
    """Is it in a bucket?"""
    return os.fspath(given).startswith("gs://")


@contextlib.contextmanager
def os_errors(what: Given) -> Iterator[None]:
    """What a bucket raises within, of gcsfs, aiohttp or google.auth, as an OSError, as a local disk would raise it."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        if not is_remote(what):
            raise
        reason = str(error).strip().splitlines()
        raise OSError(f"{type(error).__name__}: {reason[0][:200]}" if reason else type(error).__name__) from error


def read(file: Given) -> bytes:
    """The content of a file. OSError if it cannot be read."""
    with os_errors(file):
        return epath.Path(file).read_bytes()


def exists(file: Given) -> bool:
    """Is it there? OSError where a bucket does not answer."""
    with os_errors(file):
        return epath.Path(file).exists()


def read_start(file: Given, size: int) -> bytes:
    """The first `size` bytes of a file, or all of a smaller one; of a bucket no more is fetched. OSError as `read`."""
    if is_remote(file):
        with os_errors(file):
            return _bucket_files().cat_file(os.fspath(file), start=0, end=size)
    with open(file, "rb") as opened:
        return opened.read(size)


def files_below(folder: Given) -> dict[str, tuple[int, str]]:
    """{name: (size, time of the last change)} of all files below a folder of a bucket, in one listing.

    OSError where the bucket does not answer.
    """
    with os_errors(folder):
        found = _bucket_files().find(os.fspath(folder), detail=True)
    prefix = os.fspath(folder).removeprefix("gs://").rstrip("/") + "/"
    files = {name.removeprefix(prefix): info for name, info in found.items() if name.startswith(prefix)}
    return {name: (int(info["size"]), str(info.get("updated", ""))) for name, info in files.items()}


def _bucket_files() -> Any:
    """The file system of gs:// paths, the one that epath has: it keeps one for the same arguments."""
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)


def write(file: Given, content: str | bytes | Callable[[IO[bytes]], Any]) -> None:
    """Write a file, so that at any moment it is the old one or the new one; its folder is made.

    `content` may be a function that writes into an open binary file. OSError, which names the file, if it cannot be
    written: the old file is still there.
    """
    target = epath.Path(file)
    if callable(content):
        buffer = io.BytesIO()
        content(buffer)
        content = buffer.getvalue()
    elif isinstance(content, str):
        content = content.encode()
    try:
        if is_remote(target):  # there, a file appears when it is whole
            with os_errors(target):
                target.write_bytes(content)
        else:
            _write_local(target, content)
    except OSError as error:
        reason = error.strerror or str(error).strip().splitlines()[0]
        raise OSError(f"{target} cannot be written: {reason}") from error


def _write_local(target: epath.Path, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.parent / f".{target.name}.{os.getpid()}.tmp"  # `remove_unfinished` knows the name
    try:
        with open(aside, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(aside, target)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(aside)


def remove_unfinished(folder: Given) -> None:
    """Remove what a `write` that was killed has left in a folder that is there or not. In a bucket nothing is left."""
    if not is_remote(folder):
        for aside in epath.Path(folder).glob(".*.tmp"):
            aside.unlink()


def move_folder(source: Given, target: Given) -> None:
    """Move a folder, in the place of one that is there. In a bucket, file by file: there is no renaming a folder."""
    old, new = epath.Path(source), epath.Path(target)
    with os_errors(old):
        if new.exists():
            new.rmtree()
        if not is_remote(old):
            new.parent.mkdir(parents=True, exist_ok=True)
            old.rename(new)
            return
        for name in files_below(old):
            write(new / name, (old / name).read_bytes())
        old.rmtree()


def cache_dir(data_dir: str) -> str:
    """Where copies and caches of data lie: `data_dir` if it is local, else ~/.cache/ddgan_jax on this machine."""
    if not is_remote(data_dir):
        return data_dir
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ddgan_jax")
