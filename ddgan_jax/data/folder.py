"""Images of a folder (nested or flat), a zip or an LMDB: how they are found, and what their headers say.

Only files inside the folder or zip are read: links that lead out are refused. Folders and zips may be in a bucket.
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
from typing import Any

import numpy as np
from tqdm import tqdm

from ddgan_jax.data.archives import SUFFIXES, ImageFiles, Lmdb, Zip, check_size, is_image_name
from ddgan_jax.data.batches import evenly_spaced
from ddgan_jax.data.decoding import read_header
from ddgan_jax.errors import Fault, UserError, is_missing, reason_of
from ddgan_jax.storage import paths

HEADER_BYTES = 2**16  # at the start of a file: nearly always enough for the header and the preview of a camera
HASHED_FILES = 8  # files whose first bytes distinguish two datasets with equal names, sizes and times
MAX_DEFAULT_SIZE = 256  # px: the paper's largest, unless the user specifies one
WINDOW = 256  # files that are processed ahead of the one that is returned
BUCKET_THREADS = 32  # they mostly wait for the network


class Folder(ImageFiles):
    """The image files below a folder, local or in a bucket."""

    def __init__(self, path: pathlib.Path | paths.Path):
        self.remote = paths.is_remote(path)
        self._root: Any = path if self.remote else pathlib.Path(path).resolve()
        if self.remote:
            every = paths.files_below(path)
            contents = collections.defaultdict(set)
            for name in every:
                contents[name.rpartition("/")[0]].add(name.rpartition("/")[2])
            results = [folder for folder, names in contents.items() if folder and has_results(names)]
            inside = [name for name in every if not any(name.startswith(f"{folder}/") for folder in results)]
            self._files = {name: every[name] for name in inside if is_image_name(name)}
            # Joined to the root, a name that begins with a slash would be a path on this host.
            outside = (name for name in self._files if name.startswith(("/", "../")) or "//" in name)
            self.refused = dict.fromkeys(outside, "its name is not a path below the folder")
        else:
            names, links = _walk(self._root)
            stats = ((name, _stat(self._root / name)) for name in {*filter(is_image_name, names), *links})
            self._files = {name: (found.st_size, str(found.st_mtime_ns)) for name, found in stats}
            self.refused = dict.fromkeys(links, "it is a link to a folder, which is not followed")
        self.names = sorted(self._files)
        self.signature = [f"{name}\0{' '.join(map(str, self._files[name]))}" for name in self.names]

    def _read(self, name: str, size: int | None) -> bytes:
        file, whole = (self._root / name, self._files[name][0]) if self.remote else self._resolve(name)
        if size is not None:
            return paths.read_start(file, min(size, whole)) if whole else b""
        check_size(whole)
        return paths.read_exactly(file, whole)

    def _resolve(self, name: str) -> tuple[pathlib.Path, int]:
        """Returns the local file of a name, with links followed, and its size.

        Raises ValueError for a link that leads out of the folder or nowhere, and for anything but a regular file.
        """
        link = self._root / name
        try:
            target = link.resolve()
            if not target.is_relative_to(self._root):
                raise ValueError("it is a link to a file outside the folder")
            found = os.stat(target)
        except (OSError, RuntimeError) as error:  # RuntimeError before Python 3.13, for a link to itself
            if link.is_symlink() and (isinstance(error, RuntimeError) or is_missing(error)):
                raise ValueError(f"it is a link that leads nowhere ({error})") from error
            raise
        if not stat.S_ISREG(found.st_mode):  # reading a pipe would block, and a device may have no end
            raise ValueError("it is not a regular file")
        return target, found.st_size


def _stat(file: pathlib.Path) -> os.stat_result:
    """The size and time of a file; of a link, those of the file that it leads to, if there is one."""
    found = os.lstat(file)
    if stat.S_ISLNK(found.st_mode):
        with contextlib.suppress(OSError):  # a link that leads nowhere is skipped, with the reason, when it is read
            found = os.stat(file)
    return found


def has_results(names: Collection[str]) -> bool:
    """Whether the files of a folder are those of a run or of an evaluation, whose grids of samples are not data."""
    return "metrics.jsonl" in names or "first_checkpoint.json" in names or {"results.json", "samples.png"} <= {*names}


def _walk(root: pathlib.Path) -> tuple[list[str], list[str]]:
    """Returns the relative names of all files below a folder, and of the links to folders, which are not followed."""

    def fail(error: OSError) -> None:  # by default os.walk leaves out a folder that it cannot list
        raise error

    files: list[str] = []
    links: list[str] = []
    for parent, folders, names in os.walk(root, onerror=fail):
        if pathlib.Path(parent) != root and has_results(names):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.relpath(os.path.join(parent, name), root) for name in names]
        linked = (name for name in folders if os.path.islink(os.path.join(parent, name)))
        links += [os.path.relpath(os.path.join(parent, name), root) for name in linked]
    return files, links


@contextlib.contextmanager
def open_files(path: str) -> Iterator[ImageFiles]:
    """Opens the folder, zip or LMDB at `path`.

    Raises UserError if it does not exist or contains no image, and Fault for any OSError in the body of the `with`.
    """
    try:
        with contextlib.closing(paths.retry(path, lambda: _open(path))) as files:
            if not files.names:
                raise UserError(f"there is no image in {path}: it needs files that end in {', '.join(SUFFIXES)}")
            files.path = path
            yield files
    except OSError as error:
        raise Fault(f"data.path={path} cannot be read: {error}; run the same command again") from error


def _open(path: str) -> ImageFiles:
    given: Any = paths.path(path)
    if not path or not paths.exists(given):
        raise UserError(f"data.path={path!r} does not exist: name a folder, a zip or an LMDB of images")
    remote = paths.is_remote(path)
    given = given if remote else pathlib.Path(given)
    if given.suffix == ".mdb" or paths.exists(given / "data.mdb"):
        if remote:
            raise UserError(
                f"data.path={given} is an LMDB, which is read from a local disk only: copy it to one, and set "
                "data.path to the copy"
            )
        return Lmdb(given)
    return Folder(given) if paths.is_dir(given) else Zip(given)


def inspect(
    files: ImageFiles, image_size: int | None, channels: int | None, cache_dir: str
) -> tuple[int, tuple[int, int, int]]:
    """Returns the number of images, and the shape (S, S, C) of each in the prepared copy, from headers alone.

    Damaged files with a valid header count. `image_size` None means the largest power of two that is at most the median
    shorter side, and at most 256; `channels` None means 3, or 1 if all images are grey. The result is kept in
    `cache_dir`. Raises UserError if no file is an image.
    """
    kept = cache_path(files, cache_dir, "look 1").with_suffix(".json")
    try:
        found = json.loads(kept.read_bytes())
        count, side, grey = int(found["images"]), float(found["side"]), bool(found["grey"])
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
        count, side, grey = _read_headers(files)
        with contextlib.suppress(OSError):  # without the file, the next start reads the headers again
            paths.write(kept, json.dumps({"images": count, "side": side, "grey": grey}))
    size = image_size or min(2 ** int(np.log2(side)), MAX_DEFAULT_SIZE)
    return count, (size, size, channels or (1 if grey else 3))


def _read_headers(files: ImageFiles) -> tuple[int, float, bool]:
    """Returns the number of images, their median shorter side, and whether all are grey."""

    def header(name: str) -> tuple[int, bool]:
        start = files.read(name, HEADER_BYTES)
        try:
            return read_header(start)
        except ValueError:
            if len(start) < HEADER_BYTES:
                raise
            return read_header(files.read(name))

    skipped: dict[str, str] = {}
    headers = [found for _, found in process_files(files, header, "reading headers", skipped)]
    if not headers:
        raise UserError(f"{describe_skipped(files, skipped)}. At least one image is needed")
    sides, greys = zip(*headers, strict=True)
    return len(headers), float(np.median(sides)), all(greys)


def cache_path(files: ImageFiles, cache_dir: str, settings: str) -> pathlib.Path:
    """The path for a result that depends on these files, unchanged, and on `settings`."""
    lines = [settings, *files.signature]
    for index in evenly_spaced(len(files.names), HASHED_FILES):
        with contextlib.suppress(ValueError):  # of a file that is skipped later
            start = _read_or_fault(lambda name: files.read(name, HEADER_BYTES), files.names[index])
            lines.append(hashlib.sha256(start).hexdigest())
    key = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    given = paths.path(files.path)
    stem = given.stem if files.remote else pathlib.Path(given).resolve().stem
    return pathlib.Path(cache_dir) / "image_folder" / f"{stem}-{key}"


def process_files(
    files: ImageFiles, action: Callable[[str], Any], label: str, skipped: dict[str, str]
) -> Iterator[tuple[str, Any]]:
    """Yields (name, action(name)) in the order of the names. Threads run ahead, and a progress bar shows `label`.

    Files for which the action raises ValueError are left out, and added to `skipped`: their names and the reasons.
    Raises Fault for a file that cannot be read.
    """

    pool = concurrent.futures.ThreadPoolExecutor(BUCKET_THREADS if files.remote else os.cpu_count())

    def futures() -> Iterator[tuple[str, concurrent.futures.Future]]:
        pending: collections.deque = collections.deque()
        for name in tqdm(files.names, label, unit="img", disable=None):
            pending.append((name, pool.submit(_read_or_fault, action, name)))
            if len(pending) >= WINDOW:
                yield pending.popleft()
        yield from pending

    try:
        for name, future in futures():
            try:
                result = future.result()
            except ValueError as error:
                skipped[name] = str(error) or type(error).__name__
            else:
                yield name, result
    finally:
        pool.shutdown(cancel_futures=True)


def _read_or_fault(action: Callable[[str], Any], name: str) -> Any:
    """Returns `action(name)`, which reads a file. Raises Fault for errors that do not prove the file itself bad."""
    try:
        return action(name)
    except (OSError, MemoryError) as error:
        raise Fault(f"{name} cannot be read: {reason_of(error)}; run the same command again") from error


def describe_skipped(files: ImageFiles, skipped: dict[str, str]) -> str:
    """The number of skipped files, and the first with its reason, for a message."""
    name, reason = next(iter(skipped.items()))
    text = f"{len(skipped)} of {len(files.names)} files in {files.path} were skipped (the first, {name}: {reason})"
    return text.encode("utf-8", "replace").decode()  # names need not be valid Unicode
