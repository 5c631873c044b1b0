"""Reads images from untrusted bytes, and transforms them for tools."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from PIL import Image, ImageOps, UnidentifiedImageError

from search_backends.errors import InfrastructureError, ModelError

Error: TypeAlias = type[ModelError] | type[InfrastructureError]
Coordinates: TypeAlias = Literal["absolute", "thousandths"]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_ASPECT = 200
"""Longer side by shorter: the image processors of Qwen-VL refuse more."""
_MAX_SCANS = 64
"""The maximal number of scans of a JPEG file. Progressive files have about ten, each a pass over
the whole image."""
# Matches the end marker, and the markers that are followed by a length.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd8]")
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?"
_BBOX_CHARS = 200


def load_picture(
    data: bytes | Mapping[str, Any] | Image.Image | str | Path,
    *,
    max_pixels: int,
    error: Error = InfrastructureError,
) -> Image.Image:
    """Returns the image as RGB, upright, without metadata. Transparency becomes white; of an
    animation the first frame is used.

    Args:
        data: a PNG, JPEG, WebP, GIF or BMP file's bytes or path, a row's ``{"bytes": ..., "path": ...}``, or an image.
        max_pixels: an image with more is refused before it is decoded.
        error: the exception class to raise.

    Raises:
        ModelError, InfrastructureError: By ``error``: there is no such image, it is broken, cut off, too large, or
            made to be slow.
    """
    try:
        image = _open(data)
        width, height = image.size
        if not 0 < width * height <= max_pixels:
            raise error(f"the image has {width} x {height} pixels, it must have 1 to {max_pixels}")
        if _scans(image) > _MAX_SCANS:
            raise error(f"the image is a JPEG of more than {_MAX_SCANS} scans")
        image.load()
        return _plain_rgb(_upright(image))
    except error:
        raise
    except UnidentifiedImageError:
        raise error(f"this is not an image of a known kind ({', '.join(FORMATS)})") from None
    except OSError as problem:
        raise error(f"the image cannot be read: {problem.strerror or problem}") from None
    except Exception as problem:  # Pillow's decoders raise many kinds on broken data
        raise error(f"the image cannot be read: {type(problem).__name__}: {problem}") from None


def _open(data: Any) -> Image.Image:
    if isinstance(data, Mapping):
        data = data["path"] if data.get("bytes") is None else data["bytes"]
    if isinstance(data, Image.Image):
        return data
    if isinstance(data, str | Path):
        return Image.open(data, formats=FORMATS)
    if isinstance(data, bytes | bytearray | memoryview):
        return Image.open(io.BytesIO(data), formats=FORMATS)
    raise TypeError(f"an image's bytes or path were expected, got {type(data).__name__}")


def _scans(image: Image.Image) -> int:
    """Counts the scans of a JPEG that is not decoded yet, up to one too many; 0 for any other file."""
    file = getattr(image, "fp", None)
    if file is None or image.format not in ("JPEG", "MPO"):
        return 0
    start = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(start)
    scans, position = 0, 2
    while scans <= _MAX_SCANS and (marker := _MARKER.search(data, position)) and marker[0] != b"\xff\xd9":
        scans += marker[0] == b"\xff\xda"
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken metadata does not spoil the image
        return image


def _plain_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which a plain conversion makes white
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    plain = image.convert("RGB")
    plain.info = {}
    return plain


def fit(image: Image.Image, *, max_pixels: int, min_side: int) -> Image.Image:
    """The image at a size that a model takes: at most ``max_pixels``, both sides at least ``min_side``, neither more
    than 200 times the other.

    The aspect ratio is kept: the whole image is shrunk or enlarged, and one that is too narrow is
    put on white. An image that fits is returned as it is.

    Raises:
        ValueError: ``max_pixels`` is less than ``min_side`` squared.
    """
    if not 0 < min_side**2 <= max_pixels:
        raise ValueError(f"max_pixels must be at least min_side squared, got {max_pixels} and {min_side}")
    long, short = max(image.size), min(image.size)
    scale = min(
        max(1.0, min_side / short),
        # The area, also where the shorter side is filled up to `min_side` or to a `MAX_ASPECT`th of the longer:
        math.sqrt(max_pixels / (long * short)),
        max_pixels / (min_side * long),
        math.sqrt(MAX_ASPECT * max_pixels) / long,
    )
    new_long = max(min_side, _whole(long * scale))
    new_short = max(1, _whole(short * scale))
    room = max(new_short, min_side, math.ceil(new_long / MAX_ASPECT))
    new_long = min(new_long, max_pixels // room)
    size, canvas = (new_long, new_short), (new_long, room)
    if image.height > image.width:
        size, canvas = size[::-1], canvas[::-1]
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return image if size == canvas else ImageOps.pad(image, canvas, color="white")


def _whole(value: float) -> int:
    return math.floor(value + 1e-9)  # 28 / 7 * 7 may be a little less than 28


def crop(
    image: Image.Image,
    bbox: Any,
    *,
    coordinates: Coordinates,
    min_side: int,
    scale_to_pixels: int,
) -> Image.Image:
    """The region ``bbox`` of the image; a small one is enlarged.

    Args:
        image: the image as the model sees it.
        bbox: what the model wrote. Four numbers, in a list or a text; two opposite corners, in any order. What lies
            outside of the image is ignored, and a region that is too small is grown around its centre.
        coordinates: what they count: pixels ("absolute", Qwen2.5-VL), or thousandths of width and height
            ("thousandths", Qwen3-VL). Nobody can tell from the numbers.
        min_side: pixels that a region must have in width and height.
        scale_to_pixels: pixels to which a region with fewer is enlarged.

    Raises:
        ModelError: No such region; the message says what was expected.
        ValueError: ``coordinates`` is something else.
    """
    if coordinates not in ("absolute", "thousandths"):
        raise ValueError(f"coordinates must be absolute or thousandths, got {coordinates!r}")
    width, height = image.size
    spans = (width, height) if coordinates == "absolute" else (1000, 1000)
    unit = "pixels" if coordinates == "absolute" else "thousandths of its width and height"
    expected = (
        f"bbox must be [left, top, right, bottom] in {unit}: x from 0 to {spans[0]}, y from 0 to {spans[1]} "
        f"(the image has {width} x {height} pixels)"
    )
    numbers = _four_numbers(bbox)
    if numbers is None:
        raise ModelError(expected)
    if min(width, height) < min_side:
        raise ModelError(f"the image is only {width} x {height} pixels, too small to show a region of it")
    edges = []
    for axis, (side, span) in enumerate(zip((width, height), spans, strict=True)):
        low, high = sorted(min(max(number, 0.0), float(span)) for number in numbers[axis::2])
        if high - low < 1:
            raise ModelError(f"the region is empty or outside the image; {expected}")
        edges.append(_grown(low * side / span, high * side / span, side, min_side))
    (left, right), (top, bottom) = edges
    region = image.crop((left, top, right, bottom)).convert("RGB")
    if region.width * region.height >= scale_to_pixels:
        return region
    scale = math.sqrt(scale_to_pixels / (region.width * region.height))
    size = (max(region.width, _whole(region.width * scale)), max(region.height, _whole(region.height * scale)))
    return region.resize(size, Image.Resampling.LANCZOS)


def _four_numbers(value: Any) -> list[float] | None:
    if isinstance(value, str) and len(value) <= _BBOX_CHARS:
        # Words such as Qwen's <|box_start|> may stand around them, but no other numbers.
        if re.search(r"nan|inf", value, re.IGNORECASE):
            return None
        value = re.findall(_NUMBER, value)
    if not isinstance(value, list | tuple) or len(value) != 4:
        return None
    numbers = []
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int | float | str):
            return None
        if isinstance(item, str) and (len(item) > _BBOX_CHARS or not re.fullmatch(_NUMBER, item.strip())):
            return None
        try:
            number = float(item)
        except OverflowError:
            return None
        if not math.isfinite(number):
            return None
        numbers.append(number)
    return numbers


def _grown(low: float, high: float, side: int, min_side: int) -> tuple[int, int]:
    """Whole pixels around ``low`` to ``high``, at least ``min_side`` of the ``side``."""
    start, end = math.floor(low), math.ceil(high)
    if end - start < min_side:
        start = min(max(0, round((low + high - min_side) / 2)), side - min_side)
        end = start + min_side
    return start, end


def encode(image: Image.Image) -> bytes:
    """The image as an RGB PNG without metadata: the same bytes for the same pixels."""
    out = io.BytesIO()
    _plain_rgb(image).save(out, format="PNG")
    return out.getvalue()
