"""Submit an entry with its row: check both, then write them into the zoo or print them for a pull request."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import yaml

from srl_utils.errors import UserError
from srl_utils.files import write_text_atomically
from srl_utils.markdown import as_text
from srl_utils.zoo.entries import Entry, read_entries, read_entry
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
        UserError: for the reasons of `check_entry`, `check_new` and `check_rows`, or if the row is of other weights or of
            another base.
    """
    entry = read_entry(path)
    row = read_row(row_path)
    check_new(entry, zoo)
    check_rows({entry.name: entry}, {**read_rows(zoo), entry.name: row})
    load(replace(entry, digest=row.digest, base_digest=row.base_digest))
    text = path.read_text(encoding="utf-8")
    digests = {} if entry.command is not None else {"digest": row.digest}
    if row.base_digest is not None:
        digests["base_digest"] = row.base_digest
    text = with_digests(text, digests, path)
    return row, {
        zoo / "entries" / f"{entry.name}.yaml": text,
        zoo / "rows" / f"{entry.name}.json": row_path.read_text(encoding="utf-8"),
    }


def check_new(entry: Entry, zoo: Path) -> None:
    """Refuse an entry that would take the place of another VAE's.

    Raises:
        MissingFile: a FileNotFoundError, if there is no zoo.
        UserError: if the zoo has an entry of this name for other weights, or for another base or protocol.
    """
    present = read_entries(zoo).get(entry.name)
    if present is None:
        return
    for field in ("weights", "base", "protocol"):
        own, theirs = (getattr(each, field) or "none" for each in (entry, present))
        if own != theirs:
            raise UserError(f"name: the zoo has an entry {entry.name} with the {field} {theirs}; choose another name")


def with_digests(text: str, digests: Mapping[str, str], path: Path) -> str:
    """Return the text of an entry with digests in their fields.

    Args:
        text: of the entry, with its comments.
        digests: by the name of the field.
        path: of the entry, for the error.

    Raises:
        UserError: if a field is written in another way than alone on its line.
    """
    expected = {**yaml.safe_load(text), **digests}
    for field, digest in digests.items():
        text = re.sub(rf"^{field}:.*$", f'{field}: "{digest}"', text, flags=re.MULTILINE)
    try:
        entered = yaml.safe_load(text) == expected
    except yaml.YAMLError:
        entered = False
    if not entered:
        raise UserError(
            f"{path}: cannot enter {' and '.join(digests)}; write each on a line of its own, like digest: null"
        )
    return text


def write(files: dict[Path, str]) -> None:
    """Write the files of a submission, each atomically."""
    for path, text in files.items():
        write_text_atomically(path, text)


def pull_request(row: ZooRow, files: dict[Path, str]) -> str:
    """Return title and text of a pull request that adds the files, in Markdown."""
    title = f"Zoo: add {row.name}"
    worst = f"Worst case {row.worst.value:.2f} dB under {row.worst.attack} ({row.worst.threat_model}), clean {row.clean:.2f} dB"
    parts = [f"`{path.as_posix()}`:\n\n```{path.suffix[1:]}\n{text.rstrip()}\n```" for path, text in files.items()]
    return "\n\n".join([title, f"{worst}, protocol {row.protocol}, {as_text(row.device)}.", *parts]) + "\n"
