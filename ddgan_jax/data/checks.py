"""Checks of the examples and labels of a dataset: their type, shape and range."""

from typing import Any

import numpy as np

from ddgan_jax.data.batches import SAMPLED, evenly_spaced
from ddgan_jax.errors import UserError


def checked_examples(images: Any) -> Any:
    """Returns images unchanged, and points as float32. Raises UserError for anything that cannot be trained on."""
    shape = getattr(images, "shape", None)
    if shape is None or not isinstance(getattr(images, "dtype", None), np.dtype):
        raise UserError(f"the images are a {type(images).__name__}: convert them with np.asarray(images)")
    check_values(images)
    found = f"these are {images.dtype} {list(shape)}"
    if len(shape) == 2 and images.dtype.kind == "f":
        with np.errstate(over="ignore"):  # an overflow gives infinity, which the next lines refuse
            points = np.asarray(images, np.float32)
        if not np.isfinite(points).all():
            raise UserError(f"points must be finite, but {np.sum(~np.isfinite(points))} of these numbers are not")
        return points
    if len(shape) == 2:
        raise UserError(f"points must be float32 [N, d], and images uint8 [N, H, W, C], but {found}")
    if len(shape) != 4:
        hint = ": add the axis of the channels, images[..., None]" if len(shape) == 3 else ""
        raise UserError(f"images must be uint8 [N, H, W, C], but {found}{hint}")
    if 0 in shape and any(shape):  # (0, 0, 0, 0) means no images, where published statistics replace them
        raise UserError(f"the set is empty: images must be uint8 [N, H, W, C], but {found}")
    if images.dtype != np.uint8:
        how = _conversion_to_uint8(images) if images.dtype.kind in "biuf" else ""
        raise UserError(f"images must be uint8 from 0 to 255, but {found}{how}")
    return images


def check_values(images: Any) -> None:
    """Raises UserError for a masked array, or one of complex numbers: conversions would drop a part of them."""
    if isinstance(images, np.ma.MaskedArray):
        raise UserError("the images are a masked array: fill its masked values with images.filled(0)")
    if images.dtype.kind == "c":
        raise UserError(f"the images are {images.dtype}, and must be real numbers: pass images.real or np.abs(images)")


def _conversion_to_uint8(images: Any) -> str:
    """The range of images, estimated from 256 of them, and the expression that converts them to uint8."""
    some = images[evenly_spaced(len(images), SAMPLED)]
    low, high = some.min(), some.max()
    how = ""
    if images.dtype.kind in "biu" and 0 <= low <= high <= 1:
        how = "images.astype(np.uint8) * 255"
    elif 0 <= low <= high <= 255:
        scaled = f"np.round(images{' * 255' if high <= 1 else ''})" if images.dtype.kind == "f" else "images"
        how = f"{scaled}.astype(np.uint8)"
    elif images.dtype == np.uint16:
        bits = int(high).bit_length()  # of cameras and scanners: 10, 12, 14 or 16
        how = f"(images // {257 if bits == 16 else 2 ** (bits - 8)}).astype(np.uint8)"
    elif -1 <= low <= high <= 1:
        how = "np.round((images + 1) * 127.5).astype(np.uint8)"
    return f" from {low:.6g} to {high:.6g}: " + (f"convert them with {how}" if how else "scale them to 0..255 first")


def checked_labels(labels: Any, num_examples: int, num_classes: int) -> np.ndarray:
    """Returns labels as int32 [N].

    Raises UserError unless there is one label for each example, from 0 to `num_classes` - 1; `num_classes` 0 means that
    the number is not known.
    """
    if isinstance(labels, np.ma.MaskedArray):
        raise UserError("the labels are a masked array: leave the examples without a label out, and pass labels.data")
    labels = np.asarray(labels)
    expected = f"there are {num_examples:,} examples" + (f" of {num_classes} classes" if num_classes else "")
    if labels.dtype.kind not in "iu":
        hint = ""
        if labels.dtype.kind == "O" and any(label is None for label in labels.ravel().tolist()):
            hint = ": some are None; leave the examples without a label out"
        elif labels.dtype.kind in "fb" and labels.ndim == 1:
            hint = ": convert them with labels.astype(int)"
        raise UserError(f"labels must be integers [N], but these are {labels.dtype} {list(labels.shape)}{hint}")
    by_rows = labels.ndim == 2 and len(labels) == num_examples and labels.size
    if by_rows and np.all(np.sort(labels)[:, :-1] == 0) and labels.max() == 1:
        raise UserError(f"labels must be integers [N], but these are one-hot {list(labels.shape)}: labels.argmax(-1)")
    if labels.shape != (num_examples,):
        raise UserError(
            f"labels must be integers [N], one for each example, but these are {list(labels.shape)}, and {expected}"
        )
    if unlabelled := int(np.sum(labels == -1)):
        raise UserError(
            f"{unlabelled:,} of {num_examples:,} labels are -1, which means unlabelled: choose another split, or do "
            "without labels (model.num_classes=0, and eval.features=inception)"
        )
    largest = (num_classes or num_examples) - 1
    if labels.min() < 0 or labels.max() > largest:
        raise UserError(
            f"labels must be from 0 to {largest}, but these are from {labels.min()} to {labels.max()}, and {expected}"
        )
    return labels.astype(np.int32)
