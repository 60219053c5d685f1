"""Which files of a folder are pictures, and what is said of the others."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from helpers.runs import Run
from PIL import Image

from srl_utils.errors import UserError
from srl_utils.evaluation.__main__ import main as evaluate
from srl_utils.images import listing
from srl_utils.images.datasets import DataSource, load_validation_images
from srl_utils.images.listing import VIDEO, Skipped, list_images

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(80)
NEEDS_HEIF = "needs pillow-heif: pip install pillow-heif"


def encoded(file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((24, 24), 50).convert("RGB").save(file, file_format, **options)
    return file.getvalue()


@pytest.fixture(autouse=True)
def without_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow as it is without pillow-heif, whether that is installed or not."""
    formats, suffixes = listing.image_formats(), listing.image_suffixes()
    monkeypatch.setattr(listing, "image_formats", lambda: tuple(name for name in formats if name != "HEIF"))
    monkeypatch.setattr(listing, "image_suffixes", lambda: suffixes - listing.SUFFIXES["HEIF"])


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """A folder as phones and people leave it: four pictures, and nine files that are none or cannot be read."""
    folder = tmp_path / "album"
    (folder / "trip").mkdir(parents=True)
    (folder / "0.jpg").write_bytes(encoded("JPEG"))
    (folder / "trip/1").write_bytes(encoded("PNG"))
    (folder / "scan.0002").write_bytes(encoded("TIFF"))
    (folder / "IMG_3.HEIC").write_bytes(encoded("JPEG"))  # so named by a phone that converted it
    for name in ("IMG_4.HEIC", "trip/IMG_5.heif", "IMG_6"):
        (folder / name).write_bytes(HEIC)
    (folder / "clip.mov").write_bytes(b"\0\0\0\x14ftypqt  ")
    (folder / "raw.dng").write_bytes(encoded("TIFF"))
    (folder / "0.jpg_large").write_bytes(encoded("JPEG"))
    (folder / "README").write_text("BM and II* begin this text, which is longer than the head of a file.")
    (folder / "photo.jxl").write_bytes(b"\xff\x0a" + bytes(80))
    (folder / "nothing").touch()
    for name in ("metadata.jsonl", "0.txt", "0.caption", "Thumbs.db", ".DS_Store", "._0.jpg", "IMG_3.AAE"):
        (folder / name).write_text("{}")
    return folder


def test_every_file_is_a_picture_or_skipped_or_a_companion(album: Path) -> None:
    """Oracle: what was written under each name."""
    pictures, skipped = list_images(album)
    assert [path.relative_to(album).as_posix() for path in pictures] == ["0.jpg", "IMG_3.HEIC", "scan.0002", "trip/1"]
    assert skipped.names == {
        NEEDS_HEIF: ["IMG_4.HEIC", "IMG_6", "trip/IMG_5.heif"],
        "needs pillow-jxl-plugin: pip install pillow-jxl-plugin": ["photo.jxl"],
        "no suffix of an image that Pillow reads": ["0.jpg_large", "raw.dng"],
        VIDEO: ["clip.mov"],
        "no suffix, and no image by its content": ["README", "nothing"],
    }
    assert len(skipped) == 9


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000"])
def test_a_picture_without_a_suffix_is_one(file_format: str, tmp_path: Path) -> None:
    """Oracle: Pillow wrote it."""
    (tmp_path / "picture").write_bytes(encoded(file_format))
    assert list_images(tmp_path) == ([tmp_path / "picture"], Skipped())
    assert (
        len(load_validation_images(DataSource(validation_data_dir=str(tmp_path)), num_images=1, resolution=8).images)
        == 1
    )


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    """Oracle: an end; a pipe would wait for ever and a device would never end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "dangling").symlink_to("nowhere")
    pictures, skipped = list_images(tmp_path)
    assert pictures == [] and len(skipped) == 3


def test_with_pillow_heif_they_are_pictures(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: specification; an opener that is registered under the package's name takes its files."""
    suffixes = listing.image_suffixes()
    monkeypatch.setattr(listing, "image_suffixes", lambda: suffixes | {".heic", ".heif"})
    monkeypatch.setattr(listing, "image_formats", lambda: ("HEIF",))
    monkeypatch.setitem(Image.OPEN, "HEIF", (Image.Image, lambda head: head[4:12] == b"ftypheic"))
    pictures, skipped = list_images(album)
    assert {"IMG_4.HEIC", "IMG_5.heif", "IMG_6"} <= {path.name for path in pictures}
    assert NEEDS_HEIF not in skipped.names


def test_the_line_names_a_few_and_counts_all() -> None:
    """Oracle: closed form."""
    skipped = Skipped.of([("broken", f"{number}\n") for number in range(5)] + [("odd", "x")])
    assert skipped.summary() == "6 files were skipped: broken (5); odd (1)"
    assert skipped.report() == "6 files were skipped: broken (5: 0\\n, 1\\n, 2\\n, ...); odd (1: x)"
    assert not Skipped()


def test_a_folder_of_nothing_else_says_what_it_needs(tmp_path: Path) -> None:
    """Oracle: the line names the package."""
    (tmp_path / "IMG_1.HEIC").write_bytes(HEIC)
    with pytest.raises(UserError, match=f"no image files .* {NEEDS_HEIF} .*IMG_1.HEIC"):
        load_validation_images(DataSource(validation_data_dir=str(tmp_path)), num_images=1, resolution=8)


def test_evaluation_reports_what_it_did_not_look_at(album: Path, vae_folder: Path, tmp_path: Path) -> None:
    """Oracle: what was written; the report counts it with the reason and names some."""
    arguments = [
        "reconstruction", "--baseline", vae_folder, "--vae", f"same={vae_folder}", "--data_dir", album,
        "--resolution", "16", "--num_images", "9", "--attacks", "clean", "--metrics", "psnr", "--no_checks",
        "--output_dir", tmp_path / "out",
    ]  # fmt: skip
    assert evaluate([str(argument) for argument in arguments]) == 0
    report = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert "9 files were skipped" in report and NEEDS_HEIF in report and "clip.mov" in report
    assert {row["n"] for row in json.loads((tmp_path / "out/results.json").read_text())} == {4}


def test_training_says_what_it_does_not_look_at(
    run: Run, flags: list[str], photographs: Path, album: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: what was written; counted before the training and after it, and named in the log alone."""
    code, printed = run(*flags, "--train_data_dir", album, "--dry_run")
    assert code == 0 and "album: 3 training images, 1 validation images; 9 files were skipped" in printed
    assert "IMG_4.HEIC" not in printed.split("Data:")[1]
    for path in photographs.rglob("*.png"):
        (album / path.name).write_bytes(path.read_bytes())
    code, printed = run(*flags, "--train_data_dir", album, "--pgd_steps", "1", "--max_train_steps", "1")
    assert code == 0 and printed.count("9 files were skipped") == 1, printed
    assert "IMG_4.HEIC" not in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert any("IMG_4.HEIC" in message and NEEDS_HEIF in message for message in caplog.messages)


def test_a_folder_that_the_datasets_library_reads_is_counted_too(album: Path, tmp_path: Path) -> None:
    """Oracle: the one picture that the library reads, and the others; beside a text the line says how they are read."""
    (album / "metadata.jsonl").unlink()
    source = DataSource(dataset_name=str(album), validation_split="train", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(
        UserError, match=r"the columns are text; .* holds image files or tars: give it as a folder of images"
    ):
        load_validation_images(source, num_images=9, resolution=8)
    for name in ("0.txt", "clip.mov"):
        (album / name).unlink()
    loaded = load_validation_images(source, num_images=9, resolution=8)
    (skipped,) = loaded.skipped
    assert len(loaded.images) == 1 and len(skipped) == 11
    assert "that the datasets library skips (3: " in skipped.report() and NEEDS_HEIF in skipped.report()
