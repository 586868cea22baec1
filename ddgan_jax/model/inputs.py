"""Images, masks and points that a caller passes: files, Pillow images and arrays, in the form that a model needs."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from ddgan_jax.data import archives, decoding
from ddgan_jax.errors import UserError, of_a_file
from ddgan_jax.model.checks import as_array
from ddgan_jax.storage import paths


def as_input(image: Any, shape: tuple[int, ...], name: str = "image") -> np.ndarray:
    """An image as uint8 of a model's `shape` [H, W, C], or a point as float32 [d]. Raises as `as_image`."""
    if len(shape) == 3:
        return as_image(image, shape, name)
    if is_image(image):
        raise UserError("this model makes points, and has no images to work on")
    point = as_array(name, image)
    if point.shape != shape or point.dtype != np.float32:
        raise UserError(f"the point is {point.dtype} {list(point.shape)}, but the model's are float32 {list(shape)}")
    if not np.isfinite(point).all():
        raise UserError("the point holds NaN or infinity")
    return point


def as_image(image: Any, shape: tuple[int, ...], name: str = "image") -> np.ndarray:
    """A path, a Pillow image or an array as uint8 of `shape` [H, W, C], decoded as training data is.

    The image is turned upright, cropped to its central square and resized. An array is uint8 [H, W], or [H, W, C] with
    1, 3 or 4 channels; one of `shape` is returned unchanged. `name` is the argument's or the flag's.

    Raises:
        UserError: there is no such file, or it is no image; an array has another shape or type; or the model's images
            have a number of channels that image files do not have.
        Fault: the file cannot be read.
    """
    size, _, channels = shape
    if not is_image(image):
        array = as_array(name, image)
        if array.shape == shape and array.dtype == np.uint8:
            return array
        image = _from_array(array, name)
    if channels not in (1, 3):
        raise UserError(f"{name} must be a uint8 array {list(shape)}: no image file has the {channels} channels")
    if isinstance(image, Image.Image):
        return _decoded(name, lambda: decoding.fit_upright(image, size, channels))
    return _read(image, name, lambda content: decoding.decode(content, size, channels))


def as_known(known: Any, mask: Any, size: int) -> np.ndarray:
    """Where an image is kept, bool [size, size].

    Either `known` is an array [H, W] of numbers that are not 0 there, of which all or none may be 0, or `mask` is a
    mask for `as_hole`. Raises UserError for another array, and as `as_hole` for a mask.
    """
    if (known is None) == (mask is None):
        raise UserError(
            "pass either known, which is True where the image is kept, or mask, white where it is filled in"
        )
    if known is None:
        return ~as_hole(mask, size)
    if is_image(known):
        raise UserError(
            "known is an array that is True where the image is kept: pass an image, white elsewhere, as mask"
        )
    array = as_array("known", known)
    if array.dtype.kind not in "biuf" or array.ndim != 2 or not array.size or not np.isfinite(array).all():
        found = f"{array.dtype} {list(array.shape)}"
        raise UserError(f"known is {found}, and must be finite numbers [H, W]: True where the image is kept")
    array = array.astype(bool)
    return array if array.shape == (size, size) else _brightest(~array, size, "known") <= 127


def as_hole(mask: Any, size: int, name: str = "mask") -> np.ndarray:
    """The part to fill in, bool [size, size]: where a mask is lighter than 127 of 255 in any channel.

    The mask is a path, a Pillow image or a uint8 array as for `as_image`, or a bool array [H, W]. Transparent parts are
    kept. Raises as `as_image`, and UserError if the part is empty or the whole image.
    """
    hole = _brightest(mask, size, name) > 127
    if hole.all() or not hole.any():
        found = "everything" if hole.all() else "nothing"
        raise UserError(
            f"{_named(mask, name)} marks {found}: it must be white (255) where the image is to be filled in"
        )
    return hole


def is_image(value: Any) -> bool:
    """Whether a value is a path or a Pillow image, and not an array."""
    return isinstance(value, (str, os.PathLike, Image.Image))


def _brightest(mask: Any, size: int, name: str) -> np.ndarray:
    """The brightest channel of a mask, uint8 [size, size]."""
    if not is_image(mask):
        array = as_array(name, mask)
        mask = _from_array(np.uint8(255) * array if array.dtype == bool else array, name)
    if isinstance(mask, Image.Image):
        return _decoded(name, lambda: decoding.fit_mask(mask, size))
    return _read(mask, name, lambda content: decoding.decode_mask(content, size))


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    """A uint8 array [H, W] or [H, W, 1|3|4] as a Pillow image. Raises UserError for other arrays."""
    found = f"the {name} is {array.dtype} {list(array.shape)}"
    if array.dtype.kind == "f":
        raise UserError(f"{found}: convert values from 0 to 1 with (255 * {name}).round().astype('uint8')")
    if array.dtype != np.uint8:
        raise UserError(f"{found}: convert values from 0 to 255 with {name}.astype('uint8')")
    if array.ndim not in (2, 3) or not array.size or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise UserError(f"{found}: it must be [H, W], or [H, W, C] with 1, 3 or 4 channels")
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _read(path: str | os.PathLike, name: str, decode: Callable[[bytes], np.ndarray]) -> np.ndarray:
    """The image file that an argument or a flag names, decoded."""
    with of_a_file(_named(path, name)):
        file = paths.path(path)
        return _decoded(_named(path, name), lambda: decode(archives.read_file(file)))


def _decoded(what: str, decode: Callable[[], np.ndarray]) -> np.ndarray:
    try:
        return decode()
    except ValueError as error:
        raise UserError(f"{what} cannot be read: {error}") from error


def _named(value: Any, name: str) -> str:
    """An argument with its value, if that is a path."""
    return f"{name}={os.fspath(value)}" if isinstance(value, (str, os.PathLike)) else name
