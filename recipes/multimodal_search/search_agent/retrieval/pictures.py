"""Images out of untrusted bytes, and the thumbnails that are kept of them."""

from __future__ import annotations

import io

from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 50_000_000
"""Of an image that is read: 150 MB in memory."""
THUMBNAIL_SIDE = 320
"""Pixels of a thumbnail's longer side. What is searched is the thumbnail, for queries too."""


def read_image(data: bytes) -> Image.Image:
    """The image as RGB, upright, on white where it is transparent; of an animation the first frame.

    Raises:
        ValueError: No such image, broken, or of more than `MAX_PIXELS` pixels; the message says which.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise _TooLarge(f"it has {image.width} x {image.height} pixels, at most {MAX_PIXELS:,} are read")
        if min(image.size) < 1:
            raise _TooLarge("it has no pixels")
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("P", "PA", "LA", "RGBA") or "transparency" in upright.info:
            upright = upright.convert("RGBA")
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright)
        return upright.convert("RGB")
    except _TooLarge:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"it has too many pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"not an image of a kind that is read ({', '.join(FORMATS)})") from error
    except Exception as error:  # Pillow's decoders raise many kinds on broken data
        raise ValueError(f"a broken image: {error or type(error).__name__}") from error


class _TooLarge(ValueError):
    pass


def thumbnail(image: Image.Image) -> Image.Image:
    """The image, made small where it is larger."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return small


def encode_thumbnail(small: Image.Image, original: bytes) -> bytes:
    """JPEG; the original bytes where they are shorter, show the same size and anyone can read them."""
    out = io.BytesIO()
    small.save(out, format="JPEG", quality=90)
    data = out.getvalue()
    with Image.open(io.BytesIO(original), formats=FORMATS) as image:
        portable = image.format in ("PNG", "JPEG", "WEBP") and image.size == small.size
    return original if portable and len(original) <= len(data) else data
