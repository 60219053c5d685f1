"""The report of an evaluation: numbers, tables, figures and checks as JSON, Markdown and one HTML file.

Names come from data sets, cards and repositories: every one is escaped on its way into a document, and none becomes
a path as it is.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from srl_utils.evaluation.report.caveats import Caveat
from srl_utils.evaluation.report.figures import draw_figures, safe_name
from srl_utils.evaluation.report.tables import METRIC_TITLES, markdown_table, measured
from srl_utils.evaluation.results import Difference, Record, Row, Rows, Setting, differences_to
from srl_utils.evaluation.sanity import Check
from srl_utils.files import write_atomically, write_text_atomically
from srl_utils.images.pixels import format_pixel_distance
from srl_utils.markdown import as_text

LOADER = PackageLoader("srl_utils.evaluation.report")
HIGHER_IS_BETTER = frozenset({"psnr", "ssim", "clip", "clip-text", "shown", "is"})
SECTIONS = {
    "none": ("Clean images and corruptions", "Nobody aims at a VAE here."),
    "transfer": ("Transferred attacks", "Made on the baseline, shown to every VAE."),
    "adaptive": ("Adaptive attacks", "Made on the VAE under judgement: what its robustness is worth."),
}


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that a report says."""

    title: str
    baseline: str
    """Name of the VAE that the others are compared with."""
    vaes: Sequence[str]
    """All names, the baseline first."""
    rows: Rows
    records: Sequence[Record]
    checks: Mapping[str, Sequence[Check]] | None
    """By VAE; empty where nothing was checked, None where there is nothing to check."""
    notes: Sequence[str]
    """What a reader must know, such as "LPIPS was skipped: ..."."""
    caveats: Sequence[Caveat]
    """What limits the numbers, beside which it is said."""
    settings: Mapping[str, str]
    """How it was run: machine, versions, command, seed, images, date."""
    pictures: Mapping[str, Path]
    """PNG files by title; those outside the report's `figures` are copied there."""

    @property
    def others(self) -> Sequence[str]:
        return [vae for vae in self.vaes if vae != self.baseline]


@dataclass(frozen=True)
class Cell:
    """A value, how it reads, and for a difference what it means."""

    value: float | None = None
    text: str = ""
    interval: str = ""
    verdict: str = ""
    """`better` or `worse` than the baseline, with `certain` where the interval excludes 0."""


@dataclass(frozen=True)
class Line:
    """One attack, epsilon and metric: the baseline, then each other VAE and its difference."""

    setting: Setting
    cells: Sequence[Cell]

    @property
    def epsilon(self) -> str:
        return format_pixel_distance(self.setting.epsilon) if self.setting.epsilon else "0"

    @property
    def metric(self) -> str:
        return METRIC_TITLES[self.setting.metric]


@dataclass(frozen=True)
class Section:
    """A table with its heading."""

    title: str
    explanation: str
    images: str
    columns: Sequence[str]
    lines: Sequence[Line]
    caveats: Sequence[str]
    """Of the metrics that occur."""

    @property
    def metrics(self) -> Mapping[str, str]:
        """Titles of those that occur, in the order of the lines."""
        return {line.setting.metric: line.metric for line in self.lines}


@dataclass(frozen=True)
class Figure:
    """A picture in the folder of the figures."""

    title: str
    path: Path

    @property
    def data_uri(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.path.read_bytes()).decode()}"


def write_report(findings: Findings, output_dir: Path) -> None:
    """Writes `results.json`, `per_image.csv`, `report.md`, `report.html` and `figures/*.png`.

    Each file changes in one rename.
    """
    folder = output_dir / "figures"
    drawn = draw_figures(findings.rows, findings.vaes, folder)
    figures = [Figure(title, path) for title, path in drawn.items()] + list(_brought_in(findings.pictures, folder))
    contents = {"findings": findings, "sections": list(_sections(findings)), "figures": figures}
    contents["failures"] = [(vae, check) for vae, check in _checks(findings) if not check.passed]
    contents["checked"] = len(list(_checks(findings)))
    contents["legend"] = _legend(findings)
    contents["caveats"] = [caveat.text for caveat in findings.caveats if not caveat.metrics]
    write_text_atomically(
        output_dir / "results.json", json.dumps([row.to_json() for row in findings.rows], indent=1) + "\n"
    )
    write_text_atomically(output_dir / "per_image.csv", _csv(findings.records))
    write_text_atomically(output_dir / "report.md", _render_markdown(contents))
    write_text_atomically(output_dir / "report.html", _render_html(contents))
    shown = {figure.path for figure in figures} | set(findings.pictures.values())
    for outdated in set(folder.glob("*.png")) - shown:
        outdated.unlink()  # of an earlier selection; neither report shows it


def _csv(records: Sequence[Record]) -> str:
    """A line for each value of each image, so that other runs on the same images can be compared with it in pairs."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["vae", *Setting._fields, "index", "value"])
    writer.writerows([record.vae, *record.setting, record.index, record.value] for record in records)
    return file.getvalue()


def _legend(findings: Findings) -> dict[str, str]:
    """Titles of the metrics that occur: which are better when higher or lower, and which have no interval."""
    present = {row.metric: row.ci95 is not None for row in findings.rows}
    groups = {
        "higher": [metric for metric in present if metric in HIGHER_IS_BETTER],
        "lower": [metric for metric in present if metric not in HIGHER_IS_BETTER],
        "overall": [metric for metric, has_interval in present.items() if not has_interval],
    }
    return {name: " and ".join(METRIC_TITLES[metric] for metric in group) for name, group in groups.items()}


# --- what the tables say ---


def _sections(findings: Findings) -> Iterator[Section]:
    differences = differences_to(findings.baseline, findings.records)
    present = {row.threat_model for row in findings.rows}
    columns = [findings.baseline]
    for vae in findings.others:
        columns += [vae, f"{vae} - {findings.baseline}"]
    for threat_model in [name for name in SECTIONS if name in present] + sorted(present - SECTIONS.keys()):
        rows = [row for row in findings.rows if row.threat_model == threat_model]
        title, explanation = SECTIONS.get(threat_model, (threat_model, ""))
        counts = " to ".join(str(n) for n in sorted({min(row.n for row in rows), max(row.n for row in rows)}))
        metrics = {row.metric for row in rows}
        caveats = [caveat.text for caveat in findings.caveats if not metrics.isdisjoint(caveat.metrics)]
        yield Section(title, explanation, counts, columns, _lines(rows, findings, differences), caveats)


def _lines(rows: Rows, findings: Findings, differences: Mapping[tuple[str, Setting], Difference]) -> list[Line]:
    """Attacks in the order of their first row, each by epsilon and metric."""
    by_key = {(row.vae, row.setting): row for row in rows}
    settings = dict.fromkeys(row.setting for row in rows)
    attacks = list(dict.fromkeys(setting.attack for setting in settings))
    metrics = list(METRIC_TITLES)
    lines = []
    for setting in sorted(settings, key=lambda s: (attacks.index(s.attack), s.epsilon, metrics.index(s.metric))):
        baseline = by_key.get((findings.baseline, setting))
        cells = [_value_cell(baseline)]
        for vae in findings.others:
            row = by_key.get((vae, setting))
            cells += [_value_cell(row), _difference_cell(row, baseline, differences.get((vae, setting)))]
        lines.append(Line(setting, cells))
    return lines


def _value_cell(row: Row | None) -> Cell:
    if row is None:
        return Cell()
    return Cell(row.value, *measured(row.metric, row.value, row.ci95))


def _difference_cell(row: Row | None, baseline: Row | None, paired: Difference | None) -> Cell:
    """Image by image where there are values per image, else from mean to mean."""
    if row is None or baseline is None:
        return Cell()
    value = paired.value if paired else row.value - baseline.value
    interval = paired.ci95 if paired else None
    text, *bounds = measured(row.metric, value, interval, sign="+")
    return Cell(value, text, "".join(bounds), _verdict(row.metric, value, interval))


def _verdict(metric: str, value: float, interval: tuple[float, float] | None) -> str:
    if not value:
        return ""
    verdict = "better" if (value > 0) == (metric in HIGHER_IS_BETTER) else "worse"
    certain = interval is not None and (interval[0] > 0 or interval[1] < 0)
    return f"{verdict} certain" if certain else verdict


def _checks(findings: Findings) -> Iterator[tuple[str, Check]]:
    return ((vae, check) for vae, checks in (findings.checks or {}).items() for check in checks)


def _brought_in(pictures: Mapping[str, Path], folder: Path) -> Iterator[Figure]:
    """The pictures, copied into `folder` unless they are there, under numbered names made from their titles."""
    for number, (title, source) in enumerate(pictures.items(), start=1):
        path = folder / f"picture-{number}-{safe_name(title)}.png"
        if source == folder / f"{safe_name(source.stem)}.png":
            path = source
        else:
            write_atomically(path, partial(shutil.copyfile, source))
        yield Figure(title, path)


# --- how it is written ---


def _render_markdown(contents: Mapping[str, Any]) -> str:
    """What the template prints is escaped, but for what comes as markup."""
    environment = _environment(finalize=_escape_markdown)
    environment.filters["table"] = _markdown_table
    return environment.get_template("report.md.jinja").render(contents)


def _render_html(contents: Mapping[str, Any]) -> str:
    """Only the script and the style whose hashes the file announces are run: one that came with a name is not."""
    environment = _environment(autoescape=True)
    assets = {name: LOADER.get_source(environment, f"report.{name}")[0] for name in ("css", "js")}
    hashes = {f"{name}_hash": _content_hash(text) for name, text in assets.items()}
    marked = {name: Markup(text) for name, text in assets.items()}
    return environment.get_template("report.html.jinja").render({**contents, **marked, **hashes})


def _environment(**options: Any) -> Environment:
    return Environment(
        loader=LOADER,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )


def _content_hash(text: str) -> str:
    """As a Content-Security-Policy names an inline script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _escape_markdown(value: Any) -> Any:
    """A text that is no `Markup` as text alone."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else as_text(value)


def _markdown_table(section: Section) -> Markup:
    titles = ["images", "epsilon", "metric", *map(_escape_markdown, section.columns)]
    lines = [
        [
            _escape_markdown(line.setting.attack),
            line.epsilon,
            line.metric,
            *(f"{cell.text} {cell.interval}".strip() for cell in line.cells),
        ]
        for line in section.lines
    ]
    return Markup(markdown_table([titles, *lines]))
