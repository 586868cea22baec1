"""From the bytes of one image file to uint8 pixels: upright, grey or RGB, cropped and resized as a person expects."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np

MIN_SIDE = 2  # px; a tracking pixel is no picture
MAX_PIXELS = 100_000_000  # of one file: beyond it is more likely an attack on the memory than a photograph


def open_image(content: bytes) -> Any:
    """The first frame of an image file as Pillow reads it, upright; ValueError with the reason if it is none."""
    from PIL import ImageOps

    with _reasons():
        image = _open(content)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # else it copies every image
        return image


def look_at(head: bytes) -> tuple[int, bool]:
    """(shorter side, is it grey?) of an image file from its first bytes, without decoding; ValueError as above."""
    with _reasons():
        image = _open(head)
        return min(image.size), is_grey(image)


def _open(content: bytes) -> Any:
    """What the header says: Pillow decodes nothing before it has to."""
    from PIL import Image

    if not content:
        raise ValueError("it is empty")
    image = Image.open(io.BytesIO(content))
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
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"it is damaged ({error})") from error


def to_eight_bits(image: Any) -> Any:
    """A Pillow image of any mode -> mode L (grey) or RGB: 16 bits are scaled, transparent parts become white."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        scale = 255 / 65535 if values.max() > 255 else 1.0
        return Image.fromarray(np.clip(np.round(values * scale), 0, 255).astype(np.uint8))
    if image.mode in ("1", "L"):
        return image.convert("L")
    if image.mode in ("LA", "La") or "transparency" in image.info or image.mode in ("RGBA", "RGBa", "PA"):
        grey = image.mode in ("LA", "La", "L")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("L" if grey else "RGB")
    return image.convert("RGB")


def fit(image: Any, size: int, channels: int) -> np.ndarray:
    """A Pillow image -> uint8 [size, size, channels]: the largest square of its centre, resized (Lanczos)."""
    from PIL import Image

    image = to_eight_bits(image).convert("RGB" if channels == 3 else "L")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.asarray(image).reshape(size, size, channels)


def is_grey(image: Any) -> bool:
    """Does a Pillow image have no colour by its mode?"""
    return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
