"""What a sanitized file keeps of its source: alpha, frames, orientation, metadata; and what it is said to lose."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
from helpers.runs import build_tiny_vae
from PIL import ExifTags, Image, ImageCms, ImageOps, ImageSequence
from PIL.PngImagePlugin import PngInfo
from test_sanitizing import draw_picture, draw_pixels, files_in, sanitize_command

from srl_utils.pipelines import sanitize
from srl_utils.pipelines.sanitizing import spread_colours
from srl_utils.vae.loading import save_autoencoder

DURATIONS = [40, 70, 100]


@pytest.fixture(scope="module")
def vae_at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    save_autoencoder(build_tiny_vae(), folder)
    return folder


def cut_out(alphas: tuple[int, ...] = (0, 255), *, seed: int = 0) -> Image.Image:
    """A picture of 12x10 whose alpha takes these values."""
    picture = draw_picture(10, 12, seed=seed)
    picture.putalpha(Image.fromarray(np.random.default_rng(seed).choice(np.array(alphas, np.uint8), (10, 12))))
    return picture


def said_sRGB(image: Image.Image) -> bool:
    if "srgb" in image.info:
        return True
    profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    return "sRGB" in ImageCms.getProfileDescription(profile)


@pytest.mark.parametrize(
    ("suffix", "alphas"), [(".png", (0, 9, 255)), (".webp", (0, 9, 255)), (".tif", (0, 9, 255)), (".gif", (0, 255))]
)
def test_alpha_is_kept_to_the_byte(vae_at: Path, tmp_path: Path, suffix: str, alphas: tuple[int, ...]) -> None:
    """Oracle: the alpha of the source; the colours change, are those of `sanitize`, and say sRGB where the format can."""
    source, target = tmp_path / f"in{suffix}", tmp_path / "out" / f"out{suffix}"
    cut_out(alphas).save(source, lossless=True)
    assert sanitize_command(source, target, "--vae", vae_at) == 0
    with Image.open(source) as before, Image.open(target) as after:
        assert after.convert("RGBA").getchannel("A").tobytes() == before.convert("RGBA").getchannel("A").tobytes()
        assert suffix == ".gif" or said_sRGB(after)
        if suffix in {".png", ".webp", ".tif"}:
            seen = np.asarray(before.convert("RGBA"))[..., 3] > 0
            cleaned = sanitize(before, build_tiny_vae())
            assert cleaned.mode == "RGBA" and said_sRGB(cleaned)
            np.testing.assert_array_equal(np.asarray(after)[seen], np.asarray(cleaned)[seen])


@pytest.mark.parametrize("suffix", [".jpg", ".bmp"])
def test_alpha_goes_over_white_where_there_is_none(
    vae_at: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture
) -> None:
    """Oracle: `sanitize` of the picture over white, in Pillow's file of it; the loss is said."""
    picture = cut_out((0, 9, 255))
    picture.save(tmp_path / "in.png")
    assert sanitize_command(tmp_path / "in.png", tmp_path / f"out{suffix}", "--vae", vae_at) == 0
    assert "in.png: transparency" in capsys.readouterr().err
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    sanitize(flat, build_tiny_vae()).save(tmp_path / f"expected{suffix}", quality=95)
    with Image.open(tmp_path / f"out{suffix}") as after, Image.open(tmp_path / f"expected{suffix}") as expected:
        difference = np.asarray(after, dtype=int) - np.asarray(expected)
    assert abs(difference).max() <= 3  # Pillow and numpy round the blending differently


def test_hidden_colours_do_not_shine_through() -> None:
    """Oracle: a red disc over hidden black; everything around it becomes red, and what is visible stays."""
    alpha = Image.new("L", (40, 30), 0)
    alpha.paste(255, (10, 10, 15, 14))
    colour = Image.new("RGB", alpha.size)
    colour.paste((200, 0, 0), (10, 10, 15, 14))
    filled = np.asarray(spread_colours(colour, alpha), dtype=int)
    assert abs(filled - [200, 0, 0]).max() <= 2  # rounding
    np.testing.assert_array_equal(filled[10:14, 10:15], np.broadcast_to([200, 0, 0], (4, 5, 3)))


def test_what_is_hidden_does_not_matter(vae_at: Path) -> None:
    """Oracle: invariance of what is visible to the colours under transparent parts."""
    picture, other = cut_out(), cut_out()
    other.paste((255, 0, 255), mask=ImageOps.invert(picture.getchannel("A")))
    other.putalpha(picture.getchannel("A"))
    vae = build_tiny_vae()
    assert sanitize(picture, vae).tobytes() == sanitize(other, vae).tobytes()


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
@pytest.mark.parametrize("transparent", [True, False])
def test_animations_keep_frames_and_times(vae_at: Path, tmp_path: Path, suffix: str, transparent: bool) -> None:
    """Oracle: each frame alone, its duration, the loop count, and its alpha as viewers see it after the others."""
    frames = [cut_out(seed=seed) if transparent else draw_picture(10, 12, seed=seed) for seed in range(3)]
    source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    options = {"disposal": 2} if suffix == ".gif" else {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(source, save_all=True, append_images=frames[1:], duration=DURATIONS, loop=4, **options)
    assert sanitize_command(source, target, "--vae", vae_at) == 0
    vae = build_tiny_vae()
    with Image.open(source) as before, Image.open(target) as after:
        assert (after.n_frames, after.info["loop"]) == (3, before.info["loop"])
        for index, duration in enumerate(DURATIONS):
            before.seek(index)
            after.seek(index)
            shown, cleaned = np.asarray(after.convert("RGBA"), dtype=int), sanitize(before, vae).convert("RGBA")
            assert after.info["duration"] == duration
            seen = np.asarray(cleaned)[..., 3] > 0
            np.testing.assert_array_equal(shown[..., 3], np.asarray(cleaned)[..., 3])
            assert abs(shown - np.asarray(cleaned))[seen].max() <= (60 if suffix == ".gif" else 0)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".gif"])
def test_a_still_picture_is_no_frame(vae_at: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture) -> None:
    """Oracle: Pillow's marks of a PNG; other animations have two frames with their times, and the loss is said."""
    frames = [draw_picture(10, 12, seed=seed) for seed in range(3)]
    frames[0].save(
        tmp_path / "in.png", save_all=True, append_images=frames[1:], default_image=True, duration=[40, 70], loop=2
    )
    target = tmp_path / f"out{suffix}"
    assert sanitize_command(tmp_path / "in.png", target, "--vae", vae_at) == 0
    assert ("still image" in capsys.readouterr().err) == (suffix != ".png")
    with Image.open(target) as after:
        assert bool(after.info.get("default_image")) == (suffix == ".png")
        times = []
        for frame in ImageSequence.Iterator(after):
            frame.load()
            times.append(after.info.get("duration"))
    assert [time for time in times if time] == [40, 70] and len(times) == (3 if suffix == ".png" else 2)


def test_pages_keep_their_sizes(vae_at: Path, tmp_path: Path) -> None:
    """Oracle: each page alone."""
    pages = [draw_picture(9, 7), draw_picture(6, 11, seed=1), cut_out()]
    pages[0].save(tmp_path / "in.tif", save_all=True, append_images=pages[1:])
    assert sanitize_command(tmp_path / "in.tif", tmp_path / "out.tif", "--vae", vae_at) == 0
    with Image.open(tmp_path / "out.tif") as after:
        assert after.n_frames == 3
        for index, page in enumerate(pages):
            after.seek(index)
            seen = np.asarray(page.convert("RGBA"))[..., 3] > 0
            cleaned = sanitize(page, build_tiny_vae())
            np.testing.assert_array_equal(np.asarray(after)[seen], np.asarray(cleaned)[seen])


@pytest.mark.parametrize(
    ("source", "target", "loss"),
    [
        ("in.gif", "out.jpg", "2 of 3 frames"),
        ("in.tif", "out.png", "2 of 3 pages"),
        ("in.gif", "out.tif", "2 of 3 frames"),
    ],
)
def test_lost_frames_are_said(
    vae_at: Path, tmp_path: Path, source: str, target: str, loss: str, capsys: pytest.CaptureFixture
) -> None:
    """Oracle: the first frame alone, and the number of the others in the output."""
    frames = [draw_picture(10, 12, seed=seed) for seed in range(3)]
    frames[0].save(tmp_path / source, save_all=True, append_images=frames[1:])
    assert sanitize_command(tmp_path / source, tmp_path / target, "--vae", vae_at) == 0
    assert f"{source}: {loss}" in capsys.readouterr().err
    with Image.open(tmp_path / target) as after:
        assert getattr(after, "n_frames", 1) == 1


def test_a_picture_of_a_phone_is_one_picture(vae_at: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Oracle: the JPEG of the first of its two pictures; the other is said to be lost."""
    draw_picture(10, 12).save(
        tmp_path / "in.jpg", format="MPO", save_all=True, append_images=[draw_picture(10, 12, seed=1)]
    )
    assert sanitize_command(tmp_path / "in.jpg", tmp_path / "out.jpg", "--vae", vae_at) == 0
    assert "1 of 2 images in the MPO file" in capsys.readouterr().err
    with Image.open(tmp_path / "out.jpg") as after:
        assert after.format == "JPEG" and after.size == (12, 10)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_metadata_is_kept_and_orientation_applied(vae_at: Path, tmp_path: Path, suffix: str, orientation: int) -> None:
    """Oracle: what was put there, but no thumbnail, size or orientation; pixels and resolution upright."""
    exif = Image.Exif()
    exif.update({0x0112: orientation, 0x8298: "(c) Somebody", 0x013B: "Somebody", 0x010E: "A view"})
    exif.get_ifd(ExifTags.IFD.Exif).update(
        {0x9003: "2020:01:02 03:04:05", 0xA002: 1, 0xA003: 2, 0x927C: b"x\xff\xd8\xffy"}
    )
    exif.get_ifd(ExifTags.IFD.GPSInfo)[1] = "N"
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="{orientation}" dc:rights="mine"/></x:xmpmeta>'.encode()
    picture = draw_picture(10, 12)
    picture.save(tmp_path / "in.jpg", exif=exif, xmp=xmp, dpi=(300, 150), quality=95)
    assert sanitize_command(tmp_path / "in.jpg", tmp_path / f"out{suffix}", "--vae", vae_at) == 0
    with Image.open(tmp_path / f"out{suffix}") as after, Image.open(tmp_path / "in.jpg") as before:
        kept = after.getexif()
        assert [kept[tag] for tag in (0x8298, 0x013B, 0x010E)] == ["(c) Somebody", "Somebody", "A view"]
        block = kept.get_ifd(ExifTags.IFD.Exif)
        assert block[0x9003] == "2020:01:02 03:04:05" and not block.keys() & {0xA002, 0xA003, 0x927C}
        assert kept.get_ifd(ExifTags.IFD.GPSInfo)[1] == "N"
        assert kept.get(0x0112, 1) == 1 and not kept.get_ifd(ExifTags.IFD.IFD1)
        assert b"rights" in (found := after.info["xmp"]) and b"Orientation" not in found
        assert after.size == ImageOps.exif_transpose(before).size
        across, down = float(kept[0x011A]), float(kept[0x011B])
        assert (across, down) == ((150, 300) if orientation == 6 else (300, 150))
        if suffix != ".webp":
            np.testing.assert_allclose([float(value) for value in after.info["dpi"]], (across, down), rtol=1e-3)


@pytest.mark.parametrize("kind", ["webp", "avif", "tif of fractions", "tif without"])
def test_resolution_is_found_where_pillow_does_not_look(vae_at: Path, tmp_path: Path, kind: str) -> None:
    """Oracle: the resolution of the Exif or the tags, 118 dots per cm being 300 per inch; none where none was written."""
    source = tmp_path / f"in.{kind[:4].strip()}"
    exif = Image.Exif()
    exif.update({0x011A: 118.11, 0x011B: 59.055, 0x0128: 3})
    if kind == "tif of fractions":
        pixels = draw_pixels(10, 12).astype(np.float32) / 255
        tags = [(33432, "s", 0, "(c) Somebody", True)]
        tifffile.imwrite(
            source, pixels, photometric="rgb", resolution=(118.11, 59.055), resolutionunit="CENTIMETER", extratags=tags
        )
    elif kind == "avif" and "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    else:
        draw_picture(10, 12).save(source, **({} if kind == "tif without" else {"exif": exif}))
    assert sanitize_command(source, tmp_path / "out.jpg", "--vae", vae_at) == 0
    with Image.open(tmp_path / "out.jpg") as after:
        assert after.info.get("dpi") == (None if kind == "tif without" else (300, 150))
        assert kind != "tif of fractions" or after.getexif()[0x8298] == "(c) Somebody"


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".tif"])
def test_lost_texts_are_said(vae_at: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture) -> None:
    """Oracle: the names of the texts that only a PNG holds."""
    texts = PngInfo()
    for name in ("parameters", "workflow", "Author"):
        texts.add_text(name, "a cat, Steps: 20")
    draw_picture().save(tmp_path / "in.png", pnginfo=texts)
    assert sanitize_command(tmp_path / "in.png", tmp_path / f"out{suffix}", "--vae", vae_at) == 0
    assert "in.png: texts of the PNG (parameters, workflow)" in capsys.readouterr().err


def test_texts_of_a_png_are_kept(vae_at: Path, tmp_path: Path) -> None:
    """Oracle: the PNG's own texts; in a JPEG they are the EXIF's."""
    texts = PngInfo()
    texts.add_text("Copyright", "(c) Somebody")
    texts.add_itxt("Author", "Søren 画")
    draw_picture().save(tmp_path / "in.png", pnginfo=texts)
    for target in ("out.png", "out.jpg"):
        assert sanitize_command(tmp_path / "in.png", tmp_path / target, "--vae", vae_at) == 0
    with Image.open(tmp_path / "out.png") as png, Image.open(tmp_path / "out.jpg") as jpeg:
        assert (png.text["Copyright"], png.text["Author"]) == ("(c) Somebody", "Søren 画")
        assert jpeg.getexif()[0x8298] == "(c) Somebody"


def test_the_same_picture_gives_the_same_bytes(vae_at: Path, tmp_path: Path) -> None:
    """Oracle: invariance; profiles usually hold the time."""
    draw_picture().save(tmp_path / "in.png")
    for name in ("a.jpg", "b.jpg"):
        assert sanitize_command(tmp_path / "in.png", tmp_path / name, "--vae", vae_at) == 0
    assert (tmp_path / "a.jpg").read_bytes() == (tmp_path / "b.jpg").read_bytes()


@pytest.mark.parametrize(("name", "size"), [("out.webp", (16384, 1)), ("out.jpg", (1, 65501)), ("out.gif", (65536, 1))])
def test_a_format_that_is_too_small_is_refused_at_once(
    vae_at: Path, tmp_path: Path, name: str, size: tuple[int, int], capsys: pytest.CaptureFixture
) -> None:
    """Oracle: one line and no file, before the VAE is even looked for."""
    Image.new("RGB", size).save(tmp_path / "in.png")
    assert sanitize_command(tmp_path / "in.png", tmp_path / name, "--vae", tmp_path / "no VAE") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and f"{size[0]}x{size[1]}" in lines[0] and ".png" in lines[0]
    assert files_in(tmp_path) == {"in.png"}


def test_in_a_folder_it_becomes_a_png(vae_at: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Oracle: all images are there, and the new name is said. Names that two images want go to the one that has it."""
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (16384, 1)).save(folder / "wide.webp", format="PNG")
    draw_picture().save(folder / "a.ppm")
    draw_picture(seed=1).save(folder / "a.ppm.png")
    draw_picture().save(folder / "name.png")
    (tmp_path / "out" / "name.png").mkdir(parents=True)
    assert sanitize_command(folder, tmp_path / "out", "--vae", vae_at) == 2
    assert files_in(tmp_path / "out") == {"wide.webp.png", "a.ppm.png", "a.ppm-2.png"}
    printed = capsys.readouterr()
    assert "3 images written" in printed.out
    assert "wide.webp: its name (written as wide.webp.png)" in printed.err
    assert "cannot write 1 of 4 images" in printed.err.strip().splitlines()[-1]
    with Image.open(tmp_path / "out" / "a.ppm.png") as own:
        assert own.convert("RGB").tobytes() == sanitize(draw_picture(seed=1), build_tiny_vae()).tobytes()


def test_files_left_out_of_a_folder_are_said(vae_at: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Oracle: a picture without suffix is found by its content, and all other files are named with the reason."""
    folder = tmp_path / "in"
    folder.mkdir()
    draw_picture().save(folder / "plain", format="PNG")
    for name in ("clip.mov", "notes", "raw.cr2", "photo.jxl"):
        (folder / name).write_bytes(b"\0" * 80)
    (folder / "plain.txt").write_text("a caption")
    assert sanitize_command(folder, tmp_path / "out", "--vae", vae_at) == 0
    told = capsys.readouterr().err
    assert files_in(tmp_path / "out") == {"plain.png"}
    assert "4 files were skipped" in told and "needs pillow-jxl-plugin" in told and "1: raw.cr2" in told
    assert "a video, not an image" in told and "1: clip.mov" in told
    (folder / "plain").unlink()
    assert sanitize_command(folder, tmp_path / "out", "--vae", vae_at) == 2
    assert "holds no images; 4 files were skipped" in capsys.readouterr().err


def test_the_longest_names_are_written(vae_at: Path, tmp_path: Path) -> None:
    """Oracle: 255 bytes, the most that Linux's file systems take."""
    name = "n" * 251 + ".png"
    draw_picture().save(tmp_path / "in.png")
    assert sanitize_command(tmp_path / "in.png", tmp_path / name, "--vae", vae_at) == 0
    assert files_in(tmp_path) == {"in.png", name}
    assert sanitize_command(tmp_path / "in.png", tmp_path / f"n{name}", "--vae", tmp_path / "no VAE") == 2


def test_pictures_above_the_limit(
    vae_at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Oracle: refused in a line that names the flag, and with the flag the result of `sanitize`."""
    picture = draw_picture(40, 30)
    picture.save(tmp_path / "in.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    command = [tmp_path / "in.png", tmp_path / "out.png", "--vae", vae_at]
    assert sanitize_command(*command) == 2
    assert "--max_pixels" in capsys.readouterr().err
    assert sanitize_command(*command, "--max_pixels", 1199) == 2
    assert sanitize_command(*command, "--max_pixels", 1200) == 0
    monkeypatch.undo()
    with Image.open(tmp_path / "out.png") as after:
        assert after.tobytes() == sanitize(Image.fromarray(draw_pixels(40, 30)), build_tiny_vae()).tobytes()
