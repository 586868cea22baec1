"""Datasets of tensorflow-datasets (tfds) as array_record: read without TensorFlow, and prepared with it."""

import functools
import importlib.util
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from ddgan_jax.data import decoding, splits
from ddgan_jax.errors import Fault, UserError, of_a_folder, reason_of
from ddgan_jax.storage import downloads, paths
from ddgan_jax.storage.dashboards import quiet

T = TypeVar("T")
PREPARED_SIZE = 3  # times its downloads: what a dataset takes with its archives and their content
# A dataset, its configuration and version. With a namespace before them, such as huggingface:, tfds may run code from
# the internet, and a configuration can be that of somebody else.
NAME = r"\w+(/[\w.-]+)*(:[\d.*]+)?"
MAX_FILES = 16  # of a dataset that `prepare` downloads
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

    builder = _find_builder(name, data_dir)
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
        raise UserError(
            f"dataset {name} has no split {split!r}: choose {' or '.join(builder.info.splits)}, or a part of it "
            "such as 'train[:90%]'"
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
        raise Fault(f"dataset {name} cannot be read: {error}") from error


def _find_builder(name: str, data_dir: str) -> Any:
    """Returns the tfds builder of a complete dataset in `data_dir`. UserError with the command that prepares it."""
    builder = _builder(name, data_dir)
    if builder and builder.is_prepared():
        return builder
    if builder is None:
        raise UserError(
            f"dataset {name} is not in {data_dir}, and tfds has none of this name, configuration and version: set "
            "data.dir, or choose another dataset"
        )
    by_hand = f" --manual_dir=DIR {CLI_NEEDS}" if _manual(builder) else f" {CLI_NEEDS}"
    raise UserError(
        f"dataset {name} is not in {data_dir}: set data.dir, or prepare it there with "
        f"`tfds build {name} --file_format=array_record --data_dir={data_dir}`{by_hand}"
        + (f", where DIR is for what you have to download: {_manual(builder)}" if _manual(builder) else "")
    )


def _builder(name: str, data_dir: str) -> Any:
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


def _manual(builder: Any) -> str:
    """Instructions for the downloads of a dataset that a user makes; '' if tfds makes all of them."""
    return " ".join((getattr(builder, "MANUAL_DOWNLOAD_INSTRUCTIONS", None) or "").split())


# --- Preparation ----------------------------------------------------------------------------------------------------


def prepare(name: str, data_dir: str) -> None:
    """Downloads a dataset that is not in `data_dir`, and writes it there as array_record.

    A dataset that tfds does not know is left to `open_split`, which reports it. Files that a user has to download are
    taken from `data_dir`/downloads/manual. Another process that prepares the same dataset on this host waits. An
    interrupted preparation starts again, and resumes the downloads of a dataset of few files (`_download`).

    Raises:
        UserError: TensorFlow is missing, files have to be downloaded by hand, or `data_dir` cannot be written.
        Fault: files cannot be downloaded or are not the published ones; or the disk is full.
    """
    with quiet():
        builder = _builder(name, data_dir)
        if builder is None or builder.is_prepared():
            return
    manual = paths.path(data_dir) / "downloads" / "manual"
    if _manual(builder) and not paths.names(manual):
        raise UserError(
            f"dataset {name} is not in {data_dir}, and tfds cannot download it: put what follows into {manual}, or set "
            f"data.path to a folder, zip or LMDB of its images. {_manual(builder)}"
        )
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"dataset {name} is not in {data_dir}, and preparing it needs TensorFlow: run `pip install -r "
            "requirements.txt`, or prepare it on another computer and copy its folder"
        )
    if paths.is_remote(data_dir):
        _prepare(name, data_dir)
        return
    with of_a_folder(f"{data_dir} cannot be used for datasets"):
        folder = pathlib.Path(data_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with downloads.locked(folder / f".{name.replace('/', '-')}"):
            _prepare(name, data_dir)


def _prepare(name: str, data_dir: str) -> None:
    import tensorflow_datasets as tfds

    with quiet():
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        if builder.is_prepared():  # by another process, meanwhile
            return
    print(f"preparing dataset {name} in {data_dir}, once", flush=True)
    if not sys.stderr.isatty() and "ipykernel" not in sys.modules:  # bars would fill a log
        tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig()
    if not paths.is_remote(data_dir) and not _manual(builder):
        config.manual_dir = _download(name, builder, pathlib.Path(data_dir))
    try:
        builder.download_and_prepare(download_config=config)
    except Exception as error:  # tfds, requests, TensorFlow and Beam have no base in common
        if _manual(builder):
            raise UserError(
                f"dataset {name} cannot be prepared ({reason_of(error)}): put what follows into "
                f"{paths.path(data_dir) / 'downloads' / 'manual'}. {_manual(builder)}"
            ) from error
        raise Fault(
            f"dataset {name} cannot be prepared in {data_dir}: {reason_of(error)}; run the same command again, or "
            "prepare it on another computer and copy its folder"
        ) from error


def _download(name: str, builder: Any, data_dir: pathlib.Path) -> pathlib.Path:
    """Downloads the files of a dataset, if they are few, to a folder where tfds looks for them first; returns it.

    tfds' own client neither resumes a download nor finds soon that there is no internet. It has to load the many files
    of the datasets that have configurations, of which not all are needed.
    """
    # Not the folder of what users download, where the files would pass for those
    folder, files = data_dir / "downloads" / "published" / name.replace("/", "-"), builder.url_infos or {}
    if builder.BUILDER_CONFIGS or len(files) > MAX_FILES or not all(info.filename for info in files.values()):
        return folder
    needed = PREPARED_SIZE * sum(int(info.size) for info in files.values())
    what = f"dataset {name} takes up to {{}} while it is prepared"
    downloads.check_room(what, data_dir, needed, ", or set data.dir to a folder on a larger disk")
    try:
        for url, info in files.items():
            downloads.fetch(url, folder / info.filename, info.checksum)
    except Fault as error:
        raise Fault(f"{error}: run the same command again, or put the files of dataset {name} into {folder}") from error
    return folder
