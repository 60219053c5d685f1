"""Picture files of any kind to upright sRGB pictures of 8 bits per sample."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import fsspec
import numpy as np
from PIL import Image, ImageOps

# Pillow only recognises the first five (their pixels need other software) and hands the last to Ghostscript.
NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"}


class UnreadableImage(ValueError):
    """A picture that cannot be decoded; the message is a short reason."""


@lru_cache(maxsize=1)
def picture_formats() -> tuple[str, ...]:
    """Return the names of the formats that Pillow itself decodes."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - NOT_DECODED))


@lru_cache(maxsize=1)
def picture_suffixes() -> frozenset[str]:
    """Return the lower-case file suffixes, such as `.png`, of `picture_formats`."""
    formats = set(picture_formats())
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


@contextmanager
def open_picture(source: object, *, max_pixels: int | None = None) -> Iterator[Image.Image]:
    """Open a picture at its first frame, as a context. `to_srgb` turns each frame into pixels.

    Args:
        source: a path, a URL that fsspec knows, the bytes of a file, `{"bytes", "path"}`, or a PIL image, which stays
            open afterwards.
        max_pixels: the largest picture to read, in pixels, in place of `Image.MAX_IMAGE_PIXELS`.

    Raises:
        UnreadableImage: if the picture is missing, is of no known format, or has too many pixels.
    """
    with _one_line_reason():
        image = _open(source)
    try:
        yield image
    finally:
        if image is not source:
            image.close()


def to_srgb(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the current frame of an opened picture as upright sRGB (mode RGB), and its alpha (mode L).

    The alpha is None where the picture is opaque. `image` is loaded, but not changed.

    Raises:
        UnreadableImage: if the pixels are broken, or if their range is ambiguous.
    """
    with _one_line_reason():
        image.load()
        return _split(ImageOps.exif_transpose(image))


def decode_rgb(source: object, *, max_pixels: int | None = None) -> Image.Image:
    """Return the first frame of a picture in sRGB (mode RGB), upright, transparent parts over white.

    Args:
        source: as for `open_picture`.
        max_pixels: as for `open_picture`.

    Raises:
        UnreadableImage: if the picture is missing, broken, too large, or of an ambiguous range of values.
    """
    with open_picture(source, max_pixels=max_pixels) as image:
        colour, alpha = to_srgb(image)
    if alpha is None:
        return colour
    colour.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB")


@contextmanager
def _one_line_reason() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except UnreadableImage:
        raise
    except Exception as error:  # on broken files Pillow raises nearly anything: SyntaxError, struct.error, ...
        reason = (str(error).splitlines() or [""])[0]
        raise UnreadableImage(f"{type(error).__name__}: {reason}") from error


def _open(source: object) -> Image.Image:
    """The picture, its pixels not yet read."""
    if isinstance(source, dict):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, str) and "://" in source:
        with fsspec.open(source, "rb") as file:
            source = file.read()
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source), formats=picture_formats())
    if isinstance(source, (str, os.PathLike)):
        if Path(source).exists() and not Path(source).is_file():  # a pipe would wait for ever, a device never end
            raise UnreadableImage("no regular file")
        return Image.open(source, formats=picture_formats())
    raise UnreadableImage(f"{type(source).__name__} instead of a picture")


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16-bit values at 255.
        return _from_gray(np.asarray(image) / 257), None
    if image.mode == "F":
        gray = np.asarray(image)
        if not np.isfinite(gray).all():
            raise UnreadableImage("contains NaN or infinite values")
        return _from_gray(gray * 255 if gray.max() <= 1 else gray), None
    if not image.has_transparency_data:
        return image.convert("RGB"), None
    opaque = image.convert("RGBA")
    return opaque.convert("RGB"), opaque.getchannel("A")


def _from_gray(gray: np.ndarray) -> Image.Image:
    """An `[H,W]` array in [0,255] (values beyond are clipped) as an RGB picture."""
    return Image.fromarray(gray.round().clip(0, 255).astype(np.uint8)).convert("RGB")
