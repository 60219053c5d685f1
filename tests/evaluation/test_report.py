from __future__ import annotations

import base64
import csv
import hashlib
import io
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import markdown
import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from srl_utils.evaluation.report.caveats import Caveat
from srl_utils.evaluation.report.document import ReportContent, write_report
from srl_utils.evaluation.report.figures import COLOURS, draw_figures, safe_name
from srl_utils.evaluation.report.grids import extremes_picture
from srl_utils.evaluation.report.tables import METRIC_TITLES
from srl_utils.evaluation.results import (
    Difference,
    Record,
    Row,
    Setting,
    differences_to,
    paired_difference,
    to_row,
    to_rows,
)
from srl_utils.evaluation.sanity import Check

EPSILONS = (4 / 255, 8 / 255)
VAES = ("original", "robust", "other")
SCRIPT = "<script>alert(1)</script>"
MARKUP = '"><img src=x onerror=alert(2)>|**b** [a](javascript:alert(3))'
DECIMALS = {"PSNR (dB)": 2, "SSIM": 4, "rFID": 2}
VOID = {"meta", "img", "br", "link", "input"}


def example_records(
    vaes: Sequence[str] = VAES,
    attacks: Sequence[str] = ("pgd-10", "fgsm"),
    *,
    metrics: Sequence[str] = ("psnr", "ssim"),
) -> list[Record]:
    """Of three images, made up; no figure is drawn of SSIM alone, which saves time where none is looked at."""
    values = ((30 - (7 * number % 101) / 8) for number in itertools.count())
    settings = [("clean", None, "none", 0.0), *itertools.product(attacks, ["mse"], ("transfer", "adaptive"), EPSILONS)]
    return [
        Record(vae, Setting(*setting, metric), index, next(values) / (1 if metric == "psnr" else 32))
        for vae, setting, metric, index in itertools.product(vaes, settings, metrics, range(3))
    ]


def example_findings(records: Sequence[Record] | None = None, **changes: Any) -> ReportContent:
    records = example_records(metrics=["ssim"]) if records is None else records
    vaes = list(dict.fromkeys(record.vae for record in records))
    settings = {
        "title": "An example", "baseline": vaes[0], "vaes": vaes, "rows": to_rows(records), "records": records,
        "checks": {vae: [Check("Gradients do not vanish", True, "0.0%")] for vae in vaes}, "notes": [], "caveats": [],
        "settings": {"seed": "0"}, "pictures": {},
    }  # fmt: skip
    return ReportContent(**{**settings, **changes})


def with_rfid(findings: ReportContent) -> ReportContent:
    """A row without interval and without records, for each VAE."""
    clean = [row for row in findings.rows if (row.attack, row.metric) == ("clean", "ssim")]
    rfid = [replace(row, metric="rfid", value=2.0 + place**2, ci95=None) for place, row in enumerate(clean)]
    return replace(findings, rows=[*findings.rows, *rfid])


# --- reading what was written -----------------------------------------------------------------------------


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    ancestors: list[str]
    texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


class Page(HTMLParser):
    """The elements of a page in their order, each with all the text inside it."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self.open: list[Element] = []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {[element.tag for element in self.open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        element = Element(tag, attributes, [outer.tag for outer in self.open])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.texts.append(data)

    def all(self, *tags: str) -> list[Element]:
        return [element for element in self.elements if element.tag in tags]

    def tables(self) -> list[list[list[Element]]]:
        """The rows of cells of each table, the titles first."""
        tables: list[list[list[Element]]] = []
        for element in self.all("table", "tr", "th", "td"):
            if element.tag == "table":
                tables.append([])
            elif element.tag == "tr":
                tables[-1].append([])
            else:
                tables[-1][-1].append(element)
        return tables


def written_page(findings: ReportContent, folder: Path) -> Page:
    write_report(findings, folder)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def markdown_tables(text: str) -> list[list[list[str]]]:
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    return [
        [[unescape(cell.strip()) for cell in line.strip("|").split("|")] for line in block.splitlines()]
        for block in blocks
    ]


def numbers_in(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", text)]


def line_key(row: Row) -> tuple[str, str, str]:
    epsilon = {0.0: "0", 4 / 255: "4/255", 8 / 255: "8/255"}[row.epsilon]
    return row.attack, epsilon, METRIC_TITLES[row.metric]


def mean_difference(findings: ReportContent, row: Row) -> float:
    (baseline,) = [
        other.value for other in findings.rows if other.vae == findings.baseline and other.setting == row.setting
    ]
    return row.value - baseline


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "made elsewhere.png"
    Image.new("RGB", (40, 20), "red").save(path)
    return path


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReportContent, Path, Page]:
    """A report with all kinds of tables and figures, its folder and its page."""
    folder = tmp_path_factory.mktemp("complete")
    picture = folder / "made elsewhere.png"
    Image.new("RGB", (40, 20), "red").save(picture)
    findings = with_rfid(example_findings(example_records(), pictures={"A picture": picture}))
    return findings, folder / "out", written_page(findings, folder / "out")


# --- differences ------------------------------------------------------------------------------------------


def test_difference_is_taken_over_the_images_both_have() -> None:
    """Oracle: closed form. Over images 1 and 2 it is 1 and -2; of four equally likely resamples one has the mean -2
    and one 1, so these are the ends of the interval."""
    found = paired_difference({0: 1.0, 1: 5.0, 2: 2.0}, {3: 9.0, 2: 4.0, 1: 4.0})
    assert found == Difference(-0.5, (-2.0, 1.0), 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_difference_does_not_see_how_images_differ() -> None:
    """Oracle: invariance; where every image gains 2, so does every resample, however unlike the images are."""
    reference = {index: float(2**index) for index in range(8)}
    found = paired_difference({index: value + 2 for index, value in reference.items()}, reference)
    assert found == Difference(2.0, (2.0, 2.0), 8)


def test_differences_keep_settings_apart() -> None:
    """Oracle: closed form; objective, threat model, epsilon, metric and attack all tell values apart, the baseline has none."""
    settings = [
        Setting("pgd", "mse", "adaptive", 4 / 255, "psnr"), Setting("pgd", "mse", "adaptive", 8 / 255, "psnr"),
        Setting("pgd", "mse", "transfer", 8 / 255, "psnr"), Setting("pgd", "mse", "transfer", 8 / 255, "ssim"),
        Setting("fgsm", "mse", "transfer", 8 / 255, "ssim"), Setting("pgd", "other", "adaptive", 4 / 255, "psnr"),
    ]  # fmt: skip
    records = [Record("a", setting, 0, 1.0) for setting in settings]
    records += [Record("b", setting, 0, 2.0 + place) for place, setting in enumerate(settings)]
    records.append(Record("b", Setting("square", "mse", "adaptive", 8 / 255, "psnr"), 0, 5.0))
    found = differences_to("a", records)
    assert {key: difference.value for key, difference in found.items()} == {
        ("b", setting): 1.0 + place for place, setting in enumerate(settings)
    }


# --- the files --------------------------------------------------------------------------------------------


def test_results_are_the_rows(complete) -> None:
    """Oracle: round trip, exact, through the rows with and without an interval."""
    findings, folder, _ = complete
    assert list(map(Row.from_json, json.loads((folder / "results.json").read_text()))) == findings.rows
    assert {row.ci95 is None for row in findings.rows} == {True, False}


def test_values_of_images_can_be_read_back(tmp_path: Path) -> None:
    """Oracle: the records themselves, through the standard library's reader; names with commas, quotes and breaks."""
    records = example_records(vaes=("original", 'a,"b"\nc'), metrics=["ssim"])
    write_report(example_findings(records), tmp_path)
    with (tmp_path / "per_image.csv").open(newline="") as file:
        title, *lines = csv.reader(file)
    assert title == ["vae", *Setting._fields, "index", "value"]
    read = [
        Record(vae, Setting(attack, objective or None, threat, float(epsilon), metric), int(index), float(value))
        for vae, attack, objective, threat, epsilon, metric, index, value in lines
    ]
    assert read == records


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    """Oracle: the same findings but for the title give the same bytes but for the documents; nothing half written
    is left, and nothing of the old title."""

    def contents() -> dict[Path, bytes]:
        return {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    findings = example_findings(example_records(attacks=["pgd"]))
    write_report(replace(findings, title="Outdated"), tmp_path)
    first = contents()
    assert b"Outdated" in first[Path("report.html")] and b"Outdated" in first[Path("report.md")]
    write_report(findings, tmp_path)
    second = contents()
    assert {path for path in first if first[path] != second[path]} == {Path("report.html"), Path("report.md")}
    assert {str(path) for path in first} == {
        "results.json", "per_image.csv", "report.md", "report.html", "figures/psnr-by-attack-none.png",
        "figures/psnr-by-attack-transfer.png", "figures/psnr-by-attack-adaptive.png",
        "figures/psnr-by-epsilon-transfer.png", "figures/psnr-by-epsilon-adaptive.png",
    }  # fmt: skip
    assert first.keys() == second.keys() and not [path for path in second if b"Outdated" in second[path]]


# --- tables -----------------------------------------------------------------------------------------------


def test_markdown_tables_say_what_the_rows_say(complete) -> None:
    """Oracle: the tables parsed back: every row in its line and column, rounded, with its interval; differences
    recomputed from the means, which all VAEs have over the same images."""
    findings, folder, _ = complete
    tables = markdown_tables((folder / "report.md").read_text(encoding="utf-8"))
    sections = dict(zip(("none", "transfer", "adaptive"), tables, strict=False))
    seen = 0
    for threat_model, (titles, _, *lines) in sections.items():
        assert titles[:3] == ["images", "epsilon", "metric"]
        cells = {tuple(line[:3]): dict(zip(titles[3:], line[3:], strict=True)) for line in lines}
        rows = [row for row in findings.rows if row.threat_model == threat_model]
        assert len(cells) == len(lines) == len(rows) / len(VAES)
        for row in rows:
            line, half_a_digit = cells[line_key(row)], 0.5001 * 10.0 ** -DECIMALS[METRIC_TITLES[row.metric]]
            assert numbers_in(line[row.vae]) == pytest.approx([row.value, *(row.ci95 or [])], abs=half_a_digit)
            if row.vae != "original":
                mean, *interval = numbers_in(line[f"{row.vae} - original"])
                assert mean == pytest.approx(mean_difference(findings, row), abs=half_a_digit)
                assert len(interval) == (0 if row.ci95 is None else 2)
            seen += 1
    assert seen == len(findings.rows)


def test_html_cells_carry_the_exact_values(complete) -> None:
    """Oracle: the rows themselves, to the last bit: what a column is sorted by is not what was rounded for reading."""
    findings, _, page = complete
    found, differences = {}, {}
    for threat_model, (titles, *lines) in zip(("none", "transfer", "adaptive"), page.tables(), strict=False):
        names = [title.text for title in titles]
        kinds = [title.attributes["data-kind"] for title in titles]
        assert kinds == ["text", "number", "text", *["number"] * (len(names) - 3)]
        for attack, epsilon, metric, *cells in lines:
            setting = (attack.attributes["data-value"], threat_model, float(epsilon.attributes["data-value"]))
            for name, cell in zip(names[3:], cells, strict=True):
                target = differences if " - " in name else found
                target[(name, *setting, metric.attributes["data-value"])] = float(cell.attributes["data-value"])
    keys = [(row.attack, row.threat_model, row.epsilon, METRIC_TITLES[row.metric]) for row in findings.rows]
    assert found == {(row.vae, *key): row.value for row, key in zip(findings.rows, keys, strict=True)}
    assert differences == {
        # A mean of differences and a difference of means are rounded at different places.
        (f"{row.vae} - original", *key): pytest.approx(mean_difference(findings, row), rel=1e-9, abs=1e-9)
        for row, key in zip(findings.rows, keys, strict=True)
        if row.vae != "original"
    }


@pytest.mark.parametrize(
    ("metric", "gains", "verdict"),
    [
        ("psnr", (1.0, 2.0, 3.0), "better certain"),
        ("psnr", (-1.0, -2.0, -3.0), "worse certain"),
        ("ssim", (0.1, 0.2, 0.3), "better certain"),
        ("ssim", (-0.1, 0.2, 0.3), "better"),
        ("lpips-vgg", (-0.1, -0.2, -0.3), "better certain"),
        ("lpips-vgg", (0.1, 0.2, 0.3), "worse certain"),
        ("drift", (0.1, 0.2, 0.3), "worse certain"),
        ("drift", (0.1, -0.1, 0.3), "worse"),
        ("psnr", (0.0, 0.0, 0.0), ""),
    ],
)
def test_better_is_marked_by_metric_and_interval(metric, gains, verdict, tmp_path: Path) -> None:
    """Oracle: specification. PSNR and SSIM are better when higher, the others when lower; where all images move one
    way the interval excludes 0, where one moves the other way a resample of it alone puts 0 inside."""
    clean = Setting("clean", None, "none", 0.0, metric)
    records = [Record("a", clean, index, 0.5) for index in range(3)]
    records += [Record("b", clean, index, 0.5 + gain) for index, gain in enumerate(gains)]
    page = written_page(example_findings(records), tmp_path)
    (_, line), *_ = page.tables()
    assert line[-1].attributes["class"].split() == ["number", *verdict.split()]
    assert all(cell.attributes["class"] == "number " for cell in line[3:-1])


def test_rfid_is_better_when_lower_and_never_certain(tmp_path: Path) -> None:
    """Oracle: specification; without values per image there is no interval that could exclude 0."""
    setting = Setting("clean", None, "none", 0.0, "rfid")
    rows = [to_row(vae, setting, value, n=3) for vae, value in (("a", 3.0), ("b", 1.5))]
    findings = replace(example_findings(), baseline="a", vaes=["a", "b"], rows=rows, records=[])
    (_, line), *_ = written_page(findings, tmp_path).tables()
    assert line[-1].attributes["class"] == "number better"
    assert line[-1].attributes["data-value"] == "-1.5"
    assert line[-1].text == "-1.50, better"


def test_a_value_that_is_missing_leaves_its_cells_empty(tmp_path: Path) -> None:
    """Oracle: specification; a VAE that was not measured under an attack has neither value nor difference there."""
    records = example_records(metrics=["ssim"])
    records = [record for record in records if (record.vae, record.setting.attack) != ("robust", "fgsm")]
    page = written_page(example_findings(records), tmp_path)
    titles, *lines = page.tables()[2]
    robust = [place for place, title in enumerate(titles) if title.text.startswith("robust")]
    empty = {line[0].text for line in lines for place in robust if line[place].attributes["data-value"] == ""}
    assert len(robust) == 2 and empty == {"fgsm"}


# --- checks -----------------------------------------------------------------------------------------------


def test_failures_stand_above_everything(picture: Path, tmp_path: Path) -> None:
    """Oracle: specification; in both documents the failed check, its VAE and its figures come before notes, tables
    and pictures, and the ones that passed do not."""
    checks = {
        "original": [Check("Restarts never weaken the attack", True, "1 start: 20.00 dB")],
        "robust": [Check("Gradients do not vanish", False, "31.2% are 0")],
    }
    notes = ["LPIPS was skipped: no network"]
    findings = example_findings(checks=checks, notes=notes, pictures={"A picture": picture})
    page = written_page(findings, tmp_path)
    (alarm,) = [element for element in page.elements if element.attributes.get("role") == "alert"]
    assert {"table", "img", "nav"} <= {element.tag for element in page.elements}
    assert page.elements.index(alarm) < min(map(page.elements.index, page.all("table", "img", "nav")))
    order = [element.text for element in page.all("li")]
    assert order == ["robust: Gradients do not vanish. Failed (31.2% are 0)", "LPIPS was skipped: no network"]
    assert alarm.text.startswith("1 of 2 checks failed") and "Restarts" not in alarm.text

    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    top = text[: text.index("LPIPS was skipped")]
    assert "1 of 2 checks failed" in top and "Gradients do not vanish" in top and "31.2% are 0" in top
    assert "|" not in top and "Restarts" not in top


@pytest.mark.parametrize(
    ("checks", "line"),
    [
        ({vae: [Check("One", True, "1"), Check("Two", True, "2")] for vae in VAES}, "All 6 checks passed."),
        ({}, "The robustness was not checked."),
    ],
)
def test_without_failures_one_line_says_so(checks, line, tmp_path: Path) -> None:
    """Oracle: specification; the line is the first after the title, and nothing raises an alarm."""
    page = written_page(example_findings(checks=checks), tmp_path)
    (verdict,) = [element for element in page.elements if "verdict" in element.attributes.get("class", "").split()]
    assert verdict.text.startswith(line)
    assert not [element for element in page.elements if element.attributes.get("role") == "alert"]
    title, _, first, *_ = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    assert (title, first) == ("# An example", line)


def test_every_check_is_listed_by_vae(tmp_path: Path) -> None:
    """Oracle: the checks themselves, read back from both documents."""
    checks = {vae: [Check(f"{vae} one", True, "1 dB"), Check(f"{vae} two", False, "2 dB")] for vae in VAES}
    page = written_page(example_findings(checks=checks), tmp_path)
    expected = [
        [["check", "passed", "figures"], [f"{vae} one", "yes", "1 dB"], [f"{vae} two", "NO", "2 dB"]] for vae in VAES
    ]
    assert [[[cell.text for cell in row] for row in table] for table in page.tables()[3:]] == expected
    assert [heading.text for heading in page.all("h3")] == list(VAES)
    tables = markdown_tables((tmp_path / "report.md").read_text(encoding="utf-8"))[3:-1]
    assert [[[cell.strip("*") for cell in row] for row in [table[0], *table[2:]]] for table in tables] == expected


# --- names from elsewhere ---------------------------------------------------------------------------------


def hostile_findings(picture: Path) -> ReportContent:
    """Markup wherever a name or a text can come from."""
    findings = example_findings(example_records(["original", SCRIPT], [MARKUP], metrics=["ssim"]))
    return replace(
        findings,
        title=f"About {SCRIPT}",
        checks={SCRIPT: [Check(MARKUP, False, SCRIPT), Check("Fine", True, MARKUP)]},
        notes=[f"{SCRIPT} {MARKUP}"],
        settings={SCRIPT: f"{MARKUP}\n# no heading"},
        pictures={f"../../{SCRIPT}": picture, f"..\\..\\{SCRIPT}": picture, MARKUP: picture, "": picture},
    )


def test_names_cannot_become_html(picture: Path, tmp_path: Path) -> None:
    """Oracle: html.parser sees the same elements and attributes as with harmless names, and the names as text."""
    page = written_page(hostile_findings(picture), tmp_path / "hostile")
    harmless = replace(
        example_findings(example_records(["original", "robust"], ["pgd"], metrics=["ssim"])),
        checks={"robust": [Check("One", False, "1"), Check("Two", True, "2")]},
        notes=["note"],
        settings={"seed": "0"},
        pictures=dict.fromkeys("abcd", picture),
    )
    expected = written_page(harmless, tmp_path / "harmless")

    def structure(page: Page) -> list[tuple]:
        return [(element.tag, element.ancestors, sorted(element.attributes)) for element in page.elements]

    assert structure(page) == structure(expected)
    titles, *lines = page.tables()[1]
    assert [title.text for title in titles[3:]] == ["original", SCRIPT, f"{SCRIPT} - original"]
    assert {line[0].text for line in lines} == {MARKUP}
    assert page.all("h1")[0].text == f"About {SCRIPT}"
    assert page.all("dd")[0].text == f"{MARKUP} # no heading"


def test_names_cannot_become_markdown(picture: Path, tmp_path: Path) -> None:
    """Oracle: the Markdown package, whose HTML has no script, no link and no picture but the report's own, and the
    names as text in the right cells."""
    write_report(hostile_findings(picture), tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    page = Page(markdown.markdown(text, extensions=["tables"]))
    assert {element.tag for element in page.elements} <= {
        "h1", "h2", "h3", "p", "ul", "li", "blockquote", "strong", "table", "thead", "tbody", "tr", "th", "td", "img"
    }  # fmt: skip
    figures = {f"figures/{path.name}" for path in (tmp_path / "out/figures").iterdir()}
    assert {image.attributes["src"] for image in page.all("img")} == figures
    assert [heading.text for heading in page.all("h1")] == [f"About {SCRIPT}"]
    titles, *lines = page.tables()[1]
    assert [title.text for title in titles[3:]] == ["original", SCRIPT, f"{SCRIPT} - original"]
    assert {line[0].text for line in lines} == {MARKUP}
    assert [cell.text for cell in page.tables()[-1][1]] == [SCRIPT, f"{MARKUP} # no heading"]


def test_names_cannot_leave_the_output_folder(picture: Path, tmp_path: Path) -> None:
    """Oracle: specification; new files lie in the output folder only, each picture under a name of its own."""
    before = set(tmp_path.rglob("*"))
    write_report(hostile_findings(picture), tmp_path / "out")
    new = {path for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert {path.relative_to(tmp_path).parts[0] for path in new} == {"out"}
    copies = [path for path in new if path.name.startswith("picture-")]
    assert len(copies) == 4 and all(path.read_bytes() == picture.read_bytes() for path in copies)
    assert all(re.fullmatch(r"[a-z0-9-]+\.png", path.name) for path in (tmp_path / "out/figures").iterdir())


def test_figures_of_an_earlier_selection_are_removed(tmp_path: Path) -> None:
    """Oracle: the links of the report; a figure that neither report shows is of another selection."""
    folder = tmp_path / "figures"
    folder.mkdir()
    (folder / "psnr-of-an-attack-left-out-now.png").write_bytes(b"")
    (folder / "notes.txt").write_text("mine")
    written_page(example_findings(), tmp_path)
    links = set(re.findall(r"\]\(figures/(.*)\)", (tmp_path / "report.md").read_text()))
    assert {path.name for path in folder.iterdir()} == {*links, "notes.txt"}


def test_pictures_that_are_in_place_are_not_copied(picture: Path, tmp_path: Path) -> None:
    """Oracle: specification; under a name that is safe a picture stays what it is, under another it is copied."""
    folder = tmp_path / "out/figures"
    folder.mkdir(parents=True)
    for name in ("extremes-0.png", "extremes 1.png"):
        (folder / name).write_bytes(picture.read_bytes())
    findings = example_findings(pictures={"First": folder / "extremes-0.png", "Second": folder / "extremes 1.png"})
    page = written_page(findings, tmp_path / "out")
    assert len(page.all("img")) == 2
    links = re.findall(r"\]\((.*)\)", (tmp_path / "out/report.md").read_text())
    assert links == ["figures/extremes-0.png", "figures/picture-2-second.png"]
    assert {path.name for path in folder.iterdir()} == {"extremes-0.png", "extremes 1.png", "picture-2-second.png"}


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("Worst, median and best", "worst-median-and-best"), ("../../etc/passwd", "etc-passwd"), ("..", "unnamed"),
        ("C:\\NUL\0", "c-nul"), ("é漢字", "unnamed"), ("a" * 300, "a" * 40),
    ],
)  # fmt: skip
def test_safe_names(title: str, name: str) -> None:
    """Oracle: specification; ASCII letters and digits, the rest as single hyphens between them."""
    assert safe_name(title) == name


def test_caveats_stand_beside_their_metrics(tmp_path: Path) -> None:
    """Oracle: specification. In both documents under the tables in which the metric occurs, one of all metrics once, one
    of a metric that was not measured nowhere; markup is text.
    """
    caveats = [Caveat("Rank <b>only</b>", ("rfid", "fid")), Caveat("Few images"), Caveat("Noisy", ("kid",))]
    findings = with_rfid(example_findings(caveats=caveats))
    page = written_page(findings, tmp_path)
    items = [element.text for element in page.all("li")]
    assert items == ["Few images", "Rank <b>only</b>"]  # clean images alone have an rFID here
    text = (tmp_path / "report.md").read_text()
    tables = text.split("\n## ")
    assert "Rank &#60;b&#62;only&#60;/b&#62;" in tables[1] and "Few images" in tables[0]
    assert "Noisy" not in text and text.count("Rank") == 1


# --- one file ---------------------------------------------------------------------------------------------


def test_html_needs_nothing_from_elsewhere(complete) -> None:
    """Oracle: html.parser; no address but anchors of the page itself, every image a data URI that Pillow opens, equal
    to the file beside it, and no address in the style."""
    _, folder, page = complete
    links = [element.attributes["href"] for element in page.elements if "href" in element.attributes]
    anchors = {element.attributes["id"] for element in page.elements if "id" in element.attributes}
    assert links and {link.removeprefix("#") for link in links} <= anchors
    assert not page.all("link", "iframe", "object", "embed", "base", "source")
    assert not [element for element in page.all("script") if "src" in element.attributes]
    assert "url(" not in page.all("style")[0].text and "@import" not in page.all("style")[0].text
    images = [image.attributes["src"].partition("data:image/png;base64,") for image in page.all("img")]
    contents = [base64.b64decode(data, validate=True) for _, _, data in images]
    files = {path.read_bytes() for path in (folder / "figures").iterdir()}
    assert set(contents) == files and len(contents) == 6
    for content in contents:
        Image.open(io.BytesIO(content)).verify()
    assert all(image.attributes["alt"] for image in page.all("img"))


def test_html_runs_only_its_own_script_and_style(complete) -> None:
    """Oracle: hashlib on what stands between the tags; the announced policy names these hashes and no other source
    but images as data."""
    _, _, page = complete
    (policy,) = [meta.attributes["content"] for meta in page.all("meta") if "http-equiv" in meta.attributes]

    def hash_of(tag: str) -> str:
        (element,) = page.all(tag)
        return base64.b64encode(hashlib.sha256("".join(element.texts).encode()).digest()).decode()

    assert [part.strip() for part in policy.split(";")] == [
        "default-src 'none'", "img-src data:", f"script-src 'sha256-{hash_of('script')}'",
        f"style-src 'sha256-{hash_of('style')}'",
    ]  # fmt: skip
    assert not [name for element in page.elements for name in element.attributes if name == "style" or name[:2] == "on"]


def test_html_can_be_used_with_the_keyboard(complete) -> None:
    """Oracle: the HTML standard; what is clicked is a button, sortable columns announce their order, and what scrolls
    takes the focus."""
    _, _, page = complete
    headers = [title for titles, *_ in page.tables()[:3] for title in titles]
    assert len(headers) == 3 * 8 and all(title.attributes["aria-sort"] == "none" for title in headers)
    buttons = [element for element in page.all("button") if "th" in element.ancestors]
    assert [button.text for button in buttons] == [title.text for title in headers]
    assert [image.ancestors[-1] for image in page.all("img")] == ["button"] * 6
    scrolling = [element for element in page.elements if element.attributes.get("class") == "wide"]
    assert len(scrolling) == len(page.tables()) and all(e.attributes["tabindex"] == "0" for e in scrolling)


# --- figures ----------------------------------------------------------------------------------------------


def example_row(vae: str, attack: str, epsilon: float, value: float, threat_model: str = "adaptive") -> Row:
    done = ("mse", threat_model, epsilon) if epsilon else (None, "none", 0.0)
    return to_row(vae, Setting(attack, *done, "psnr"), value, n=3, ci95=(value, value))


def psnr_rows(vaes: Sequence[str], attacks: Sequence[str]) -> list[Row]:
    return to_rows(example_records(vaes, attacks, metrics=["psnr"]))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def coloured(path: Path, number: int) -> np.ndarray:
    """Where a figure has exactly the colour of a VAE, `[H,W]`."""
    colour = tuple(bytes.fromhex(COLOURS[number][1:]))
    return (pixels(path) == colour).all(axis=2)


def test_bars_are_as_long_as_the_values(tmp_path: Path) -> None:
    """Oracle: closed form; bars start at 0, so lengths in pixels are as the values, here 30 : 20 : 10 and 24."""
    values = {("a", "clean"): 30.0, ("b", "clean"): 24.0, ("a", "pgd"): 20.0, ("a", "fgsm"): 10.0}
    rows = [example_row(vae, attack, 0.0 if attack == "clean" else 8 / 255, v) for (vae, attack), v in values.items()]
    path = draw_figures(rows, ["a", "b"], tmp_path)["PSNR, adaptive attacks at epsilon 8/255"]
    lengths = coloured(path, 0).sum(axis=1)
    # The legend's patch is far shorter; rows of pixels at a bar's edges are mixed with the white.
    found = sorted({int(length) for length in lengths if length > 100})
    assert [length / found[-1] for length in found] == pytest.approx([1 / 3, 2 / 3, 1], abs=0.01)
    assert coloured(path, 1).sum(axis=1).max() / found[-1] == pytest.approx(24 / 30, abs=0.01)


def test_figures_show_every_vae_in_its_colour(tmp_path: Path) -> None:
    """Oracle: the palette; a colour is there if and only if its VAE is."""
    for count in (1, 5):
        vaes = [f"vae-{number}" for number in range(count)]
        figures = draw_figures(psnr_rows(vaes, ["pgd"]), vaes, tmp_path / str(count))
        assert len(figures) == 5
        for path in figures.values():
            assert [bool(coloured(path, number).any()) for number in range(6)] == [n < count for n in range(6)]


def test_figures_have_room_for_every_attack(tmp_path: Path) -> None:
    """Oracle: bound; 20 attacks stay within what a screen scrolls and get more room than one, the width of bars and
    the width of a panel stay as they are."""
    sizes = {}
    for count in (1, 20):
        rows = psnr_rows(VAES, [f"attack-{number}" for number in range(count)])
        rows = [row for row in rows if row.threat_model != "transfer"]
        figures = draw_figures(rows, VAES, tmp_path / str(count))
        sizes[count] = {title: Image.open(path).size for title, path in figures.items()}
    for title in ("PSNR, adaptive attacks at epsilon 8/255", "PSNR against epsilon, adaptive attacks"):
        (width, height), (wide, high) = sizes[1][title], sizes[20][title]
        assert 600 <= width <= wide <= 2000
        assert 200 <= height < high / 3 and high <= 3200


def test_figures_follow_the_data(tmp_path: Path) -> None:
    """Oracle: the same rows give the same bytes; other values change the figures of their threat model alone."""
    rows = psnr_rows(VAES, ["pgd"])
    moved = [replace(row, value=row.value - 2 * (row.threat_model == "adaptive")) for row in rows]
    first, same, other = (
        {title: path.read_bytes() for title, path in draw_figures(rows, VAES, tmp_path / name).items()}
        for name, rows in (("first", rows), ("same", rows), ("other", moved))
    )
    assert first == same
    assert {title for title in first if first[title] != other[title]} == {
        "PSNR against epsilon, adaptive attacks", "PSNR, adaptive attacks at epsilon 8/255"
    }  # fmt: skip


def test_severities_of_a_corruption_are_a_curve(tmp_path: Path) -> None:
    """Oracle: specification; from two severities on, and a steeper curve changes that figure."""
    severities = [replace(example_row("vae", f"jpeg-{k}", 0.0, 30.0 - k), threat_model="none") for k in range(1, 6)]
    title = "PSNR against severity, clean and corrupted images"
    first, same, steeper = (
        draw_figures([replace(row, value=factor * row.value) for row in severities], ["vae"], tmp_path / name)[title]
        for name, factor in (("first", 1.0), ("same", 1.0), ("steeper", 0.5))
    )
    assert first.read_bytes() == same.read_bytes() != steeper.read_bytes()
    assert title not in draw_figures(severities[:1], ["vae"], tmp_path / "one")


def test_one_epsilon_needs_no_curve(tmp_path: Path) -> None:
    """Oracle: specification; no figure, no file and no mention of PSNR against epsilon, bars as ever."""
    records = [record for record in example_records(metrics=["psnr"]) if record.setting.epsilon in (0.0, 8 / 255)]
    write_report(example_findings(records), tmp_path)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "psnr-by-attack-none.png", "psnr-by-attack-transfer.png", "psnr-by-attack-adaptive.png"
    }  # fmt: skip
    assert "against epsilon" not in (tmp_path / "report.md").read_text() + (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("epsilons", "chosen"),
    [
        ({"a": (2, 8, 16), "b": (2, 8, 16)}, "8"), ({"a": (2, 6, 16), "b": (2, 6, 16)}, "6"),
        ({"a": (4, 8), "b": (4,)}, "4"), ({"a": (16,)}, "16"),
    ],
)  # fmt: skip
def test_bars_are_at_the_epsilon_most_attacks_share(epsilons, chosen: str, tmp_path: Path) -> None:
    """Oracle: specification; among equals, the one nearest to 8/255."""
    rows = [example_row("vae", attack, k / 255, 20.0) for attack, levels in epsilons.items() for k in levels]
    titles = [title for title in draw_figures(rows, ["vae"], tmp_path) if "against" not in title]
    assert titles == [f"PSNR, adaptive attacks at epsilon {chosen}/255"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["$\\frac$", "_hidden", f"two\nlines {'long ' * 50}"])
def test_names_cannot_break_a_figure(name: str, tmp_path: Path) -> None:
    """Oracle: the figure of a nameless VAE, as wide and without dark ink in the legend below: nothing is read as a
    formula, which would raise, nor hidden from the legend, as matplotlib before 3.10 does with leading underscores."""
    title, drawn = "PSNR, adaptive attacks at epsilon 8/255", []
    for vae in (name, ""):
        rows = [example_row(vae, "$\\x$", 8 / 255, 20.0)]
        drawn.append(pixels(draw_figures(rows, [vae], tmp_path / str(len(drawn)))[title]))
    named, nameless = drawn
    assert named.shape[1] == nameless.shape[1]
    assert [image[-len(image) // 6 :].min() < 100 for image in (named, nameless)] == [True, False]


def test_figures_leave_matplotlib_as_it_was(tmp_path: Path) -> None:
    """Oracle: invariance of the settings; and those of the user do not change the figures."""
    rows = psnr_rows(VAES, ["pgd"])
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30}):
        before = dict(matplotlib.rcParams)
        figures = draw_figures(rows, VAES, tmp_path / "theirs")
        assert dict(matplotlib.rcParams) == before
    plain = draw_figures(rows, VAES, tmp_path / "ours")
    assert [path.read_bytes() for path in figures.values()] == [path.read_bytes() for path in plain.values()]


# --- worst, median and best -------------------------------------------------------------------------------


def flat(red: float, green: float, blue: float) -> torch.Tensor:
    return torch.tensor([red, green, blue])[:, None, None].expand(3, 16, 16)


def test_extremes_picture_shows_each_image_in_its_place() -> None:
    """Oracle: closed form. From the right edge, cells of 40 px with gaps of 6; from the top, a title of 18 and lines
    of 40 + 18 + 6; on the left, a label for each line."""
    images = [[flat(1, -1, -1), flat(-1, 1, -1)], [flat(-1, -1, 1), flat(1, 1, -1)]]
    colours = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 0)]]
    rows = [
        (label, [(image, "20.0 dB") for image in row]) for label, row in zip(("worst", "best"), images, strict=True)
    ]
    picture = extremes_picture(rows, ["photograph", "attacked"], cell=40)
    assert picture.height == 24 + 2 * 64
    margin = picture.width - (2 * 46 + 6)
    found = [[picture.getpixel((margin + 26 + 46 * column, 44 + 64 * row)) for column in (0, 1)] for row in (0, 1)]
    assert found == colours
    labels = [np.asarray(picture)[24 + 64 * row : 64 + 64 * row, :margin] for row in (0, 1)]
    assert margin > 0 and all(label.min() < 128 for label in labels)
    assert not np.array_equal(*labels)


def test_long_texts_stay_in_their_cells() -> None:
    """Oracle: closed form; beside a cell with a title and a caption of any length, one without them stays white."""
    rows = [("x" * 500, [(flat(1, -1, -1), "caption " * 50), (flat(1, -1, -1), "")])]
    picture = extremes_picture(rows, ["title\n" * 50, ""], cell=60)
    assert picture.width <= 120 + 6 + 2 * 66 + 6
    second = np.asarray(picture)[:, picture.width - 66 :]
    assert second[:24].min() == 255 and second[24 + 60 :].min() == 255
    first = np.asarray(picture)[:, picture.width - 132 : picture.width - 72]
    assert first[:24].min() < 128 and first[24 + 60 :].min() < 128
