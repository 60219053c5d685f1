"""Convert the colours of images to sRGB, from ICC profiles and from the short forms in PNG and Exif."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from PIL import ExifTags, Image, ImageCms

from srl_utils.console import warn_once

Converter = Callable[[Image.Image], Image.Image]
Chromaticities = tuple[float, ...]
"""x and y of white, red, green and blue, in this order."""

D65 = (0.3127, 0.3290)
SRGB: Chromaticities = (*D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
ADOBE_RGB: Chromaticities = (*D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
CODED_PRIMARIES: dict[int, Chromaticities] = {  # ITU-T H.273, table 2
    1: SRGB,
    5: (*D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (*D65, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    9: (*D65, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
    12: (*D65, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
}

# Exponent, then the slopes, offset and threshold of an ICC parametric curve of type 3.
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
BT709_CURVE = (1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
CODED_CURVES: dict[int, Sequence[float]] = {  # ITU-T H.273, table 3
    1: BT709_CURVE,
    4: (2.2,),
    5: (2.8,),
    6: BT709_CURVE,
    8: (1.0,),
    13: SRGB_CURVE,
    14: BT709_CURVE,
    15: BT709_CURVE,
}
ADOBE_GAMMA = 563 / 256
PNG_GAMMAS = (0.1, 10.0)  # values outside are errors of the file
SRGB_GAMMA = (0.434, 0.478)  # libpng's own tolerance of 5% around 1/2.2
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
D50 = np.array([0.9642, 1.0, 0.8249])

MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # by the colour space of a profile
DEVICES = {"scnr", "mntr", "prtr", "spac"}
SAME = 2  # levels; larger differences are not rounding
INTENTS = (ImageCms.Intent.PERCEPTUAL, ImageCms.Intent.RELATIVE_COLORIMETRIC)  # the first is used, as in browsers
RAMP = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
CACHED_PROFILES = 8
STRIP = 128  # rows


def profile_of(image: Image.Image) -> bytes | None:
    """Return the ICC profile of an opened image, or one that says what its PNG chunks or its Exif say.

    The order is that of the PNG specification: cICP, iCCP, sRGB, then gAMA and cHRM. Exif counts last.
    """
    if isinstance(coded := image.info.get("cicp"), tuple):
        return _coded_profile(*coded)
    embedded = image.info.get("icc_profile")
    if isinstance(embedded, bytes) and embedded:
        return embedded
    if isinstance(image.info.get("srgb"), int):
        return None
    return _png_profile(image) or _exif_profile(image)


def as_rgb(image: Image.Image | np.ndarray, profile: bytes | None) -> Image.Image:
    """Return an image in sRGB, mode RGB.

    A profile that is broken, or made for images of another kind, is ignored, as browsers ignore it.

    Args:
        image: of mode L, RGB, CMYK or LAB, or an array of 16 bits, `[H,W]` or `[H,W,3]`.
        profile: ICC profile of its colours; None for sRGB.
    """
    if profile and profile[16:20] == b"GRAY":
        image = _gray_of(image)
    mode = image.mode if isinstance(image, Image.Image) else "L" if image.ndim == 2 else "RGB"
    converter = _converter(profile, mode) if profile and mode != "LAB" else None
    if isinstance(image, np.ndarray):
        return _deep_as_rgb(image, converter)
    if converter is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    return converter(image)


def _gray_of(image: Image.Image | np.ndarray) -> Image.Image | np.ndarray:
    """Return mode L for an RGB image without colours; Pillow opens gray PNG of 16 bits with alpha as such an image."""
    if isinstance(image, np.ndarray) or image.mode != "RGB":
        return image
    red, green, blue = image.split()
    return red if red.tobytes() == green.tobytes() == blue.tobytes() else image


def _deep_as_rgb(samples: np.ndarray, converter: Converter | None) -> Image.Image:
    """Return an image of 16 bits per sample as sRGB of 8 bits.

    An image with steep curves is converted in strips of `STRIP` rows, as it needs many times its own memory.
    """
    if converter is None:
        return Image.fromarray((samples / 257).round().astype(np.uint8)).convert("RGB")
    if samples.ndim == 2:
        curves = np.asarray(converter(RAMP), np.float32)[0].T
        levels = np.arange(65536) / 257
        table = np.stack([np.interp(levels, np.arange(256), curve) for curve in curves], axis=-1)
        return Image.fromarray(table.round().astype(np.uint8)[samples])
    if not _is_steep(converter):
        return converter(_deep_as_rgb(samples, None))
    strips = [_interpolated(samples[row : row + STRIP], converter) for row in range(0, len(samples), STRIP)]
    return Image.fromarray(np.concatenate(strips))


def _is_steep(converter: Converter) -> bool:
    """Return whether neighbouring grays of 8 bits differ by more than rounding after the conversion.

    This is so for profiles of linear light.
    """
    return bool(np.diff(np.asarray(converter(RAMP), int), axis=1).max() > SAME)


def _interpolated(samples: np.ndarray, converter: Converter) -> np.ndarray:
    """Convert RGB of 16 bits `[H,W,3]` with a converter of 8 bits, and return 8 bits.

    Each colour is interpolated linearly between the eight converted colours around it.
    """
    place = samples.astype(np.float32) / 257
    below = np.minimum(place.astype(np.uint8), 254)
    share = place - below
    total = np.zeros_like(place)
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, share, 1 - share), axis=-1, keepdims=True)
        total += weight * np.asarray(converter(Image.fromarray(below + np.uint8(corner))), np.float32)
    return total.round().astype(np.uint8)


def matrix_profile(primaries: Chromaticities, curve: Sequence[float]) -> bytes:
    """Return an ICC profile (version 4) of an RGB space.

    Args:
        primaries: its chromaticities.
        curve: from samples to light: an exponent alone, or the five numbers of ICC's parametric curve of type 3.

    Raises:
        ValueError: if the chromaticities span no colour space.
    """
    columns = _colorants(primaries).T
    tags = {b"wtpt": _xyz(D50)}
    tags |= {b"%cXYZ" % name: _xyz(column) for name, column in zip(b"rgb", columns, strict=True)}
    kind = 0 if len(curve) == 1 else 3
    tags |= {b"%cTRC" % name: struct.pack(">4s4xHxx", b"para", kind) + _fixed(curve) for name in b"rgb"}
    return _assembled(tags)


def _png_profile(image: Image.Image) -> bytes | None:
    gamma, primaries = image.info.get("gamma"), image.info.get("chromaticity")
    gamma = gamma if isinstance(gamma, float) and PNG_GAMMAS[0] <= gamma <= PNG_GAMMAS[1] else None
    primaries = primaries if isinstance(primaries, tuple) and not np.allclose(primaries, SRGB, atol=1e-3) else None
    curve = SRGB_CURVE if gamma is None else (1 / gamma,)
    if primaries is None and (gamma is None or SRGB_GAMMA[0] < gamma < SRGB_GAMMA[1]):
        return None
    try:
        return matrix_profile(primaries or SRGB, curve)
    except ValueError:
        return matrix_profile(SRGB, curve)


def _coded_profile(primaries: int, transfer: int, matrix: int, full_range: int) -> bytes | None:
    """Return the profile of code points of ITU-T H.273, as the PNG chunk cICP holds them; None if they are unknown."""
    if primaries in CODED_PRIMARIES and transfer in CODED_CURVES and matrix == 0 and full_range == 1:
        return matrix_profile(CODED_PRIMARIES[primaries], CODED_CURVES[transfer])
    warn_once(f"colours of the code points {primaries}/{transfer}/{matrix}/{full_range} are read as sRGB")
    return None


def _exif_profile(image: Image.Image) -> bytes | None:
    """Return the profile of Adobe RGB if Exif names it (interoperability index R03, or colour space 2), else None."""
    space = _exif_entry(image, ExifTags.IFD.Exif, ExifTags.Base.ColorSpace)
    index = _exif_entry(image, ExifTags.IFD.Interop, ExifTags.Interop.InteropIndex)
    is_adobe = space == 2 or (isinstance(index, str) and index.startswith("R03"))
    return matrix_profile(ADOBE_RGB, (ADOBE_GAMMA,)) if is_adobe else None


def _exif_entry(image: Image.Image, group: int, entry: int) -> object:
    """Return an entry of a group of Exif; None if there is none, or if it cannot be read."""
    try:
        return image.getexif().get_ifd(group).get(entry)
    except Exception:  # Exif is often broken, and Pillow 12 fails where a group is missing
        return None


@lru_cache(maxsize=CACHED_PROFILES)
def _converter(profile: bytes, mode: str) -> Converter | None:
    """Return a function that converts images of this mode and profile to sRGB; None if it is sRGB or unusable."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        taken = MODES.get(opened.profile.xcolor_space.strip())
        if opened.profile.device_class not in DEVICES or taken not in (mode, "RGB" if mode == "L" else mode):
            warn_once("a colour profile made for another kind of image is ignored")
            return None
        if any(_changes_nothing(opened, taken, intent) for intent in INTENTS):
            return None
        transform = _transform(opened, taken, INTENTS[0])
    except (ImageCms.PyCMSError, ImportError, OSError, ValueError) as error:
        warn_once(f"a colour profile that cannot be used is ignored ({(str(error).splitlines() or [''])[0]})")
        return None
    if taken == "L":
        table = np.asarray(transform.apply(RAMP))[0]
        return lambda image: Image.fromarray(table[np.asarray(image)])
    return lambda image: transform.apply(image if image.mode == taken else image.convert(taken))


def _transform(profile: ImageCms.ImageCmsProfile, mode: str, intent: ImageCms.Intent) -> ImageCms.ImageCmsTransform:
    # Little CMS interpolates gray between few points, which is inaccurate in dark parts.
    flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
    return ImageCms.buildTransform(
        profile, ImageCms.createProfile("sRGB"), mode, "RGB", renderingIntent=intent, flags=flags
    )


def _changes_nothing(profile: ImageCms.ImageCmsProfile, mode: str, intent: ImageCms.Intent) -> bool:
    """Return whether the profile is one of the many of sRGB, which differ by roundings only.

    Such images stay as they are.
    """
    if mode == "CMYK":
        return False
    steps = np.linspace(0, 255, 18).astype(np.uint8)
    chart = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(18, -1, 3)
    image = Image.fromarray(chart[..., 0] if mode == "L" else chart)
    changed = np.asarray(_transform(profile, mode, intent).apply(image), int)
    return bool(np.abs(changed - np.asarray(image.convert("RGB"), int)).max() <= SAME)


def _colorants(primaries: Chromaticities) -> np.ndarray:
    """Return the XYZ of red, green and blue as columns `[3,3]`, adapted to the white D50 (Bradford).

    Raises:
        ValueError: if the chromaticities span no colour space.
    """
    x, y = np.array(primaries[0::2]), np.array(primaries[1::2])
    if not (y > 0).all():
        raise ValueError("chromaticities without light")
    white, *lights = np.stack([x / y, np.ones(4), (1 - x - y) / y], axis=1)
    lights = np.array(lights).T
    if abs(np.linalg.det(lights)) < 1e-4:
        raise ValueError("chromaticities on one line")
    lights = lights * np.linalg.solve(lights, white)
    gains = (BRADFORD @ D50) / (BRADFORD @ white)
    return np.linalg.solve(BRADFORD, gains[:, None] * (BRADFORD @ lights))


def _fixed(numbers: Sequence[float] | np.ndarray) -> bytes:
    """Return numbers as ICC's s15Fixed16Number, four bytes each."""
    return struct.pack(f">{len(numbers)}i", *(round(65536 * float(number)) for number in numbers))


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(values)


def _assembled(tags: dict[bytes, bytes]) -> bytes:
    """Return an ICC profile of an RGB display with these tags."""
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(">I4xI4s4s4s12x4s28x", start + len(body), 0x04300000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    return (header + _fixed(D50)).ljust(128, b"\0") + table + body
