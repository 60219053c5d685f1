"""Captions of pictures in a folder, from metadata files as the datasets library reads them and from text files."""

from __future__ import annotations

import csv
import io
import json
import logging
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow.parquet

from srl_utils.errors import UserError, one_line
from srl_utils.pictures import list_files

logger = logging.getLogger(__name__)

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SIDECARS = (".txt", ".caption")
SIDECAR_COLUMNS = ("text", "txt", "caption")
# UTF-32 before UTF-16, whose mark begins alike.
MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}

SPACE = re.compile(r"\s*")

Row = Mapping[str, object]


def decode_text(content: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark, or UTF-16 and UTF-32 with one.

    Raises:
        ValueError: if the bytes are none of these.
    """
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8-sig")
    return content.decode(encoding)


def lines_of(text: str) -> list[str]:
    """Return the lines that hold more than spaces, stripped.

    Lines end with a newline or a carriage return only, unlike those of str.splitlines: U+2028, U+0085 and the like
    occur inside captions.
    """
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def as_caption(value: object) -> str:
    """Return one line of text: of several captions, as COCO has them, the first; "" for none."""
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return "" if value is None or value != value else str(value).strip()  # NaN, unlike 0, is no caption


def folder_captions(folder: Path, pictures: Sequence[Path], column: str) -> list[str]:
    """Return a caption for each picture, "" for none.

    They come from the metadata files in `folder` and below. Where these have none and `column` is one of
    `SIDECAR_COLUMNS`, the first line of `1.txt` or `1.caption` beside `1.png` is the caption.

    Raises:
        UserError: if a metadata file cannot be read, or if there are no captions of this name at all.
    """
    found = _from_sidecars(folder) if column.lower() in SIDECAR_COLUMNS else {}
    sidecars = bool(found)
    tables = [path for path in list_files(folder) if path.name in METADATA]
    columns: dict[str, None] = {}
    for path in sorted(tables, key=lambda path: len(path.parts)):  # of two, the nearest says what a picture shows
        for row in _rows(path):
            columns.update(dict.fromkeys(row))
            if caption := as_caption(row.get(column)):
                found.update(dict.fromkeys(_names(path, row), caption))
    if tables and not sidecars and column not in columns:
        raise UserError(
            f"--caption_column {column}: there is no such column in {one_line(str(tables[0]))}; "
            f"the columns are {one_line(', '.join(map(str, columns)) or 'none')}"
        )
    if not tables and not sidecars:
        raise UserError(
            f"--caption_column {column}: {one_line(str(folder))} has no {METADATA[0]}, with a line such as "
            f'{{"file_name": "1.png", "{column}": "a red circle"}} for each image; '
            "with --caption_column text, files such as 1.txt beside 1.png do as well"
        )
    captions = [_lookup(found, path) for path in pictures]
    logger.info("%d of %d images have a caption", sum(map(bool, captions)), len(captions))
    return captions


def _lookup(found: Mapping[str, str], path: Path) -> str:
    """Return the caption of a picture by its name, or by its name without or with the suffix of a text file."""
    return next((found[key] for key in (_key(path), *_sidecar_keys(path)) if key in found), "")


def _from_sidecars(folder: Path) -> dict[str, str]:
    files = [path for path in list_files(folder, frozenset(SIDECARS)) if path.is_file()]
    # Those that come last count: .txt before .caption.
    ordered = sorted(files, key=lambda path: SIDECARS.index(path.suffix.lower()), reverse=True)
    return {f"{_key(path.with_suffix(''))}*": caption for path in ordered if (caption := _first_line(path))}


def _sidecar_keys(path: Path) -> tuple[str, str]:
    return f"{_key(path)}*", f"{_key(path.with_suffix(''))}*"


def _first_line(path: Path) -> str:
    try:
        return next(iter(lines_of(decode_text(path.read_bytes()))), "")
    except (OSError, ValueError) as error:
        logger.warning("caption passed over: %s (%s)", one_line(str(path)), one_line(str(error)))
        return ""


def _key(path: Path | str) -> str:
    """Return one name for all spellings of a path: ./a, b/../a, and composed or decomposed letters."""
    return unicodedata.normalize("NFC", posixpath.normpath(Path(path).absolute().as_posix()))


def _names(metadata: Path, row: Row) -> Iterator[str]:
    """Return the keys of the pictures of a row; a backslash may be part of a name, or separate folders."""
    for column, value in row.items():
        if value is None or re.fullmatch(r"(.*_)?file_names?", str(column)) is None:
            continue
        for name in value if isinstance(value, list) else [value]:
            yield _key(metadata.parent / str(name))
            if "\\" in str(name):
                yield _key(metadata.parent / str(name).replace("\\", "/"))


def _rows(path: Path) -> Iterable[Row]:
    """Return the rows of a metadata file.

    Raises:
        UserError: if it cannot be read, or a row names no file.
    """
    try:
        rows = list(READERS[path.suffix](path.read_bytes()))
    except (ValueError, csv.Error, OSError) as error:  # pyarrow's errors are ValueErrors
        reason = one_line((str(error).splitlines() or [type(error).__name__])[0])
        raise UserError(f"{one_line(str(path))} cannot be read: {reason}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not any(str(name).endswith(("file_name", "file_names")) for name in row):
            raise UserError(f"{one_line(str(path))}: row {number} has no file_name: {one_line(str(row))[:200]}")
    return rows


def _json_rows(content: bytes) -> Iterator[Row]:
    """Read JSON objects one after the other, whatever is between them: lines may end in any way."""
    text, decoder = decode_text(content), json.JSONDecoder(strict=False)
    place = SPACE.match(text).end()
    while place < len(text):
        row, end = decoder.raw_decode(text, place)
        yield row
        place = SPACE.match(text, end).end()


def _csv_rows(content: bytes) -> Iterator[Row]:
    return csv.DictReader(io.StringIO(decode_text(content), newline=""))


def _parquet_rows(content: bytes) -> list[Row]:
    return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()


READERS = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
