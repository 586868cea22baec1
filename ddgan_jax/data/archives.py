"""Image files in a zip or an LMDB, read in place.

What was read and is no image is a ValueError, and a reason to skip one file. What could not be read is an OSError, and
ends the work with a Fault: skipped files would be missing in the copy for good.
"""

import contextlib
import errno
import lzma
import pathlib
import posixpath
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Collection, Iterator
from typing import Any

from ddgan_jax.errors import UserError
from ddgan_jax.storage import paths

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_BYTES = 2**30  # of one file: beyond it is more likely an attack on the memory than a photograph
HEAD = 2**16  # bytes of a file that nearly always hold its header, with the preview that a camera puts before it


def is_image_name(name: str) -> bool:
    """Whether a file is read: by its extension, unless it or a folder on the way is hidden."""
    parts = name.replace("\\", "/").split("/")
    hidden = any(part.startswith(".") and part not in (".", "..") for part in parts) or "__MACOSX" in parts
    return not hidden and parts[-1].lower().endswith(SUFFIXES)


class Zip:
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
            if is_image_name(info.filename)
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


_WALK = """
import sys, lmdb
with lmdb.open(sys.argv[1], subdir=sys.argv[2] == "True", readonly=True, lock=False).begin(buffers=True) as transaction:
    for key in transaction.cursor().iternext(values=False):
        bytes(transaction.get(key)[-1:])  # the end of each value: what is between is no part of the structure
"""


class Lmdb:
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
