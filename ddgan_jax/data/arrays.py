"""A dataset from what a Python program has: arrays, tensors, lists of files or of images, and labels or their names."""

import concurrent.futures
import contextlib
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ddgan_jax.config.check import checked, to_plain
from ddgan_jax.config.types import ImageSize
from ddgan_jax.data import decoding
from ddgan_jax.data.archives import EXCERPT_BYTES
from ddgan_jax.data.checks import check_values
from ddgan_jax.data.headers import MAX_DEFAULT_SIZE
from ddgan_jax.data.sources import Data
from ddgan_jax.devices import processes
from ddgan_jax.errors import UserError, of_a_file
from ddgan_jax.storage import paths

Range = tuple[float, float]


def as_data(
    images: Any,
    labels: Any = None,
    classes: Sequence[str] = (),
    value_range: Range | None = None,
    image_size: int | None = None,
) -> Data:
    """A dataset of images and, optionally, labels.

    Args:
        images: One of
            - an array or tensor: uint8 or bool [N, H, W], [N, H, W, 1, 3 or 4] or [N, 1, 3 or 4, H, W]; transparent
              pixels become white;
            - the same with other numbers, whose black and white are `value_range`;
            - a list of files, of PIL images, or of uint8 arrays, which may differ in size;
            - points, float [N, d];
            - a `Data`.
        labels: Integers [N] from 0 to K-1, or names of classes, text [N].
        classes: Different names of the K classes, with `labels` only. By default those in `labels`, sorted, or
            '0', '1', ...
        value_range: The numbers that stand for black and white, such as (0, 1) or (-1, 1).
        image_size: Side in pixels to which images are cropped and resized. Arrays are square and unchanged without it;
            for lists, the default is the largest power of two not above the median shorter side, and at most 256.

    Raises:
        UserError: an argument is of another kind, shape or range.
    """
    names = as_names(classes)
    image_size = checked(to_plain(image_size), ImageSize | None, "image_size")
    _check_range(value_range)
    if isinstance(images, Data):
        if labels is not None or names:
            twice = "classes" if labels is None else "labels"
            raise UserError(f"{twice} are given twice: they belong into Data(images, labels, classes)")
        shape = images.images.shape
        if len(shape) == 4 and image_size not in (None, shape[1]):
            raise UserError(f"image_size={image_size} is for arrays and lists: a Data of {shape[1]} px is not resized")
        return images
    if labels is None and names:
        raise UserError(f"classes={names} name the labels, and there are none: pass labels too, or no classes")
    examples = _from_list(images, image_size) if _is_list(images) else _from_array(images, value_range, image_size)
    if labels is None:
        return Data(examples)
    return Data(examples, *_as_labels(labels, names))


def as_names(classes: Any) -> tuple[str, ...]:
    """Names of classes as a tuple. Raises UserError unless they are text, and different."""
    names: tuple[Any, ...] = (None,)
    with contextlib.suppress(TypeError):  # raised for everything that cannot be iterated over
        names = (None,) if isinstance(classes, str) else tuple(classes)
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"classes={to_plain(classes)!r:.100} must be names, such as ('cat', 'dog')")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"classes={names!r:.100} have the name {twice[0]!r} twice: pass different names")
    return names


def are_names(labels: Any) -> bool:
    """Whether labels are names of classes: text, and not integers."""
    found = _as_array("labels", labels)
    return found.dtype.kind in "OUS" and all(isinstance(name, str) for name in found.ravel().tolist())


def _as_array(name: str, value: Any) -> np.ndarray:
    """Lists, tensors or arrays as an array of NumPy. Raises UserError for lists of different lengths."""
    if hasattr(value, "detach"):  # a tensor of PyTorch
        value = value.detach().cpu().numpy()
    try:
        return np.asanyarray(value)  # which keeps the mask of a masked array, so that it is refused
    except ValueError as error:
        raise UserError(f"the {name} are no array: {error}") from error


def _check_range(value_range: Any) -> None:
    """Raises UserError unless there is no range, or it is two finite numbers in ascending order."""
    try:
        low, high = (0, 1) if value_range is None else value_range
        valid = bool(-math.inf < low < high < math.inf)
    except (TypeError, ValueError):  # of another length, or of no numbers
        valid = False
    if not valid:
        raise UserError(f"value_range={value_range!r:.100} must be the numbers of black and white, such as (0, 1)")


def _is_list(images: Any) -> bool:
    """Whether each image is an object: a file, a PIL image, or an array."""
    if (dtype := getattr(images, "dtype", None)) is not None:  # also of a column of a table, whose dtype is pandas'
        return getattr(dtype, "kind", "-") in "OUS" or str(dtype) in ("object", "str", "string")
    if not isinstance(images, Sequence) or isinstance(images, str) or not images:
        return False
    return _is_path(images[0]) or isinstance(images[0], np.ndarray) or hasattr(images[0], "getexif")


def _from_array(images: Any, value_range: Range | None, size: int | None) -> np.ndarray:
    """uint8 [N, H, W, C] from an array of images, or float points [N, d]."""
    array = _as_array("images", images)
    check_values(array)
    if array.ndim < 3:
        if value_range is not None:
            raise UserError(
                f"value_range is for images, and an array {list(array.shape)} holds points: images are [N, H, W], "
                "such as images.reshape(-1, 8, 8)"
            )
        if not array.size:
            raise UserError(f"the set is empty: points must be float [N, d], but these are {list(array.shape)}")
        return array  # points, which `Data` checks
    if array.ndim == 4 and array.shape[-1] not in (1, 3, 4) and array.shape[1] in (1, 3, 4):
        array = array.transpose(0, 2, 3, 1)  # channels first, as in PyTorch
    array = array[..., None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[-1] not in (1, 3, 4):
        raise UserError(
            f"images must be [N, H, W], or [N, H, W, C] with 1, 3 or 4 channels, but these are {list(array.shape)}"
        )
    if not array.size:
        return array.astype(np.uint8)  # which `Data` refuses
    array = _to_uint8(array, value_range)
    height, width, channels = array.shape[1:]
    if size is None and height != width:
        raise UserError(
            f"the images are {height}x{width}, and networks take squares: image_size={min(height, width)} crops and "
            "resizes them"
        )
    if channels < 4 and size in (None, height) and height == width:
        return np.ascontiguousarray(array)
    return np.stack(_in_threads(lambda image: _fitted(image, size or height, 1 if channels == 1 else 3), list(array)))


def _to_uint8(array: np.ndarray, value_range: Range | None) -> np.ndarray:
    """Numbers in `value_range` as 0 to 255. Raises UserError if they are not in it, or if it is needed and missing."""
    if value_range is None:
        array = array.astype(np.uint8) * 255 if array.dtype == bool else array
        if array.dtype == np.uint8 or array.dtype.kind not in "iuf":
            return array  # which `Data` checks
        raise UserError(
            f"the images are {array.dtype} from {array.min():.6g} to {array.max():.6g}, and not uint8: pass "
            "value_range, the numbers of black and white, such as (0, 1) or (0, 255)"
        )
    lowest, highest = float(array.min()), float(array.max())
    if np.isnan(lowest):
        raise UserError(f"the images hold {np.isnan(array).sum():,} NaN: replace them by numbers in {value_range}")
    # Rounded as the images are: float32 0.1 is above 0.1
    black, white = np.array(value_range, array.dtype if array.dtype.kind == "f" else np.float64)
    if not (black <= lowest and highest <= white):
        raise UserError(f"the images have values from {lowest:.6g} to {highest:.6g}, not in value_range={value_range}")
    low, high = value_range
    scaled = (array.astype(np.float32) - low) * (255 / (high - low))
    return np.rint(scaled, out=scaled).clip(0, 255).astype(np.uint8)


def _from_list(images: Any, size: int | None) -> np.ndarray:
    """uint8 [N, size, size, C] from files, PIL images or arrays; C is 1 if all are grey."""
    if not len(images):
        raise UserError("the set is empty: there must be at least one image")
    headers = _in_threads(_header, images)
    sides, greys = zip(*headers, strict=True)
    size = size or min(2 ** int(np.log2(np.median(sides))), MAX_DEFAULT_SIZE)
    return np.stack(_in_threads(functools.partial(_fitted, size=size, channels=1 if all(greys) else 3), images))


def _header(image: Any) -> tuple[int, bool]:
    """The shorter side of an image, and whether it is grey."""
    if not _is_path(image):
        return decoding.describe(_as_pillow(image))
    with of_a_file(f"image {image}"):
        start = paths.read_start(paths.path(image), EXCERPT_BYTES)
    try:
        return decoding.read_header(start)
    except ValueError:  # a header that is longer, or no image
        return _usable(image, lambda: decoding.read_header(_content(image)))


def _fitted(image: Any, size: int, channels: int) -> np.ndarray:
    """An image as uint8 [size, size, channels], decoded as those of a folder are."""
    if _is_path(image):
        return _usable(image, lambda: decoding.decode(_content(image), size, channels))
    return _usable("in the list", lambda: decoding.fit_upright(_as_pillow(image), size, channels))


def _is_path(image: Any) -> bool:
    return isinstance(image, str | os.PathLike)


def _content(path: Any) -> bytes:
    with of_a_file(f"image {path}"):
        return paths.read(paths.path(path))


def _usable(image: Any, decode: Callable[[], Any]) -> Any:
    """`decode()`. Raises UserError where that raises ValueError."""
    try:
        return decode()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"image {image} cannot be used: {error}") from error


def _as_pillow(image: Any) -> Any:
    """An array or a Pillow image as a Pillow image. Raises UserError for other arrays."""
    from PIL import Image

    if hasattr(image, "getexif"):
        return image
    array = np.asanyarray(image)
    check_values(array)
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))
    if array.dtype != np.uint8 or not is_image or not array.size:
        raise UserError(
            f"an image is {array.dtype} {list(array.shape)}: in a list, images must be uint8 [H, W] or [H, W, C] with "
            "1, 3 or 4 channels"
        )
    return Image.fromarray(array)


def _in_threads(function: Any, items: Any) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(processes.num_cores()) as pool:
        return list(pool.map(function, items))


def _as_labels(labels: Any, classes: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """Labels as integers, and the names of the classes."""
    found = _as_array("labels", labels)
    if not are_names(found):
        return found, classes
    if found.ndim != 1:
        raise UserError(f"labels must be integers or names [N], one for each image, but these are {list(found.shape)}")
    names = classes or tuple(sorted(set(found.tolist())))
    if unknown := sorted(set(found.tolist()) - set(names)):
        raise UserError(
            f"the label {unknown[0]!r} is none of the classes {', '.join(names)}: labels are these names, or integers "
            f"from 0 to {len(names) - 1}"
        )
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[name] for name in found.tolist()], np.int32), names
