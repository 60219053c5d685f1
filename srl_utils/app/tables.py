"""Read results.json files into a table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srl_utils.errors import UserError, one_line
from srl_utils.evaluation.results import Row

RESULTS = "results.json"
MAX_REPORT_FILES = 300
"""Files of a report folder."""
MAX_ROWS = 20_000
HEADERS = ("VAE", "attack", "threat model", "epsilon (1/255)", "metric", "value", "from", "to", "images", "file")
KINDS = ("str", "str", "str", "number", "str", "number", "number", "number", "number", "str")
"""Of each column: text or numbers, which are sorted by size."""

Line = list[Any]


def read_table(files: Sequence[Path]) -> list[Line]:
    """Return one line for each row of all results files among `files`, with the columns `HEADERS`.

    Args:
        files: a `results.json` of any name, or the files of report folders, of which each `results.json` is read.

    Raises:
        UserError: if there are no results, too many rows, or a file that is none of this project's results.
    """
    chosen = [file for file in files if file.name == RESULTS] or [file for file in files if file.suffix == ".json"]
    if not chosen:
        raise UserError(f"there is no {RESULTS} among {len(files)} files")
    lines: list[Line] = []
    for number, file in enumerate(chosen):
        title = file.name if len(chosen) == 1 else f"{file.name} {number + 1}"
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
        rows = [_checked(Row.from_json(fields)) for fields in json.loads(file.read_text(encoding="utf-8"))[: most + 1]]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(one_line(f"{file.name} holds no results of this project")) from None
    if len(rows) > most:
        raise UserError(f"there are too many rows; choose files of {MAX_ROWS} at most")
    return [_line(row, title if row.dataset is None else f"{title}, {row.dataset}") for row in rows]


def _checked(row: Row) -> Row:
    """Return the row; raise a TypeError if a number is none."""
    numbers = (row.epsilon, row.value, row.n, *(row.ci95 or ()))
    if not all(isinstance(number, (int, float)) for number in numbers) or len(row.ci95 or (0, 0)) != 2:
        raise TypeError
    return row


def _line(row: Row, file: str) -> Line:
    low, high = row.ci95 or (None, None)
    texts = [str(text) for text in (row.vae, row.attack, row.threat_model)]
    numbers = [_rounded(number) for number in (row.value, low, high)]
    return [*texts, _rounded(255 * row.epsilon), str(row.metric), *numbers, row.n, file]


def _rounded(number: float | None) -> float | None:
    """Return a number with 5 significant digits; None if it is not finite, which JSON cannot hold."""
    return None if number is None or not math.isfinite(number) else float(f"{number:.5g}")
