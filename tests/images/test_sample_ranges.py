"""Which number of a file is white: by what the file says, whatever the bits, the byte order and the compression."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import tifffile
from helpers.picture_files import (
    ALPHA,
    COLOURS,
    HEIGHT,
    RAMP,
    WIDTH,
    as_levels,
    encoded,
    levels,
    over_white,
    packed_tiff,
    png,
    tiff,
)
from PIL import Image

from srl_utils.images.decoding import UnreadableImage, decode_rgb, open_image, to_srgb
from srl_utils.images.sample_ranges import AmbiguousRange, Declared, unit_values

WHITES = {
    np.uint8: 255, np.uint16: 65535, np.uint32: 2**32 - 1, np.int8: 127, np.int16: 32767, np.int32: 2**31 - 1,
    np.float16: 1, np.float32: 1, np.float64: 1,
}  # fmt: skip
ORDERS = pytest.mark.parametrize("order", ["<", ">"])


def error(data: bytes, expected: np.ndarray) -> float:
    """The largest difference in levels from an expected picture in [0,1]."""
    return float(np.abs(np.asarray(decode_rgb(data), float) - as_levels(expected)).max())


@ORDERS
@pytest.mark.parametrize("kind", WHITES, ids=lambda kind: kind.__name__)
def test_every_number_type_of_tiff(kind: type, order: str) -> None:
    """Oracle: closed form; full scale is white, and zero where the photometric tag says so. tifffile writes them."""
    gray, colours = ((unit * WHITES[kind]).astype(kind) for unit in (RAMP, COLOURS))
    tolerance = 1 if WHITES[kind] in (1, 255) or WHITES[kind] > 255 else 3  # 127 steps are 2 levels each
    assert error(tiff(gray, byteorder=order), RAMP) <= tolerance
    assert error(tiff(gray, "miniswhite", byteorder=order), 1 - RAMP) <= tolerance
    assert error(tiff(gray, byteorder=order, compression="zlib"), RAMP) <= tolerance
    assert error(tiff(colours, "rgb", byteorder=order), COLOURS) <= tolerance
    planes = np.ascontiguousarray(np.moveaxis(colours, -1, 0))
    assert error(tiff(planes, "rgb", planarconfig="separate", byteorder=order), COLOURS) <= tolerance


LAYOUTS = {
    "tiles": {"tile": (16, 16)}, "strips": {"rowsperstrip": 5}, "big tiff": {"bigtiff": True},
    "predictor": {"compression": "zlib", "predictor": 2},
}  # fmt: skip


@ORDERS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [np.int16, np.uint16, np.uint32, np.float32], ids=lambda kind: kind.__name__)
def test_every_layout_of_tiff(kind: type, layout: str, order: str) -> None:
    """Oracle: closed form, as above; the place of the samples in the file does not matter."""
    options = {} if kind is np.float32 and layout == "predictor" else LAYOUTS[layout]
    for unit, photometric in ((RAMP, "minisblack"), (COLOURS, "rgb")):
        data = tiff((unit * WHITES[kind]).astype(kind), photometric, byteorder=order, **options)
        assert error(data, unit) <= 1


@ORDERS
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "deflated"])
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_packed_samples_of_tiff(bits: int, compress: bool, order: str) -> None:
    """Oracle: closed form; 2^bits - 1 is white."""
    gray, colours = levels(RAMP, bits), levels(COLOURS, bits)
    assert error(packed_tiff(gray, bits, 1, order, compress), RAMP) <= 1
    assert error(packed_tiff(gray, bits, 0, order, compress), 1 - RAMP) <= 1
    assert error(packed_tiff(colours, bits, 2, order, compress), COLOURS) <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_few_bits_of_tiff(bits: int) -> None:
    """Oracle: closed form, for both senses of gray."""
    for photometric in (0, 1):
        unit = levels(RAMP, bits) / (2**bits - 1)
        assert error(packed_tiff(levels(RAMP, bits), bits, photometric), unit if photometric else 1 - unit) <= 1


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("extra", ["unassalpha", "assocalpha", "unspecified"])
def test_extra_samples_of_tiff(extra: str, kind: type) -> None:
    """Oracle: closed form; alpha is kept, multiplied into the colours or not, and what is unspecified is no alpha."""
    for unit, photometric in ((RAMP[..., None], "minisblack"), (COLOURS, "rgb")):
        stored = unit * ALPHA[..., None] if extra == "assocalpha" else unit
        samples = (np.concatenate([stored, ALPHA[..., None]], axis=-1) * WHITES[kind]).astype(kind)
        data = tiff(samples, photometric, planarconfig="contig", extrasamples=[extra])
        flat = unit if unit.shape[-1] == 3 else unit[..., 0]
        assert error(data, flat if extra == "unspecified" else over_white(flat, ALPHA)) <= 3


@pytest.mark.parametrize("tag", [281, 341])
def test_fewer_bits_than_the_file_has_room_for(tag: int) -> None:
    """Oracle: closed form; a declared highest value of 2^12 - 1 is white, a mere maximum of the picture is not."""
    gray, colours = levels(RAMP, 12), levels(COLOURS, 12)
    assert error(tiff(gray, extratags=[(tag, "H", 1, 4095, True)]), RAMP) <= 1
    assert error(tiff(colours, "rgb", extratags=[(tag, "H", 3, (4095,) * 3, True)]), COLOURS) <= 1
    assert error(tiff(gray, extratags=[(tag, "H", 1, 4094, True)]), gray / 65535) <= 1
    assert error(tiff(levels(RAMP, 16), extratags=[(tag, "H", 1, 4095, True)]), RAMP) <= 1


@pytest.mark.parametrize("maximum", [1, 255, 300, 1023, 4095])
def test_sixteen_bits_of_which_only_twelve_are_used(maximum: int) -> None:
    """Oracle: a file of 12 bits in words is the same as one that is nearly black, so neither is guessed."""
    for unit, photometric, colour_type in ((RAMP, "minisblack", 0), (COLOURS, "rgb", 2)):
        samples = (unit * maximum).astype(np.uint16)
        for data in (
            tiff(samples, photometric),
            tiff(samples, photometric, compression="zlib"),
            png(samples, 16, colour_type),
        ):
            with pytest.raises(UnreadableImage, match="no value above 4095"):
                decode_rgb(data)


def test_black_and_declared_darkness_are_read() -> None:
    """Oracle: closed form; words of zeros, 8 bits, and a PGM, whose header names its white."""
    assert error(tiff(np.zeros((5, 5), np.uint16)), np.zeros((5, 5))) == 0
    assert error(png(np.zeros((5, 5, 3), np.uint16), 16, 2), np.zeros((5, 5, 3))) == 0
    assert error(png(levels(COLOURS / 20), 8, 2), COLOURS / 20) <= 1
    dark = (RAMP * 3000).astype(">u2")
    assert error(b"P5\n%d %d\n65535\n" % (WIDTH, HEIGHT) + dark.tobytes(), dark / 65535) <= 1


def fractions(scale: float, shift: float = 0.0) -> bytes:
    return tiff((RAMP * scale + shift).astype(np.float32))


@pytest.mark.parametrize(
    ("scale", "shift", "white"),
    [
        (1.0001, 0, 1), (1.2, 0, 1), (1.0, -0.01, 1), (0.3, 0, 1), (0, 0, 1), (1.2, -0.1, 1), (1e-3, 0, 1),
        (255, 0, 255), (255.4, 0, 255), (290, -15, 255), (200, 0, 255), (60, 0, 255),
        (65535, 0, 65535), (65600, 0, 65535), (40_000, 0, 65535),
    ],
)  # fmt: skip
def test_fractions_show_their_white(scale: float, shift: float, white: float) -> None:
    """Oracle: closed form; values just beyond black or white are clipped, and all others stay in proportion."""
    assert error(fractions(scale, shift), (RAMP * scale + shift) / white) <= 1


def test_one_value_beyond_white_changes_no_other() -> None:
    """Oracle: the same picture without it."""
    spoiled = RAMP.astype(np.float32)
    spoiled[0, 0] = 1.0001
    same = np.asarray(decode_rgb(tiff(spoiled)))[1:] == np.asarray(decode_rgb(fractions(1)))[1:]
    assert same.all()


@pytest.mark.parametrize(
    "samples",
    [
        RAMP * 3.7, RAMP * 1000, RAMP * 4095, RAMP * 2 - 1, RAMP**8 * 40, RAMP**20 * 300, RAMP * 1e9, RAMP * 300 - 150,
        np.where(RAMP > 0.5, np.nan, RAMP), np.where(RAMP > 0.5, np.inf, RAMP),
        (RAMP * 1000).astype(np.int32), (RAMP * 3000 - 1024).astype(np.int16), (RAMP * 1e7).astype(np.uint32),
    ],
    ids=[
        "3.7", "1000", "4095", "-1 to 1", "bright lights", "brighter lights", "1e9", "far below black", "nan", "infinity",
        "long integers to 1000", "tomography", "long integers to 1e7",
    ],
)  # fmt: skip
def test_ambiguous_ranges_are_refused(samples: np.ndarray) -> None:
    """Oracle: nothing in these files says what is white; the reason is one line with the value that is in doubt."""
    kind = np.float32 if samples.dtype == np.float64 else samples.dtype
    with pytest.raises(UnreadableImage, match=r"values (up|down) to -?[\d.e+]+|NaN or infinite") as caught:
        decode_rgb(tiff(samples.astype(kind)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("scale", "white"), [(1, 1), (255, 255), (65535, 65535), (2**31 - 1, 2**31 - 1)])
def test_long_integers_show_their_white(scale: int, white: int) -> None:
    """Oracle: closed form; masks, bytes and words in long integers, and their full range."""
    samples = (RAMP * scale).astype(np.int32)
    assert error(tiff(samples), samples / white) <= 1


@pytest.mark.parametrize("maximum", [100, 255, 1000, 4095, 65535])
def test_maximum_of_pgm_and_ppm_is_white(maximum: int) -> None:
    """Oracle: closed form; the header's maximum is white, also where no pixel has it."""
    for unit, magic in ((RAMP, b"P5"), (0.3 * RAMP, b"P5"), (COLOURS, b"P6")):
        samples = (unit * maximum).round().astype(">u2" if maximum > 255 else "u1")
        data = b"%s\n%d %d\n%d\n" % (magic, WIDTH, HEIGHT, maximum) + samples.tobytes()
        assert error(data, samples / maximum) <= 1


def test_floats_of_pfm() -> None:
    """Oracle: closed form; rows go from bottom to top."""
    data = b"Pf\n%d %d\n-1.0\n" % (WIDTH, HEIGHT) + RAMP[::-1].astype("<f4").tobytes()
    assert error(data, RAMP) <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_clear_gray_of_png(bits: int) -> None:
    """Oracle: tRNS names one gray in the file's own bits; it and no other becomes white."""
    samples = levels(RAMP, bits)
    samples[3:6] = samples[4, 5]
    data = png(samples, bits, 0, (b"tRNS", struct.pack(">H", samples[4, 5])))
    assert error(data, np.where(samples == samples[4, 5], 1, samples / (2**bits - 1))) <= 1


@pytest.mark.parametrize("bits", [8, 16])
def test_clear_colour_of_png(bits: int) -> None:
    """Oracle: as above, by all bits: a colour that differs in the last of 16 bits is not transparent."""
    samples = levels(COLOURS, bits)
    samples[3:6] = samples[4, 5]
    samples[7:9] = samples[4, 5] ^ 1
    data = png(samples, bits, 2, (b"tRNS", struct.pack(">3H", *samples[4, 5])))
    clear = (samples == samples[4, 5]).all(axis=-1, keepdims=True)
    assert error(data, np.where(clear, 1, samples / (2**bits - 1))) <= 1


def test_alpha_of_png_with_16_bits() -> None:
    """Oracle: closed form, for gray and for colours; the alpha itself is in `to_srgb`."""
    for unit, colour_type in ((RAMP[..., None], 4), (COLOURS, 6)):
        data = png(levels(np.concatenate([unit, ALPHA[..., None]], axis=-1), 16), 16, colour_type)
        assert error(data, over_white(unit if colour_type == 6 else unit[..., 0], ALPHA)) <= 2
        with open_image(data) as image:
            alpha = to_srgb(image)[1]
        assert np.abs(np.asarray(alpha, float) - 255 * ALPHA).max() <= 1


IN_MEMORY = {
    "I": (Image.fromarray((RAMP * 65535).astype(np.int32)), RAMP),
    "F": (Image.fromarray(RAMP.astype(np.float32)), RAMP),
    "I;16": (Image.fromarray(levels(RAMP, 16)), RAMP),
    "I;16B": (Image.frombytes("I;16B", (WIDTH, HEIGHT), levels(RAMP, 16).astype(">u2").tobytes()), RAMP),
    "La": (Image.merge("LA", [Image.fromarray(levels(unit)) for unit in (RAMP, ALPHA)]).convert("La"), None),
    "RGBa": (Image.fromarray(levels(np.concatenate([COLOURS, ALPHA[..., None]], -1))).convert("RGBa"), None),
    "PA": (Image.new("PA", (WIDTH, HEIGHT), (0, 0)), np.ones_like(RAMP)),
    "HSV": (Image.fromarray(levels(COLOURS)).convert("HSV"), COLOURS),
    "YCbCr": (Image.fromarray(levels(COLOURS)).convert("YCbCr"), COLOURS),
    "LAB": (Image.new("LAB", (WIDTH, HEIGHT), (255, 128, 128)), np.ones_like(RAMP)),
}
IN_MEMORY["La"] = (IN_MEMORY["La"][0], over_white(RAMP, ALPHA))
IN_MEMORY["RGBa"] = (IN_MEMORY["RGBa"][0], over_white(COLOURS, ALPHA))


@pytest.mark.parametrize("mode", IN_MEMORY)
def test_every_mode_in_memory(mode: str) -> None:
    """Oracle: closed form, within the roundings of the mode; the picture given stays as it was."""
    picture, expected = IN_MEMORY[mode]
    before = picture.tobytes()
    assert picture.mode == mode
    assert np.abs(np.asarray(decode_rgb(picture), float) - as_levels(expected)).max() <= 6
    assert picture.tobytes() == before and picture.mode == mode


@ORDERS
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32], ids=lambda kind: kind.__name__)
def test_orientation_of_every_kind_of_tiff(kind: type, order: str) -> None:
    """Oracle: NumPy's rotation by a quarter clockwise, which orientation 6 asks for."""
    turn = [(274, "H", 1, 6, True)]
    for unit, photometric in ((RAMP, "minisblack"), (COLOURS, "rgb")):
        data = tiff((unit * WHITES[kind]).astype(kind), photometric, byteorder=order, extratags=turn)
        assert error(data, np.rot90(unit, -1)) <= 1


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32], ids=lambda kind: kind.__name__)
def test_pages_of_tiff(kind: type) -> None:
    """Oracle: each page as a file of its own; its size may differ."""
    pages = [(unit * WHITES[kind]).astype(kind) for unit in (COLOURS, 0.5 * COLOURS[:5], COLOURS[::-1])]
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for page in pages:
            writer.write(page, photometric="rgb")
    with open_image(file.getvalue()) as image:
        assert image.n_frames == 3
        for number in (2, 0, 1):
            image.seek(number)
            assert image.tell() == number
            assert np.array_equal(to_srgb(image)[0], decode_rgb(tiff(pages[number], "rgb")))
        with pytest.raises(EOFError):
            image.seek(3)


@pytest.mark.parametrize("kind", [np.float32, np.uint32], ids=lambda kind: kind.__name__)
def test_truncated_tiff_of_unusual_numbers_is_unreadable(kind: type) -> None:
    """Oracle: a file without its last bytes holds no whole picture."""
    data = tiff((COLOURS * WHITES[kind]).astype(kind), "rgb", compression="zlib")
    for end in (len(data) - 40, len(data) // 2, 60):
        with pytest.raises(UnreadableImage):
            decode_rgb(data[:end])


def test_no_values_are_refused_in_one_line() -> None:
    """Oracle: complex numbers are no picture."""
    with pytest.raises(AmbiguousRange, match="complex64"):
        unit_values(np.ones((2, 2), np.complex64), Declared())


def test_pillow_and_tifffile_agree() -> None:
    """Oracle: the same 16 bits in a compression that only Pillow knows and in one that both know."""
    picture = Image.fromarray(levels(RAMP, 16))
    assert np.array_equal(
        decode_rgb(encoded(picture, "TIFF", compression="tiff_lzw")), decode_rgb(tiff(levels(RAMP, 16)))
    )
