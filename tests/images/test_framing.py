"""Decoding to RGB, crops, and the listing of picture files."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from srl_utils.images.decoding import UnreadableImage, decode_rgb, image_suffixes
from srl_utils.images.framing import Crop, random_box, to_tensor
from srl_utils.images.listing import list_files
from srl_utils.images.pixels import to_pil

SIZE = (6, 4)


def encode(picture: Image.Image, file_format: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


def palette_with_transparency() -> bytes:
    picture = Image.new("P", SIZE, 0)
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.paste(1, (0, 0, 3, 4))
    return encode(picture, "PNG", transparency=1)


def animation() -> bytes:
    frames = [Image.new("RGB", SIZE, color) for color in ((255, 0, 0), (0, 0, 255))]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])


SIXTEEN_BIT = np.full(SIZE[::-1], 257 * 100, dtype=np.uint16)

CASES = {
    "rgb": (encode(Image.new("RGB", SIZE, (1, 2, 3)), "PNG"), (1, 2, 3)),
    "gray": (encode(Image.new("L", SIZE, 77), "PNG"), (77, 77, 77)),
    "one bit": (encode(Image.new("1", SIZE, 1), "PNG"), (255, 255, 255)),
    "palette": (encode(Image.new("RGB", SIZE, (9, 8, 7)).quantize(4), "PNG"), (9, 8, 7)),
    # 102/255 of (100,0,200) over white: 0.4 * (100,0,200) + 0.6 * 255.
    "rgba": (encode(Image.new("RGBA", SIZE, (100, 0, 200, 102)), "PNG"), (193, 153, 233)),
    "gray and alpha": (encode(Image.new("LA", SIZE, (100, 102)), "PNG"), (193, 193, 193)),
    "clear palette entry": (palette_with_transparency(), (255, 255, 255)),
    "16-bit png": (encode(Image.fromarray(SIXTEEN_BIT), "PNG"), (100, 100, 100)),
    "16-bit big-endian tiff": (encode(Image.fromarray(SIXTEEN_BIT.astype(">u2")), "TIFF"), (100, 100, 100)),
    "32-bit tiff": (encode(Image.fromarray(SIXTEEN_BIT.astype(np.int32)), "TIFF"), (100, 100, 100)),
    "float up to 1": (encode(Image.fromarray(np.full(SIZE[::-1], 0.4, np.float32)), "TIFF"), (102, 102, 102)),
    "float up to 255": (encode(Image.fromarray(np.full(SIZE[::-1], 33.0, np.float32)), "TIFF"), (33, 33, 33)),
    "cmyk": (encode(Image.new("CMYK", SIZE, (255, 0, 0, 0)), "TIFF"), (0, 255, 255)),
    "animation": (animation(), (255, 0, 0)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_mode_has_the_expected_color(name: str) -> None:
    """Oracle: closed form; a flat picture of known color (alpha blending computed by hand)."""
    data, expected = CASES[name]
    picture = decode_rgb(data)
    assert picture.mode == "RGB" and picture.size == SIZE
    assert np.abs(np.array(picture.getpixel((0, 0))) - expected).max() <= 1


def test_cmyk_jpeg_is_not_inverted() -> None:
    """Oracle: closed form; cyan ink on white paper, within JPEG rounding."""
    data = encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95)
    assert np.abs(np.array(decode_rgb(data).getpixel((8, 8))) - (0, 255, 255)).max() <= 4


def test_orientation_tag_is_applied() -> None:
    """Oracle: EXIF orientation 6 says that the stored picture must be turned by 90 degrees clockwise."""
    stored = Image.new("RGB", SIZE)
    stored.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = decode_rgb(encode(stored, "PNG", exif=exif))
    assert upright.size == SIZE[::-1]
    assert upright.getpixel((3, 0)) == (255, 255, 255)


def test_sources_are_equivalent(tmp_path: Path) -> None:
    """Oracle: invariance; bytes, a struct, a path, a URL and a PIL image are the same picture."""
    data = CASES["rgba"][0]
    path = tmp_path / "a.png"
    path.write_bytes(data)
    sources = [data, {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, path, str(path)]
    sources += [path.as_uri(), Image.open(path)]
    pixels = [np.asarray(decode_rgb(source)) for source in sources]
    assert all(np.array_equal(pixels[0], other) for other in pixels[1:])


@pytest.mark.parametrize(
    "source",
    [
        encode(Image.effect_noise((64, 64), 50), "JPEG")[:-400],
        encode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"),
        b"no picture",
        b"",
        None,
        {"bytes": None, "path": None},
        "missing.png",
        3.5,
    ],
    ids=["truncated", "nan", "garbage", "empty", "none", "empty struct", "missing file", "number"],
)
def test_bad_pictures_raise_one_short_line(source: object) -> None:
    """Oracle: none of these holds a whole picture."""
    with pytest.raises(UnreadableImage) as caught:
        decode_rgb(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [SIZE[0] * SIZE[1] - 1, SIZE[0] * SIZE[1] // 3])
def test_decompression_bombs_are_unreadable(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Oracle: Pillow warns above MAX_IMAGE_PIXELS and raises above twice that; both count, without a warning."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnreadableImage, match="DecompressionBomb"):
            decode_rgb(CASES["rgb"][0])


def test_centre_square_is_resize_then_crop() -> None:
    """Oracle: Pillow's resize of the whole picture followed by a central crop, where the scale is exact."""
    picture = Image.effect_noise((64, 32), 60).convert("RGB")
    expected = picture.resize((32, 16), Image.Resampling.LANCZOS).crop((8, 0, 24, 16))
    difference = np.asarray(to_pil(Crop(resolution=16)(picture)), int) - np.asarray(expected, int)
    assert np.abs(difference).max() <= 1


def test_random_boxes_obey_area_and_ratio() -> None:
    """Oracle: the ranges of RandomResizedCrop, within the rounding to whole pixels."""
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(300, 200, rng=rng) for _ in range(500)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 300 and boxes[:, 3].max() <= 200
    area, ratio = width * height / 60000, width / height
    assert 0.24 < area.min() < 0.3 and area.max() <= 1.01
    assert 0.74 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.35


def test_narrow_pictures_fall_back_to_the_central_square() -> None:
    """Oracle: a 1000 x 2 picture has no part with a ratio of 4/3 and a quarter of its area."""
    assert random_box(1000, 2, rng=np.random.default_rng(0)) == (499.0, 0.0, 501.0, 2.0)
    square = Crop(resolution=8, rng=np.random.default_rng(0))(Image.new("RGB", (1000, 2)))
    assert square.shape == (3, 8, 8)


def test_flip_mirrors_the_tensor() -> None:
    """Oracle: torch.flip along the width."""
    picture = Image.effect_noise((8, 8), 60).convert("RGB")
    assert to_tensor(picture, flip=True).equal(to_tensor(picture).flip(-1))


def test_listing_is_sorted_and_survives_a_loop_of_links(tmp_path: Path) -> None:
    """Oracle: the files put there; hidden ones and other kinds are left out, and each folder appears once."""
    for name in ("b/2.JPG", "b/1.png", "a.webp", ".hidden.png", ".cache/3.png", "notes.txt", "film.mpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "loop").symlink_to(tmp_path, target_is_directory=True)
    found = [path.relative_to(tmp_path).as_posix() for path in list_files(tmp_path, image_suffixes())]
    assert found == ["a.webp", "b/1.png", "b/2.JPG"]
