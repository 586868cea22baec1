"""Datasets of tensorflow-datasets (tfds) that are stored as array_record, read without TensorFlow."""

import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from ddgan_jax.data import decoding, splits
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.storage import paths

T = TypeVar("T")
# A dataset, its configuration and version. With a namespace before them, such as huggingface:, tfds may run code from
# the internet, and a configuration can be that of somebody else.
NAME = r"\w+(/[\w.-]+)*(:[\d.*]+)?"
EXAMPLES = 1_024  # read at once for their labels: their encoded images are read with them
# What the command line of tensorflow-datasets 4.9.10 imports and does not install.
CLI_NEEDS = "(after `pip install apache-beam mlcroissant`)"


def open_split(
    name: str, split: str, image_size: int | None, channels: int | None, data_dir: str
) -> tuple["EncodedImages", Callable[[], np.ndarray] | None, tuple[str, ...]]:
    """Returns the images, labels and class names of a split of a dataset in `data_dir`.

    Without labels, these are None and (). Raises UserError if the dataset or the split is missing, if it is not stored
    as array_record or has no feature `image`, or if the images have another size or number of channels.
    """
    import tensorflow_datasets as tfds

    check_folder(data_dir)
    builder = _find_builder(name, data_dir)
    name, features = builder.info.full_name.rpartition("/")[0], builder.info.features
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        command = f"tfds convert_format --dataset_version_dir={builder.data_dir} --out_file_format=array_record"
        raise UserError(
            f"dataset {name} in {builder.data_dir} is stored as {', '.join(sorted(formats))}, not array_record: "
            f"convert it with `{command}` {CLI_NEEDS}"
        )
    check_image(name, features)
    shape = decoding.output_shape(name, features["image"].shape, image_size, channels)
    try:
        for part in tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits):
            # tfds reads a reversed slice as another one: [20%:10%] of 12 examples as 10 of them.
            size = builder.info.splits[part.splitname].num_examples
            splits.check_not_empty(split, size, slice(part.from_, part.to), f"dataset {name}")
        open_source = functools.partial(
            builder.as_data_source, split, file_format="array_record", decoders={"image": tfds.decode.SkipDecoding()}
        )
        source = _Source(lambda: _read(name, data_dir, open_source, expected=(ValueError,)))
    except UserError:
        raise
    except ValueError as error:
        sizes = [f"{known} ({info.num_examples:,} examples)" for known, info in builder.info.splits.items()]
        raise UserError(
            f"dataset {name} has no split {split!r}: choose {' or '.join(sizes)}, or a part of it such as 'train[:90%]'"
        ) from error
    images = EncodedImages(source, name, shape, data_dir)
    if "label" not in features or not isinstance(features["label"], tfds.features.ClassLabel):
        return images, None, ()

    def labels() -> np.ndarray:
        parts = (range(start, min(start + EXAMPLES, len(source))) for start in range(0, len(source), EXAMPLES))
        read = lambda part: [int(example["label"]) for example in source.read(part)]  # noqa: E731
        found = [_read(name, data_dir, functools.partial(read, part)) for part in parts]
        return np.array([label for part in found for label in part], np.int32)

    return images, labels, tuple(features["label"].names)


def check_folder(data_dir: str) -> None:
    """Raises UserError for a folder in which tfds finds no dataset, since it reads [ as a pattern."""
    if "[" in data_dir:
        raise UserError(f"data.dir={data_dir} contains [, with which tfds cannot read it: name a folder without")


def check_image(name: str, features: Any) -> None:
    """Raises UserError unless the features of a dataset have an image."""
    import tensorflow_datasets as tfds

    if "image" not in features or not isinstance(features["image"], tfds.features.Image):
        raise UserError(f"dataset {name} has {', '.join(features)}, but no image: choose another dataset")


class _Source:
    """A random-access source of examples, which is opened again after a failed read.

    A reader of array_record whose file could not be opened keeps failing.
    """

    def __init__(self, open_source: Callable[[], Any]):
        self._open = open_source
        self._source = open_source()

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Sequence[int]) -> Any:
        """The examples at these indices. Raises whatever the source raises."""
        try:
            return self._source.__getitems__(indices)
        except Exception:  # whatever it is, it is raised again
            self._source = self._open()
            raise


class EncodedImages:
    """The encoded images of a tfds split, which are decoded when they are indexed."""

    def __init__(self, source: _Source, name: str, shape: tuple[int, ...], data_dir: str):
        """Reads `source`. Images that are not of `shape` (H, W, C) are cropped and resized to it."""
        self.shape, self.dtype = (len(source), *shape), np.dtype(np.uint8)
        self._source, self._name, self._data_dir = source, name, data_dir

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Any) -> np.ndarray:
        images = np.empty((len(indices), *self.shape[1:]), np.uint8)
        chosen = [int(index) for index in indices]
        examples = _read(self._name, self._data_dir, lambda: self._source.read(chosen))
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


def _read(name: str, data_dir: str, action: Callable[[], T], expected: tuple[type[Exception], ...] = ()) -> T:
    """Returns `action()`, which reads files of a dataset, after retries.

    Raises Fault if they are damaged or cannot be read. Exceptions of the `expected` types are passed on.
    """

    def attempt() -> T:
        try:
            return action()
        except Exception as error:  # tfds, protobuf, array_record and gcsfs have no common base class
            if isinstance(error, (*expected, UserError, Fault, ImportError)):
                raise
            reasons, cause = [error], error.__cause__ or error.__context__
            while cause:
                if isinstance(cause, OSError):
                    reasons[1:] = [cause]  # of several, the first that was raised
                cause = cause.__cause__ or cause.__context__
            raise OSError("; ".join(" ".join(f"{type(e).__name__} {e}".split())[:200] for e in reasons)) from error

    try:
        return paths.retry(data_dir, attempt)
    except OSError as error:
        raise Fault(
            f"dataset {name} cannot be read: {error}; run the same command again, or remove the folder of the dataset "
            f"in {data_dir} and prepare it anew"
        ) from error


def _find_builder(name: str, data_dir: str) -> Any:
    """Returns the tfds builder of a complete dataset in `data_dir`. UserError with the command that prepares it."""
    builder = builder_of(name, data_dir)
    if builder and builder.is_prepared():
        return builder
    if builder is None:
        raise UserError(
            f"dataset {name} is not in {data_dir}, and tfds has none of this name, configuration and version: set "
            "data.dir, or choose another dataset"
        )
    manual = manual_instructions(builder)
    raise UserError(
        f"dataset {name} is not in {data_dir}: set data.dir, or prepare it there with "
        f"`tfds build {name} --file_format=array_record --data_dir={data_dir}`"
        + (" --manual_dir=DIR" if manual else "")
        + f" {CLI_NEEDS}"
        + (f", where DIR is for what you have to download: {manual}" if manual else "")
    )


def builder_of(name: str, data_dir: str) -> Any:
    """The tfds builder of a dataset, prepared or not; None if tfds knows none, and there are no files."""
    import tensorflow_datasets as tfds

    if not re.fullmatch(NAME, name):
        return None
    try:
        if not paths.is_remote(data_dir):  # tfds treats a folder that it cannot list as a missing one
            folder = os.path.join(data_dir, re.split("[/:]", name)[0])
            _read(name, data_dir, lambda: paths.names(folder))
        find = functools.partial(tfds.builder, name, data_dir=data_dir)
        return _read(name, data_dir, find, expected=(ValueError, AssertionError))
    except (ValueError, AssertionError):  # there is no builder of that name, config or version
        return None


def manual_instructions(builder: Any) -> str:
    """Instructions for the downloads of a dataset that a user makes; '' if tfds makes all of them."""
    return " ".join((getattr(builder, "MANUAL_DOWNLOAD_INSTRUCTIONS", None) or "").split())
