"""Images of all kinds, and boxes of all kinds."""

from __future__ import annotations

import contextlib
import io
import math
import random
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin

from search_backends.errors import InfrastructureError, ModelError
from search_backends.pictures import MAX_ASPECT, crop, encode, fit, load_picture

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def _bytes(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def _noise(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def _load(data: Any, **options: Any) -> Image.Image:
    return load_picture(data, max_pixels=1_000_000, **options)


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _png_header(width: int, height: int) -> bytes:
    """A PNG that says it has this size, and holds next to nothing."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(b"\0" * 100)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_known_kinds_are_read(kind: str) -> None:
    image = _load(_bytes(Image.new("RGB", (40, 30), RED), kind))
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert np.abs(np.asarray(image, int) - RED).max() <= 4


def test_all_sources_give_the_same(tmp_path: Path) -> None:
    noise = _noise()
    data = _bytes(noise)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    sources = [data, bytearray(data), path, str(path), noise, {"bytes": data, "path": None}, {"path": str(path)}]
    assert {_load(source).tobytes() for source in sources} == {noise.tobytes()}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(orientation: int) -> None:
    upright = Image.new("RGB", (60, 30), BLUE)
    upright.paste(RED, (0, 0, 20, 10))  # the corner tells all eight apart
    undo = [
        *[None, None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM],
        *[Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_270],
    ][orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if undo is None else upright.transpose(undo)
    image = _load(_bytes(stored, exif=exif))
    assert image.tobytes() == upright.tobytes()
    assert not image.info
    assert not image.getexif()


def test_broken_metadata_does_not_spoil_an_image() -> None:
    assert _load(_bytes(_noise(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).size == (64, 48)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "L", "1", "RGB with a colour that is transparent"])
def test_what_is_transparent_is_white(mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (10, 10), 0)
        image.putpalette([255, 0, 0, 0, 0, 255])
        data = _bytes(image, "GIF", transparency=0)
    elif mode.startswith("RGB with"):
        data = _bytes(Image.new("RGB", (10, 10), RED), transparency=RED)
    elif mode in ("L", "1"):
        data = _bytes(Image.new(mode, (10, 10), 0), transparency=0)
    else:
        image = Image.new("RGBA", (10, 10), (255, 0, 0, 0))
        data = _bytes(image.convert("LA")) if mode == "LA" else image.convert(mode)  # type: ignore[assignment]
    assert _load(data).getcolors() == [(100, WHITE)]


def test_half_transparent_is_mixed_with_white() -> None:
    ((_, colour),) = _load(_bytes(Image.new("RGBA", (10, 10), (255, 0, 0, 128)))).getcolors() or []
    assert colour == (255, 127, 127)


def test_sixteen_bits_of_grey_are_grey() -> None:
    data = _bytes(Image.fromarray(np.full((10, 10), 32768, np.uint16)))
    assert _load(data).getcolors() == [(100, (128, 128, 128))]


def test_cmyk_is_read() -> None:
    assert _load(_bytes(Image.new("CMYK", (10, 10), (0, 0, 0, 0)), "JPEG")).getcolors() == [(100, WHITE)]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animations_are_their_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, BLUE, WHITE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = _bytes(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
    assert _load(data).getcolors() == [(400, RED)]


@pytest.mark.parametrize("error", [ModelError, InfrastructureError])
def test_bombs_are_refused_before_they_are_decoded(error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Any) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(error, match="the image has 2000 x 501 pixels, it must have 1 to 1000000"):
        _load(_png_header(2000, 501), error=error)
    for size in (60_000, 2**31 - 1):  # Pillow has limits of its own
        with pytest.raises(error):
            _load(_png_header(size, size), error=error)
    with pytest.raises(AssertionError):  # this one would have been
        Image.open(io.BytesIO(_png_header(1000, 1000))).load()


def _progressive(scans: int, between: bytes = b"", after: bytes = b"") -> bytes:
    """A grey JPEG of 200 x 200 pixels with so many scans: one for the image, the others refine it by nothing."""

    def segment(marker: int, body: bytes) -> bytes:
        return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body

    tables = segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2, struct.pack(">BHHB", 8, 200, 200, 1) + b"\1\x11\0")
    # One code each: "no change" for the first scan; "nothing in the next 16384 to 32767 blocks" for the others.
    codes = segment(0xC4, b"\x00\1" + b"\0" * 16) + segment(0xC4, b"\x10\1" + b"\0" * 15 + b"\xe0")
    first = segment(0xDA, b"\1\1\0\0\0\1") + b"\0" * 100
    again = segment(0xDA, b"\1\1\0\1\x3f\x10") + b"\x40\0"
    return b"\xff\xd8" + tables + codes + between + first + again * (scans - 1) + b"\xff\xd9" + after


def test_jpegs_with_thousands_of_scans_are_refused_before_they_are_decoded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for scans in (1, 12, 64):
        assert _load(_progressive(scans)).size == (200, 200)
    assert _load(_bytes(_noise(), "JPEG", progressive=True)).size == (64, 48)
    comment = b"\xff\xfe" + struct.pack(">H", 60_002) + b"\xff\xda\xff\xd9" * 15_000
    assert _load(_progressive(12, between=comment, after=b"\xff\xda" * 1000)).size == (200, 200)

    def load(self: Any) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", load)
    file = tmp_path / "many.jpg"
    file.write_bytes(_progressive(20_000))
    for data in (_progressive(65), file.read_bytes(), file, _progressive(20_000, between=comment)):
        with pytest.raises(ModelError, match="a JPEG of more than 64 scans"):
            _load(data, error=ModelError)


def test_long_animations_cost_one_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.new("P", (20, 20), number) for number in range(2)]
    for frame in frames:
        frame.putpalette([255, 0, 0, 0, 0, 255])
    gif = _bytes(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=10)
    second = gif[gif.rindex(b"\x21\xf9") : -1]
    apng = _bytes(frames[0].convert("RGB"), save_all=True, append_images=[frames[1].convert("RGB")] * 500)

    def seek(self: Any, frame: int) -> None:
        raise AssertionError(f"frame {frame} was read")

    for plugin in (GifImagePlugin.GifImageFile, PngImagePlugin.PngImageFile):
        monkeypatch.setattr(plugin, "seek", seek)
    for data in (gif[:-1] + second * 20_000 + b";", apng):
        assert _load(data).getcolors() == [(400, RED)]


@pytest.mark.parametrize(
    "chunks",
    [
        _chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 100_000_000)),
        _chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"a" * 100_000_000)),
        _chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 1_000_000)) * 100,
        _chunk(b"iCCP", b"k\0\0" + zlib.compress(b"a" * 100_000_000)),
    ],
    ids=["zTXt", "iTXt", "many", "iCCP"],
)
def test_metadata_that_would_fill_the_memory_is_not_unpacked(chunks: bytes) -> None:
    data = _bytes(_noise())
    body = data[:33] + chunks + data[33:]
    tracemalloc.start()
    try:
        with contextlib.suppress(InfrastructureError):  # Pillow gives some of them up, and leaves others out
            assert _load(body).tobytes() == _noise().tobytes()
        assert tracemalloc.get_traced_memory()[1] < 80_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_images_that_are_cut_off_are_refused(kind: str) -> None:
    data = _bytes(_noise(200, 200), kind)
    for length in (0, 1, 10, 30, len(data) // 2, len(data) - 40):
        with pytest.raises(InfrastructureError, match="image"):
            _load(data[:length])


@pytest.mark.parametrize(
    "data",
    [
        *[None, 3, 2.5, [], {}, {"bytes": None}, {"bytes": "text"}, {"path": None}, {"bytes": 5}, True, object()],
        *[b"", b"text", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4", "no/such/file.png", "\0", "/"],
        Image.new("RGB", (0, 5)),
    ],
)
def test_what_is_no_image_is_refused(data: Any) -> None:
    with pytest.raises(ModelError, match="image"):
        _load(data, error=ModelError)


def test_other_kinds_of_files_are_not_opened(tmp_path: Path) -> None:
    for kind in ("TIFF", "PPM", "PCX", "ICO", "TGA", "EPS"):
        data = _bytes(Image.new("RGB", (32, 32)), kind)
        path = tmp_path / "a.png"
        path.write_bytes(data)
        for source in (data, path):
            with pytest.raises(InfrastructureError, match="not an image of a known kind"):
                _load(source)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]), st.integers(0, 2**32))
def test_damaged_images_raise_nothing_else(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray(_bytes(_noise(), kind))
    for _ in range(rng.randint(1, 20)):
        data[rng.randrange(min(len(data), rng.choice([40, 10**6])))] = rng.randrange(256)
    try:
        image = _load(bytes(data))
    except InfrastructureError:
        return
    assert image.mode == "RGB"
    assert 0 < image.width * image.height <= 1_000_000


def test_given_images_are_not_changed() -> None:
    given_image = Image.new("RGBA", (10, 10), (255, 0, 0, 0))
    given_image.info["note"] = "kept"
    loaded = _load(given_image)
    loaded.paste(BLUE, (0, 0, 10, 10))
    assert given_image.getpixel((0, 0)) == (255, 0, 0, 0)
    assert given_image.info == {"note": "kept"}


def _white_margin(image: Image.Image) -> tuple[int, int]:
    """Columns and rows that are not white."""
    dark = (np.asarray(image.convert("L")) < 200).any
    return int(dark(axis=0).sum()), int(dark(axis=1).sum())


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 60) | st.integers(1, 3000),
    st.integers(1, 60) | st.integers(1, 3000),
    st.integers(0, 300_000),
    st.sampled_from([1, 8, 28, 32]),
)
def test_fitted_images_fit(width: int, height: int, extra: int, min_side: int) -> None:
    max_pixels = min_side**2 + extra
    black = Image.new("RGB", (width, height))
    image = fit(black, max_pixels=max_pixels, min_side=min_side)
    assert image.width * image.height <= max_pixels
    assert min(image.size) >= min_side
    assert max(image.size) <= MAX_ASPECT * min(image.size)
    content = _white_margin(image)
    # The aspect is kept, to a pixel.
    scale = max(content) / max(width, height)
    assert abs(content[0] - max(1, width * scale)) <= 1.01
    assert abs(content[1] - max(1, height * scale)) <= 1.01
    # None is smaller than it has to be: it is as it was, or the budget is used up, or a side touches its minimum.
    if image.size != black.size and scale < 1:
        bigger = (max(image.size) + 2) * (min(image.size) + 2)
        assert bigger > max_pixels or MAX_ASPECT * (min(image.size)) < max(image.size) + 2 * MAX_ASPECT
    assert fit(image, max_pixels=max_pixels, min_side=min_side) is image


def test_fit_leaves_what_fits() -> None:
    image = _noise(100, 50)
    assert fit(image, max_pixels=5000, min_side=28) is image


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((1000, 1000), (512, 512)),
        ((2000, 500), (1024, 256)),
        ((10, 20), (28, 56)),
        ((1, 1), (28, 28)),
        ((7, 7), (28, 28)),
        ((1, 10000), (37, 7084)),
    ],
)
def test_fit_by_example(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert fit(Image.new("RGB", size), max_pixels=512 * 512, min_side=28).size == fitted


def test_fit_needs_room_for_the_smallest_image() -> None:
    with pytest.raises(ValueError, match="max_pixels must be at least min_side squared, got 783 and 28"):
        fit(_noise(), max_pixels=783, min_side=28)


def _positions(width: int, height: int) -> Image.Image:
    """Red says x, green says y."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))


def _crop(image: Image.Image, bbox: Any, coordinates: Any = "absolute", min_side: int = 8, scale: int = 1) -> Any:
    return crop(image, bbox, coordinates=coordinates, min_side=min_side, scale_to_pixels=scale)


def _region(image: Image.Image) -> tuple[int, int, int, int]:
    pixels = np.asarray(image)
    (left, top, _), (right, bottom, _) = pixels[0, 0], pixels[-1, -1]
    return int(left), int(top), int(right) + 1, int(bottom) + 1


@pytest.mark.parametrize(
    ("bbox", "region"),
    [
        ([10, 20, 60, 80], (10, 20, 60, 80)),
        ([60, 80, 10, 20], (10, 20, 60, 80)),
        ([60, 20, 10, 80], (10, 20, 60, 80)),
        ("[10, 20, 60, 80]", (10, 20, 60, 80)),
        ("10,20,60,80", (10, 20, 60, 80)),
        ("10 20 60 80", (10, 20, 60, 80)),
        ("<|box_start|>(10,20),(60,80)<|box_end|>", (10, 20, 60, 80)),
        (["10", "20", 60.0, " 80 "], (10, 20, 60, 80)),
        ([10.4, 20.6, 59.2, 79.9], (10, 20, 60, 80)),
        ([-50, -1e300, 60, 80], (0, 0, 60, 80)),
        ([150, 50, 10**300, 500], (150, 50, 200, 100)),
        ([10, 20, 12, 60], (7, 20, 15, 60)),  # grown around its centre
        ([0, 0, 2, 2], (0, 0, 8, 8)),  # and away from the border
        ([198, 98, 200, 100], (192, 92, 200, 100)),
    ],
)
def test_regions_in_pixels(bbox: Any, region: tuple[int, int, int, int]) -> None:
    assert _region(_crop(_positions(200, 100), bbox)) == region


@pytest.mark.parametrize(
    ("bbox", "region"),
    [
        ([0, 0, 1000, 1000], (0, 0, 200, 100)),
        ([500, 500, 1000, 1000], (100, 50, 200, 100)),
        ([900, 900, 100, 100], (20, 10, 180, 90)),
        ([0, 0, 5000, 500], (0, 0, 200, 50)),
        ([500, 500, 510, 510], (97, 46, 105, 54)),
    ],
)
def test_regions_in_thousandths(bbox: Any, region: tuple[int, int, int, int]) -> None:
    assert _region(_crop(_positions(200, 100), bbox, "thousandths")) == region


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
numbers = st.integers(-5, 1200) | st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 1e308, 5e-324])
boxes = st.lists(numbers | st.text("0123456789.-+e nai,", max_size=8), min_size=4, max_size=4)


@settings(max_examples=500, deadline=None)
@given(
    json_values | boxes | boxes.map(str) | st.text("0123456789.,[]() -e", max_size=220),
    st.sampled_from(["absolute", "thousandths"]),
    st.integers(1, 250),
    st.integers(1, 120),
    st.integers(1, 40),
    st.integers(1, 20_000),
)
def test_any_argument_is_a_region_or_refused(
    bbox: Any, coordinates: str, width: int, height: int, min_side: int, scale: int
) -> None:
    image = _positions(width, height)
    region, refusal = None, ""
    try:
        region = _crop(image, bbox, coordinates, min_side, scale)
    except ModelError as error:
        refusal = str(error)
    if region is None:
        assert f"{width} x {height} pixels" in refusal
        assert len(refusal) < 300
        return
    assert region.mode == "RGB"
    assert min(region.size) >= min_side
    assert region.width <= width or region.width * region.height <= scale
    plain = _crop(image, bbox, coordinates, min_side, 1)
    left, top, right, bottom = _region(plain)
    assert (right - left, bottom - top) == plain.size  # it is a part of the image
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@pytest.mark.parametrize(
    "bbox",
    [
        *[None, True, 5, 0.5, "", "everything", {}, {"x": 1}, [], [1, 2, 3], [1, 2, 3, 4, 5], [[1, 2, 3, 4]]],
        *[[10, 20, 60, None], [10, 20, 60, True], [10, 20, 60, "eighty"], [10, 20, 60, [80]], [10, 20, 60, math.nan]],
        *[[0, 0, math.inf, 50], [0, 0, 10**400, 50], ["nan", 0, 60, 50], "[0, 0, inf, 50]", "[nan, 0, 60, 50, 7]"],
        *["1, 2, 3", "1, 2, 3, 4, 5", "1" * 10_000, "(10,20),(60,80)" * 100, ["1" * 10_000, 0, 60, 50]],
        *[[50, 50, 50, 80], [10, 20, 10, 20], [300, 20, 400, 80], [-9, -9, 0, 0], [0.1, 0.1, 0.6, 0.9]],
    ],
)
def test_nonsense_is_answered_with_what_was_expected(bbox: Any) -> None:
    with pytest.raises(ModelError) as caught:
        _crop(_positions(200, 100), bbox)
    assert "bbox must be [left, top, right, bottom] in pixels: x from 0 to 200, y from 0 to 100" in str(caught.value)
    with pytest.raises(ModelError, match="x from 0 to 1000, y from 0 to 1000"):
        _crop(_positions(200, 100), [0, 0, 0, 0] if bbox == [300, 20, 400, 80] else bbox, "thousandths")


def test_image_must_be_large_enough() -> None:
    with pytest.raises(ModelError, match="only 200 x 20 pixels"):
        _crop(_positions(200, 20), [0, 0, 200, 20], min_side=28)


def test_kind_of_coordinates_must_be_known() -> None:
    with pytest.raises(ValueError, match="coordinates must be absolute or thousandths, got 'auto'"):
        _crop(_noise(), [0, 0, 20, 20], "auto")


def test_small_regions_are_enlarged_and_large_ones_stay() -> None:
    image = _positions(200, 100)
    assert _crop(image, [0, 0, 20, 10], scale=20_000).size == (200, 100)
    assert _crop(image, [0, 0, 200, 100], scale=500).size == (200, 100)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_encoding_depends_on_pixels_alone(width: int, height: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    data = encode(image)
    assert np.array_equal(np.asarray(load_picture(data, max_pixels=1600)), pixels)
    image.info.update(icc_profile=b"x" * 200, exif=b"y", dpi=(300, 300), comment="z", transparency=(0, 0, 0))
    noted = Image.fromarray(pixels)
    noted.info.update(icc_profile=b"x" * 200, dpi=(300, 300))
    assert encode(noted) == data
    assert encode(load_picture(data, max_pixels=1600)) == data
