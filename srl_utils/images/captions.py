"""Read the captions of images in a folder, from metadata files as in the datasets library, and from text files."""

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
from srl_utils.images.listing import list_files

logger = logging.getLogger(__name__)

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SIDECARS = (".txt", ".caption")
SIDECAR_COLUMNS = ("text", "txt", "caption")
# UTF-32 comes before UTF-16, since its mark begins with that of UTF-16.
MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}

SPACE = re.compile(r"\s*")
LARGEST_FIELD = 2**31 - 1  # characters of a CSV file; the csv module's own limit is 131,072

Row = Mapping[str, object]


def names(caption: str, words: str) -> bool:
    """Return whether a caption contains one or more whole words, in this order and without others between them.

    Upper and lower case, the number of spaces and the punctuation beside the words do not matter.
    """
    wanted = r"\s+".join(map(re.escape, words.split()))
    return bool(wanted) and re.search(rf"(?<!\w){wanted}(?!\w)", caption, re.IGNORECASE) is not None


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
    """Return a caption as one text: the first of several captions, as COCO has them; "" for none."""
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return "" if value is None or value != value else str(value).strip()  # NaN means no caption, 0 does not


def folder_captions(folder: Path, images: Sequence[Path], column: str) -> list[str]:
    """Return a caption for each image, "" for none.

    They come from the metadata files in `folder` and below. Where these have none and `column` is one of
    `SIDECAR_COLUMNS`, the first line of `1.txt` or `1.caption` beside `1.png` is the caption.

    Raises:
        UserError: if a metadata file cannot be read, or if there are no captions of this name at all.
    """
    tables = sorted(
        (path for path in list_files(folder) if path.name in METADATA), key=lambda path: (len(path.parts), path)
    )
    found = _from_sidecars(folder, images) if column.lower() in SIDECAR_COLUMNS else {}
    if not tables and not found:
        raise UserError(
            f"there are no captions in {one_line(str(folder))}; add a {METADATA[0]} with a line such as "
            f'{{"file_name": "1.png", "{column}": "a red circle"}} for each image, or name the column text '
            "and add files such as 1.txt beside 1.png",
            parameter="caption_column",
        )
    known = {_key(path) for path in images}
    columns: dict[str, None] = {}
    for table in tables:  # the last one wins: the table nearest to an image
        found.update(_from_table(table, column, known, columns))
    if not found and column not in columns:
        raise UserError(
            f"there is no column '{column}' in {one_line(str(tables[0]))}; "
            f"the columns are {one_line(', '.join(map(str, columns)) or 'none')}",
            parameter="caption_column",
        )
    return [next((found[key] for key in (_key(path), *_sidecar_keys(path)) if key in found), "") for path in images]


def _from_table(path: Path, column: str, known: set[str], columns: dict[str, None]) -> dict[str, str]:
    """Return the captions of a metadata file by the key of the image.

    Warns of rows whose images are not `known`.

    Args:
        path: the file.
        column: the column of the captions.
        known: keys of the images of the folder.
        columns: the file's columns are added here.
    """
    folder = path.parent.absolute().as_posix()
    found: dict[str, str] = {}
    strays: list[str] = []
    for row in _rows(path):
        columns.update(dict.fromkeys(row))
        names = list(_names(row))
        keys = known.intersection(_normal(posixpath.join(folder, name)) for name in _spellings(names))
        if not keys:
            strays += names
        if caption := as_caption(row.get(column)):
            found.update(dict.fromkeys(keys, caption))
    if strays:
        logger.warning(
            "%s names %d files that are not among the images, such as %s",
            one_line(str(path)), len(strays), one_line(strays[0]),
        )  # fmt: skip
    return found


def _from_sidecars(folder: Path, images: Sequence[Path]) -> dict[str, str]:
    """Return the first lines of text files beside images, by the key of the file without its suffix."""
    wanted = {key for path in images for key in _sidecar_keys(path)}
    files = [path for path in list_files(folder, frozenset(SIDECARS)) if path.is_file()]
    # The last one wins: .txt over .caption.
    ordered = sorted(files, key=lambda path: SIDECARS.index(path.suffix.lower()), reverse=True)
    keys = {path: f"{_key(path.with_suffix(''))}*" for path in ordered}
    return {keys[path]: caption for path in ordered if keys[path] in wanted and (caption := _first_line(path))}


def _sidecar_keys(path: Path) -> tuple[str, str]:
    """Return the keys of `1.png.txt` and `1.txt` beside `1.png`."""
    return f"{_key(path)}*", f"{_key(path.with_suffix(''))}*"


def _first_line(path: Path) -> str:
    try:
        return next(iter(lines_of(decode_text(path.read_bytes()))), "")
    except (OSError, ValueError) as error:
        logger.warning("caption skipped: %s (%s)", one_line(str(path)), one_line(str(error)))
        return ""


def _key(path: Path) -> str:
    return _normal(path.absolute().as_posix())


def _normal(path: str) -> str:
    """Return one name for all spellings of a path: ./a, b/../a, and composed or decomposed letters."""
    return unicodedata.normalize("NFC", posixpath.normpath(path))


def _names(row: Row) -> Iterator[str]:
    """Yield the names of the images of a row, from the columns in which the datasets library looks for them."""
    for column, value in row.items():
        if value not in (None, "") and re.fullmatch(r"(.*_)?file_names?", str(column)):
            yield from map(str, value if isinstance(value, list) else [value])


def _spellings(names: Iterable[str]) -> Iterator[str]:
    """Return names as they are and with slashes: a backslash may be part of a name, or separate folders."""
    for name in names:
        yield name
        yield name.replace("\\", "/")


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
    place = _after_space(text, 0)
    while place < len(text):
        row, end = decoder.raw_decode(text, place)
        yield row
        place = _after_space(text, end)


def _after_space(text: str, start: int) -> int:
    """Return the place of the first character from `start` on that is not in `SPACE`."""
    space = SPACE.match(text, start)
    return start if space is None else space.end()


def _csv_rows(content: bytes) -> Iterator[Row]:
    csv.field_size_limit(LARGEST_FIELD)
    return csv.DictReader(io.StringIO(decode_text(content), newline=""))


def _parquet_rows(content: bytes) -> list[Row]:
    return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()


READERS = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
