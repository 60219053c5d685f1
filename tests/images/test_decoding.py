"""Opening pictures: long texts of PNG, limits, sources, and formats that need another package."""

from __future__ import annotations

import os
import struct
import tracemalloc
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.picture_files import COLOURS, HEIGHT, WIDTH, encoded, levels, png
from PIL import Image, PngImagePlugin

from srl_utils.images import decoding
from srl_utils.images.colours import CODED_PRIMARIES, SRGB_CURVE, matrix_profile
from srl_utils.images.decoding import UnreadableImage, decode_rgb, image_suffixes, open_image, to_srgb

SAMPLES = levels(COLOURS)
LONG = b"node: 17, " * 200_000
LONGER_THAN_ALLOWED = bytes(100_000_000)
P3 = matrix_profile(CODED_PRIMARIES[12], SRGB_CURVE)


def deflated(text: bytes, level: int = 9) -> bytes:
    return zlib.compress(text, level)


TEXTS = {
    "zTXt": (b"zTXt", b"workflow\0\0" + deflated(LONG)),
    "zTXt that is hardly smaller": (b"zTXt", b"workflow\0\0" + deflated(os.urandom(1_200_000), 0)),
    "iTXt": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + deflated(LONG)),
    "uncompressed iTXt": (b"iTXt", b"workflow\0\0\0en\0\0" + LONG),
    "tEXt": (b"tEXt", b"parameters\0" + LONG),
    "tEXt of 70 MB": (b"tEXt", b"parameters\0" + bytes(70_000_000)),
    "eXIf": (b"eXIf", b"II*\0\x08\0\0\0\0\0\0\0\0\0" + LONG),
    "broken zTXt": (b"zTXt", b"workflow\0\0" + deflated(LONG)[:-500] + b"rubbish" * 200),
    "cut zTXt": (b"zTXt", b"workflow\0\0" + deflated(os.urandom(3_000_000))[:2_000_000]),
    "broken iCCP": (b"iCCP", b"scanner\0\0" + deflated(LONG)),
}


@pytest.mark.parametrize("place", ["before the pixels", "after them"])
@pytest.mark.parametrize("name", TEXTS)
def test_long_texts_do_not_matter(name: str, place: str) -> None:
    """Oracle: the samples written."""
    data = png(SAMPLES, 8, 2, TEXTS[name]) if place == "before the pixels" else png(SAMPLES, 8, 2, last=TEXTS[name])
    assert np.array_equal(decode_rgb(data), SAMPLES)


def test_long_texts_are_kept() -> None:
    """Oracle: the text written, and Pillow's own limits, which stay as they were for the rest of the program."""
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    with open_image(png(SAMPLES, 8, 2, TEXTS["zTXt"], TEXTS["iTXt"])) as image:
        assert image.text["workflow"].encode() == LONG and image.info["xmp"] == LONG
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


def test_long_profiles_count() -> None:
    """Oracle: the same profile without the 3 MB behind it."""
    long = P3 + bytes(3_000_000)
    data = png(SAMPLES, 8, 2, (b"iCCP", b"scanner\0\0" + deflated(long)))
    assert np.array_equal(decode_rgb(data), decode_rgb(encoded(Image.fromarray(SAMPLES), icc_profile=P3)))
    assert not np.array_equal(decode_rgb(data), SAMPLES)


BOMBS = {
    "zTXt": [(b"zTXt", b"a\0\0" + deflated(LONGER_THAN_ALLOWED))],
    "iTXt": [(b"iTXt", b"a\0\1\0\0\0" + deflated(LONGER_THAN_ALLOWED))],
    "iCCP": [(b"iCCP", b"a\0\0" + deflated(LONGER_THAN_ALLOWED))],
    "many zTXt": [(b"zTXt", b"%d\0\0" % number + deflated(LONG)) for number in range(40)],
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_in_texts_are_refused_in_little_memory(name: str) -> None:
    """Oracle: 64 MB are the limit; far less than twice as much is ever held."""
    data = png(SAMPLES, 8, 2, *BOMBS[name])
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableImage, match="64 MB"):
            decode_rgb(data)
        assert tracemalloc.get_traced_memory()[1] < 150 * 2**20
    finally:
        tracemalloc.stop()


def test_long_texts_in_threads() -> None:
    """Oracle: the samples, from eight threads at once."""
    data = png(SAMPLES, 8, 2, TEXTS["zTXt"])
    with ThreadPoolExecutor(8) as pool:
        assert all(np.array_equal(picture, SAMPLES) for picture in pool.map(decode_rgb, [data] * 64))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    "chunks", [[], [(b"gAMA", (100_000).to_bytes(4, "big"))], [TEXTS["zTXt"]]], ids=["", "gamma", "text"]
)
def test_broken_pixels_are_noticed(chunks: list[tuple[bytes, bytes]], bits: int) -> None:
    """Oracle: a changed byte of the compressed pixels, or missing ones, leave no whole picture."""
    data = png(levels(COLOURS, bits), bits, 2, *chunks)
    pixels = data.index(b"IDAT") + 4
    changed = data[: pixels + 3] + bytes([data[pixels + 3] ^ 0xFF]) + data[pixels + 4 :]
    for broken in (changed, data[: pixels + 20]):
        with pytest.raises(UnreadableImage):
            decode_rgb(broken)


# --- limits ---------------------------------------------------------------------------------------------


def test_max_pixels_replaces_pillows_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: one pixel more than allowed is refused, in both directions; the limit of others stays."""
    data = png(SAMPLES, 8, 2)
    pixels = HEIGHT * WIDTH
    with pytest.raises(UnreadableImage, match="DecompressionBomb"):
        decode_rgb(data, max_pixels=pixels - 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels // 4)
    with pytest.raises(UnreadableImage, match="DecompressionBomb"):
        decode_rgb(data)
    assert np.array_equal(decode_rgb(data, max_pixels=pixels), SAMPLES)
    for picture in (data, Image.fromarray(SAMPLES)):
        with open_image(picture, max_pixels=pixels) as image:
            assert np.array_equal(to_srgb(image)[0], SAMPLES)
    assert pixels // 4 == Image.MAX_IMAGE_PIXELS


def test_large_pages_are_refused_too() -> None:
    """Oracle: the second page has more pixels than allowed, the first has not."""
    pages = [Image.new("RGB", size) for size in ((4, 4), (40, 40))]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    with open_image(data, max_pixels=1000) as image:
        to_srgb(image)
        image.seek(1)
        with pytest.raises(UnreadableImage, match="DecompressionBomb"):
            to_srgb(image)


# --- sources --------------------------------------------------------------------------------------------


def test_every_source_is_the_same_picture(tmp_path: Path) -> None:
    """Oracle: the samples; from a member of a zip, a memory view and Path-like objects as well."""
    data = png(SAMPLES, 8, 2, TEXTS["zTXt"])
    (tmp_path / "a.png").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/a.png", data)
    member = f"zip://in/a.png::{tmp_path / 'a.zip'}"
    sources = [
        member,
        {"bytes": None, "path": member},
        {"bytes": data, "path": "gone.png"},
        memoryview(data),
        bytearray(data),
    ]
    sources += [tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").as_uri()]
    for source in sources:
        assert np.array_equal(decode_rgb(source), SAMPLES)


def test_a_picture_given_stays_open_and_as_it_was(tmp_path: Path) -> None:
    """Oracle: its frame, its pixels and its information before and after."""
    frames = [Image.fromarray(SAMPLES), Image.fromarray(SAMPLES[::-1])]
    (tmp_path / "a.webp").write_bytes(
        encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    )
    with Image.open(tmp_path / "a.webp") as picture:
        picture.seek(1)
        assert np.array_equal(decode_rgb(picture), SAMPLES[::-1])
        assert picture.tell() == 1 and np.array_equal(picture.convert("RGB"), SAMPLES[::-1])
        picture.seek(0)
        assert np.array_equal(decode_rgb(picture), SAMPLES)


def test_what_is_no_picture_is_refused_in_the_same_words(tmp_path: Path) -> None:
    """Oracle: bytes and files of several beginnings give one reason, without names and addresses in memory."""
    reasons = set()
    for content in (b"", b"text", bytes(100), png(SAMPLES, 8, 2)[:8] + bytes(50)):
        (tmp_path / "a.png").write_bytes(content)
        for source in (content, tmp_path / "a.png"):
            with pytest.raises(UnreadableImage) as caught:
                decode_rgb(source)
            reasons.add(str(caught.value))
    assert reasons == {"no image of a known format, or its beginning is broken"}


def test_an_error_of_the_caller_stays_its_own() -> None:
    """Oracle: the exception raised while a picture is open is no unreadable picture."""
    with pytest.raises(ZeroDivisionError), open_image(png(SAMPLES, 8, 2)):
        raise ZeroDivisionError


# --- formats of other packages --------------------------------------------------------------------------

FOREIGN = {
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "needs pillow-heif"),
    "heif": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "needs pillow-heif"),
    "burst": (b"\0\0\0\x18ftyphevc\0\0\0\0msf1hevc", "needs pillow-heif"),
    "avif": (b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miaf", "needs Pillow 11.3 or newer"),
    "avif by its compatible brands": (b"\0\0\0\x20ftypmif1\0\0\0\0mif1avif", "needs Pillow 11.3 or newer"),
    "jpeg xl": (b"\xff\x0a\xfa\x1f\x01", "needs pillow-jxl-plugin"),
    "jpeg xl in a container": (b"\0\0\0\x0cJXL \r\n\x87\n", "needs pillow-jxl-plugin"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_formats_name_the_package(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the first bytes that the standards of these formats prescribe, whatever the file is called."""
    head, reason = FOREIGN[name]
    monkeypatch.setattr(decoding, "image_formats", lambda: ("JPEG", "PNG"))  # as if no plugin were installed
    (tmp_path / "a.jpg").write_bytes(head + bytes(200))
    for source in (tmp_path / "a.jpg", head + bytes(200)):
        with pytest.raises(UnreadableImage, match=reason):
            decode_rgb(source)


@pytest.mark.parametrize("extra", ["plain", "profile", "turned"])
def test_heic_is_read_where_its_package_is_installed(extra: str) -> None:
    """Oracle: the flat colour that was written; ImageCms; the size of a picture turned by a quarter."""
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    assert {".heic", ".heif"} <= image_suffixes()
    exif = Image.Exif()
    exif[274] = 6
    options = {"plain": {}, "profile": {"icc_profile": P3}, "turned": {"exif": exif.tobytes()}}[extra]
    data = encoded(Image.new("RGB", (64, 48), (200, 100, 50)), "HEIF", quality=95, **options)
    expected = decode_rgb(
        encoded(Image.new("RGB", (1, 1), (200, 100, 50)), icc_profile=P3 if extra == "profile" else b"")
    )
    picture = decode_rgb(data)
    assert picture.size == ((48, 64) if extra == "turned" else (64, 48))
    assert np.abs(np.array(picture.getpixel((20, 20))) - expected.getpixel((0, 0))).max() <= 6


def coded_colours(data: bytes, primaries: int, transfer: int) -> bytes:
    """A HEIF or AVIF file with these code points in place of its own."""
    place = data.index(b"colrnclx") + 8
    return data[:place] + struct.pack(">HH", primaries, transfer) + data[place + 4 :]


@pytest.mark.parametrize(("primaries", "transfer", "profile"), [(12, 13, P3), (12, 2, P3), (1, 1, b""), (2, 2, b"")])
@pytest.mark.parametrize("file_format", ["HEIF", "AVIF"])
def test_code_points_are_converted(
    file_format: str, primaries: int, transfer: int, profile: bytes, tmp_path: Path
) -> None:
    """Oracle: the same colour in a PNG with the profile of these code points; none where they mean sRGB or nothing."""
    if file_format == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    if file_format not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    options = {"save_nclx_profile": True, "color_primaries": 1} if file_format == "HEIF" else {}
    data = encoded(Image.new("RGB", (64, 48), (200, 100, 50)), file_format, quality=95, **options)
    (tmp_path / "a.bin").write_bytes(coded_colours(data, primaries, transfer))
    expected = decode_rgb(encoded(Image.new("RGB", (1, 1), (200, 100, 50)), icc_profile=profile)).getpixel((0, 0))
    for source in (tmp_path / "a.bin", (tmp_path / "a.bin").read_bytes()):
        assert np.abs(np.array(decode_rgb(source).getpixel((20, 20))) - expected).max() <= 6


def test_avif_is_read_by_pillow_itself() -> None:
    """Oracle: a flat colour, within the losses of the format."""
    if "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    data = encoded(Image.new("RGB", (16, 16), (200, 100, 50)), "AVIF", quality=90)
    assert np.abs(np.array(decode_rgb(data).getpixel((8, 8))) - (200, 100, 50)).max() <= 6
