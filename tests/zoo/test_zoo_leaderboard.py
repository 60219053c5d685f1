"""The leaderboard: its order, its numbers, and that the committed one is current."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.runs import ROOT
from helpers.zoo import BASED, DIGEST, FIELDS, entry, psnr_rows, row

from srl_utils.errors import UserError
from srl_utils.zoo.entries import read_entries
from srl_utils.zoo.leaderboard import END, START, TABLES, TITLES, as_html, as_markdown, tables, updated
from srl_utils.zoo.protocols import PROTOCOLS
from srl_utils.zoo.rows import ZooRow, read_row, read_rows

PAGE = ROOT / "docs/leaderboard.md"


def test_the_committed_leaderboard_is_that_of_the_committed_rows() -> None:
    """Oracle: the command itself."""
    found = tables(read_entries(ROOT / "zoo"), read_rows(ROOT / "zoo"))
    page = PAGE.read_text(encoding="utf-8")
    assert page == updated(page, found), "run python -m srl_utils.zoo leaderboard"
    assert (PAGE.parent / TABLES).read_text(encoding="utf-8") == as_html(found)


def test_committed_rows_are_current_and_have_an_entry() -> None:
    """Oracle: an outdated row, or one without an entry, is on no page and has to go."""
    rows = [read_row(path) for path in (ROOT / "zoo/rows").glob("*.json")]
    entries = read_entries(ROOT / "zoo")
    for found in rows:
        found.check(entries[found.name])


def test_the_worst_case_is_the_lowest_psnr_over_attacks_and_threat_models() -> None:
    """Oracle: closed form; neither clean images nor noise count."""
    worst = row(30, 20, results=psnr_rows(12, 11, 25, 21, 22, 23)).worst
    assert (worst.value, worst.attack, worst.threat_model) == (21, "attack-1", "adaptive")
    assert row(30, 20, results=psnr_rows(12, 11, 20, 21)).worst.threat_model == "transfer"


def test_the_best_worst_case_comes_first() -> None:
    """Oracle: closed form: 22 > 21 > 20, whatever the clean PSNR; an entry without a row is named below."""
    worst = {"low": 20.0, "high": 22.0, "middle": 21.0}
    entries = {name: entry(name=name) for name in (*worst, "open")}
    rows = {name: row(40 - value, value, name=name) for name, value in worst.items()}
    (table,) = tables(entries, rows)
    assert [line.entry.name for line in table.lines] == ["high", "middle", "low"]
    assert table.note == "Not measured yet: open."
    text = as_markdown([table])
    assert re.findall(r"^\| (\w+) +\| (\d\d\.\d\d)", text, flags=re.M) == [
        ("high", "22.00"),
        ("middle", "21.00"),
        ("low", "20.00"),
    ]
    page = as_html([table])
    assert re.findall(r'<th scope="row" data-value="(\w+)"', page) == ["high", "middle", "low"]
    assert page.count('<th scope="col"') == len(TITLES) and page.count('<table class="sortable">') == 1


@pytest.mark.parametrize(("failed", "text"), [(None, "not checked"), ([], "0"), (["do more steps help?"], "1")])
def test_failed_checks_are_counted(failed: list[str] | None, text: str) -> None:
    """Oracle: closed form; a VAE without a base has no checks, and both pages say so. They show each number of a line."""
    (table,) = tables({"small": entry()}, {"small": row(30, 20, failed_checks=failed)})
    cells = table.lines[0].cells
    assert cells["failed checks"].text == text
    assert ("not checked" in as_html([table])) == ("not checked" in as_markdown([table])) == (failed is None)
    page, numbers = as_html([table]), [cell.text for cell in cells.values() if cell.value is not None]
    assert len(numbers) == (3 if failed is None else 4) and all(f"<b>{number}</b>" in page for number in numbers)


def test_claims_stand_beside_what_was_measured() -> None:
    """Oracle: closed form; the drift of a VAE without a base is left out."""
    claims = {"setting": "their own images", "worst": 24.5}
    entries = {"small": entry(claims=claims, cost=203.64, **BASED), "other": entry(name="other")}
    (table,) = tables(entries, {"small": row(30, 20, **BASED, failed_checks=[]), "other": row(29, 19, name="other")})
    first, second = ({title: cell.text for title, cell in line.cells.items()} for line in table.lines)
    assert (
        first["worst case (dB)"] == "20.00"
        and first["claimed, worst (dB)"] == "24.50"
        and first["cost of training (TFLOP)"] == "203.6"
    )
    assert first["base"] == BASED["base"] and second["base"] == "" and first["objective"] == FIELDS["objective"]
    assert first["drift"] == "0.2500" and second["drift"] == "" and second["claimed, worst (dB)"] == ""
    assert "claimed, clean" not in as_markdown([table])  # empty in all lines


RESULTS = row(30, 20).results


@pytest.mark.parametrize(
    ("of_entry", "of_row", "message"),
    [
        ({"digest": "f" * 16}, {}, f"the weights have the digest {DIGEST}"),
        ({"protocol": "full"}, {}, "the row has the protocol embedded"),
        (BASED, {}, "the row has the base none, and the entry x"),
        ({}, {**BASED, "failed_checks": []}, "the row has the base x, and the entry none"),
        ({**BASED, "base": "y"}, {**BASED, "failed_checks": []}, "the row has the base x, and the entry y"),
        ({**BASED, "base_digest": "f" * 16}, {**BASED, "failed_checks": []}, f"of the base have the digest {DIGEST}"),
        ({**BASED, "base_digest": None}, {"base": "x", "failed_checks": []}, "of the base have the digest none"),
        (BASED, BASED, "the row of small has no robustness checks"),
        ({}, {"images": "0" * 16}, f"the images have the digest {'0' * 16}, and those of the protocol have"),
        ({}, {"results": []}, "lacks a result of the protocol: "),
        ({}, {"results": [each for each in RESULTS if each.attack != "pid"]}, r"lacks .*: psnr under pid, (adaptive|transfer)"),
        ({}, {"results": [*RESULTS, *psnr_rows(1, 1, 1)[2:]]}, "a result that is not of the protocol: psnr under attack-0, transfer"),
        ({}, {"results": [replace(RESULTS[0], value=-5.0), *RESULTS]}, r"the row of small has two results of \w+ under"),
        ({}, {"results": [replace(each, n=2) for each in RESULTS]}, "has means of 2 images, and the protocol 32"),
    ],
)  # fmt: skip
def test_rows_of_something_else_are_refused(of_entry: dict[str, str], of_row: dict[str, object], message: str) -> None:
    """Oracle: specification: a row is of the weights, the base and the whole protocol of its entry."""
    with pytest.raises(UserError, match=message):
        tables({"small": entry(**of_entry)}, {"small": row(30, 20, **of_row)})


def test_rows_have_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: specification: where the protocol leaves them open, the rows agree."""
    monkeypatch.setitem(PROTOCOLS, "embedded", replace(PROTOCOLS["embedded"], image_digest=None))
    rows = {"small": row(30, 20, images="0" * 16), "other": row(30, 20, name="other", images="1" * 16)}
    with pytest.raises(UserError, match="those of the row of other have 1111"):
        tables({name: entry(name=name) for name in rows}, rows)


def test_rows_of_an_earlier_protocol_are_left_out(tmp_path: Path) -> None:
    """Oracle: specification."""
    current, outdated = row(30, 20), row(30, 20, name="other", fingerprint="0" * 16)
    for found in (current, outdated):
        found.write(tmp_path / f"rows/{found.name}.json")
    assert read_rows(tmp_path) == {"small": current}


def test_a_row_survives_its_file(tmp_path: Path) -> None:
    """Oracle: equality; other files are refused in one line."""
    found = replace(row(30, 20), failed_checks=["do more steps help?"])
    found.write(tmp_path / "row.json")
    assert read_row(tmp_path / "row.json") == found and isinstance(found, ZooRow)
    (tmp_path / "row.json").write_text("{}")
    with pytest.raises(UserError, match="is not a row"):
        read_row(tmp_path / "row.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_ms": None}, "encoder_ms: expected a number, got None"),
        ({"device": {}}, "device: expected text, got {}"),
        ({"failed_checks": "none"}, "failed_checks: expected a list or null, got 'none'"),
        ({"failed_checks": [3]}, "failed_checks, 0: expected text, got 3"),
        ({"name": ["x"]}, "name: expected text"),
        ({"results": {}}, "results: expected a list"),
        ({"results": [3]}, "results, 0: expected fields such as vae, got int"),
    ],
)
def test_rows_have_the_types_of_rows(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    """Oracle: specification: one line with the file and the field."""
    path = tmp_path / "row.json"
    path.write_text(json.dumps({**row(30, 20).to_json(), **changes}))
    with pytest.raises(UserError, match="is not a row of the zoo") as caught:
        read_row(path)
    assert str(path) in str(caught.value) and f"({message}" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("value", math.nan),
        ("value", math.inf),
        ("value", None),
        ("value", "99"),
        ("attack", ["x"]),
        ("ci95", [1]),
        ("n", 2.5),
    ],
)
def test_results_have_the_types_of_results(field: str, value: object, tmp_path: Path) -> None:
    """Oracle: specification. A value that is not finite would hide the worst case: no comparison finds it the lowest."""
    wrong = row(30, 20).to_json()
    wrong["results"][0][field] = value
    (tmp_path / "row.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError, match=f"results, 0: {field}: expected"):
        read_row(tmp_path / "row.json")


@pytest.mark.parametrize("page", ["", END + START, START + START + END, START])
def test_a_page_without_a_place_for_the_tables(page: str) -> None:
    """Oracle: specification: both lines once, in order."""
    with pytest.raises(UserError, match=r"needs the lines <!-- leaderboard.* once each"):
        updated(page, [])


def test_names_are_text() -> None:
    """Oracle: no markup of an entry gets into the pages."""
    claims = {"setting": "<script>|*"}
    found = tables({"small": entry(claims=claims)}, {"small": row(30, 20)})
    assert "<script>|" not in as_markdown(found) and "<script>|" not in as_html(found)
