"""Decode image files of any kind to upright sRGB images of 8 bits per sample."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from srl_utils.images import iso_boxes, png_chunks, tiff_pages
from srl_utils.images.colours import as_rgb, profile_of
from srl_utils.images.png_chunks import LOW_BYTES
from srl_utils.images.sample_ranges import SIGNED, AmbiguousRange, Declared, unit_values

# Pillow only recognises the first five (their pixels need other software) and hands the last to Ghostscript.
NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"}
SIXTEEN_BIT_FORMATS = {"PNG", "PPM"}  # Pillow scales their long integers to 16 bits
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
AVIF_BRANDS = {b"avif", b"avis"}
JPEG_XL = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
HEAD = 64  # bytes that identify a format
NEEDED = {
    "AVIF": "needs Pillow 11.3 or newer: pip install --upgrade pillow",
    "HEIF": "needs pillow-heif: pip install pillow-heif",
    "JXL": "needs pillow-jxl-plugin: pip install pillow-jxl-plugin",
}
NATIVE = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}  # Pillow's names of raw samples
NEEDS_ALL_BITS = {"cicp", "icc_profile", "gamma", "chromaticity", "transparency"}  # entries of `Image.info`
SIXTEEN_BITS = Declared(bits=16)
TWELVE_BITS = 4095

_raised_limit = threading.RLock()


class UnreadableImage(ValueError):
    """An image that cannot be decoded; the message is a short reason."""


@lru_cache(maxsize=1)
def image_formats() -> tuple[str, ...]:
    """Return the names of the formats that Pillow decodes, with the plugins that are installed."""
    Image.init()
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    with suppress(ImportError):
        import_module("pillow_jxl")  # registers itself
    return tuple(sorted(set(Image.OPEN) - NOT_DECODED))


@lru_cache(maxsize=1)
def image_suffixes() -> frozenset[str]:
    """Return the lower-case file suffixes, such as `.png`, of `image_formats`."""
    formats = {*image_formats(), "MPO"}  # MPO: cameras with two lenses; Pillow opens these files as JPEG
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


@contextmanager
def open_image(source: object, *, max_pixels: int | None = None) -> Iterator[Image.Image]:
    """Open an image at its first frame, as a context. `to_srgb` turns each frame into pixels.

    Args:
        source: a path, a URL that fsspec knows, the bytes of a file, `{"bytes", "path"}`, or a PIL image, which stays
            open afterwards.
        max_pixels: the largest image to read, in pixels, in place of `Image.MAX_IMAGE_PIXELS`.

    Raises:
        UnreadableImage: if the image is missing, is of no known format, or has too many pixels.
    """
    with _pixel_limit(max_pixels):
        with one_line_reason():
            image = _open(source)
        try:
            yield image
        finally:
            if image is not source:
                image.close()


def to_srgb(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the current frame of an opened image as upright sRGB (mode RGB), and its alpha (mode L).

    The alpha is None where the image is opaque. `image` is loaded, but not changed.

    Raises:
        UnreadableImage: if the pixels are broken, or if their range is ambiguous.
    """
    with one_line_reason():
        _refuse_bomb(image)
        _expect_native_bytes(image)
        stated = image.declared if isinstance(image, tiff_pages.TiffPages) else None
        deep = stated is not None or any(";16" in str(tile[3]) for tile in getattr(image, "tile", []))
        image.load()
        upright, low = _upright(image), image.info.get(LOW_BYTES)
        colour: Image.Image | np.ndarray
        if isinstance(low, Image.Image) and _needs_low_bytes(image):
            colour, alpha = _join(upright, _upright(low))
        else:
            colour, alpha = _split(upright, _declared(image))
        profile = profile_of(image)
        if profile is None:
            _refuse_dim(colour, deep, stated or _declared(image))
        rgb = as_rgb(colour, profile)
        rgb.info = {}  # it describes the file's own colours, not these
        return rgb, alpha


def decode_rgb(source: object, *, max_pixels: int | None = None) -> Image.Image:
    """Return the first frame of an image in sRGB (mode RGB), upright, transparent parts over white.

    Args:
        source: as for `open_image`.
        max_pixels: as for `open_image`.

    Raises:
        UnreadableImage: if the image is missing, broken, too large, or of an ambiguous range of values.
    """
    with open_image(source, max_pixels=max_pixels) as image:
        return over_white(*to_srgb(image))


def over_white(colour: Image.Image, alpha: Image.Image | None) -> Image.Image:
    """Return an RGB image with the transparent parts over white. `colour` may be changed."""
    if alpha is None:
        return colour
    colour.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB")


@contextmanager
def one_line_reason() -> Iterator[None]:
    """Turn any error within the context into an UnreadableImage with a reason of one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:  # its message may hold an address in memory
        raise UnreadableImage("no image of a known format, or its beginning is broken") from error
    except Exception as error:  # on broken files Pillow raises nearly anything: SyntaxError, struct.error, ...
        reason = (str(getattr(error, "strerror", None) or error).splitlines() or [""])[0]  # without the path
        raise UnreadableImage(f"{type(error).__name__}: {reason}") from error


@contextmanager
def _pixel_limit(max_pixels: int | None) -> Iterator[None]:
    """Set Pillow's limit of pixels to `max_pixels` within the context; None leaves it.

    The limit holds for the whole process, so other threads that set it wait.
    """
    if max_pixels is None:
        yield
        return
    with _raised_limit:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _refuse_bomb(image: Image.Image) -> None:
    """Raise Pillow's error for an image with too many pixels.

    Pillow checks files when it opens them, but neither PIL images in memory nor the later pages of a file.
    """
    pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise Image.DecompressionBombError(f"{pixels} pixels are more than {limit}")


def _open(source: object) -> Image.Image:
    """Open an image without reading its pixels; see `open_image` for `source`."""
    source = content_or_path(source)
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, str) and "://" in source:
        with fsspec.open(source, "rb") as file:
            return _open_bytes(file.read())
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open_bytes(bytes(source))
    if isinstance(source, (str, os.PathLike)):
        return _open_file(Path(source))
    raise UnreadableImage(f"{type(source).__name__} instead of an image")


def content_or_path(source: object) -> object:
    """Return the content of `{"bytes", "path"}`, or else its path; any other source as it is."""
    if isinstance(source, dict):
        return source["path"] if source.get("bytes") is None else source["bytes"]
    return source


def check_regular(path: Path) -> None:
    """Raise an UnreadableImage for a folder, a pipe or a device: reading these may never end."""
    if path.exists() and not path.is_file():
        raise UnreadableImage("no regular file")


def _open_file(path: Path) -> Image.Image:
    check_regular(path)
    with path.open("rb") as file:
        head = file.read(HEAD)
    boxes = head.startswith(iso_boxes.JP2) or head[4:8] == iso_boxes.FILE_TYPE
    if boxes or head.startswith((png_chunks.SIGNATURE, *tiff_pages.SIGNATURES)):
        return _open_bytes(path.read_bytes())
    with _named_reason(head):
        return Image.open(path, formats=image_formats())


def _open_bytes(data: bytes) -> Image.Image:
    if data.startswith(tiff_pages.SIGNATURES):
        return _open_tiff(data)
    if data.startswith(png_chunks.SIGNATURE):
        return _open_png(data)
    with _named_reason(data[:HEAD]):
        image = Image.open(io.BytesIO(data), formats=image_formats())
    if data.startswith(iso_boxes.JP2):
        image.info["icc_profile"] = iso_boxes.embedded_profile(data)
    elif data[4:8] == iso_boxes.FILE_TYPE and not image.info.get("icc_profile"):
        image.info["cicp"] = iso_boxes.code_points(data)
    return image


def _open_png(data: bytes) -> Image.Image:
    readable, info = png_chunks.readable_png(data)
    image = Image.open(io.BytesIO(readable), formats=["PNG"])
    image.info.update(info)
    if png_chunks.is_deep(data) and not getattr(image, "is_animated", False):
        image.info[LOW_BYTES] = low = Image.open(io.BytesIO(readable), formats=["PNG"])
        # In the opposite byte order Pillow keeps the other byte.
        low.tile = [_told(tile, f"{low.mode};16L") for tile in low.tile]
    return image


def _open_tiff(data: bytes) -> Image.Image:
    """Open a TIFF with Pillow, which knows all compressions, or with tifffile, which knows all kinds of samples."""
    try:
        image = Image.open(io.BytesIO(data), formats=["TIFF"])
    except UnidentifiedImageError:
        return tiff_pages.TiffPages(data)
    if not isinstance(image, TiffImageFile) or tiff_pages.misread_by_pillow(image.tag_v2):
        return tiff_pages.TiffPages(data)
    if tiff_pages.is_deep(image.tag_v2):  # Pillow drops the low bytes
        with suppress(Exception):  # tifffile may not know the compression
            return tiff_pages.TiffPages(data)
    return image


@contextmanager
def _named_reason(head: bytes) -> Iterator[None]:
    """Name the package that is needed, if Pillow cannot identify a file of a format that a package adds."""
    try:
        yield
    except UnidentifiedImageError:
        file_format = foreign_format(head)
        if file_format is None or file_format in image_formats():
            raise
        raise UnreadableImage(f"{file_format} {NEEDED[file_format]}") from None


def foreign_format(head: bytes) -> str | None:
    """Return which of `NEEDED` the first bytes of a file begin; None for any other format."""
    if head.startswith(JPEG_XL):
        return "JXL"
    brands = {head[8:12], *(head[start : start + 4] for start in range(16, len(head), 4))}
    if head[4:8] != b"ftyp" or not brands & (AVIF_BRANDS | HEIF_BRANDS):
        return None
    return "AVIF" if brands & AVIF_BRANDS else "HEIF"


def _expect_native_bytes(image: Image.Image) -> None:
    """Correct what Pillow tells its decoder of compressed big-endian TIFF: libtiff has swapped the bytes by then."""
    if not isinstance(image, ImageFile.ImageFile):
        return
    tiles: list[Any] = list(image.tile)
    if tiles and tiles[0][0] == "libtiff":
        image.tile = [_told(tile, (NATIVE.get(tile[3][0], tile[3][0]), *tile[3][1:])) for tile in tiles]


def _told(tile: tuple[Any, ...], arguments: object) -> Any:
    """Return a tile with other arguments for its decoder. Older releases of Pillow have plain tuples."""
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)


def _upright(image: Image.Image) -> Image.Image:
    """Return a copy, turned as Exif says if Exif can be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image.copy()


def _declared(image: Image.Image) -> Declared:
    """Return what the file says of its samples."""
    if isinstance(tags := getattr(image, "tag_v2", None), Mapping):
        return Declared.of_tiff(tags)
    if image.mode == "F":
        return Declared()
    sixteen_bits = image.mode.startswith("I;16") or image.format in SIXTEEN_BIT_FORMATS
    highest = 65535 if image.format == "PPM" else None  # Pillow scales the maximum in the header to this
    return Declared(bits=16 if sixteen_bits else None, highest=highest)


def _split(image: Image.Image, declared: Declared) -> tuple[Image.Image | np.ndarray, Image.Image | None]:
    """Return the colours (mode L, RGB, CMYK or LAB, or gray of 16 bits `[H,W]`) and the alpha, if any."""
    transparent = image.info.pop("transparency", None)
    signed = image.mode == "L" and declared.kind == SIGNED
    if signed or image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _long_samples(image, declared, transparent)
    if isinstance(transparent, (int, tuple, bytes)):  # a text of a PNG may have this name too
        image.info["transparency"] = transparent
    gray = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        *bands, alpha = image.convert("LA" if gray else "RGBA").split()
        return Image.merge("L" if gray else "RGB", bands), _unless_opaque(alpha)
    return image if image.mode in ("L", "RGB", "CMYK", "LAB") else image.convert("L" if gray else "RGB"), None


def _unless_opaque(alpha: Image.Image) -> Image.Image | None:
    return None if alpha.getextrema() == (255, 255) else alpha


def _long_samples(image: Image.Image, declared: Declared, transparent: object) -> tuple[np.ndarray, Image.Image | None]:
    """Return gray of 16 bits `[H,W]` and the alpha, if any, for samples of more than 8 bits.

    Pillow's own conversion clips them at 255.
    """
    values = np.asarray(image)
    if declared.kind == SIGNED and declared.bits in (8, 16):
        values = values.astype(f"i{declared.bits // 8}")
    elif declared.kind != SIGNED and declared.bits == 32 and values.dtype == np.int32:
        values = values.view(np.uint32)
    gray = (65535 * unit_values(values, declared)).round().astype(np.uint16)
    if not isinstance(transparent, int):
        return gray, None
    return gray, _unless_opaque(_mask(values != transparent))


def _refuse_dim(colour: Image.Image | np.ndarray, deep: bool, declared: Declared) -> None:
    """Raise an `AmbiguousRange` for 16 bits of which only 12 are used.

    Such files are rarely meant to be as dark as they are.
    """
    if declared != SIXTEEN_BITS:
        return
    if isinstance(colour, np.ndarray):
        dim = 0 < colour.max() <= TWELVE_BITS
    else:  # the high bytes
        dim = deep and 0 < np.asarray(colour.convert("RGB")).max() <= TWELVE_BITS >> 8
    if dim:
        raise AmbiguousRange("has 16 bits, but no value above 4095, as files of 12 bits have; convert it to 8 bits")


def _needs_low_bytes(image: Image.Image) -> bool:
    """Return whether RGB(A) needs all 16 bits: for exact colours, or because all high bytes are 0."""
    return bool(NEEDS_ALL_BITS & image.info.keys()) or not np.asarray(image)[..., :3].any()


def _join(high: Image.Image, low: Image.Image) -> tuple[np.ndarray, Image.Image | None]:
    """Return RGB of 16 bits `[H,W,3]` from images of its high and its low bytes, and the alpha, if any."""
    samples = np.asarray(high.convert("RGB")).astype(np.uint16) << 8 | np.asarray(low.convert("RGB"))
    if high.mode == "RGBA":
        return samples, _unless_opaque(high.getchannel("A"))
    transparent = high.info.get("transparency")
    if not isinstance(transparent, tuple):
        return samples, None
    return samples, _unless_opaque(_mask(~(samples == transparent).all(axis=-1)))


def _mask(visible: np.ndarray) -> Image.Image:
    return Image.fromarray(np.where(visible, 255, 0).astype(np.uint8))
