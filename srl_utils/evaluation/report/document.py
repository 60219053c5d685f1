"""Write the report of an evaluation: numbers, tables, figures and checks as JSON, CSV, Markdown and one HTML file.

Names come from datasets, cards and repositories, so every name is escaped in documents and cleaned in paths.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from srl_utils.evaluation.report.caveats import Caveat
from srl_utils.evaluation.report.effects import effects_on
from srl_utils.evaluation.report.figures import draw_data_sets, draw_figures, safe_name
from srl_utils.evaluation.report.pages import environment, html_page
from srl_utils.evaluation.report.tables import HIGHER_IS_BETTER, METRIC_TITLES, Panel, markdown_table, measured
from srl_utils.evaluation.results import Difference, Record, Row, Rows, Setting, differences_to
from srl_utils.evaluation.sanity import Check
from srl_utils.files import write_atomically, write_text_atomically
from srl_utils.images.pixels import format_pixel_distance
from srl_utils.markdown import as_text

SECTIONS = {
    "none": ("Clean images and corruptions", "These perturbations are not adversarial."),
    "transfer": ("Transferred attacks", "Made on the baseline; every VAE is evaluated under them."),
    "adaptive": ("Adaptive attacks", "Made on the evaluated VAE itself; they measure its robustness."),
    "certified": ("Certificates", "Bounds that no perturbation within a Euclidean ball exceeds, and attacks on them."),
}


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """Everything that a report contains."""

    title: str
    baseline: str
    """Name of the VAE with which the others are compared."""
    vaes: Sequence[str]
    """Names of all VAEs, the baseline first."""
    rows: Rows
    records: Sequence[Record]
    checks: Mapping[str, Sequence[Check]] | None
    """Robustness checks by VAE; empty if they were left out, None for a task without checks."""
    notes: Sequence[str]
    """What a reader must know, such as "LPIPS was skipped: ..."."""
    caveats: Sequence[Caveat]
    """What limits the numbers; each stands beside the metrics that it concerns."""
    settings: Mapping[str, str]
    """How it was run: machine, versions, command, seed, images, date."""
    panels: Sequence[Panel] = ()
    """Further tables, such as of defences."""
    parts: Mapping[str, ReportContent] = field(default_factory=dict)
    """In a report on several data sets, the contents of the reports on each, by its name."""
    pictures: Mapping[str, Path]
    """PNG files by title; files outside the report's `figures` folder are copied there."""

    @property
    def others(self) -> Sequence[str]:
        """Return the names of all VAEs except the baseline."""
        return [vae for vae in self.vaes if vae != self.baseline]


@dataclass(frozen=True)
class TableCell:
    """A value, its text, and for a difference whether it is an improvement."""

    value: float | None = None
    text: str = ""
    interval: str = ""
    verdict: str = ""
    """`better` or `worse` than the baseline, with `certain` if the interval excludes 0; empty for no difference."""


@dataclass(frozen=True)
class TableLine:
    """One attack, epsilon and metric: the baseline's value, then each other VAE's value and difference."""

    setting: Setting
    cells: Sequence[TableCell]

    @property
    def epsilon(self) -> str:
        """Return the budget as text, such as 8/255."""
        return format_pixel_distance(self.setting.epsilon) if self.setting.epsilon else "0"

    @property
    def metric(self) -> str:
        """Return the title of the metric."""
        return METRIC_TITLES[self.setting.metric]


@dataclass(frozen=True)
class Section:
    """A table of one threat model, with its heading."""

    title: str
    explanation: str
    images: str
    columns: Sequence[str]
    lines: Sequence[TableLine]
    caveats: Sequence[str]
    """Limits of the metrics in the table."""

    @property
    def metrics(self) -> Mapping[str, str]:
        """Return the titles of the metrics in the table, by name."""
        return {line.setting.metric: line.metric for line in self.lines}


@dataclass(frozen=True)
class Figure:
    """A PNG file in the report's `figures` folder."""

    title: str
    path: Path

    @property
    def data_uri(self) -> str:
        """Return the picture as a URI, so that the HTML file needs no other file."""
        return f"data:image/png;base64,{base64.b64encode(self.path.read_bytes()).decode()}"


def write_report(content: ReportContent, output_dir: Path) -> None:
    """Write `results.json`, `per_image.csv`, `report.md`, `report.html` and `figures/*.png`, each atomically."""
    folder = output_dir / "figures"
    draw = draw_data_sets if content.parts else draw_figures
    drawn = draw(content.rows, content.vaes, folder)
    figures = [Figure(title, path) for title, path in drawn.items()] + list(_copied_figures(content.pictures, folder))
    named = content.parts or {"": content}
    sections = [section for name, part in named.items() for section in _sections(part, name)]
    variables = {"content": content, "sections": sections, "figures": figures}
    effects = None if content.parts else effects_on(content.baseline, content.rows, content.records)
    variables["panels"] = [*([] if effects is None else [effects]), *content.panels]
    variables["failures"] = [(vae, check) for vae, check in _checks(content) if not check.passed]
    variables["checked"] = len(list(_checks(content)))
    variables["legend"] = _legend(content)
    variables["caveats"] = [caveat.text for caveat in content.caveats if not caveat.metrics]
    write_text_atomically(
        output_dir / "results.json", json.dumps([row.to_json() for row in content.rows], indent=1) + "\n"
    )
    write_text_atomically(output_dir / "per_image.csv", _csv(content))
    write_text_atomically(output_dir / "report.md", _render_markdown(variables))
    write_text_atomically(output_dir / "report.html", html_page("report.html.jinja", variables))
    shown = {figure.path for figure in figures} | set(content.pictures.values())
    for outdated in set(folder.glob("*.png")) - shown:
        outdated.unlink()  # figures of an earlier report


def _csv(content: ReportContent) -> str:
    """Return a CSV file with one line for each value of each image, which starts with the data set if there are several."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*(["dataset"] if content.parts else []), "vae", *Setting._fields, "index", "value"])
    for start, records in [([], content.records), *(([name], part.records) for name, part in content.parts.items())]:
        writer.writerows([*start, record.vae, *record.setting, record.index, record.value] for record in records)
    return file.getvalue()


def _legend(content: ReportContent) -> dict[str, str]:
    """Return the titles of the metrics that are better when higher, better when lower, and without an interval."""
    present = {row.metric: row.ci95 is not None for row in content.rows}
    groups = {
        "higher": [metric for metric in present if metric in HIGHER_IS_BETTER],
        "lower": [metric for metric in present if metric not in HIGHER_IS_BETTER],
        "overall": [metric for metric, has_interval in present.items() if not has_interval],
    }
    return {name: ", ".join(METRIC_TITLES[metric] for metric in group) for name, group in groups.items()}


# --- tables ---


def _sections(content: ReportContent, dataset: str) -> Iterator[Section]:
    """Yield the table of each threat model; titles start with the name of the data set, "" for the only one."""
    start = f"{dataset}: " if dataset else ""
    differences = differences_to(content.baseline, content.records)
    present = {row.threat_model for row in content.rows}
    columns = [content.baseline]
    for vae in content.others:
        columns += [vae, f"{vae} - {content.baseline}"]
    for threat_model in [name for name in SECTIONS if name in present] + sorted(present - SECTIONS.keys()):
        rows = [row for row in content.rows if row.threat_model == threat_model]
        title, explanation = SECTIONS.get(threat_model, (threat_model, ""))
        counts = " to ".join(str(n) for n in sorted({min(row.n for row in rows), max(row.n for row in rows)}))
        metrics = {row.metric for row in rows}
        caveats = [caveat.text for caveat in content.caveats if not metrics.isdisjoint(caveat.metrics)]
        yield Section(f"{start}{title}", explanation, counts, columns, _lines(rows, content, differences), caveats)


def _lines(
    rows: Rows, content: ReportContent, differences: Mapping[tuple[str, Setting], Difference]
) -> list[TableLine]:
    """Return the lines of a table: attacks in the order of their first row, each sorted by epsilon and metric."""
    by_key = {(row.vae, row.setting): row for row in rows}
    settings = dict.fromkeys(row.setting for row in rows)
    attacks = list(dict.fromkeys(setting.attack for setting in settings))
    metrics = list(METRIC_TITLES)
    lines = []
    for setting in sorted(settings, key=lambda s: (attacks.index(s.attack), s.epsilon, metrics.index(s.metric))):
        baseline = by_key.get((content.baseline, setting))
        cells = [_value_cell(baseline)]
        for vae in content.others:
            row = by_key.get((vae, setting))
            cells += [_value_cell(row), _difference_cell(row, baseline, differences.get((vae, setting)))]
        lines.append(TableLine(setting, cells))
    return lines


def _value_cell(row: Row | None) -> TableCell:
    if row is None:
        return TableCell()
    return TableCell(row.value, *measured(row.metric, row.value, row.ci95))


def _difference_cell(row: Row | None, baseline: Row | None, paired: Difference | None) -> TableCell:
    """Return the mean of the paired differences; for a metric of whole sets, the difference of the two values."""
    if row is None or baseline is None:
        return TableCell()
    value = paired.value if paired else row.value - baseline.value
    interval = paired.ci95 if paired else None
    text, *bounds = measured(row.metric, value, interval, sign="+")
    return TableCell(value, text, "".join(bounds), _verdict(row.metric, value, interval))


def _verdict(metric: str, value: float, interval: tuple[float, float] | None) -> str:
    if not value:
        return ""
    verdict = "better" if (value > 0) == (metric in HIGHER_IS_BETTER) else "worse"
    certain = interval is not None and (interval[0] > 0 or interval[1] < 0)
    return f"{verdict} certain" if certain else verdict


def _checks(content: ReportContent) -> Iterator[tuple[str, Check]]:
    return ((vae, check) for vae, checks in (content.checks or {}).items() for check in checks)


def _copied_figures(pictures: Mapping[str, Path], folder: Path) -> Iterator[Figure]:
    """Copy the pictures into `folder` under numbered names, unless they are there already; yield them as figures."""
    for number, (title, source) in enumerate(pictures.items(), start=1):
        path = folder / f"picture-{number}-{safe_name(title)}.png"
        if source == folder / f"{safe_name(source.stem)}.png":
            path = source
        else:
            write_atomically(path, partial(shutil.copyfile, source))
        yield Figure(title, path)


# --- documents ---


def _render_markdown(variables: Mapping[str, Any]) -> str:
    """Return the Markdown report; all text except `Markup` is escaped."""
    page = environment(finalize=_escape_markdown)
    page.filters["table"] = _markdown_table
    page.filters["panel_table"] = _markdown_panel
    return page.get_template("report.md.jinja").render(variables)


def _escape_markdown(value: Any) -> Any:
    """Escape a text unless it is `Markup`; return other values unchanged."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else as_text(value)


def _markdown_panel(panel: Panel) -> Markup:
    """Return a panel's table in Markdown."""
    titles, *lines = panel.table
    return Markup(markdown_table([titles, *([_escape_markdown(name), *values] for name, *values in lines)]))


def _markdown_table(section: Section) -> Markup:
    """Return the section's table in Markdown."""
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
