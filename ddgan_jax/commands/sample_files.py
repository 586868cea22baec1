"""Samples in files, which `--mode=evaluate --samples` measures: an .npz, or a folder of images."""

from collections.abc import Iterator

import numpy as np

from ddgan_jax.data import decoding
from ddgan_jax.data.batches import epoch_permutation
from ddgan_jax.data.folder import Folder
from ddgan_jax.errors import UserError, of_a_file
from ddgan_jax.metrics import npz
from ddgan_jax.metrics.evaluator import Results
from ddgan_jax.storage import paths

Samples = tuple[Iterator[np.ndarray], int, np.ndarray | None, Results]  # chunks [n, ...], count, labels, about


def file_samples(path: str, num_samples: int) -> Samples:
    """`num_samples` random samples (0: all) of an npz with one array, or of all images below a folder.

    Random, because files may be sorted by class, or have the classes in turn. The choice is always the same.

    Raises UserError if there are too few, or if they are damaged or of different sizes; Fault if they cannot be read.
    """
    folder = _folder(path) if paths.is_dir(paths.path(path)) else None
    if folder:
        total = len(folder.names)
    else:
        arrays = npz.read_npz(path)
        if len(arrays) != 1:
            raise UserError(
                f"--samples={path} holds {len(arrays)} arrays, {', '.join(arrays) or 'none'}: it must be one"
            )
        (array,) = arrays.values()
        if array.dtype.kind not in "uif":
            raise UserError(f"--samples={path} holds {array.dtype} numbers: save images as uint8, or points as float32")
        total = len(array) if array.ndim else 0
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(f"--samples={path} holds NaN or infinity: save finite numbers alone")
    count = num_samples or total
    if total < max(count, 2):
        raise UserError(
            f"--samples={path} holds {total} samples, but {max(count, 2)} are needed: lower --num_samples or add some"
        )
    chosen = np.sort(epoch_permutation(total, 0, 0)[:count])
    if folder:
        return _decoded(folder, [folder.names[i] for i in chosen]), count, None, {"samples": path}
    return (array[chosen[i : i + 256]] for i in range(0, count, 256)), count, None, {"samples": path}


def _folder(path: str) -> Folder:
    """The images below the folder `path`, as for `data.path`. Raises UserError if not all can be read as samples."""
    given = paths.path(path)
    with of_a_file(f"--samples={path}"):
        folder = paths.retry(path, lambda: Folder(given))
    folder.path = str(given)
    if folder.unfinished:
        raise UserError(
            f"--samples={path} is not complete: the command that writes samples there was interrupted, or is running. "
            f"Run it again, or remove {given / folder.unfinished[0]}"
        )
    if folder.refused:
        name, reason = next(iter(folder.refused.items()))
        raise UserError(f"sample {given}/{name} cannot be read: {reason}")
    return folder


def _decoded(folder: Folder, names: list[str]) -> Iterator[np.ndarray]:
    """Images in chunks uint8 [n, H, W, C]."""
    first = None
    for start in range(0, len(names), 64):
        chunk = []
        for name in names[start : start + 64]:
            file = f"{folder.path}/{name}"
            with of_a_file(file):
                try:
                    image = decoding.to_eight_bits(decoding.open_image(folder.read(name)))
                except ValueError as error:
                    raise UserError(f"sample {file} cannot be read: {error}") from error
            chunk.append(decoding.pixels(image))
            first = first or chunk[0].shape
            if chunk[-1].shape != first:
                raise UserError(
                    f"the samples are of different sizes, {file} {chunk[-1].shape} and the first {first}: resize them"
                )
        yield np.stack(chunk)


def as_grey(chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Chunks [n, H, W, 3] of grey images as [n, H, W, 1]; others unchanged. UserError for images in colour."""
    for chunk in chunks:
        if chunk.ndim == 4 and chunk.shape[-1] == 3:
            if (chunk != chunk[..., :1]).any():
                raise UserError(
                    "the samples are in colour, but the real images are grey: name samples of the same data"
                )
            chunk = chunk[..., :1]
        yield chunk
