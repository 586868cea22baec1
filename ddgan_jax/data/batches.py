"""The images of batch k, a pure function of (seed, k): a run resumes its data from the number of the step alone.

The permutations of epochs 0, 1, 2, ... form one endless sequence, and batch k of size B consists of positions k B to
(k + 1) B - 1. Every image occurs exactly once per epoch, even if B does not divide the number of images.
"""

import functools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from ddgan_jax.devices import processes
from ddgan_jax.errors import UserError

SAMPLED = 256  # examples that represent a dataset where not all are read


@functools.lru_cache(maxsize=4)
def epoch_permutation(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation [num_images] of an epoch, read-only. `seed` and `epoch` are at least 0.

    It sorts raw bits, since NumPy guarantees the same bits in all versions, but not the same results of `permutation`.
    """
    indices = np.argsort(np.random.PCG64((seed, epoch)).random_raw(num_images), kind="stable")
    indices.flags.writeable = False
    return indices


def batch_indices(step: int, num_images: int, global_batch: int, seed: int) -> np.ndarray:
    """The indices [global_batch] of the images of batch `step`, over all processes."""
    epochs, positions = np.divmod(step * global_batch + np.arange(global_batch, dtype=np.int64), num_images)
    parts = (
        epoch_permutation(num_images, seed, int(epoch))[positions[epochs == epoch]]
        for epoch in range(epochs[0], epochs[-1] + 1)
    )
    return np.concatenate(list(parts))


def evenly_spaced(count: int, limit: int) -> np.ndarray:
    """Up to `limit` evenly spaced indices from 0 to count - 1, including both ends."""
    return np.linspace(0, count - 1, min(limit, count)).astype(int)


def match_label_frequencies(labels: np.ndarray | None, count: int) -> np.ndarray | None:
    """Labels [count] for samples, with the frequencies of the real `labels` [N]; None without labels."""
    return None if labels is None else labels[batch_indices(0, len(labels), count, 0)]


def batches(
    images: Any,
    *,
    global_batch: int,
    seed: int,
    start_step: int,
    process_index: int,
    process_count: int,
    labels: np.ndarray | None = None,
) -> Iterator[Any]:
    """Yields batches start_step, start_step + 1, ... without end: [global_batch / process_count, ...] of each.

    `images` is an array [N, ...] or the images of a `Data`; their dtype is kept. With `labels` [N], a batch is a pair
    (images, labels). Process p gets the p-th contiguous part, so that the global batch is the same for any number of
    processes. Threads prepare a few batches ahead. Raises UserError if there are no images, or if `global_batch` is not
    divisible by `process_count`.
    """
    import grain

    if global_batch < 1 or global_batch % process_count:
        raise UserError(
            f"a batch of {global_batch} images does not divide by {process_count} processes: "
            f"choose a multiple of {process_count}"
        )
    if not len(images):
        raise UserError("the dataset holds 0 images, but training needs at least one: choose another split")
    size = global_batch // process_count
    local = slice(process_index * size, (process_index + 1) * size)

    def gather(step: int) -> Any:
        indices = batch_indices(step, len(images), global_batch, seed)[local]
        return images[indices] if labels is None else (images[indices], labels[indices])

    steps = grain.MapDataset.range(start_step, sys.maxsize)
    # Arrays are only copied. Everything else is decoded, by one thread for each core.
    threads = 2 if isinstance(images, np.ndarray) else max(2, processes.num_cores())
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2)
    return iter(steps.map(gather).to_iter_dataset(ahead))
