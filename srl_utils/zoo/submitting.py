"""Submit an entry with its row: check both, then write them into the zoo or print them for a pull request."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from srl_utils.files import write_text_atomically
from srl_utils.zoo.entries import Entry, read_entry
from srl_utils.zoo.measuring import load
from srl_utils.zoo.rows import ZooRow, check_rows, read_row, read_rows


def check_entry(path: Path) -> Entry:
    """Return the entry in a YAML file after loading its weights, which have to be there.

    Raises:
        UserError: if the entry is refused by `read_entry`, or if its weights cannot be loaded or differ from its digest.
    """
    entry = read_entry(path)
    load(entry)
    return entry


def submission(path: Path, row_path: Path, zoo: Path) -> tuple[ZooRow, dict[Path, str]]:
    """Return the row of an entry, and the text of each file that the zoo gets.

    The digests of published weights and of the base are entered where the entry leaves them open. Weights that a command
    makes have other bits on another machine, so their entries stay without a digest.

    Args:
        path: the entry, a YAML file.
        row_path: the row, a JSON file that `measure` has written.
        zoo: the folder of entries and rows.

    Raises:
        UserError: for the reasons of `check_entry` and `check_rows`, or if the row is of other weights or of another base.
    """
    entry = read_entry(path)
    row = read_row(row_path)
    check_rows({entry.name: entry}, {**read_rows(zoo), entry.name: row})
    load(replace(entry, digest=row.digest, base_digest=row.base_digest))
    text = path.read_text(encoding="utf-8")
    if entry.command is None:
        text = with_digest(text, "digest", row.digest)
    if row.base_digest is not None:
        text = with_digest(text, "base_digest", row.base_digest)
    return row, {
        zoo / "entries" / f"{entry.name}.yaml": text,
        zoo / "rows" / f"{entry.name}.json": row_path.read_text(encoding="utf-8"),
    }


def with_digest(text: str, field: str, digest: str) -> str:
    """Return the text of an entry with a digest in one of its fields."""
    return re.sub(rf"^{field}:.*$", f'{field}: "{digest}"', text, flags=re.MULTILINE)


def write(files: dict[Path, str]) -> None:
    """Write the files of a submission, each atomically."""
    for path, text in files.items():
        write_text_atomically(path, text)


def pull_request(row: ZooRow, files: dict[Path, str]) -> str:
    """Return title and text of a pull request that adds the files, in Markdown."""
    title = f"Zoo: add {row.name}"
    worst = f"Worst case {row.worst.value:.2f} dB under {row.worst.attack} ({row.worst.threat_model}), clean {row.clean:.2f} dB"
    parts = [f"`{path.as_posix()}`:\n\n```{path.suffix[1:]}\n{text.rstrip()}\n```" for path, text in files.items()]
    return "\n\n".join([title, f"{worst}, protocol {row.protocol}, {row.device}.", *parts]) + "\n"
