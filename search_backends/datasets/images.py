"""Images that rows of public data sets hold or name: bytes, paths, base64, ``data:`` addresses."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image

from search_backends.errors import ModelError
from search_backends.pictures import FORMATS, fit, load_picture

MAX_READ_PIXELS = 100_000_000  # larger images are left out unread
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
OTHER_SUFFIXES = (".tif", ".tiff", ".avif", ".heic", ".heif", ".ico", ".ppm", ".pgm", ".svg", ".jp2", ".jxl")
"""Suffixes of image files that are not read; the reason for leaving a row out names them."""
LONGEST_NAME = 255
"""The maximal length of a file's name: a longer text without a slash is not a path."""
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]{1,20}://")
_URL_SAFE = str.maketrans("-_", "+/")
_KINDS_OF_FILES = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"\0\0\1\0": "ICO",
    b"\0\0\0\x0cjP": "JPEG 2000",
    b"\0\0\0\x0cJXL": "JPEG XL",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"<?xml": "XML or SVG",
    b"<!doctype": "HTML",
    b"<html": "HTML",
}


class Dropped(Exception):
    """A row that is left out; the message says why."""


class Images:
    """Finds the images that rows name.

    Args:
        folder: they are looked for in it, at any depth, by name with or without ending; None: beside the data's file.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._by_name: dict[str, Path] | None = None

    def read(self, value: Any, beside: Path | None) -> list[bytes]:
        """The bytes of a row's images.

        Raises:
            Dropped: One is not there.
        """
        if isinstance(value, list):
            return [data for each in value for data in self.read(each, beside)]
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, Image.Image):
            buffer = io.BytesIO()
            value.save(buffer, format="PNG")
            return [buffer.getvalue()]
        if isinstance(value, bytes | bytearray):
            return [bytes(value)]
        if isinstance(value, str) and value.strip():
            return [self._named(value.strip(), beside)]
        return []

    def _named(self, text: str, beside: Path | None) -> bytes:
        """The image that a text names, or is."""
        if text.startswith("data:"):
            head, _, content = text.partition(",")
            data = _from_base64(content) if head.endswith(";base64") else unquote_to_bytes(content)
            if not data:
                raise Dropped("image unreadable: a data: address that holds nothing that can be decoded")
            return data
        file = self._find(text, beside)
        if file is not None:
            try:
                return file.read_bytes()
            except OSError as error:
                raise Dropped(f"image unreadable: {file}: {error.strerror}") from error
        if address := _ADDRESS.match(text):
            raise Dropped(f"image not found: {address[0]} addresses are not read, only paths")
        data = _from_base64(text)
        if data is not None and (kind_of(data) or len(text) > LONGEST_NAME):
            return data
        if len(text) > LONGEST_NAME and "/" not in text:
            raise Dropped(f"image unreadable: a text of {len(text)} characters, neither a path nor base64")
        raise Dropped("image not found")

    def _find(self, name: str, beside: Path | None) -> Path | None:
        for folder in (self._folder, beside):
            if folder is not None and _is_file(folder / name):
                return folder / name
        if self._folder is None:
            return None
        if self._by_name is None:
            self._by_name = {}
            files = [file for file in self._folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES + OTHER_SUFFIXES]
            # What can be read first; the others are there to be named in the reason.
            for file in sorted(files, key=lambda file: (file.suffix.lower() in OTHER_SUFFIXES, file)):
                self._by_name.setdefault(file.stem, file)
                self._by_name.setdefault(file.name, file)
        return self._by_name.get(Path(name).name) or self._by_name.get(Path(name).stem)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # longer than a name may be, or with a NUL
        return False


def _from_base64(text: str) -> bytes | None:
    """Decodes base64; None if the text is not base64.

    Line ends, missing padding and the alphabet for URLs are accepted.
    """
    text = "".join(text.split()).translate(_URL_SAFE).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


def kind_of(data: bytes) -> str | None:
    """Recognises a kind of file by its first bytes: an image, or what is often found in its place."""
    if data[4:8] == b"ftyp":
        return "AVIF" if data[8:12] in (b"avif", b"avis") else "HEIC"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if re.match(rb"P[1-7]\s", data):
        return "PPM"
    start = data[:100].lstrip().lower()
    return next(
        (kind for mark, kind in _KINDS_OF_FILES.items() if data.startswith(mark) or start.startswith(mark)), None
    )


def read_picture(data: bytes) -> Image.Image:
    """The image in a row's bytes.

    Raises:
        Dropped: It cannot be read.
    """
    try:
        return load_picture(data, max_pixels=MAX_READ_PIXELS, error=ModelError)
    except ModelError as error:
        kind = kind_of(data)
        known = kind in FORMATS or kind is None
        why = str(error) if known else f"it is {kind}, and only {', '.join(FORMATS)} are read: convert it"
        raise Dropped(f"image unreadable: {why}") from error


def encoded(data: bytes, picture: Image.Image, max_pixels: int) -> bytes:
    """Returns the image's own bytes if the model can take them, else a JPEG."""
    small = fit(picture, max_pixels=max_pixels, min_side=28)
    with Image.open(io.BytesIO(data)) as original:
        upright = original.getexif().get(0x0112, 1) == 1
        if small is picture and upright and original.format in ("PNG", "JPEG") and original.mode == "RGB":
            return data
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def image_keys(info: Mapping[str, Any]) -> list[str]:
    """The sha256 of each image's original bytes, out of a prepared row's ``extra_info``.

    Raises:
        KeyError, TypeError: There are none.
    """
    if info.get("image_keys") is not None:
        return list(info["image_keys"])
    return list(info["tools_kwargs"]["image_search"]["create_kwargs"]["image_keys"])  # where rows name their tools
