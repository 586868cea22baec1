"""A sketch of a dataset, which is saved with a run: it recognises the data when the run is resumed or evaluated."""

import zlib
from typing import Any

import numpy as np

from ddgan_jax.data.batches import evenly_spaced
from ddgan_jax.data.sources import Data

COMPARED = 64  # examples whose means are compared


def sketch_of(data: Data, labels: np.ndarray | None = None) -> dict[str, Any]:
    """The number of examples, and the means of up to COMPARED of them, which distinguish two datasets.

    Means are of each example, and of the channels of its quarters, which differ in a mirrored, turned or recoloured
    image. Another version of an image decoder hardly changes them. `labels` [N], of a class-conditional run, add a
    checksum, and the names of the classes.
    """
    count = len(data.images)
    some = data.images[evenly_spaced(count, COMPARED)]
    means = some.reshape(len(some), -1).mean(axis=1, dtype=np.float64)
    close = 2.0 if data.images.dtype == np.uint8 else 1e-3
    sketch = {"count": count, "means": [round(float(mean), 4) for mean in means], "close": close}
    sketch["quarters"] = np.round(_quarters(some), 2 if data.images.dtype == np.uint8 else 4).tolist()
    return (
        sketch
        if labels is None
        else sketch | {"labels": zlib.crc32(labels.tobytes()), "classes": [*map(str, data.classes)]}
    )


def _quarters(examples: np.ndarray) -> np.ndarray:
    """Images [N, H, W, C] as the means [N, 4 C] of the channels of their quarters; points as they are."""
    if examples.ndim == 2:
        return examples
    halves = (half for rows in np.array_split(examples, 2, axis=1) for half in np.array_split(rows, 2, axis=2))
    return np.concatenate([half.mean(axis=(1, 2), dtype=np.float64) for half in halves if half.size], axis=1)


def difference(before: dict[str, Any] | None, now: dict[str, Any]) -> str:
    """How two sketches differ, or ''.

    Old checkpoints have no sketch, or one without quarters or labels: what is missing is not compared.
    """
    if not before:
        return ""
    if now["count"] != before["count"]:
        return f"{before['count']:,} examples then, {now['count']:,} now"
    far = np.abs(np.subtract(now["means"], before["means"])) > now["close"]
    if "quarters" in before:
        far |= np.any(np.abs(np.subtract(now["quarters"], before["quarters"])) > 2 * now["close"], axis=1)
    if far.any():
        return f"{far.sum()} of {len(far)} examples that are compared differ"
    if "labels" in before and "labels" in now and before["labels"] != now["labels"]:
        return "the labels differ"
    return ""
