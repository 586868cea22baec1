"""Inspection of a set of images by their headers: how many there are, their size, and whether they are grey."""

import contextlib
import json
from typing import NamedTuple

import numpy as np

from ddgan_jax.data import folder, keyed
from ddgan_jax.data.archives import EXCERPT_BYTES, ImageFiles
from ddgan_jax.data.decoding import read_header
from ddgan_jax.storage import paths

MAX_DEFAULT_SIZE = 256  # px: the paper's largest, unless the user specifies one


class Inspection(NamedTuple):
    """Facts about a set of images, read from their headers."""

    num_images: int  # the files with the header of an image; some may be damaged
    shape: tuple[int, int, int]  # (S, S, C) of each in the prepared copy
    classes: list[str]


def inspect(
    files: ImageFiles, image_size: int | None, channels: int | None, cache_dir: str, max_bad_share: float = 1.0
) -> Inspection:
    """Describes the prepared copy of a set of images, from headers alone.

    `image_size` None means the largest power of two that is at most the median shorter side, and at most 256;
    `channels` None means 3, or 1 if all images are grey. The result is kept in `cache_dir`, and so is what the header
    of each file says. Raises UserError if no file is an image, or too many are not (`folder.check_skipped`).
    """
    copy = folder.cache_path(files, cache_dir, "look 2")
    kept = copy.with_name(f"{copy.name}.json")  # not with_suffix: the name of the folder may have a dot
    try:
        found = json.loads(kept.read_bytes())
        count, side, grey = int(found["images"]), float(found["side"]), bool(found["grey"])
        classes = [str(name) for name in found["classes"]]
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
        sides, greys = _headers(files, cache_dir, max_bad_share)
        count, side, grey, classes = len(sides), float(np.median(sides)), bool(np.all(greys)), files.classes()
        about = {"images": count, "side": side, "grey": grey, "classes": classes}
        with contextlib.suppress(OSError):  # without the file, the next start reads the headers again
            paths.write(kept, json.dumps(about))
    size = image_size or min(2 ** int(np.log2(side)), MAX_DEFAULT_SIZE)
    return Inspection(count, (size, size, channels or (1 if grey else 3)), classes)


def _headers(files: ImageFiles, cache_dir: str, max_bad_share: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the shorter side of each image, and whether it is grey. Only headers of new or changed files are read."""

    def header(name: str) -> tuple[int, bool]:
        start = files.read(name, EXCERPT_BYTES)
        try:
            return read_header(start)
        except ValueError:
            if len(start) < EXCERPT_BYTES:
                raise
            return read_header(files.read(name))

    names, keys = folder.names_of(files), keyed.digests(files.keys)
    kept = folder.folder_of_copies(cache_dir) / f"{folder.stem(files)}-{keyed.digest(folder.source(files))}.headers.npz"
    known = keyed.read(kept, {"sides": np.int32, "greys": np.bool_})
    place = keyed.find(known["keys"], keys)
    skipped: dict[str, str] = {}
    new = [name for name, at in zip(names, place, strict=True) if at < 0]
    found = dict(folder.process_files(files, new, header, "reading headers", skipped))
    read = [keys[i] for i, name in enumerate(names) if name in found]
    sides, greys = (np.array([value[i] for value in found.values()]) for i in (0, 1))
    at = place[place >= 0]
    merged = {
        "keys": np.concatenate([known["keys"][at], np.array(read, np.uint64)]),
        "sides": np.concatenate([known["sides"][at], sides.astype(np.int32)]),
        "greys": np.concatenate([known["greys"][at], greys.astype(np.bool_)]),
    }
    if found:
        with contextlib.suppress(OSError):  # as above
            keyed.write(kept, merged)
    if skipped:
        folder.check_skipped(files, skipped, len(names), max_bad_share)
    return merged["sides"], merged["greys"]
