"""The tables of the comparison of defences, by hand-made results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import defences
from experiments.claims import ORIGINAL, Defence, Results, trained_name
from experiments.runner import WEIGHTS, Runner
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


def test_rivals_are_compared(reconstruction: Results, tmp_path: Path) -> None:
    """Oracle: by hand; of 10 dB lost, the seeds win back 40% and 60%. Three steps take 1, 2 and 9 seconds, or twice that. What
    was not measured stays empty."""
    run = Runner(tmp_path, WEIGHTS / "vae", title="test", num_calls=1)
    for seed in (0, 1):
        lines = [{"step": 0}, *({"images_per_second": 8 / (seconds * (seed + 1))} for seconds in (1, 9, 2))]
        folder = run.vae(trained_name("srl", seed))
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    scale = replace(defences.FULL, seeds=2)
    table = defences.rivals_table(reconstruction, reconstruction, scale, run)
    header, _, original, srl = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    cells = dict(zip(header, srl, strict=True))
    assert cells["clean (dB)"] == "29 ± 0" and cells["attacked (dB)"] == "25 ± 1.4" and cells["FID of edits"] == ""
    assert cells["won back (%)"] == "50 ± 14" and cells["seconds"] == "9 ± 4.2"
    assert dict(zip(header, original, strict=True))["won back (%)"] == "0"


def test_a_curve_has_every_weight(reconstruction: Results) -> None:
    """Oracle: by hand; the largest weight comes first, and all are of the first seed."""
    (points,) = defences.curves(reconstruction, defences.FULL).values()
    assert list(points.items()) == [(0.3, (0.04, 22)), (0.03, (0.01, 24)), (0.0, (0.03, 27))]


def test_a_line_of_a_defence() -> None:
    """Oracle: by hand; what was not tried is empty, and a purifier's time is added to an encode's."""
    won = {"transfer": {"photoguard-encoder": [50.0], "sds": [20.0]}, "adaptive": {}}
    found = {name: Defence([1.0], won) for name in ("srl", f"{ORIGINAL} + jpeg-75")}
    timings = {"purifiers": {"jpeg-75": 0.002}, "encoders": {ORIGINAL: 0.01}, "device": "cpu", "n": 4}
    header, _, *lines = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in defences.defences_table(found, timings).splitlines()
    )
    srl, jpeg = (dict(zip(header, line, strict=True)) for line in lines)
    assert srl["photoguard-encoder, transfer"] == "50" and srl["mist-fused, transfer"] == srl["mean, adaptive"] == ""
    assert srl["mean, transfer"] == "35" and srl["FID of clean edits"] == "1"
    assert [line["milliseconds per image"] for line in (srl, jpeg)] == ["10", "12"]


def test_the_best_rival_wins_back_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand, mean of seeds and protections; of 10 lost, `steady` leaves 3 in all, `mixed` 0 and 8."""
    rival = defences.Rival("", 1)
    monkeypatch.setattr(defences, "RIVALS", {"mixed": rival, "steady": rival})
    left = {ORIGINAL: (10, 10), "mixed": (0, 8), trained_name("mixed", 1): (0, 8), "steady": (3, 3)}
    values = {
        (vae, f"{protection}, inpainting", "transfer", "fid"): value
        for vae, both in left.items()
        for protection, value in zip(("sds", "mist-fused"), both, strict=True)
    }
    assert defences.best_rival(Results(values)) == "steady"
