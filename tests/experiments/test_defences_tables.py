"""The tables of the comparison of defences, by hand-made results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import defences
from experiments.claims import ORIGINAL, Defence, Results, trained_name
from srl_utils.evaluation.motion import TRAVEL
from srl_utils.evaluation.tasks.base import DRIFT

PSNR = {
    ORIGINAL: (30, 20),
    "srl": (29, 24),
    trained_name("srl", 1): (29, 26),
    "srl, alpha 0": (28, 27),
    "srl, alpha 0.3": (30, 22),
}


@pytest.fixture
def reconstruction(tmp_path: Path) -> Results:
    rows = []
    for place, (vae, (clean, attacked)) in enumerate(PSNR.items()):
        of_vae = {
            ("clean", "none", "psnr"): clean, ("clean", "none", "rfid"): 5, ("clean", "none", DRIFT): place / 100,
            ("apgd-50", "adaptive", "psnr"): attacked, ("apgd-50-latents", "adaptive", TRAVEL): 0.5,
        }  # fmt: skip
        names = ("attack", "threat_model", "metric")
        rows += [{"vae": vae, **dict(zip(names, key, strict=True)), "value": value} for key, value in of_vae.items()]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    return Results.read(tmp_path / "results.json")


@pytest.fixture(autouse=True)
def one_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defences, "RIVALS", {"srl": defences.Rival("--recipe fast", 10, curve=True)})


def test_rivals_are_compared(reconstruction: Results) -> None:
    """Oracle: by hand; of 10 dB lost, the seeds win back 40% and 60%. What was not measured stays empty."""
    table = defences.rivals_table(
        reconstruction, reconstruction, defences.FULL, {"train srl": 90, "train srl (seed 1)": 110}
    )
    header, _, original, srl = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    cells = dict(zip(header, srl, strict=True))
    assert cells["clean (dB)"] == "29 ± 0" and cells["attacked (dB)"] == "25 ± 1.4" and cells["FID of edits"] == ""
    assert cells["won back (%)"] == "50 ± 14" and cells["seconds"] == "100 ± 14"
    assert dict(zip(header, original, strict=True))["won back (%)"] == "0"


def test_a_curve_has_every_weight(reconstruction: Results) -> None:
    """Oracle: by hand; the largest weight comes first, and seeds are averaged."""
    (points,) = defences.curves(reconstruction, "apgd-50").values()
    assert points == [(0.04, 22), (pytest.approx(0.015), 25), (0.03, 27)]


def test_a_defence_costs_its_purifier_and_an_encode() -> None:
    """Oracle: by hand, in milliseconds."""
    found = {name: Defence([1.0], {"transfer": [50.0], "adaptive": []}) for name in ("srl", f"{ORIGINAL} + jpeg-75")}
    timings = {"purifiers": {"jpeg-75": 0.002}, "encoders": {ORIGINAL: 0.01}, "device": "cpu", "n": 4}
    table = defences.defences_table(found, timings)
    assert [line.strip("| ").split("|")[-1].strip() for line in table.splitlines()[2:]] == ["10", "12"]
