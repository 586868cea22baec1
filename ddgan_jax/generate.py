"""Sampling as a job: from a checkpoint to pictures or arrays, in chunks that fit the memory."""

import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ddgan_jax import checkpoint, figures, parallel
from ddgan_jax.build import Built, build, sampler
from ddgan_jax.errors import UserError


class Sampler:
    """Draws uint8 images or points by index from a built method; compiled once a chunk size."""

    def __init__(self, built: Built, batch_size: int):
        """Draw `batch_size` images at once on each of this process's devices."""
        self._draw = parallel.map_local(sampler(built), (None, None, 0))
        self._batch_size = max(1, batch_size)

    def chunks(self, params: Any, seed: int, num: int) -> Iterator[np.ndarray]:
        """Images 0..num-1, uint8 [n, H, W, C], or points [n, d], chunk by chunk; sample i from (seed, i) alone.

        Halves its batch where memory ends.
        """
        params, devices, done = parallel.replicate_local(params), jax.local_device_count(), 0
        while done < num:
            size = min(self._batch_size, -(-num // devices))
            indices = np.arange(done, done + devices * size, dtype=np.int32).reshape(devices, size)
            try:
                chunk = np.asarray(self._draw(params, np.uint32(seed), indices))
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or size == 1:
                    raise
                self._batch_size = size // 2
                continue
            chunk = chunk.reshape(-1, *chunk.shape[2:])[: num - done]
            done += len(chunk)
            yield chunk

    def __call__(self, params: Any, seed: int, num: int, progress: bool = False) -> np.ndarray:
        """The same in one array."""
        images = []
        with tqdm(total=num, unit="img", desc="sampling", disable=None if progress else True) as bar:
            for chunk in self.chunks(params, seed, num):
                images.append(chunk)
                bar.update(len(chunk))
        return np.concatenate(images)


def save(images: np.ndarray, out: str) -> None:
    """Write uint8 images [N, H, W, C] as one grid (.png), one array (.npz), or numbered files (a directory).

    Points [N, d] become a scatter plot or an array.
    """
    path = pathlib.Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        figures.save_image(path, figures.picture(images))
    elif path.suffix == ".npz":
        np.savez_compressed(path, images=images)
    else:
        for i, image in enumerate(images):
            figures.save_image(path / f"{i:06d}.png", image if image.shape[-1] == 3 else image[..., :1].repeat(3, -1))


def load(path: str) -> tuple[Any, dict[str, Any], int, Built]:
    """(moving average of G's parameters, configuration, step, what it describes) of a workdir or checkpoint `path`.

    UserError if there is none, or if its arrays are not those of its configuration.
    """
    params, config, step = checkpoint.restore_ema(path)
    built = build(config)
    checkpoint.check_like(params, jax.eval_shape(built.init_gen, jax.random.key(0)), f"the checkpoint in {path}")
    return params, config, step, built


def generate(path: str, out: str, num_samples: int, seed: int = 0, batch_size: int | None = None) -> np.ndarray:
    """Sample from the moving average of a workdir or checkpoint `path`, write to `out`, and return the images."""
    suffix = pathlib.Path(out).suffix
    if suffix not in (".png", ".npz", ""):
        raise UserError(f"--out={out} must end in .png (a grid), .npz (an array) or name a directory")
    params, config, step, built = load(path)
    if len(built.image_shape) == 1 and not suffix:
        raise UserError(f"--out={out}: points can be written to .png (a plot) or .npz (an array)")
    start = time.time()
    draw = Sampler(built, batch_size or config["sample"]["batch_size"])
    images = draw(params, seed, num_samples, progress=True)
    save(images, out)
    print(f"{num_samples} samples of step {step} written to {out} in {time.time() - start:.1f} s")
    return images
