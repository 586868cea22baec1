"""Lists the prepared copies of folders, zips and LMDBs, and removes those that are no longer needed.

    python -m ddgan_jax.data.copies              a line for each copy
    python -m ddgan_jax.data.copies --remove_old

Other options: `--dir=DIR`, the `config.data.dir` of the runs; `--remove=NAME`, one copy. An old copy is one
whose folder has a copy of the same size that was used later, or one that is incomplete, damaged or of an older version.
A copy that is being made, or that cannot be read, is not old.
"""

import argparse
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from ddgan_jax.data import folder, keyed, preparing, sources
from ddgan_jax.errors import reason_of
from ddgan_jax.storage import paths
from ddgan_jax.storage.downloads import locked


class Found(NamedTuple):
    """A copy on disk."""

    path: pathlib.Path
    # The folder and the shape; () if the copy is incomplete, damaged, or of an older version; why it cannot be read
    of: tuple[str, ...]
    images: int
    used: float  # seconds since the epoch
    num_bytes: int  # that removing it would free: other copies may share the rest

    @property
    def name(self) -> str:
        return self.path.name


def find(directory: pathlib.Path) -> list[Found]:
    """The copies in a folder, by the time of their last use."""
    copies = [read(path) for path in directory.iterdir() if path.is_dir()] if directory.is_dir() else []
    return sorted(copies, key=lambda copy: copy.used)


def read(path: pathlib.Path) -> Found:
    """Describes the copy at `path`."""
    files = [file.stat() for file in path.iterdir()]
    freed = sum(file.st_size for file in files if file.st_nlink == 1)
    used = max((file.st_mtime for file in files), default=path.stat().st_mtime)
    try:
        about = json.loads(paths.read(path / "dataset.json"))
        shape = "x".join(str(side) for side in about["shape"])
        complete = about["format"] == preparing.FORMAT and not path.name.startswith("incomplete.")
        return Found(path, (str(about["source"]), shape) if complete else (), int(about["images"]), used, freed)
    except (FileNotFoundError, *keyed.DAMAGE):
        return Found(path, (), 0, used, freed)
    except OSError as error:  # which says nothing about the copy
        return Found(path, (f"{path / 'dataset.json'} cannot be read: {reason_of(error)}",), 0, used, freed)


def old(copies: Sequence[Found]) -> list[Found]:
    """Those of `copies`, which are in the order of their last use, that no run of an unchanged folder needs."""
    newest = {copy.of: copy for copy in copies}
    return [copy for copy in copies if not copy.of or newest[copy.of] is not copy]


def remove(copy: Found) -> bool:
    """Removes a copy; False if another process is making it."""
    name = copy.name.removeprefix("incomplete.")
    try:
        with locked(copy.path.with_name(name), wait=False):
            shutil.rmtree(copy.path)
    except BlockingIOError:
        return False
    return True


def main(argv: Sequence[str]) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m ddgan_jax.data.copies", description="Lists prepared copies of folders of images, or removes them."
    )
    parser.add_argument("--dir", help="config.data.dir of the runs")
    parser.add_argument("--remove", metavar="NAME", help="remove the copy of this name")
    parser.add_argument("--remove_old", action="store_true", help="remove copies that newer ones replace")
    options = parser.parse_args(argv)
    directory = folder.folder_of_copies(paths.cache_dir(sources.directory(options.dir)))
    copies = find(directory)
    if options.remove and options.remove not in (copy.name for copy in copies):
        print(f"error: there is no copy {options.remove} in {directory}", file=sys.stderr)
        return 2
    replaced = old(copies)
    chosen = [copy for copy in copies if copy.name == options.remove or (options.remove_old and copy in replaced)]
    code = 0
    for copy in chosen or copies:
        what = " at ".join(copy.of) or "not complete, or of another version"
        note = "old" if copy in replaced else ""
        if chosen:
            try:
                note = "removed" if remove(copy) else "another process is making it"
            except OSError as error:
                note, code = f"cannot be removed: {reason_of(error)}", 1
        date = time.strftime("%Y-%m-%d", time.localtime(copy.used))
        print(f"{copy.name}  {copy.num_bytes / 2**20:,.0f} MiB  used {date}  {copy.images:,} images: {what}  {note}")
    if not copies:
        print(f"there are no copies in {directory}")
    elif not chosen and replaced:
        print(f"--remove_old frees {sum(copy.num_bytes for copy in replaced) / 2**20:,.0f} MiB")
    elif options.remove_old and not chosen:
        print("there are no old copies")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
