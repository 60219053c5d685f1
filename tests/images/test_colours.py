"""Colour profiles, PNG's gAMA, cHRM and cICP, and Exif's Adobe RGB, to sRGB."""

from __future__ import annotations

import io
import logging
import struct

import numpy as np
import pytest
from helpers.picture_files import (
    ALPHA,
    COLOURS,
    RAMP,
    as_levels,
    cmyk_icc,
    encoded,
    gray_icc,
    levels,
    over_white,
    png,
    tiff,
)
from PIL import Image, ImageCms

from srl_utils.console import warn_once
from srl_utils.images.colours import ADOBE_RGB, BT709_CURVE, CODED_PRIMARIES, SRGB, SRGB_CURVE, matrix_profile
from srl_utils.images.decoding import decode_rgb, open_image, to_srgb

P3 = matrix_profile(CODED_PRIMARIES[12], SRGB_CURVE)
ADOBE = matrix_profile(ADOBE_RGB, (563 / 256,))
PICTURE = Image.fromarray(levels(COLOURS))
GRAY = Image.fromarray(levels(RAMP))
LIGHTNESS = np.asarray(GRAY) / 255


def decoded(source: object) -> np.ndarray:
    return np.asarray(decode_rgb(source)).astype(float)


def encode_srgb(light: np.ndarray) -> np.ndarray:
    """The sRGB standard's curve, from linear light in [0,1]."""
    light = light.clip(0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def to_xyz(primaries: tuple[float, ...]) -> np.ndarray:
    """`[3,3]`: the XYZ of the primaries as columns, which add up to that of white."""
    x, y = np.array(primaries[0::2]), np.array(primaries[1::2])
    white, *lights = np.stack([x / y, np.ones(4), (1 - x - y) / y], axis=1)
    lights = np.array(lights).T
    return lights * np.linalg.solve(lights, white)


def formula(unit: np.ndarray, primaries: tuple[float, ...], exponent: float | None) -> np.ndarray:
    """Values of a space with a white of D65 and this gamma (None: the curve of sRGB) in sRGB, both in [0,1]."""
    curve = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    light = curve if exponent is None else unit**exponent
    return encode_srgb(light @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(primaries)).T)


def by_image_cms(picture: Image.Image, profile: bytes) -> np.ndarray:
    converted = ImageCms.profileToProfile(
        picture, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    return np.asarray(converted).astype(float)


@pytest.mark.parametrize(
    ("profile", "primaries", "exponent"),
    [
        (P3, (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06), None),
        (ADOBE, (0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06), 563 / 256),
        (matrix_profile(SRGB, (1.0,)), SRGB, 1.0),
        (matrix_profile(SRGB, (1.8,)), SRGB, 1.8),
    ],
    ids=["display p3", "adobe rgb", "linear", "gamma 1.8"],
)
def test_matrix_profiles_follow_the_formula(
    profile: bytes, primaries: tuple[float, ...], exponent: float | None
) -> None:
    """Oracle: closed form; the published primaries and curves of both spaces in NumPy."""
    expected = 255 * formula(np.asarray(PICTURE) / 255, primaries, exponent)
    assert np.abs(expected - np.asarray(PICTURE)).max() > 10  # the profile matters
    assert np.abs(decoded(encoded(PICTURE, icc_profile=profile)) - expected).max() <= 1


FORMATS = {
    "PNG": {}, "TIFF": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "MPO": {"quality": 95}, "AVIF": {},
}  # fmt: skip


@pytest.mark.parametrize("file_format", FORMATS)
def test_profiles_count_in_every_format(file_format: str) -> None:
    """Oracle: Pillow's ImageCms on the pixels as Pillow decodes them."""
    if file_format not in Image.SAVE:
        pytest.skip(f"this Pillow has no {file_format}")
    data = encoded(PICTURE, file_format, icc_profile=P3, **FORMATS[file_format])
    with Image.open(io.BytesIO(data)) as image:
        expected = by_image_cms(image.convert("RGB"), P3)
    assert np.array_equal(decoded(data), expected)


@pytest.mark.parametrize("name", ["P3", "none"])
def test_profiles_of_jpeg_2000_count(name: str) -> None:
    """Oracle: ImageCms on the pixels; Pillow's file with its box of colours exchanged for one with a profile."""
    data = encoded(PICTURE, "JPEG2000", irreversible=False)
    header, colours = data.index(b"jp2h") - 4, data.index(b"colr") - 4
    length = struct.unpack_from(">I", data, colours)[0]
    box = struct.pack(">I4sBBB", 11 + len(P3), b"colr", 2, 0, 0) + P3
    longer = struct.pack(">I", struct.unpack_from(">I", data, header)[0] + len(box) - length)
    changed = data[:header] + longer + data[header + 4 : colours] + box + data[colours + length :]
    if name == "P3":
        assert np.array_equal(decoded(changed), by_image_cms(PICTURE, P3))
    else:
        assert np.array_equal(decoded(data), np.asarray(PICTURE))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("profile", [P3, ADOBE], ids=["display p3", "adobe rgb"])
def test_palettes_and_gray_follow_an_rgb_profile(profile: bytes, file_format: str) -> None:
    """Oracle: ImageCms on the picture in RGB."""
    for picture in (PICTURE.quantize(32), GRAY):
        data = encoded(picture, file_format, icc_profile=profile)
        assert np.array_equal(decoded(data), by_image_cms(picture.convert("RGB"), profile))


def test_transparency_is_blended_after_the_conversion() -> None:
    """Oracle: closed form on the converted colours; the alpha itself is that of the file."""
    transparent = PICTURE.copy()
    transparent.putalpha(Image.fromarray(levels(ALPHA)))
    data = encoded(transparent, icc_profile=P3)
    converted = by_image_cms(PICTURE, P3)
    with open_image(data) as image:
        colour, alpha = to_srgb(image)
    assert np.array_equal(np.asarray(colour), converted) and np.array_equal(np.asarray(alpha), levels(ALPHA))
    assert np.abs(decoded(data) - 255 * over_white(converted / 255, levels(ALPHA) / 255)).max() <= 1


def test_a_clear_colour_is_found_before_the_conversion() -> None:
    """Oracle: tRNS names the colour as the file has it; the rest is ImageCms's."""
    clear = np.asarray(PICTURE)[3, 4]
    data = encoded(PICTURE, icc_profile=P3, transparency=tuple(int(value) for value in clear))
    expected = np.where((np.asarray(PICTURE) == clear).all(-1, keepdims=True), 255, by_image_cms(PICTURE, P3))
    assert np.array_equal(decoded(data), expected)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "JPEG"])
def test_gray_profiles_follow_the_formula(file_format: str) -> None:
    """Oracle: closed form; gamma 1.8 to the curve of sRGB."""
    data = encoded(GRAY, file_format, icc_profile=gray_icc(1.8), **({"quality": 100} if file_format == "JPEG" else {}))
    expected = as_levels(encode_srgb(LIGHTNESS**1.8))
    assert np.abs(decoded(data) - expected).max() <= (3 if file_format == "JPEG" else 1)


def test_gray_profiles_count_beside_an_alpha() -> None:
    """Oracle: closed form, for gray and alpha of 8 and of 16 bits."""
    expected = as_levels(over_white(encode_srgb(RAMP**1.8), ALPHA))
    for bits in (8, 16):
        samples = np.stack([levels(RAMP, bits), levels(ALPHA, bits)], axis=-1)
        with Image.open(io.BytesIO(png(samples, bits, 4))) as image:
            image.load()
            image.info["icc_profile"] = gray_icc(1.8)
            assert np.abs(decoded(image) - expected).max() <= 2


@pytest.mark.parametrize("file_format", ["TIFF", "JPEG"])
def test_cmyk_profiles_count(file_format: str) -> None:
    """Oracle: ImageCms on the inks as Pillow reads them; and the plain formula, from which it is far."""
    inks = Image.fromarray(levels(np.concatenate([1 - COLOURS, 0.3 * RAMP[..., None]], axis=-1)), "CMYK")
    options = {"quality": 95} if file_format == "JPEG" else {}
    data = encoded(inks, file_format, icc_profile=cmyk_icc(), **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = by_image_cms(image, cmyk_icc())
        assert np.abs(expected - np.asarray(image.convert("RGB"), float)).mean() > 10
    assert np.array_equal(decoded(data), expected)


def test_profiles_of_pictures_in_memory_count() -> None:
    """Oracle: the same picture as a file; the picture given stays as it was."""
    picture = PICTURE.copy()
    picture.info["icc_profile"] = P3
    assert np.array_equal(decoded(picture), by_image_cms(PICTURE, P3))
    assert np.array_equal(np.asarray(picture), np.asarray(PICTURE))


@pytest.mark.parametrize("profile", [P3, gray_icc(1.8), cmyk_icc(), b"junk"], ids=["rgb", "gray", "cmyk", "broken"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "LAB", "P", "RGBA"])
def test_decoding_twice_is_decoding_once(mode: str, profile: bytes) -> None:
    """Oracle: invariance; the result is sRGB and carries nothing that says otherwise, also when it is saved."""
    exif = Image.Exif()
    exif[0x0112] = 6
    once = decode_rgb(encoded(PICTURE.convert(mode), "TIFF", icc_profile=profile, exif=exif))
    assert np.array_equal(decode_rgb(once), once) and once.size == PICTURE.size[::-1]
    assert np.array_equal(decode_rgb(encoded(once)), once)


@pytest.mark.parametrize("bits", [16, 32])
def test_linear_light_keeps_its_shadows(bits: int) -> None:
    """Oracle: closed form; with 8 bits of linear light the darkest step would be 13 levels."""
    dark = COLOURS / 20
    samples = levels(dark, 16) if bits == 16 else dark.astype(np.float32)
    expected = as_levels(encode_srgb(dark))
    assert np.abs(decoded(tiff(samples, "rgb", iccprofile=matrix_profile(SRGB, (1.0,)))) - expected).max() <= 2
    gray = samples[..., 0]
    assert np.abs(decoded(tiff(gray, iccprofile=gray_icc(1.0))) - expected[..., :1]).max() <= 2


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("picture", ["rgb", "gray", "rgba"])
def test_srgb_profiles_change_nothing(picture: str, bits: int) -> None:
    """Oracle: the same file without the profile, to the byte."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    samples = {"rgb": COLOURS, "gray": RAMP, "rgba": np.concatenate([COLOURS, ALPHA[..., None]], -1)}[picture]
    options = {"extrasamples": ["unassalpha"]} if picture == "rgba" else {}
    photometric = "minisblack" if picture == "gray" else "rgb"
    plain, named = (
        decoded(tiff(levels(samples, bits), photometric, **options, **more)) for more in ({}, {"iccprofile": profile})
    )
    assert np.abs(plain - named).max() <= (0 if bits == 8 or picture == "gray" else 1)


BAD_PROFILES = {
    "no profile": b"junk", "empty": b"", "cut": P3[:300], "cut in its header": P3[:60], "zeros": bytes(400),
    "of gray": gray_icc(1.8), "of inks": cmyk_icc(), "of no device": P3[:12] + b"link" + P3[16:],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PROFILES)
def test_profiles_that_do_not_fit_are_ignored_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: the pixels as they are, and one line in the log for two pictures."""
    warn_once.cache_clear()
    data = encoded(PICTURE, icc_profile=BAD_PROFILES[name])
    assert np.array_equal(decoded(data), np.asarray(PICTURE))
    assert np.array_equal(decoded(encoded(PICTURE, "TIFF", icc_profile=BAD_PROFILES[name])), np.asarray(PICTURE))
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) <= 1


# --- the short forms of PNG and Exif -------------------------------------------------------------------


def gama(value: int) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", value)


def chrm(primaries: tuple[float, ...]) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *(round(100_000 * value) for value in primaries))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("gamma", [100_000, 55_556, 60_000])
def test_gamma_of_png_follows_the_formula(gamma: int, bits: int) -> None:
    """Oracle: closed form; light is the sample to the power of 1 / gamma."""
    for unit, colour_type in ((COLOURS, 2), (RAMP, 0)):
        samples = levels(unit, bits)
        expected = as_levels(encode_srgb((samples / (2**bits - 1)) ** (100_000 / gamma)))
        assert np.abs(decoded(png(samples, bits, colour_type, gama(gamma))) - expected).max() <= 2


def test_chromaticities_of_png_follow_the_formula() -> None:
    """Oracle: closed form, with a gamma, and with the curve of sRGB where there is none."""
    samples = levels(COLOURS)
    for chunks, exponent in (((chrm(ADOBE_RGB), gama(45455)), 2.2), ((chrm(ADOBE_RGB),), None)):
        expected = 255 * formula(samples / 255, ADOBE_RGB, exponent)
        assert np.abs(decoded(png(samples, 8, 2, *chunks)) - expected).max() <= 1


NEUTRAL = {
    "gamma of sRGB": [gama(45455)],
    "all of sRGB": [gama(45455), chrm(SRGB)],
    "sRGB beside another gamma": [(b"sRGB", b"\0"), gama(100_000), chrm(ADOBE_RGB)],
    "cICP of sRGB beside another gamma": [(b"cICP", bytes([1, 13, 0, 1])), gama(100_000)],
    "gamma 0": [gama(0)],
    "absurd gamma": [gama(1)],
    "no chromaticities": [(b"cHRM", bytes(32))],
    "chromaticities on a line": [chrm((0.3127, 0.329, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3))],
    "texts with telling names": [
        (b"tEXt", name + b"\0text")
        for name in (
            b"gamma",
            b"chromaticity",
            b"srgb",
            b"icc_profile",
            b"transparency",
            b"cicp",
            b"exif",
            b"low_bytes",
        )
    ],
    "high dynamic range": [(b"cICP", bytes([9, 16, 0, 1]))],
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_and_absurd_chunks_change_nothing(name: str) -> None:
    """Oracle: the samples themselves; the PNG specification's order of precedence."""
    assert np.array_equal(decoded(png(levels(COLOURS), 8, 2, *NEUTRAL[name])), levels(COLOURS))


def test_code_points_of_png_come_first() -> None:
    """Oracle: closed form for Display P3 and for BT.2020 with the curve of BT.709, whatever else the file says."""
    samples = levels(COLOURS)
    p3 = 255 * formula(samples / 255, CODED_PRIMARIES[12], None)
    others = [(b"iCCP", b"a\0\0" + b"junk"), gama(100_000)]
    assert np.abs(decoded(png(samples, 8, 2, (b"cICP", bytes([12, 13, 0, 1])), *others)) - p3).max() <= 1
    exponent, slope, offset, linear, edge = BT709_CURVE
    light = np.where(samples / 255 < edge, samples / 255 * linear, (slope * (samples / 255) + offset) ** exponent)
    expected = 255 * formula(light, CODED_PRIMARIES[9], 1.0)
    assert np.abs(decoded(png(samples, 8, 2, (b"cICP", bytes([9, 1, 0, 1])))) - expected).max() <= 1


@pytest.mark.parametrize(
    ("entries", "is_adobe"),
    [
        ({0xA001: 2}, True),
        ({0xA001: 65535, 0xA005: {1: "R03"}}, True),
        ({0xA001: 1, 0xA005: {1: "R98"}}, False),
        ({0xA001: 65535}, False),
    ],
    ids=["colour space 2", "R03", "R98", "uncalibrated"],
)
def test_adobe_rgb_by_exif(entries: dict[int, object], is_adobe: bool) -> None:
    """Oracle: closed form; cameras write R03 (DCF) or colour space 2 and no profile. A profile counts before it."""
    exif = Image.Exif()
    exif[0x8769] = entries
    expected = 255 * formula(np.asarray(PICTURE) / 255, ADOBE_RGB, 563 / 256) if is_adobe else np.asarray(PICTURE)
    assert np.abs(decoded(encoded(PICTURE, exif=exif.tobytes())) - expected).max() <= (1 if is_adobe else 0)
    both = encoded(PICTURE, exif=exif.tobytes(), icc_profile=P3)
    assert np.array_equal(decoded(both), by_image_cms(PICTURE, P3))
