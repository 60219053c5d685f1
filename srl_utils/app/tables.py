"""Read results.json files into a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srl_utils.errors import UserError, one_line
from srl_utils.evaluation.results import Row

RESULTS = "results.json"
MAX_REPORTS = 300
"""Results files that are read at once."""
MAX_ROWS = 20_000
HEADERS = ("VAE", "attack", "threat model", "epsilon (1/255)", "metric", "value", "from", "to", "images", "file")
KINDS = ("str", "str", "str", "number", "str", "number", "number", "number", "number", "str")
"""Of each column: text or numbers, which are sorted by size."""
LARGEST = 1.7976e308
"""The largest float of 5 digits; JSON can hold integers beyond, and infinity."""

Line = list[Any]


def results_among(files: Sequence[str | Path]) -> list[Path]:
    """Return the files that hold results by their names, whose case does not matter; none is looked at.

    Args:
        files: a `results.json` of any name, or the files of report folders, of which each `results.json` is chosen.

    Raises:
        UserError: if there are files, but none of them is chosen.
    """
    paths = [Path(file) for file in files]
    named = [path for path in paths if path.name.lower() == RESULTS]
    chosen = named or [path for path in paths if path.suffix.lower() == ".json"]
    if paths and not chosen:
        raise UserError(f"there is no {RESULTS} among {len(paths)} files")
    return chosen


def read_table(files: Sequence[Path]) -> list[Line]:
    """Return one line for each row of results files, with the columns `HEADERS`.

    Raises:
        UserError: if there are too many rows, or if a file is none of this project's results.
    """
    lines: list[Line] = []
    for number, file in enumerate(files):
        title = file.name if len(files) == 1 else f"{file.name} {number + 1}"
        lines += _lines(file, title, MAX_ROWS - len(lines))
    return lines


def in_order(lines: Sequence[Line], column: str, *, descending: bool) -> list[Line]:
    """Return lines sorted by a column of `HEADERS`; those without a value come last."""
    index = HEADERS.index(column)
    known = [line for line in lines if line[index] is not None]
    return [
        *sorted(known, key=lambda line: line[index], reverse=descending),
        *(line for line in lines if line[index] is None),
    ]


def _lines(file: Path, title: str, most: int) -> list[Line]:
    try:
        listed = json.loads(file.read_text(encoding="utf-8-sig"))  # editors of Windows write the mark
        rows = [_checked(Row.from_json(fields)) for fields in listed[: most + 1]]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(one_line(f"{file.name} holds no results of this project")) from None
    if len(rows) > most:
        raise UserError(f"there are too many rows; choose files of {MAX_ROWS} at most")
    return [_line(row, title if row.dataset is None else f"{title}, {row.dataset}") for row in rows]


def _checked(row: Row) -> Row:
    """Return the row; raise a TypeError if a number or a text is none."""
    numbers = (row.epsilon, row.value, row.n, *(row.ci95 or ()))
    texts = (row.vae, row.attack, row.threat_model, row.metric, row.dataset or "")
    right = [isinstance(number, (int, float)) for number in numbers] + [isinstance(text, str) for text in texts]
    if not all(right) or len(row.ci95 or (0, 0)) != 2:
        raise TypeError
    return row


def _line(row: Row, file: str) -> Line:
    low, high = row.ci95 or (None, None)
    numbers = [_rounded(number) for number in (row.value, low, high)]
    texts = (row.vae, row.attack, row.threat_model, row.metric, file)
    vae, attack, threat_model, metric, title = map(one_line, texts)  # half a pair of surrogates cannot be sent
    return [vae, attack, threat_model, _rounded(255 * row.epsilon), metric, *numbers, _rounded(row.n, 15), title]


def _rounded(number: float | None, digits: int = 5) -> float | None:
    """Return a number with significant digits; None if it is not finite or beyond all floats, which JSON cannot hold."""
    return float(f"{number:.{digits}g}") if number is not None and abs(number) <= LARGEST else None
