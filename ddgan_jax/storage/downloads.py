"""Published files from the internet: downloaded once, resumed after a cut, and verified before anything reads them.

Proxies are those of the environment (https_proxy). DDGAN_MIRROR is an address such as https://mirror.example/files
below which all files are looked for by their names, instead of at their own addresses.
"""

import contextlib
import fcntl
import hashlib
import http.client
import math
import os
import pathlib
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator

from tqdm import tqdm

from ddgan_jax.devices.processes import say
from ddgan_jax.errors import Fault, UserError, of_a_folder, reason_of
from ddgan_jax.storage import paths
from ddgan_jax.storage.buckets import is_address, retry

MIRROR = "DDGAN_MIRROR"
TIMEOUT = 30.0  # seconds without a byte
MAX_BYTES = 2**31  # of a file of unknown size: a server may send without end
PART = 2**20  # bytes that are written at once
LARGER_DISK = "set data.dir to a folder on a larger disk"
PASSING = (408, 425, 429)  # statuses that may pass, besides those from 500 on


def folder() -> pathlib.Path:
    """The folder of downloads in the user's cache."""
    return pathlib.Path(paths.user_cache(), "downloads")


def fetch(url: str, file: pathlib.Path, sha256: str, size: int = 0) -> None:
    """Downloads `url`, of at most `size` bytes, by default MAX_BYTES, to `file`, unless it is there.

    A download that was cut, also by a kill, is resumed from FILE.part. On a file system with locks, another process
    that wants the same file waits.

    Raises:
        UserError: the folder cannot be written, DDGAN_MIRROR is no address, or `file` is there with other content.
        Fault: the file cannot be downloaded, or is not the published one; or the disk is full.
    """
    url = address(url, file.name)
    with of_a_folder(f"{file.parent} cannot be used for downloads"):
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file):
            if not file.exists():
                _fetch(url, file, sha256, size or MAX_BYTES)
            else:
                check(file, sha256)


def check(file: pathlib.Path, sha256: str) -> None:
    """Raises UserError unless a file has this SHA-256."""
    if (found := _sha256(file)) != sha256:
        raise UserError(
            f"{file} is damaged, or not the published file: its SHA-256 is {found}, not {sha256}; remove it, and run "
            "the same command again"
        )


def address(url: str, name: str) -> str:
    """The address of a file: `url`, or that of its name below $DDGAN_MIRROR. Raises UserError if that is no address."""
    mirror = os.environ.get(MIRROR, "")
    if mirror and not (is_address(mirror) and mirror.partition("://")[2].strip("/")):
        raise UserError(f"{MIRROR}={mirror} must be an address, such as https://mirror.example/files")
    return f"{mirror.rstrip('/')}/{name}" if mirror else url


@contextlib.contextmanager
def locked(file: pathlib.Path, wait: bool = True) -> Iterator[None]:
    """Holds FILE.lock, which belongs to a file or folder that a process makes.

    Raises BlockingIOError if another process has it and `wait` is False.
    """
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:  # of a file system without locks
            pass
        yield


def check_room(what: str, folder: pathlib.Path, needed: int, remedy: str = "") -> None:
    """Raises Fault unless a folder has room for `needed` bytes. `what` is the beginning of the message: 'X takes'."""
    if needed > (free := shutil.disk_usage(folder).free):
        takes = f"{what} {math.ceil(needed / 2**20):,} MiB"
        raise Fault(f"{takes}, and {folder} has {free // 2**20:,} MiB free: make room there{remedy}")


def _fetch(url: str, file: pathlib.Path, sha256: str, size: int) -> None:
    part = file.with_name(f"{file.name}.part")
    say(f"downloading {url} to {file}")
    for resumed in (part.exists(), False):
        if not resumed or _sha256(part) != sha256:  # unless a kill came between the last byte and the new name
            _download(url, part, size)
        if (found := _sha256(part)) == sha256:
            os.replace(part, file)
            return
        part.unlink()
        if not resumed:  # else its beginning may be that of another file
            break
    raise Fault(f"{url} is not the published file: its SHA-256 is {found}, not {sha256}")


def _sha256(file: pathlib.Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _download(url: str, part: pathlib.Path, size: int) -> None:
    """Completes the file `part`. Raises Fault when attempts fail and none of them brings a byte."""
    while True:
        before = _size(part)
        try:
            return retry(url, lambda: _receive(url, part, size))
        except OSError as error:
            if _size(part) <= before:
                reason = error.reason if isinstance(error, urllib.error.URLError) else reason_of(error)
                raise Fault(f"{url} cannot be downloaded: {reason}") from error


def _receive(url: str, part: pathlib.Path, size: int) -> None:
    """Receives what `part` lacks. Raises OSError for a failure that may pass, and Fault for others."""
    begun = _size(part)
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={begun}-"} if begun else {})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            begun = begun if response.status == http.client.PARTIAL_CONTENT else 0
            length = response.headers.get("Content-Length", "")
            total = begun + int(length) if length.isdigit() else None
            received = begun
            check_room(f"{url} takes", part.parent, (total or 0) - begun)
            with (
                part.open("ab" if begun else "wb") as file,
                tqdm(total=total, initial=begun, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar,
            ):
                while block := response.read(PART):
                    bar.update(len(block))
                    received += len(block)
                    if received > size:
                        raise Fault(f"{url} sends more than {size:,} bytes: it is not the published file")
                    try:
                        file.write(block)
                    except OSError as error:
                        raise Fault(f"{part} cannot be written: {error.strerror}") from error
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:  # the part is too long
            part.unlink()
        elif error.code < 500 and error.code not in PASSING:
            raise Fault(f"{url} cannot be downloaded: the server answers {error.code} {error.reason}") from error
        raise
    except (http.client.InvalidURL, ValueError) as error:  # of what cannot be an address
        raise UserError(f"{url} is no valid address: {error}; check {MIRROR} and https_proxy") from error
    except http.client.HTTPException as error:
        raise OSError(reason_of(error)) from error
    if total is not None and _size(part) < total:
        raise OSError(f"the connection ended after {_size(part):,} of {total:,} bytes")


def _size(file: pathlib.Path) -> int:
    return file.stat().st_size if file.exists() else 0
