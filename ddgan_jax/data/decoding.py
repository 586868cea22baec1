"""From the content of an image file to uint8 pixels: upright, grey or RGB, cropped to a square and resized.

`content` is the content of one file. Every function that decodes it raises ValueError, with the reason, if it is not an
image that can be used.
"""

import contextlib
import functools
import io
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from ddgan_jax.errors import UserError

# The content alone decides about the format. Others are excluded, since Pillow runs programs to read some of them.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "AVIF", "HEIF")
MIN_SIDE = 2  # px: excludes tracking pixels
MAX_PIXELS = 100_000_000  # of one file: more are more likely an attack on the memory than a photograph
LARGE_PIXELS = 25_000_000  # from here on, threads decode one file at a time
_LARGE_LOCK = threading.Lock()


def read_header(content: bytes) -> tuple[int, bool]:
    """Returns the shorter side and whether the image is grey, from the first bytes of a file."""
    with _value_errors(content):
        return describe(_open(content))


def describe(image: Any) -> tuple[int, bool]:
    """Returns the shorter side of a Pillow image, and whether it is grey."""
    return min(image.size), image.mode in ("1", "L", "LA", "La") or _is_deep(image)


def open_image(content: bytes) -> Any:
    """Returns the first frame of an image file as a Pillow image, upright."""
    with _value_errors(content):
        return _load(_open(content))


def decode(content: bytes, size: int, channels: int) -> np.ndarray:
    """Returns an image file as uint8 [size, size, channels], as `fit` does, with little memory for a large image."""
    with _value_errors(content):
        image = _open(content)
        large, square = image.width * image.height > LARGE_PIXELS, _central_square(image)
        with _LARGE_LOCK if large else contextlib.nullcontext():
            if factor := _draft(image, size):
                image.load()
                fitted = _fitted(image, size, channels, tuple(edge / factor for edge in square))
                return pixels(_upright(fitted, _orientation(image)))
            image = _load(image)
            image, box = _reduce(image, size) if large else (image, None)
            return fit(image, size, channels, box)


def _draft(image: Any, size: int) -> int:
    """Lets a JPEG from `_open` be decoded at 1/2, 1/4 or 1/8 of its size, with sides of at least three times `size`.

    Returns 2, 4 or 8, or 0 if it is not: for other formats and small images. libjpeg then skips most of the work.
    """
    if image.format != "JPEG" or min(image.size) < 2 * 3 * size:
        return 0
    width = image.width
    image.draft(None, (3 * size, 3 * size))
    return next((factor for factor in (8, 4, 2) if -(-width // factor) == image.width), 0)


def decode_mask(content: bytes, size: int) -> np.ndarray:
    """Returns the brightest channel of an image file on black, cropped and resized by `fit`: uint8 [size, size]."""
    with _value_errors(content):
        return _fit_mask(_load(_open(content)), size)


def fit_upright(image: Any, size: int, channels: int) -> np.ndarray:
    """Returns an open Pillow image, turned upright, as `fit` does. Raises ValueError if its file is damaged."""
    with _value_errors():
        return fit(_upright(image, _orientation(image)), size, channels)


def fit_mask(image: Any, size: int) -> np.ndarray:
    """Returns an open Pillow image as `decode_mask` does its file. Raises ValueError if its file is damaged."""
    with _value_errors():
        return _fit_mask(_upright(image, _orientation(image)), size)


def _fit_mask(image: Any, size: int) -> np.ndarray:
    return fit(to_eight_bits(image, "black"), size, 3).max(axis=-1)


def fit(image: Any, size: int, channels: int, box: tuple[float, ...] | None = None) -> np.ndarray:
    """Crops a Pillow image to its central square and resizes it (Lanczos) to uint8 [size, size, channels].

    `box` replaces the central square, for a reduced image whose last row and column may stand for fewer pixels.
    """
    return pixels(_fitted(image, size, channels, box))


def pixels(image: Any) -> np.ndarray:
    """A Pillow image as uint8 [H, W, channels]."""
    return np.asarray(image).reshape(image.height, image.width, -1)


def _fitted(image: Any, size: int, channels: int, box: tuple[float, ...] | None) -> Any:
    """`fit` as a Pillow image."""
    from PIL import Image

    image, mode = to_eight_bits(image), "RGB" if channels == 3 else "L"
    image = image if image.mode == mode else image.convert(mode)  # convert copies even if nothing changes
    if box:
        image = image.resize((size, size), Image.Resampling.LANCZOS, box)
    else:
        if image.width != image.height:
            image = image.crop(_central_square(image))
        if image.width != size:
            image = image.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return image


def to_eight_bits(image: Any, background: str = "white") -> Any:
    """Converts a Pillow image to mode L (grey) or RGB. 16 bits are scaled to 8.

    Transparent parts become the `background`, 'white' or 'black'.
    """
    from PIL import Image

    if _is_deep(image):
        values = np.array(image, np.float32)
        if "transparency" in image.info:
            values[values == image.info["transparency"]] = 65535 if background == "white" else 0
        values *= 255 / 65535 if image.mode != "F" else 1.0
        return Image.fromarray(np.clip(np.rint(values, out=values), 0, 255, out=values).astype(np.uint8))
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if "transparency" not in image.info and image.mode not in ("LA", "La", "RGBA", "RGBa", "PA"):
        return image.convert(mode)
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    opaque = Image.new(mode, image.size, background)
    opaque.paste(image.convert(mode), mask=image.getchannel("A"))
    return opaque


def output_shape(
    name: str, own: tuple[int | None, ...], image_size: int | None, channels: int | None
) -> tuple[int, ...]:
    """Returns the shape (H, W, C) to which the images of dataset `name` are decoded.

    `own` is the shape that they have; entries that differ between images are None. Raises UserError if `image_size` and
    `channels` do not match it, or if they are None where they are needed.
    """
    shape = tuple(given or theirs for given, theirs in zip((image_size, image_size, channels), own, strict=True))
    if None in shape:
        raise UserError(f"the images of dataset {name} differ in size: choose one with data.image_size")
    if None not in own and shape != own:
        raise UserError(
            f"the images of dataset {name} are {own}, but data.image_size and data.channels ask for {shape}: "
            "set both to 0, which takes the dataset's"
        )
    check_channels(shape[2])
    return shape  # type: ignore[return-value]


def check_channels(channels: int | None) -> None:
    """Raises UserError for a number of channels to which no image file is decoded."""
    if channels not in (None, 1, 3):
        raise UserError(f"data.channels={channels} is not supported: images are decoded in 1 channel (grey) or 3 (RGB)")


def _open(content: bytes) -> Any:
    """Reads the header of an image and checks its size. Pillow decodes the pixels later."""
    from PIL import Image

    if not content:
        raise ValueError("it is empty")
    image = Image.open(io.BytesIO(content), formats=readable_formats())
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS:,}")
    if min(image.size) < MIN_SIDE:
        raise ValueError(f"{image.width}x{image.height} pixels are too few")
    return image


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Those of FORMATS that this installation reads: AVIF needs Pillow 11.3, and HEIC photos need pillow-heif."""
    from PIL import Image

    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _why_not_read(content: bytes) -> str:
    """Why Pillow cannot read a file that begins with `content`."""
    if content[4:8] == b"ftyp":  # of the ISO base media file format
        if content[8:11] in (b"hei", b"hev", b"mif", b"msf") and "HEIF" not in readable_formats():
            return "it is a HEIC photo, which `pip install pillow-heif` makes readable"
        if content[8:11] == b"avi" and "AVIF" not in readable_formats():
            return "it is an AVIF image, which `pip install -U pillow` makes readable"
    return "it is not an image that Pillow can read"


def _load(image: Any) -> Any:
    """Decodes an image from `_open` and turns it upright."""
    # Pillow scales the values of grey PNGs of 2 and 4 bits to 0..255, but not the value that means transparent.
    layout = str(image.tile[0][3]) if image.tile else ""
    step = {"L;2": 85, "L;4": 17}.get(layout, 1)
    image.load()
    if layout == "RGB;16B":  # Pillow keeps the high bytes of the pixels, which no longer show which one is transparent
        image.info.pop("transparency", None)
    if step > 1 and "transparency" in image.info:
        image.info["transparency"] *= step
    return _upright(image, _orientation(image))


def _upright(image: Any, orientation: int) -> Any:
    """A Pillow image, turned as its EXIF orientation says."""
    from PIL import Image

    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)


def _orientation(image: Any) -> int:
    """The EXIF orientation: 1 for an upright image or unreadable metadata, and up to 8 for others.

    `ImageOps.exif_transpose` is not used: it rewrites all EXIF tags, and fails if one of them is malformed.
    """
    try:
        found = image.getexif().get(0x0112)
        return found if isinstance(found, int) else 1
    except Exception:  # Pillow raises many types for malformed metadata, and the pixels are decoded already
        return 1


def _central_square(image: Any) -> tuple[int, int, int, int]:
    """The largest square at the centre of an image: left, top, right, bottom."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return left, top, left + side, top + side


def _reduce(image: Any, size: int) -> tuple[Any, tuple[float, ...] | None]:
    """Averages blocks of pixels of a large image, so that its sides stay at least three times `size`.

    Returns the reduced image, and its central square in units of blocks; None if it is not reduced.
    """
    if "transparency" in image.info and not _is_deep(image):
        image = image.convert("RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    factor = min(image.size) // (3 * size)
    if factor < 2 or image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return image, None
    return image.reduce(factor), tuple(edge / factor for edge in _central_square(image))


def _is_deep(image: Any) -> bool:
    """Whether the values exceed 8 bits: 0 to 65535 in the modes I and I;16, or floating point, 0 to 255, in F."""
    return image.mode.startswith("I") or image.mode == "F"


@contextlib.contextmanager
def _value_errors(content: bytes = b"") -> Iterator[None]:
    """Converts what Pillow raises for a broken file into ValueError with the reason, which `content` may show."""
    from PIL import Image

    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(f"it claims more than {MAX_PIXELS:,} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(_why_not_read(content)) from error
    except (OSError, SyntaxError, EOFError) as error:  # all bytes are in memory, so OSError is about the content
        raise ValueError(f"it is damaged ({error})") from error
