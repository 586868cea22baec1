"""Which images make up batch k: a pure function of (seed, k), so that the step alone resumes the data.

The permutations of epochs 0, 1, 2, ... are laid end to end, and batch k of size B takes positions k B to (k + 1) B of
that endless sequence. Every image comes exactly once an epoch, also where B does not divide the number of images.
"""

import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from ddgan_jax.errors import UserError


@functools.lru_cache(maxsize=4)
def order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation [num_images] of epoch `epoch`, read-only; `seed` and `epoch` are not negative.

    Sorted raw bits, because NumPy promises the same bits in all versions, and no such thing of `permutation`.
    """
    indices = np.argsort(np.random.PCG64((seed, epoch)).random_raw(num_images), kind="stable")
    indices.flags.writeable = False
    return indices


def batch_indices(step: int, num_images: int, global_batch: int, seed: int) -> np.ndarray:
    """The indices [global_batch] of the images of batch `step`, over all processes."""
    epochs, positions = np.divmod(step * global_batch + np.arange(global_batch, dtype=np.int64), num_images)
    parts = [order(num_images, seed, int(e))[positions[epochs == e]] for e in range(epochs[0], epochs[-1] + 1)]
    return np.concatenate(parts)


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """Up to `most` of the indices 0..count-1, the first and the last among them."""
    return np.linspace(0, count - 1, min(most, count)).astype(int)


def like_real(labels: np.ndarray | None, count: int) -> np.ndarray | None:
    """The labels [count] of samples that are compared with real examples of `labels` [N]: as frequent as there."""
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
    """Endless batches start_step, start_step + 1, ...: this process's part [global_batch / process_count, ...] of each.

    `images` is an array [N, ...] or what `sources.open_data` gives for one; the dtype stays. With `labels` [N] a batch
    is a pair (images, labels). Process p gets the p-th contiguous part, so that the global batch is the same for any
    number of processes. A few batches are gathered ahead, in threads. UserError if there are no images or the batch
    does not divide.
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
    mine = slice(process_index * size, (process_index + 1) * size)

    def gather(step: int) -> Any:
        indices = batch_indices(step, len(images), global_batch, seed)[mine]
        return images[indices] if labels is None else (images[indices], labels[indices])

    steps = grain.MapDataset.range(start_step, sys.maxsize)
    # Batches of arrays are only copied; others are decoded, by a thread on every core.
    threads = 2 if isinstance(images, np.ndarray) else max(2, os.cpu_count() or 1)
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2)
    return iter(steps.map(gather).to_iter_dataset(ahead))
