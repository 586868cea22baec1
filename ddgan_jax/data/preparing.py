"""Making the prepared copy of a folder, zip or LMDB: what an earlier copy holds is shared, and the rest is decoded.

An interrupted preparation continues at the last block of images that it finished.
"""

import contextlib
import functools
import glob
import json
import math
import os
import pathlib
import shutil
import time
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ddgan_jax.data import folder, keyed
from ddgan_jax.data.archives import ImageFiles, class_of
from ddgan_jax.data.batches import evenly_spaced
from ddgan_jax.data.decoding import decode
from ddgan_jax.errors import of_a_folder
from ddgan_jax.storage import paths
from ddgan_jax.storage.downloads import LARGER_DISK, check_room, locked

FORMAT = 7  # of the copy; a change of how files are found or decoded raises it
# Of index.npz, for each file: the number of the file of pixels, the row in it (-1 for a skipped file), the CRC-32 of
# the pixels, and the label
COLUMNS = {"parts": np.uint16, "rows": np.int64, "checksums": np.uint32, "labels": np.int32}
BLOCK_SECONDS = 2.0  # of decoding: as much is lost if the preparation is interrupted
COMPARED = 32  # images of an earlier copy that are decoded again, to see that they are still the same
MAX_PARTS = 64
COPIES = "python -m ddgan_jax.data.copies"


def copy_path(files: ImageFiles, cache_dir: str, size: int, channels: int) -> pathlib.Path:
    """The folder of the prepared copy."""
    return folder.cache_path(files, cache_dir, f"{FORMAT} {size} {channels}")


def prepare(files: ImageFiles, copy: pathlib.Path, size: int, channels: int, max_bad_share: float) -> None:
    """Writes a copy into a temporary folder, which becomes `copy` when it is complete.

    The lock makes a second process wait for the copy of the first. A process that ends loses its lock, and the next
    one continues. Raises UserError if there is no image or no such place, and as soon as too many files are bad
    (`folder.check_skipped`); Fault for a failed read or write, or if there is no room.
    """
    aside, shape = copy.with_name(f"incomplete.{copy.name}"), (size, size, channels)
    with of_a_folder(f"the copy of {files.path} cannot be written to {copy.parent}", "set data.dir to another folder"):
        copy.parent.mkdir(parents=True, exist_ok=True)
        with locked(copy):
            if paths.exists(copy / "dataset.json"):
                return
            names, keys = folder.names_of(files), keyed.digests(files.keys)
            earlier = find_earlier(files, keys, copy, shape)
            place = earlier.place(keys)
            new = [name for name, at in zip(names, place, strict=True) if at < 0]
            aside.mkdir(exist_ok=True)
            work = Work(aside, earlier.parts, new, shape)
            done = work.resume()
            what, needed = f"the copy of {files.path} at {size} px takes", (len(new) - done) * math.prod(shape)
            check_room(what, copy.parent, needed, f" (`{COPIES}` lists older copies), or {LARGER_DISK}")
            shared = f", {len(names) - len(new):,} of them shared with {earlier.path.name}" * (len(new) < len(names))
            before = f", {done:,} of them already decoded" * bool(done)
            print(
                f"preparing the {len(names):,} files of {files.path} at {size} px in {copy}, once{shared}{before}",
                flush=True,
            )
            work.decode(files, done, max_bad_share)
            _describe(files, work, earlier, keys, place)
            shutil.rmtree(copy, ignore_errors=True)  # a copy that has lost its dataset.json
            aside.rename(copy)
            (copy / work.log.name).unlink(missing_ok=True)


# --- An earlier copy ------------------------------------------------------------------------------------------------


class Earlier(NamedTuple):
    """A copy of the same folder before it was changed; its table is empty if there is none to share."""

    path: pathlib.Path
    table: dict[str, np.ndarray]
    parts: int

    def place(self, keys: np.ndarray) -> np.ndarray:
        """The row of each file in the table; -1 for new ones, and for skipped ones, which may be readable now."""
        place = keyed.find(self.table["keys"], keys)
        place[place >= 0] = np.where(self.table["rows"][place[place >= 0]] >= 0, place[place >= 0], -1)
        return place


def find_earlier(files: ImageFiles, keys: np.ndarray, copy: pathlib.Path, shape: tuple[int, int, int]) -> Earlier:
    """The copy of this folder, at this size, that has the most of its files unchanged.

    A copy is not used if less than half of its pixels would be, or if an image in it is damaged or differs from its
    decoded file.
    """
    best, most = Earlier(copy, keyed.empty(COLUMNS), 0), 0
    for path in sorted(copy.parent.glob(f"{glob.escape(folder.stem(files))}-*")):
        with contextlib.suppress(OSError, *keyed.DAMAGE):  # a copy that is damaged, or cannot be read, is not shared
            about = json.loads(paths.read(path / "dataset.json"))
            if (about["source"], about["format"]) != (folder.source(files), FORMAT):
                continue
            if tuple(about["shape"]) != shape or about["parts"] >= MAX_PARTS:
                continue
            found = Earlier(path, keyed.parse(paths.read(path / "index.npz"), COLUMNS), about["parts"])
            place = found.place(keys)
            used = int((place >= 0).sum())
            stored = sum(os.stat(path / f"images.{i}.bin").st_size for i in range(about["parts"]))
            if used <= most or 2 * used * math.prod(shape) < stored:
                continue
            if _same_pixels(files, place, found, shape) and _intact(found, place[place >= 0], shape):
                best, most = found, used
    return best


def _same_pixels(files: ImageFiles, place: np.ndarray, earlier: Earlier, shape: tuple[int, int, int]) -> bool:
    """Whether some files decode to what a copy has for them: the content of a file may change, and its time not."""
    shared = np.flatnonzero(place >= 0)
    for i in shared[evenly_spaced(len(shared), COMPARED)]:
        try:
            checksum = zlib.crc32(_pixels(files, shape, files.names[i]))
        except ValueError:
            return False
        if checksum != earlier.table["checksums"][place[i]]:
            return False
    return True


def _intact(earlier: Earlier, place: np.ndarray, shape: tuple[int, int, int]) -> bool:
    """Whether the stored images in these rows of the table of a copy still have their checksums."""
    parts, rows, checksums = (earlier.table[name][place] for name in ("parts", "rows", "checksums"))
    for number in range(earlier.parts):
        with open(earlier.path / f"images.{number}.bin", "rb") as pixels:
            for i in sorted(np.flatnonzero(parts == number), key=rows.__getitem__):  # in the order of the file
                pixels.seek(int(rows[i]) * math.prod(shape))
                if zlib.crc32(pixels.read(math.prod(shape))) != checksums[i]:
                    return False
    return True


# --- What is decoded ------------------------------------------------------------------------------------------------


def _pixels(files: ImageFiles, shape: tuple[int, int, int], name: str) -> bytes:
    size, _, channels = shape
    return decode(files.read(name), size, channels).tobytes()


class Work:
    """The decoded images of a copy in the making, and the log of what is done."""

    def __init__(self, aside: pathlib.Path, part: int, names: Sequence[str], shape: tuple[int, int, int]):
        """Decodes `names` to `shape` into the file of pixels number `part`, in the folder `aside`."""
        self.aside, self.part, self.shape, self._names = aside, part, shape, names
        self.pixels, self.log = aside / f"images.{part}.bin", aside / "progress.jsonl"
        self._about = {"part": part, "names": keyed.digest("\n".join(names))}
        self.checksums: list[int] = []  # of the images so far
        self.skipped: dict[str, str] = {}

    def resume(self) -> int:
        """Returns the number of files that an interrupted preparation of the same files has done."""
        for file in self.aside.glob("images.*.bin"):
            if file != self.pixels:
                file.unlink()
        log = paths.read(self.log) if paths.exists(self.log) else b""
        whole = log[: log.rfind(b"\n") + 1]  # without a line that was not finished
        if whole != log:
            os.truncate(self.log, len(whole))
        last, blocks = "", iter(whole.splitlines())
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError, StopIteration):  # damage
            if json.loads(next(blocks)) == self._about:
                rows = self.pixels.stat().st_size // math.prod(self.shape)
                for block in map(json.loads, blocks):
                    first, end = block["first"], block["first"] + len(block["checksums"])
                    if first == len(self.checksums) and end <= rows:
                        self.checksums += block["checksums"]
                        self.skipped |= block["skipped"]
                        last = block["last"]
        if not last:
            self.pixels.write_bytes(b"")
            self.log.write_text(json.dumps(self._about) + "\n")
        return self._names.index(last) + 1 if last else 0

    def decode(self, files: ImageFiles, done: int, max_bad_share: float) -> None:
        """Decodes all files but the first `done`. Raises UserError as soon as too many are bad."""
        block: list[int] = []
        logged, since = len(self.skipped), time.monotonic()
        with self.pixels.open("r+b") as pixels, self.log.open("a") as log:

            def finish(last: str) -> None:
                pixels.flush()
                os.fsync(pixels.fileno())
                skipped = dict(list(self.skipped.items())[logged:])
                about = {"last": last, "first": len(self.checksums), "checksums": block, "skipped": skipped}
                log.write(json.dumps(about) + "\n")
                log.flush()
                self.checksums += block
                block.clear()

            def check() -> None:
                if len(self.skipped) > folder.MAX_SKIPPED or not max_bad_share:
                    folder.check_skipped(files, self.skipped, len(files.names), max_bad_share)

            pixels.truncate(len(self.checksums) * math.prod(self.shape))
            pixels.seek(0, os.SEEK_END)
            action = functools.partial(_pixels, files, self.shape)
            images = folder.process_files(files, self._names, action, "decoding", self.skipped, done, check)
            for name, image in images:
                pixels.write(image)
                block.append(zlib.crc32(image))
                if time.monotonic() - since >= BLOCK_SECONDS:
                    finish(name)
                    logged, since = len(self.skipped), time.monotonic()
            if done < len(self._names):
                finish(self._names[-1])


def _describe(files: ImageFiles, work: Work, earlier: Earlier, keys: np.ndarray, place: np.ndarray) -> None:
    """Completes a copy: the shared files of pixels, index.npz, skipped.json and dataset.json.

    `place` is that of each file in the earlier copy, or -1.
    """
    names, old = files.names, place >= 0
    good = np.array([name not in work.skipped for name in names], bool)
    table = {name: np.zeros(len(names), dtype) for name, dtype in COLUMNS.items()}
    for name in ("parts", "rows", "checksums"):
        table[name][old] = earlier.table[name][place[old]]
    table["parts"][~old], table["rows"][~old & good] = work.part, np.arange(len(work.checksums))
    table["checksums"][~old & good] = work.checksums
    table["rows"][~good] = -1
    of_names = [class_of(name) for name, kept in zip(names, good, strict=True) if kept]
    classes = sorted(set(of_names))
    label = {name: index for index, name in enumerate(classes)}
    table["labels"][good] = [label[name] for name in of_names]
    for i in range(earlier.parts):
        _share(earlier.path / f"images.{i}.bin", work.aside / f"images.{i}.bin")
    keyed.write(work.aside / "index.npz", {"keys": keys} | table)
    paths.write(work.aside / "skipped.json", json.dumps(work.skipped, indent=1, sort_keys=True))
    about = {"format": FORMAT, "source": folder.source(files), "shape": work.shape, "classes": classes}
    paths.write(
        work.aside / "dataset.json", json.dumps(about | {"images": int(good.sum()), "parts": earlier.parts + 1})
    )


def _share(file: pathlib.Path, link: pathlib.Path) -> None:
    """Makes a hard link, which takes no room and outlives the earlier copy; without links, a copy."""
    link.unlink(missing_ok=True)
    try:
        os.link(file, link)
    except OSError:  # a file system without links
        shutil.copyfile(file, link)
