"""Sets of images by name, decoded once: uint8 [N, H, W, C], in memory or memory-mapped.

'synthetic' is made up here, 'image_folder' is anyone's folder or zip, and every other name is a tfds dataset that lies
on disk as array_record; 'digits' is put there by its first use. Reading tfds datasets needs tfds but no TensorFlow, and
importing this file needs neither.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from ddgan_jax.data import image_folder
from ddgan_jax.errors import UserError

SYNTHETIC_IMAGES = 256
# What tensorflow-datasets 4.9.10 imports in its command line and does not install.
CLI_NEEDS = "(after `pip install apache-beam mlcroissant`)"


def open_images(
    name: str,
    split: str,
    data_dir: str | None,
    image_shape: tuple[int, int, int],
    path: str = "",
    max_bad_share: float = 0.01,
) -> np.ndarray:
    """The images uint8 [N, *image_shape] of a split such as 'train' or 'train[:90%]'.

    `name` is 'synthetic', 'digits', any tfds dataset with a feature 'image', or 'image_folder': the folder or zip
    `path`, cropped and resized to `image_shape`, where zeros mean what the images have; see `image_folder.open_folder`.
    `data_dir` None means $TFDS_DATA_DIR or ~/tensorflow_datasets. UserError if the data is not there, not array_record,
    or not of `image_shape`.
    """
    if name != "image_folder" and 0 in image_shape:
        raise UserError(f"data.image_size and data.channels must be given for dataset {name}")
    if name == "synthetic":
        return np.random.default_rng(0).integers(0, 256, (SYNTHETIC_IMAGES, *image_shape), np.uint8)
    data_dir = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    if name == "image_folder":
        return image_folder.open_folder(path, image_shape[0], image_shape[2], data_dir, max_bad_share)[0]
    try:
        with quiet():
            builder = _find(name, data_dir)
            if builder is None and name == "digits":
                builder = _prepare_digits(data_dir)
            if builder is None:
                raise UserError(
                    f"dataset {name} is not in {data_dir}: set data_dir, or prepare it there with "
                    f"`tfds build {name} --file_format=array_record --data_dir={data_dir}` {CLI_NEEDS}"
                )
            return _read(builder, name, split, image_shape)
    except ModuleNotFoundError as error:
        raise UserError(f"dataset {name} needs {error.name}: run `pip install -r requirements.txt`") from error


def _find(name: str, data_dir: str) -> Any:
    """The tfds builder of a dataset that lies complete in `data_dir`, or None."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (ValueError, AssertionError):  # no builder of that name, config or version, and no files either
        return None
    return builder if builder.is_prepared() else None


def _prepare_digits(data_dir: str) -> Any:
    """The builder of the digits, written to `data_dir` by this process or, at the same time, by another."""
    print(f"preparing digits (1,797 images) into {data_dir}, once", flush=True)
    from ddgan_jax.data.digits import prepare

    try:
        prepare(data_dir)
    except OSError as error:
        # tfds writes aside and renames: the later of two processes fails here, with the other's copy in place.
        if (builder := _find("digits", data_dir)) is None:
            raise UserError(
                f"digits cannot be prepared in {data_dir}: {error}; set data_dir to a folder with room"
            ) from error
        return builder
    return _find("digits", data_dir)


def _read(builder: Any, name: str, split: str, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Decode every image of a split; the one way for all tfds datasets."""
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        command = f"tfds convert_format --dataset_version_dir={builder.data_dir} --out_file_format=array_record"
        raise UserError(
            f"dataset {name} in {builder.data_dir} is stored as {', '.join(sorted(formats))}, not array_record: "
            f"convert it with `{command}` {CLI_NEEDS}"
        )
    if "image" not in builder.info.features:
        raise UserError(f"dataset {name} has {', '.join(builder.info.features)}, but no image: choose another dataset")
    try:
        source = builder.as_data_source(split, file_format="array_record")
    except ValueError as error:
        raise UserError(
            f"dataset {name} has no split {split!r}: choose {' or '.join(builder.info.splits)}, or a part of it "
            "such as 'train[:90%]'"
        ) from error
    images = np.empty((len(source), *image_shape), np.uint8)
    for i, example in enumerate(source):
        if example["image"].shape != tuple(image_shape) or example["image"].dtype != np.uint8:
            raise UserError(
                f"image {i} of dataset {name} is {example['image'].dtype} {example['image'].shape}, but the config's "
                f"image shape is {tuple(image_shape)} (uint8): make them the same"
            )
        images[i] = example["image"]
    return images


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the notes of TensorFlow and tfds on what they find and how they were built; exceptions come through.

    TensorFlow 2.21 writes to the file descriptor, before any setting of its own is read.
    """
    absl = logging.getLogger("absl")
    level, stderr, nowhere = absl.level, os.dup(2), os.open(os.devnull, os.O_WRONLY)
    absl.setLevel(logging.ERROR)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
        absl.setLevel(level)
