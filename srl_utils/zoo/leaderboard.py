"""Build the leaderboard from entries and rows: tables in docs/leaderboard.md, and a page with sortable ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import ChoiceLoader, PackageLoader

from srl_utils.errors import MissingFile, UnusableFile
from srl_utils.evaluation.report.document import TableCell
from srl_utils.evaluation.report.pages import LOADER, html_page
from srl_utils.evaluation.report.tables import markdown_table, measured
from srl_utils.files import write_text_atomically
from srl_utils.markdown import as_text
from srl_utils.zoo.entries import Entry, read_entries
from srl_utils.zoo.protocols import PROTOCOLS, Protocol
from srl_utils.zoo.rows import ZooRow, check_rows, read_rows

START = "<!-- leaderboard: written by `python -m srl_utils.zoo leaderboard` -->\n"
END = "<!-- end of leaderboard -->\n"
PAGE, TABLES = "leaderboard.md", "zoo.html"
NUMBERS = ("worst case (dB)", "clean (dB)", "drift", "encoder (ms an image)")
NOT_CHECKED = "not checked"
COST = "cost of training (TFLOP)"
CLAIMED = ("claimed, worst (dB)", "claimed, clean (dB)", "claimed drift")
TITLES = (
    "VAE",
    *NUMBERS[:1],
    "under",
    *NUMBERS[1:],
    "measured on",
    "failed checks",
    COST,
    "base",
    "objective",
    *CLAIMED,
    "setting of the claims",
)


@dataclass(frozen=True)
class Line:
    """A VAE of the leaderboard: its entry and its row."""

    entry: Entry
    row: ZooRow

    @property
    def cells(self) -> dict[str, TableCell]:
        """Return a cell for each of `TITLES`; numbers have a value."""
        row, claims = self.row, self.entry.claims
        worst = row.worst
        texts = {
            "VAE": self.entry.name,
            "under": f"{worst.attack}, {worst.threat_model}",
            "base": self.entry.base or "",
            "objective": self.entry.objective,
            "measured on": row.device,
            "setting of the claims": claims.setting if claims else "",
        }
        numbers = {
            "worst case (dB)": ("psnr", worst.value),
            "clean (dB)": ("psnr", row.clean),
            "drift": ("drift", None if self.entry.base is None else row.drift),
            "claimed, worst (dB)": ("psnr", claims.worst if claims else None),
            "claimed, clean (dB)": ("psnr", claims.clean if claims else None),
            "claimed drift": ("drift", claims.drift if claims else None),
        }
        cells = {title: TableCell(text=text) for title, text in texts.items()}
        cells |= {title: _number(metric, value) for title, (metric, value) in numbers.items()}
        cells["encoder (ms an image)"] = TableCell(row.encoder_ms, f"{row.encoder_ms:.2f}")
        failed = row.failed_checks
        cells["failed checks"] = (
            TableCell(text=NOT_CHECKED) if failed is None else TableCell(len(failed), str(len(failed)))
        )
        cost = self.entry.cost
        cells[COST] = TableCell() if cost is None else TableCell(cost, f"{cost:.1f}")
        return {title: cells[title] for title in TITLES}


@dataclass(frozen=True)
class Table:
    """The VAEs of one protocol, the best worst case first."""

    protocol: Protocol
    lines: Sequence[Line]
    unmeasured: Sequence[str]
    """Names of the entries without a current row."""

    @property
    def explanation(self) -> str:
        """Return how the VAEs were measured."""
        return f"{self.protocol.images}; budget {self.protocol.epsilon}; protocol {self.protocol.fingerprint}."

    @property
    def note(self) -> str:
        """Return which entries have no row yet; empty if all have one."""
        return f"Not measured yet: {', '.join(self.unmeasured)}." if self.unmeasured else ""


def write_leaderboard(zoo: Path, folder: Path) -> None:
    """Write the tables between the markers of `leaderboard.md` in a folder, and `zoo.html` beside it.

    Raises:
        MissingFile: a FileNotFoundError, if there is no such page or no zoo.
        UnusableFile: an OSError, if the page has no place for the tables.
        UserError: a ValueError, if an entry or a row is refused.
    """
    page = folder / PAGE
    if not page.is_file():
        raise MissingFile(f"there is no page {page}; run this in a clone of the repository", parameter="output_dir")
    found = tables(read_entries(zoo), read_rows(zoo))
    write_text_atomically(page, updated(page.read_text(encoding="utf-8"), found))
    write_text_atomically(folder / TABLES, as_html(found))


def tables(entries: Mapping[str, Entry], rows: Mapping[str, ZooRow]) -> list[Table]:
    """Return a table for each protocol that an entry has.

    Raises:
        UserError: if a row does not belong to its entry or to its protocol.
    """
    check_rows(entries, rows)
    found = []
    for name, protocol in PROTOCOLS.items():
        own = [entry for entry in entries.values() if entry.protocol == name]
        lines = [Line(entry, rows[entry.name]) for entry in own if entry.name in rows]
        lines.sort(key=lambda line: line.row.worst.value, reverse=True)
        if own:
            found.append(Table(protocol, lines, [entry.name for entry in own if entry.name not in rows]))
    return found


def updated(page: str, found: Sequence[Table]) -> str:
    """Return the Markdown page with the tables between its two markers.

    Raises:
        UnusableFile: an OSError, if it lacks one, or has one twice.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end or START in rest or END in before + after:
        raise UnusableFile(f"{PAGE} needs the lines {START.strip()} and {END.strip()} once each, in this order")
    return f"{before}{START}\n{as_markdown(found)}\n{END}{after}"


def as_markdown(found: Sequence[Table]) -> str:
    """Return the tables in Markdown. Columns that are empty everywhere are left out."""
    parts = []
    for table in found:
        lines = [[as_text(cell.text) for cell in line.cells.values()] for line in table.lines]
        kept = [number for number in range(len(TITLES)) if any(line[number] for line in lines)]
        grid = [[line[number] for number in kept] for line in (TITLES, *lines)]
        shown = markdown_table(grid) if lines else ""
        parts += [f"### {table.protocol.title}", table.explanation, shown, table.note]
    return "\n\n".join(filter(None, parts)) + "\n"


def as_html(found: Sequence[Table]) -> str:
    """Return a page of sortable tables that needs no other file."""
    loader = ChoiceLoader([PackageLoader("srl_utils.zoo"), LOADER])
    variables = {"tables": found, "titles": TITLES, "numbers": {*NUMBERS, *CLAIMED, "failed checks", COST}}
    return html_page("leaderboard.html.jinja", variables, loader)


def _number(metric: str, value: float | None) -> TableCell:
    return TableCell() if value is None else TableCell(value, *measured(metric, value, None))
