"""Images out of untrusted bytes, and the thumbnails that are kept of them."""

from __future__ import annotations

import io

from PIL import Image

from search_backends.errors import ModelError
from search_backends.pictures import FORMATS, load_picture

MAX_PIXELS = 50_000_000
"""The maximal number of pixels of an image that is read: 150 MB in memory."""
THUMBNAIL_SIDE = 320
"""Pixels of a thumbnail's longer side. What is searched is the thumbnail, for queries too."""


def read_image(data: bytes) -> Image.Image:
    """See `load_picture`.

    Raises:
        ModelError: A `ValueError`; there is no such image, it is broken, or has more than `MAX_PIXELS` pixels.
    """
    return load_picture(data, max_pixels=MAX_PIXELS, error=ModelError)


def thumbnail(image: Image.Image) -> Image.Image:
    """Returns the image, shrunk if it is larger than a thumbnail."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return small


def encode_thumbnail(small: Image.Image, original: bytes) -> bytes:
    """Returns a JPEG, or the original bytes if they are shorter, show the same size and are widely readable."""
    out = io.BytesIO()
    small.save(out, format="JPEG", quality=90)
    data = out.getvalue()
    with Image.open(io.BytesIO(original), formats=FORMATS) as image:
        portable = image.format in ("PNG", "JPEG", "WEBP") and image.size == small.size
    return original if portable and len(original) <= len(data) else data
