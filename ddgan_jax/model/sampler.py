"""Samples by index, drawn by every device: sample i depends on (seed, i) alone."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ddgan_jax.devices import parallel, processes
from ddgan_jax.errors import is_out_of_memory
from ddgan_jax.method import sampling
from ddgan_jax.method.diffusion import deterministic_posterior, sample_posterior
from ddgan_jax.method.sampling import Denoiser

POSTERIORS = {"gaussian": sample_posterior, "deterministic": deterministic_posterior}


def to_images(x0: Any, scale: float = 1.0) -> jax.Array:
    """float32 [..., H, W, C] in [-1, 1] -> uint8; points [N, d] over the method's scale."""
    return jnp.round((jnp.clip(x0, -1, 1) + 1) * 127.5).astype(jnp.uint8) if x0.ndim > 2 else x0 / scale


def default_labels(num_classes: int, indices: np.ndarray) -> np.ndarray | None:
    """The classes of samples that nobody chose: all in turn; None for an unconditional model."""
    return (indices % num_classes).astype(np.int32) if num_classes else None


def noise_of(denoiser: Denoiser, seed: jax.Array, indices: jax.Array) -> sampling.Noise:
    """All draws of samples `indices` [B] of a seed."""
    steps = denoiser.schedule.num_steps
    return sampling.draw_noise(jax.random.key(seed), indices, steps, denoiser.image_shape, denoiser.nz)


def sample(denoiser: Denoiser, posterior: str, params: Any, seed: jax.Array, indices: jax.Array, y: Any) -> jax.Array:
    """Samples `indices` [B] in [-1, 1], or points; of classes `y` [B] if the model is class-conditional."""
    return sampling.sample(denoiser, params, jax.random.key(seed), indices, y, POSTERIORS[posterior])


def rows(labels: np.ndarray | None, indices: np.ndarray) -> np.ndarray | None:
    """The labels of these samples; None for an unconditional model."""
    return None if labels is None else labels[indices]


def in_batches(run: Callable[[np.ndarray], Any], num: int, batch_size: int, axis: int = 0) -> Any:
    """The results of `run(indices)` for the indices 0..num-1, joined along `axis`, as host arrays.

    All batches have the same size, so that `run` compiles one program: the last one repeats the index num - 1.
    """
    size = min(num, batch_size)
    starts = range(0, num, size)
    parts = [jax.device_get(run(np.minimum(np.arange(start, start + size), num - 1))) for start in starts]
    rest = (slice(None),) * axis + (slice(num - starts[-1]),)
    parts[-1] = jax.tree.map(lambda array: array[rest], parts[-1])
    return jax.tree.map(lambda *arrays: np.concatenate(arrays, axis), *parts)


@functools.lru_cache(maxsize=16)
def _mapped_sample(denoiser: Denoiser, posterior: str) -> Any:
    return parallel.map_local(
        lambda *inputs: to_images(sample(denoiser, posterior, *inputs), denoiser.scale), (None, None, 0, 0)
    )


class Sampler:
    """Draws uint8 images or points by index from a generator; compiled once a chunk size."""

    def __init__(self, denoiser: Denoiser, batch_size: int, posterior: str = "gaussian"):
        """Draw up to `batch_size` images at once on each device."""
        self._draw = _mapped_sample(denoiser, posterior)
        self._batch_size = max(1, batch_size)
        self._num_classes = denoiser.num_classes

    def chunks(self, params: Any, seed: int, num: int, labels: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Images 0..num-1, uint8 [n, H, W, C], or points [n, d], chunk by chunk; sample i from (seed, i) alone.

        If the method is class-conditional, of classes `labels` [num]. Where several processes share the work, a chunk
        is this one's part of a round (`parallel.rounds`). Halves its batch where memory ends.
        """
        params = parallel.replicate_local(params)
        if labels is None:
            labels = default_labels(self._num_classes, np.arange(num))
        for indices, count in parallel.rounds(num, self._batch_size):
            chunk = self._part(params, seed, indices, labels)
            yield chunk[:count] if processes.num_processes() == 1 else chunk

    def _part(self, params: Any, seed: int, indices: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
        """Images `indices` [n], by all devices of this process."""
        devices = jax.local_device_count()
        mapped = indices.astype(np.int32).reshape(devices, -1)
        size = min(self._batch_size, mapped.shape[1])
        parts = []
        for start in range(0, mapped.shape[1], size):
            part = mapped[:, np.minimum(np.arange(start, start + size), mapped.shape[1] - 1)]
            try:
                parts.append(
                    np.asarray(self._draw(params, np.uint32(seed), part, None if labels is None else labels[part]))
                )
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
                self._batch_size = size // 2
                return self._part(params, seed, indices, labels)
        drawn = np.concatenate(parts, axis=1)[:, : mapped.shape[1]]
        return drawn.reshape(-1, *drawn.shape[2:])

    def __call__(
        self, params: Any, seed: int, num: int, labels: np.ndarray | None = None, progress: bool = False
    ) -> np.ndarray:
        """The same in one array, in every process."""
        images = []
        with tqdm(total=num, unit="img", desc="sampling", disable=None if progress else True) as bar:
            for chunk in self.chunks(params, seed, num, labels):
                images.append(processes.gather_rows(chunk))
                bar.update(min(len(images[-1]), num - bar.n))
        return np.concatenate(images)[:num]
