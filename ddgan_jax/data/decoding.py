"""From the bytes of one image file to uint8 pixels: upright, grey or RGB, cropped and resized as a person expects."""

import contextlib
import io
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from ddgan_jax.errors import UserError

MIN_SIDE = 2  # px; a tracking pixel is no picture
# What a name or an extension says counts for nothing; of other formats Pillow reads some by running programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM")
LARGE = 25_000_000  # pixels; threads decode such files one after the other
_LARGE = threading.Lock()
MAX_PIXELS = 100_000_000  # of one file: beyond it is more likely an attack on the memory than a photograph


def open_image(content: bytes) -> Any:
    """The first frame of an image file as Pillow reads it, upright; ValueError with the reason if it is none."""
    with _reasons():
        return _loaded(_open(content))


def _loaded(image: Any) -> Any:
    """What `_open` returned, decoded and upright."""
    from PIL import Image

    # Pillow scales the values of grey PNGs of 2 and 4 bits to 0..255, except the one that stands for transparent.
    step = {"L;2": 85, "L;4": 17}.get(str(image.tile[0][3]) if image.tile else "", 1)
    image.load()
    if step > 1 and "transparency" in image.info:
        image.info["transparency"] *= step
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Any) -> Any:
    """The EXIF orientation, of which 2 to 8 mean that the image is not upright; 1 if it cannot be read.

    Not by `ImageOps.exif_transpose`, which writes all EXIF tags again and fails where any of them is malformed.
    """
    try:
        found = image.getexif().get(0x0112)
        return found if isinstance(found, int) else 1
    except Exception:  # malformed metadata makes Pillow raise nearly anything, and the pixels are decoded already
        return 1


def decode(content: bytes, size: int, channels: int) -> np.ndarray:
    """`fit` of `open_image`, with little memory where the image is large; ValueError with the reason if it is none."""
    with _reasons():
        image = _open(content)
        large = image.width * image.height > LARGE
        with _LARGE if large else contextlib.nullcontext():
            image = _loaded(image)
            image = _shrunk(image, size) if large else image
            return fit(image, size, channels)


def _shrunk(image: Any, size: int) -> Any:
    """The image with blocks of pixels averaged to one, and at least three times as large as `size`."""
    if "transparency" in image.info and not _is_deep(image):
        image = image.convert("RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    factor = min(image.size) // (3 * size)
    return image.reduce(factor) if factor > 1 and image.mode in ("L", "LA", "RGB", "RGBA", "CMYK") else image


def decode_mask(content: bytes, size: int) -> np.ndarray:
    """The brightest channel of an image file on black, cropped and resized as `decode`: uint8 [size, size]."""
    from PIL import Image

    with _reasons():
        image = _loaded(_open(content))
        image = (to_eight_bits(image) if _is_deep(image) else image).convert("RGBA")
        black = Image.new("RGB", image.size, "black")
        black.paste(image.convert("RGB"), mask=image.getchannel("A"))
        return fit(black, size, 3).max(axis=-1)


def read_header(head: bytes) -> tuple[int, bool]:
    """(shorter side, is it grey?) of an image file from its first bytes, without decoding; ValueError as above."""
    with _reasons():
        image = _open(head)
        return min(image.size), is_grey(image)


def _open(content: bytes) -> Any:
    """What the header says: Pillow decodes nothing before it has to."""
    from PIL import Image

    if not content:
        raise ValueError("it is empty")
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS:,}")
    if min(image.size) < MIN_SIDE:
        raise ValueError(f"{image.width}x{image.height} pixels are too few")
    return image


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """What Pillow raises for broken files, as a ValueError with the reason."""
    from PIL import Image

    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(f"it claims more than {MAX_PIXELS:,} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError("it is not an image that Pillow can read") from error
    except (OSError, SyntaxError, EOFError) as error:  # all bytes are in memory: an OSError is of the content
        raise ValueError(f"it is damaged ({error})") from error


def to_eight_bits(image: Any) -> Any:
    """A Pillow image of any mode -> mode L (grey) or RGB: 16 bits are scaled, transparent parts become white."""
    from PIL import Image

    if _is_deep(image):
        values = np.array(image, np.float32)
        if "transparency" in image.info:
            values[values == image.info["transparency"]] = 65535
        values *= 255 / 65535 if image.mode != "F" else 1.0
        return Image.fromarray(np.clip(np.rint(values, out=values), 0, 255, out=values).astype(np.uint8))
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if "transparency" not in image.info and image.mode not in ("LA", "La", "RGBA", "RGBa", "PA"):
        return image.convert(mode)
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    opaque = Image.new(mode, image.size, "white")
    opaque.paste(image.convert(mode), mask=image.getchannel("A"))
    return opaque


def fit(image: Any, size: int, channels: int) -> np.ndarray:
    """A Pillow image -> uint8 [size, size, channels]: the largest square of its centre, resized (Lanczos)."""
    from PIL import Image

    image, mode = to_eight_bits(image), "RGB" if channels == 3 else "L"
    image = image if image.mode == mode else image.convert(mode)  # which copies even where nothing changes
    side = min(image.size)
    if image.width != image.height:
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.asarray(image).reshape(size, size, channels)


def is_grey(image: Any) -> bool:
    """Does a Pillow image have no colour by its mode?"""
    return image.mode in ("1", "L", "LA", "La") or _is_deep(image)


def _is_deep(image: Any) -> bool:
    """Whether the values are no bytes: 0 to 65535 in the modes I and I;16, as Pillow opens files; 0 to 255 in F."""
    return image.mode.startswith("I") or image.mode == "F"


def output_shape(
    name: str, own: tuple[int | None, ...], image_size: int | None, channels: int | None
) -> tuple[int, ...]:
    """Returns the shape (H, W, C) to which images of shape `own` are decoded, as the configuration asks.

    An entry of `own` is None where the images differ. UserError if that leaves the size open, or contradicts it.
    """
    shape = tuple(given or theirs for given, theirs in zip((image_size, image_size, channels), own, strict=True))
    if None in shape:
        raise UserError(f"the images of dataset {name} differ in size: choose one with data.image_size")
    if None not in own and shape != own:
        raise UserError(f"the images of dataset {name} are {own}, but the configuration's {shape}: make them the same")
    check_channels(shape[2])  # type: ignore[arg-type]
    return shape  # type: ignore[return-value]


def check_channels(channels: int | None) -> None:
    """UserError for a number of channels in which no image file is decoded."""
    if channels not in (None, 1, 3):
        raise UserError(f"data.channels={channels} is not supported: images are decoded in 1 channel (grey) or 3 (RGB)")
