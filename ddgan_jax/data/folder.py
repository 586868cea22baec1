"""Images of a folder (nested or flat), a zip or an LMDB: how they are found, identified, and processed in threads.

Only files inside the folder or zip are read: links that lead out are refused. Folders and zips may be in a bucket.
"""

import collections
import concurrent.futures
import contextlib
import contextvars
import hashlib
import math
import os
import pathlib
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from ddgan_jax.data.archives import (
    SUFFIXES,
    ImageFiles,
    Lmdb,
    Zip,
    is_image_name,
    read_file,
    read_or_fault,
)
from ddgan_jax.data.decoding import readable_formats
from ddgan_jax.devices import processes
from ddgan_jax.errors import Fault, UserError, is_missing
from ddgan_jax.storage import paths

WINDOW = 256  # files that are processed ahead of the one that is returned
UNFINISHED = ".unfinished"  # a file in a folder to which samples are being written
MAX_SKIPPED = 10  # files that may be skipped, however few there are
MAX_STEM = 50  # characters
BUCKET_THREADS = 32  # they mostly wait for the network


class Folder(ImageFiles):
    """The image files below a folder, local or in a bucket. `unfinished` has the names of the files UNFINISHED."""

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
            self._files = {name: every[name] for name in inside if is_image_name(name) or _is_mark(name)}
            # Joined to the root, a name that begins with a slash would be a path on this host.
            outside = (name for name in self._files if name.startswith(("/", "../")) or "//" in name)
            self.refused = dict.fromkeys(outside, "its name is not a path below the folder")
        else:
            self._files, links = _image_files(os.fspath(self._root))
            self.refused = dict.fromkeys(links, "it is a link to a folder, which is not followed")
        self.unfinished = sorted(filter(_is_mark, self._files))
        self.names = sorted(self._files.keys() - {*self.unfinished})
        self.keys = [f"{name}\0{' '.join(map(str, self._files[name]))}" for name in self.names]

    def _read(self, name: str, size: int | None) -> bytes:
        file, whole = (self._root / name, self._files[name][0]) if self.remote else self._resolve(name)
        if size is not None:
            return paths.read_start(file, min(size, whole)) if whole else b""
        return read_file(file, whole)

    def _resolve(self, name: str) -> tuple[pathlib.Path, int]:
        """Returns the local file of a name, with links followed, and its size.

        Raises ValueError for a link that leads out of the folder or nowhere, and for anything but a regular file.
        """
        link = self._root / name
        try:
            target = link.resolve()
            if not target.is_relative_to(self._root):
                raise ValueError("it is a link to a file outside the folder")
            return target, paths.size_of(target)
        except (OSError, RuntimeError) as error:  # RuntimeError before Python 3.13, for a link to itself
            if link.is_symlink() and (isinstance(error, RuntimeError) or is_missing(error)):
                raise ValueError(f"it is a link that leads nowhere ({error})") from error
            raise


def _stat(file: str) -> tuple[int, str]:
    """The size and time of a file; of a link, those of the file that it leads to, if there is one."""
    found = os.lstat(file)
    if stat.S_ISLNK(found.st_mode):
        with contextlib.suppress(OSError):  # a link that leads nowhere is skipped, with the reason, when it is read
            found = os.stat(file)
    return found.st_size, str(found.st_mtime_ns)


def _is_link_to_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_symlink() and entry.is_dir()
    except OSError as error:
        if is_missing(error):  # of a link to itself
            return False
        raise


def _is_mark(name: str) -> bool:
    return name.rpartition("/")[2] == UNFINISHED


def has_results(names: Collection[str]) -> bool:
    """Whether the files of a folder are those of a run or of an evaluation, whose grids of samples are not data."""
    return "metrics.jsonl" in names or "first_checkpoint.json" in names or {"results.json", "samples.png"} <= {*names}


def _image_files(root: str) -> tuple[dict[str, tuple[int, str]], list[str]]:
    """Returns {name: (size, time)} of the images and marks below a folder, and the links to folders.

    Links to folders are not followed. Hidden folders and the results of runs are left out. Raises OSError for a folder
    that cannot be listed.
    """
    files: dict[str, tuple[int, str]] = {}
    links: list[str] = []
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(os.path.join(root, prefix)) as listing:
            entries = list(listing)
        if prefix and has_results({entry.name for entry in entries}):
            continue
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                pending += [f"{name}/"] * (not entry.name.startswith("."))
            elif _is_link_to_folder(entry):
                links += [name] * (not entry.name.startswith("."))
            elif is_image_name(name) or _is_mark(name):
                files[name] = _stat(entry.path)
    return files | {name: _stat(os.path.join(root, name)) for name in links}, links


_LISTED: contextvars.ContextVar[dict[str, ImageFiles] | None] = contextvars.ContextVar("listed", default=None)


@contextlib.contextmanager
def listed_once() -> Iterator[None]:
    """A context in which each folder, zip or LMDB is listed once, however often it is opened."""
    listed: dict[str, ImageFiles] = {}
    with contextlib.ExitStack() as stack:
        token = _LISTED.set(listed)
        try:
            yield
        finally:
            _LISTED.reset(token)
            for files in listed.values():
                stack.callback(files.close)


@contextlib.contextmanager
def os_errors(path: str) -> Iterator[None]:
    """Turns an OSError of reading `path` into a Fault that names it."""
    try:
        yield
    except OSError as error:
        raise Fault(f"data.path={path} cannot be read: {error}; run the same command again") from error


@contextlib.contextmanager
def open_files(path: str) -> Iterator[ImageFiles]:
    """Opens the folder, zip or LMDB at `path`.

    Raises UserError if it does not exist, and Fault for any OSError in the body of the `with`.
    """
    listed = _LISTED.get()
    with os_errors(path):
        if listed is not None and path in listed:
            yield listed[path]
            return
        files = _open(path)
        files.path = path
        with contextlib.closing(files) if listed is None else contextlib.nullcontext():
            if listed is not None:
                listed[path] = files
            yield files


def names_of(files: ImageFiles) -> Sequence[str]:
    """The names of all files. Raises UserError if there is none."""
    if not files.names:
        raise UserError(f"there is no image in {files.path}: it needs files that end in {', '.join(SUFFIXES)}")
    return files.names


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
    kind = Folder if paths.is_dir(given) else Zip
    # What lists a bucket retries itself.
    return kind(given) if remote and kind is Folder else paths.retry(path, lambda: kind(given))


def stem(files: ImageFiles) -> str:
    """The name of the folder, zip or LMDB, without a suffix, and cut where names of files would become too long."""
    given = paths.path(files.path)
    return (given if files.remote else pathlib.Path(given).resolve()).stem[:MAX_STEM]


def source(files: ImageFiles) -> str:
    """The folder, zip or LMDB as an absolute path."""
    return files.path if files.remote else os.path.realpath(paths.path(files.path))


def folder_of_copies(cache_dir: str) -> pathlib.Path:
    """The folder of all prepared copies."""
    return pathlib.Path(cache_dir) / "image_folder"


def cache_path(files: ImageFiles, cache_dir: str, settings: str) -> pathlib.Path:
    """The path for a result that depends on these files, unchanged, on `settings`, and on the formats that are read."""
    formats = " ".join(readable_formats())
    digest = hashlib.sha256("\n".join([settings, formats, *files.signature()]).encode("utf-8", "surrogateescape"))
    for excerpt in files.excerpts():
        digest.update(hashlib.sha256(excerpt).digest())
    return folder_of_copies(cache_dir) / f"{stem(files)}-{digest.hexdigest()[:16]}"


def process_files(
    files: ImageFiles,
    names: Sequence[str],
    action: Callable[[str], Any],
    label: str,
    skipped: dict[str, str],
    done: int = 0,
    check: Callable[[], Any] = lambda: None,
) -> Iterator[tuple[str, Any]]:
    """Yields (name, action(name)) for names[done:], in order. Threads run ahead, and a progress bar shows `label`.

    Files for which the action raises ValueError are left out, and added to `skipped`: their names and the reasons.
    Then `check` is called, which may raise. Raises Fault for a file that cannot be read.
    """

    pool = concurrent.futures.ThreadPoolExecutor(BUCKET_THREADS if files.remote else processes.num_cores())

    def futures() -> Iterator[tuple[str, concurrent.futures.Future]]:
        pending: collections.deque = collections.deque()
        for name in tqdm(names[done:], label, len(names), unit="img", initial=done, disable=None):
            pending.append((name, pool.submit(read_or_fault, action, name)))
            if len(pending) >= WINDOW:
                yield pending.popleft()
        yield from pending

    try:
        for name, future in futures():
            try:
                result = future.result()
            except ValueError as error:
                skipped[name] = str(error) or type(error).__name__
                check()
            else:
                yield name, result
    finally:
        pool.shutdown(cancel_futures=True)


def check_skipped(
    files: ImageFiles, skipped: dict[str, str], num_files: int, max_share: float = 1.0, listed: str = ""
) -> str:
    """Returns a note on the skipped files, of `num_files`: their number, and the first with its reason.

    `listed` is where all are listed. Raises UserError if all are skipped, or more than MAX_SKIPPED and the fraction
    `max_share` of them; a fraction of 0 allows none.
    """
    name, reason = next(iter(skipped.items()))
    text = f"{len(skipped)} of {num_files} files in {files.path} were skipped (the first, {name}: {reason}){listed}"
    text = text.encode("utf-8", "replace").decode()  # names need not be valid Unicode
    if len(skipped) == num_files:
        raise UserError(f"{text}. At least one image is needed")
    if len(skipped) > (max(MAX_SKIPPED, max_share * num_files) if max_share else 0):
        share = math.ceil(100 * len(skipped) / num_files) / 100
        limit = f"{MAX_SKIPPED} files and the fraction {max_share:g} of them" if max_share else "none"
        raise UserError(
            f"{text}. That is more than {limit}: remove them, or allow it with --config.data.max_bad_share={share:g}"
        )
    return text
