"""Captions of a folder's pictures: metadata files as the datasets library reads them, text files, prompts."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from pathlib import Path

import datasets
import pandas
import pytest
from PIL import Image

from srl_utils.errors import UserError
from srl_utils.evaluation.cli.editing import read_prompts
from srl_utils.images.captions import as_caption, decode_text, folder_captions, lines_of, names
from srl_utils.images.datasets import DataSource, ValidationImages, load_validation_images
from srl_utils.images.listing import list_images

CAPTIONS = {"1.png": "a red\u2028square", "sub/2.png": 'says "hi",\u0085 twice', "sub/deep/3.png": "drei Äpfel 🍎"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures in nested folders."""
    for number, name in enumerate(CAPTIONS, start=1):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (10 * number,) * 3).save(path)
    return tmp_path / "photos"


def captions_of(folder: Path, column: str = "text") -> dict[str, str]:
    pictures, _ = list_images(folder)
    names = [unicodedata.normalize("NFC", path.relative_to(folder).as_posix()) for path in pictures]
    return dict(zip(names, folder_captions(folder, pictures, column), strict=True))


def as_json(rows: dict[str, object], line_end: str = "\n", column: str = "text") -> str:
    return line_end.join(
        json.dumps({"file_name": name, column: text}, ensure_ascii=False) for name, text in rows.items()
    )


def as_csv(rows: dict[str, str], line_end: str = "\n") -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator=line_end).writerows([("file_name", "text"), *rows.items()])
    return file.getvalue()


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32")
WRITERS = {"metadata.jsonl": as_json, "metadata.csv": as_csv}


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\n\n \n"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", WRITERS)
def test_metadata_in_any_encoding(name: str, encoding: str, line_end: str, folder: Path) -> None:
    """Oracle: the captions written, among them the line separators that are no line ends."""
    if name == "metadata.csv" and line_end.strip(" ") != line_end:
        line_end = "\n\n"  # a line of spaces would be a row
    (folder / name).write_bytes(WRITERS[name](CAPTIONS, line_end.replace(" ", "")).encode(encoding))
    assert captions_of(folder) == CAPTIONS


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_as_the_library_reads_it(kind: str, folder: Path, tmp_path: Path) -> None:
    """Oracle: the datasets library's own reading of the same folder, image by image; numbers and empty cells too."""
    table = pandas.DataFrame(
        {"file_name": list(CAPTIONS), "text": [*list(CAPTIONS.values())[:2], None], "size": [1, 0, 3]}
    )
    path = folder / f"metadata.{kind}"
    if kind == "jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        (table.to_csv if kind == "csv" else table.to_parquet)(path, index=False)
    library = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    library = library.cast_column("image", datasets.Image(decode=False))
    for column in ("text", "size"):
        expected = {Path(row["image"]["path"]).name: as_caption(row[column]) for row in library}
        assert {Path(name).name: caption for name, caption in captions_of(folder, column).items()} == expected
    assert set(captions_of(folder, "size").values()) == {"0", "1", "3"}


def test_metadata_in_subfolders_names_files_from_there(folder: Path) -> None:
    """Oracle: the captions written; of two for one picture, that of the nearer file."""
    (folder / "metadata.jsonl").write_text(as_json({"1.png": "one", "sub/2.png": "farther"}))
    (folder / "sub/metadata.csv").write_text(as_csv({"2.png": "two", "deep/3.png": "three"}))
    assert captions_of(folder) == {"1.png": "one", "sub/2.png": "two", "sub/deep/3.png": "three"}


@pytest.mark.parametrize("spelling", ["sub\\2.png", "./sub/2.png", "sub//2.png", "sub/deep/../2.png", ".\\sub\\2.png"])
def test_spellings_of_a_path(spelling: str, folder: Path) -> None:
    """Oracle: the one picture that each of them names."""
    (folder / "metadata.jsonl").write_text(as_json({spelling: "two"}))
    assert captions_of(folder) == {"1.png": "", "sub/2.png": "two", "sub/deep/3.png": ""}


def test_a_name_may_be_absolute_or_hold_a_backslash(folder: Path) -> None:
    """Oracle: the pictures of exactly these names."""
    (folder / "a\\b.png").write_bytes((folder / "1.png").read_bytes())
    (folder / "metadata.jsonl").write_text(as_json({"a\\b.png": "back", str(folder / "1.png"): "one"}))
    assert captions_of(folder) == {"1.png": "one", "a\\b.png": "back", "sub/2.png": "", "sub/deep/3.png": ""}


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_composed_and_decomposed_letters_are_one_name(forms: tuple[str, str], folder: Path) -> None:
    """Oracle: Unicode; a Mac writes the letters of file names apart."""
    on_disk, in_file = (unicodedata.normalize(form, "Äpfel é.png") for form in forms)
    assert on_disk != in_file
    (folder / on_disk).write_bytes((folder / "1.png").read_bytes())
    (folder / "metadata.jsonl").write_text(as_json({in_file: "apples"}), encoding="utf-8")
    assert captions_of(folder)["Äpfel é.png"] == "apples"


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        ("a", "a"),
        (" a\n", "a"),
        (3, "3"),
        (0, "0"),
        (0.5, "0.5"),
        (["a", "b"], "a"),
        ([], ""),
        (None, ""),
        (float("nan"), ""),
        ("", ""),
    ],
)
def test_values_of_any_kind(value: object, caption: str, folder: Path) -> None:
    """Oracle: the value as text; of several captions the first."""
    assert as_caption(value) == caption
    (folder / "metadata.jsonl").write_text(as_json({"1.png": value}))
    assert captions_of(folder)["1.png"] == caption


def test_other_names_of_the_column_of_files(folder: Path) -> None:
    """Oracle: the datasets library's documentation: `*_file_name` and `file_names` name files too."""
    rows = [
        {"image_file_name": "1.png", "text": "one"},
        {"file_names": ["sub/2.png", "sub/deep/3.png"], "text": "more"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captions_of(folder) == {"1.png": "one", "sub/2.png": "more", "sub/deep/3.png": "more"}


def test_rows_that_name_no_picture_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: the two rows whose files were never there, one by name."""
    (folder / "metadata.jsonl").write_text(as_json({"1.png": "one", "nowhere.png": "x", "sub/4.png": "y"}))
    assert captions_of(folder)["1.png"] == "one"
    assert any("names 2 files that are not among the images, such as nowhere.png" in text for text in caplog.messages)


def test_a_text_that_is_beside_no_picture_is_no_caption(folder: Path) -> None:
    """Oracle: specification; the line says what a folder with captions has."""
    (folder / "README.txt").write_text("how these were made")
    with pytest.raises(UserError, match=r"no captions in .* metadata.jsonl .* 1.txt beside 1.png"):
        captions_of(folder)


@pytest.mark.parametrize("column", ["text", "txt", "caption"])
def test_text_files_beside_the_pictures(column: str, folder: Path) -> None:
    """Oracle: the captions written, the first line of each file; where there is metadata it goes first."""
    (folder / "1.txt").write_bytes("\ufeff\r\n a red\u2028square \r\nmore\r\n".encode())
    (folder / "sub/2.caption").write_text("two")
    (folder / "sub/deep/3.png.TXT").write_bytes("drei Äpfel".encode("utf-16"))
    assert captions_of(folder, column) == {
        "1.png": "a red\u2028square",
        "sub/2.png": "two",
        "sub/deep/3.png": "drei Äpfel",
    }
    (folder / "metadata.jsonl").write_text(as_json({"1.png": "one"}, column=column))
    assert captions_of(folder, column)["1.png"] == "one" and captions_of(folder, column)["sub/2.png"] == "two"


def test_text_files_that_say_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: no caption; the file that is no text is named."""
    (folder / "1.txt").write_text(" \n")
    (folder / "sub/2.txt").write_bytes(b"caf\xe9")
    (folder / "sub/deep/3.txt").write_text("three")
    assert captions_of(folder) == {"1.png": "", "sub/2.png": "", "sub/deep/3.png": "three"}
    assert any("2.txt" in message for message in caplog.messages)


def loaded(folder: Path, **flags: object) -> ValidationImages:
    source = DataSource(validation_data_dir=str(folder), caption_column="text", **flags)
    return load_validation_images(source, num_images=2, resolution=8)


def test_images_without_a_caption_make_room_for_others(folder: Path) -> None:
    """Oracle: the two that have one, though two images were asked for and the first has none."""
    (folder / "metadata.jsonl").write_text(as_json({"sub/2.png": "two", "sub/deep/3.png": "three", "1.png": None}))
    images = loaded(folder)
    assert images.captions == ["two", "three"] and images.without_caption == [str(folder / "1.png")]


def test_rows_without_a_caption_are_named(tmp_path: Path) -> None:
    """Oracle: the rows that have one, however many have none before them, and the number of all others; of a table and
    of a stream of it.
    """
    picture = io.BytesIO()
    Image.new("RGB", (9, 9)).save(picture, "PNG")
    rows = {"image": [picture.getvalue()] * 50, "text": ["one", None, *[""] * 47, "fifty"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "table/validation.parquet")
    for streaming in (False, True):
        source = DataSource(dataset_name=str(tmp_path / "table"), caption_column="text", streaming=streaming)
        images = load_validation_images(source, num_images=2, resolution=8)
        assert images.captions == ["one", "fifty"] and len(images.without_caption) == 48
    source = DataSource(dataset_name=str(tmp_path / "table"), caption_column="text", validation_split="validation[1:3]")
    with pytest.raises(UserError, match=r"none of 2 images has a caption, the first is row 1"):
        load_validation_images(source, num_images=4, resolution=8)


def test_long_captions_and_empty_rows_of_csv(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: the caption written, longer than Python's csv module takes by itself; a row of commas names no file."""
    caption = "x" * 200_000
    (folder / "metadata.csv").write_text(f"file_name,text\n1.png,{caption}\n,\n")
    assert loaded(folder).captions == [caption]
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "metadata.jsonl",
            b'{"file_name": "1.png", "title": "a"}',
            "no column 'text' in .*; the columns are file_name, title",
        ),
        ("metadata.jsonl", b"", "the columns are none"),
        ("metadata.jsonl", b'{"text": "a"}', "row 1 has no file_name"),
        ("metadata.jsonl", b'["1.png", "a"]', "row 1 has no file_name"),
        ("metadata.jsonl", b'{"file_name": "1.png", "text": "a"}\n{"file_name": "2', "cannot be read: .* line 2"),
        ("metadata.jsonl", b'{"file_name": "caf\xe9.png"}', "cannot be read: 'utf-8' codec"),
        ("metadata.csv", b"file_name;text\n1.png;a\n", "row 1 has no file_name"),
        ("metadata.parquet", b"no parquet", "metadata.parquet cannot be read"),
    ],
)
def test_bad_metadata_is_one_line(name: str, content: bytes, message: str, folder: Path) -> None:
    """Oracle: the line names the file, and the row or the columns that are there."""
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        captions_of(folder)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_many_rows_are_read_in_time_that_grows_with_them(folder: Path) -> None:
    """Oracle: 50,000 rows, which a reader that copies the rest for each row would take minutes for."""
    rows = {f"{number}.png": "x" * 100 for number in range(50_000)}
    (folder / "metadata.jsonl").write_text(as_json(rows))
    assert captions_of(folder)["1.png"] == "x" * 100


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r", "\n \n"])
def test_prompts_in_any_encoding(encoding: str, line_end: str, tmp_path: Path) -> None:
    """Oracle: the prompts written; only line ends end a line."""
    (tmp_path / "prompts.txt").write_bytes(line_end.join([*CAPTIONS.values(), ""]).encode(encoding))
    assert read_prompts(tmp_path / "prompts.txt", 3) == list(CAPTIONS.values())


def test_prompts_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    """Oracle: the line names parameter and file."""
    (tmp_path / "prompts.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"prompts: .*prompts.txt cannot be read"):
        read_prompts(tmp_path / "prompts.txt", 1)


def test_lines_end_where_editors_end_them() -> None:
    """Oracle: closed form."""
    assert lines_of("a\u2028b\x0b\n\r\n c\x85d \re\x1cf") == ["a\u2028b", "c\x85d", "e\x1cf"]
    assert decode_text("ä".encode()) == decode_text(b"\xef\xbb\xbf\xc3\xa4") == decode_text(b"\xff\xfe\xe4\0") == "ä"


def test_a_caption_names_whole_words_side_by_side() -> None:
    """Oracle: closed form."""
    caption = "a small red  circle on a ringlet"
    assert names(caption, "circle") and names(caption, "red circle") and names(caption, " a ")
    assert not names(caption, "ring") and not names(caption, "small circle") and not names(caption, "circle red")
    assert names("A red, round circle.", "CIRCLE") and names("A red, round circle.", "a  red") and names("C++", "c++")
    assert not names("A red, round circle.", "red round") and not names(caption, " ")
