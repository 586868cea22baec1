"""Image files by name: what every source of them has in common, and the readers of a zip and an LMDB.

A file that was read and is not an image raises ValueError, and is skipped. A file that could not be read raises
OSError, and ends the work: if it were skipped, the prepared copy would lack it from then on.
"""

import contextlib
import errno
import functools
import lzma
import pathlib
import posixpath
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ddgan_jax.data.batches import evenly_spaced
from ddgan_jax.errors import Fault, UserError, reason_of
from ddgan_jax.storage import paths

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".avif", ".heic", ".heif")
MAX_BYTES = 2**30  # of one file: a larger one is more likely an attack on the memory than a photograph
EXCERPTS = 8  # parts of the content that distinguish two datasets with equal names, sizes and times
EXCERPT_BYTES = 2**16


class ImageFiles:
    """The image files of a folder, zip or LMDB. A subclass sets the attributes and defines `_read`."""

    path = ""  # as the user specified it
    remote = False  # whether the files are in a bucket
    names: Sequence[str]  # of all files, in the order of the dataset
    keys: Sequence[str]  # one for each file, which differs if the file is renamed or changed
    refused: Mapping[str, str] = {}  # the names that are never read, with the reason

    def signature(self) -> Iterable[str]:
        """Texts that differ whenever a file is added, removed or changed."""
        return self.keys

    def excerpts(self) -> Iterator[bytes]:
        """Parts of the content: the first 64 KiB of 8 evenly spaced files. Raises Fault if they cannot be read."""
        for index in evenly_spaced(len(self.names), EXCERPTS):
            with contextlib.suppress(ValueError):  # of a file that is skipped later
                yield read_or_fault(lambda name: self.read(name, EXCERPT_BYTES), self.names[index])

    def read(self, name: str, size: int | None = None) -> bytes:
        """Returns the content of a file, or its first `size` bytes.

        Raises ValueError if the file is to be skipped, and OSError if it cannot be read.
        """
        if name in self.refused:
            raise ValueError(self.refused[name])
        return self._read(name, size)

    def _read(self, name: str, size: int | None) -> bytes:
        raise NotImplementedError

    def classes(self) -> list[str]:
        """The sorted names of the top-level folders; '' stands for files outside any folder."""
        return sorted({class_of(name) for name in self.names if name not in self.refused})

    def close(self) -> None:
        """Closes what the reader holds open."""


def read_or_fault(action: Callable[[str], Any], name: str) -> Any:
    """Returns `action(name)`, which reads a file. Raises Fault for errors that do not prove the file itself bad."""
    try:
        return action(name)
    except (OSError, MemoryError) as error:
        raise Fault(f"{name} cannot be read: {reason_of(error)}; run the same command again") from error


def class_of(name: str) -> str:
    """The class of an image: its top-level folder, or ''."""
    return name.split("/")[0] if "/" in name else ""


def is_image_name(name: str) -> bool:
    """Whether a name has the suffix of an image, and neither it nor one of its folders is hidden."""
    parts = name.replace("\\", "/").split("/")
    hidden = any(part.startswith(".") and part not in (".", "..") for part in parts) or "__MACOSX" in parts
    return not hidden and parts[-1].lower().endswith(SUFFIXES)


def check_size(size: int) -> None:
    """Raises ValueError for a file of more than `MAX_BYTES`."""
    if size > MAX_BYTES:
        raise ValueError("it is larger than 1 GiB")


def read_file(file: pathlib.Path | paths.Path, size: int | None = None) -> bytes:
    """The content of an image file, with links followed. A `size` is that of a regular file which the caller found.

    Raises ValueError unless it is a regular file of at most `MAX_BYTES`, and OSError if it cannot be read.
    """
    size = paths.size_of(file) if size is None else size
    check_size(size)
    return paths.read_exactly(file, size)


class Zip(ImageFiles):
    """The image files in a zip, which may be in a bucket. Nothing is extracted to the disk."""

    def __init__(self, path: pathlib.Path | paths.Path):
        self.remote = paths.is_remote(path)
        self._opened: Any = _BucketFile(path) if self.remote else path.open("rb")
        try:
            with self._damage_as_value_error():
                self._zip = zipfile.ZipFile(self._opened)
        except (OSError, ValueError) as error:
            self._opened.close()
            if isinstance(error, OSError):
                raise
            raise UserError(
                f"data.path={path} is neither a folder nor a zip file nor an LMDB, or a zip that is damaged ({error})"
            ) from error
        # Windows programs write backslashes. Of several entries with one name the last counts, as in unpacking a zip.
        self._entries = {
            posixpath.normpath(entry.filename.replace("\\", "/")): entry
            for entry in self._zip.infolist()
            if is_image_name(entry.filename)
        }
        self.names = sorted(self._entries)
        self.keys = [f"{name}\0{self._entries[name].file_size} {self._entries[name].CRC}" for name in self.names]
        outside = (name for name in self.names if name.startswith(("/", "../")))
        self.refused = dict.fromkeys(outside, "its name points outside the zip")

    @contextlib.contextmanager
    def _damage_as_value_error(self) -> Iterator[None]:
        """Converts what zipfile raises for damaged, encrypted or unknown content into ValueError."""
        try:
            yield
        except (RuntimeError, EOFError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
            cause = error.__context__
            if isinstance(cause, OSError) and self._is_failure(cause):  # zipfile reports it as "not a zip file"
                raise cause from error
            raise ValueError(str(error) or type(error).__name__) from error
        except OSError as error:
            if self._is_failure(error):
                raise
            raise ValueError(str(error)) from error

    def _is_failure(self, error: OSError) -> bool:
        """Whether a read failed. For damage, bz2 raises OSError without a number, and a wrong offset gives EINVAL."""
        return self.remote or error.errno not in (None, errno.EINVAL)

    def _read(self, name: str, size: int | None) -> bytes:
        check_size(self._entries[name].file_size)
        with self._damage_as_value_error(), self._zip.open(self._entries[name]) as file:
            return file.read(-1 if size is None else size)

    def close(self) -> None:
        self._zip.close()
        self._opened.close()


class _BucketFile:
    """An open file in a bucket. Any exception that gcsfs raises during a read becomes an OSError."""

    def __init__(self, path: Any):
        self._path, self._file = path, path.open("rb")

    def read(self, size: int = -1) -> bytes:
        with paths.os_errors(self._path):
            return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


_WALK = """
import sys, lmdb
with lmdb.open(sys.argv[1], subdir=sys.argv[2] == "True", readonly=True, lock=False).begin(buffers=True) as transaction:
    left = int(sys.argv[3])
    for key in transaction.cursor().iternext(values=False):
        bytes(transaction.get(key)[-1:])  # the last byte is enough: the bytes before it are not part of the structure
        left -= 1
        if left < 0:
            sys.exit("it has more entries than its file has room for")
"""


LEAST_ENTRY = 10  # bytes in the file: a header of 8, and a pointer
MAGIC, MAGIC_PLACE = 0xBEEFC0DE.to_bytes(4, sys.byteorder), slice(16, 20)  # what an LMDB begins with, and where


class Lmdb(ImageFiles):
    """The values of an LMDB, each the content of an image file, in the order of their keys. LSUN is published so.

    The database is opened when its names or values are first used: a run that has a prepared copy uses neither.
    """

    def __init__(self, path: pathlib.Path):
        self._path, self._file = path, path / "data.mdb" if paths.is_dir(path) else path
        found = paths.retry(self._file, self._file.stat)
        self._size, self._stat = found.st_size, f"{found.st_size} {found.st_mtime_ns}"

    def signature(self) -> list[str]:
        return [self._stat]

    def excerpts(self) -> Iterator[bytes]:
        """Evenly spaced parts of the file: the database is not opened."""
        for start in evenly_spaced(max(self._size - EXCERPT_BYTES, 1), EXCERPTS):
            yield paths.retry(self._file, functools.partial(self._excerpt, start))

    def _excerpt(self, start: int) -> bytes:
        with self._file.open("rb") as file:
            file.seek(start)
            return file.read(EXCERPT_BYTES)

    @functools.cached_property
    def names(self) -> list[str]:  # type: ignore[override]
        environment = self._environment
        with self._os_errors(), environment.begin() as transaction:
            keys = transaction.cursor().iternext(values=False)
            names = [key.decode("utf-8", "surrogateescape") for key in keys]
        if len(set(names)) < len(names):
            raise UserError(f"data.path={self._path} has a key twice: it is damaged, or has several values for a key")
        return names

    @functools.cached_property
    def keys(self) -> list[str]:  # type: ignore[override]
        return [f"{name}\0{self._stat}" for name in self.names]

    @functools.cached_property
    def _environment(self) -> Any:
        try:
            import lmdb
        except ImportError:
            raise UserError(f"data.path={self._path} is an LMDB: to read it run `pip install lmdb`") from None
        paths.retry(self._file, self._verify)
        with self._os_errors():
            # Without its lock file, so that nothing is written beside the user's data.
            subdir = self._file != self._path
            return lmdb.open(str(self._path), subdir=subdir, readonly=True, lock=False, readahead=False)

    def _verify(self) -> None:
        """Reads the structure in another process: on a damaged file the library may read any memory, and crash.

        Raises UserError if the file is damaged or no LMDB, and OSError if the disk may be the cause.
        """
        # Pages that lead to each other could otherwise be walked forever.
        most = self._size // LEAST_ENTRY
        walk = [sys.executable, "-c", _WALK, str(self._path), str(self._file != self._path), str(most)]
        walked = subprocess.run(walk, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
        if not walked.returncode:
            return
        with self._file.open("rb") as opened:  # raises OSError if the disk fails
            start = opened.read(MAGIC_PLACE.stop)
            while opened.read(2**24):
                pass
        reason = (walked.stderr.strip().splitlines() or ["it is damaged, or not an LMDB"])[-1]
        # The library has an error of its own for what is no LMDB. It reports a header that a read cut as such, too.
        cut = reason.startswith("lmdb.InvalidError") and start[MAGIC_PLACE] == MAGIC
        if reason.startswith("lmdb.Error") or cut:
            raise OSError(reason)
        raise UserError(f"data.path={self._path} cannot be read as an LMDB: {reason}")

    @contextlib.contextmanager
    def _os_errors(self) -> Iterator[None]:
        """Converts LMDB's errors into OSError: another process has verified the structure before."""
        import lmdb

        try:
            yield
        except lmdb.Error as error:
            raise OSError(f"{self._file}: {error}") from error

    def _read(self, name: str, size: int | None) -> bytes:
        with self._os_errors(), self._environment.begin(buffers=True) as transaction:
            return bytes((transaction.get(name.encode("utf-8", "surrogateescape")) or b"")[:size])

    def close(self) -> None:
        if "_environment" in vars(self):
            self._environment.close()
