"""Datasets of tfds that lie on disk as array_record, read without TensorFlow."""

import functools
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from ddgan_jax.data import decoding, splits
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.storage import paths

T = TypeVar("T")
# What tensorflow-datasets 4.9.10 imports in its command line and does not install.
CLI_NEEDS = "(after `pip install apache-beam mlcroissant`)"


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


def open_split(
    name: str, split: str, image_size: int | None, channels: int | None, data_dir: str
) -> tuple["Records", Callable[[], np.ndarray] | None, tuple[str, ...]]:
    """(images, labels, names of the classes) of a split of a dataset on disk; the one way for all tfds datasets."""
    import tensorflow_datasets as tfds

    builder = _find(name, data_dir)
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
    shape = decoding.output_shape(name, features["image"].shape, image_size, channels)
    decoders = {"image": tfds.decode.SkipDecoding()}
    try:
        for part in tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits):
            # which tfds itself reads as another one: of 12 examples [20%:10%] are 10
            size = builder.info.splits[part.splitname].num_examples
            splits.check_part(split, size, slice(part.from_, part.to), f"dataset {name}")
        as_source = functools.partial(builder.as_data_source, file_format="array_record", decoders=decoders)
        source = _reading(name, data_dir, lambda: as_source(split), (ValueError,))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"dataset {name} has no split {split!r}: choose {' or '.join(builder.info.splits)}, or a part of it "
            "such as 'train[:90%]'"
        ) from error
    if "label" not in features or not isinstance(features["label"], tfds.features.ClassLabel):
        return Records(source, name, shape, data_dir), None, ()

    def labels() -> np.ndarray:
        everything = range(len(source))
        found = lambda: [int(example["label"]) for example in source.__getitems__(everything)]  # noqa: E731
        return np.array(_reading(name, data_dir, found), np.int32)

    return Records(source, name, shape, data_dir), labels, tuple(features["label"].names)


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
