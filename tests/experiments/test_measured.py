"""What experiments measured, in small files, and the page of results that is written from them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from docs.scripts import results as script
from experiments.claims import Results
from experiments.measured import as_text, pictures_of, summary
from srl_utils.evaluation.timings import Timings

ROWS = [
    {"vae": vae, "attack": attack, "threat_model": threat, "metric": "psnr", "value": value}
    for vae, attack, threat, value in (
        ("original", "clean", "none", 26.123456), ("original", "apgd-50", "adaptive", 20.0),
        ("robust", "apgd-50", "adaptive", 23.0), ("robust (seed 1)", "apgd-50", "adaptive", 24.0),
    )
]  # fmt: skip


def test_the_page_is_what_was_measured() -> None:
    """Oracle: the template, rendered anew; `python -m docs.scripts.results` writes the page."""
    assert script.PAGE.read_text(encoding="utf-8") == script.page()


def test_a_summary_keeps_the_results(tmp_path: Path) -> None:
    """Oracle: the results themselves, to five digits."""
    (tmp_path / "on-images").mkdir()
    path = tmp_path / "on-images/results.json"
    path.write_text(json.dumps(ROWS))
    kept = json.loads(as_text(summary(tmp_path)))
    for setting, values in kept["on-images"].items():
        attack, threat, metric = setting.split(" | ")
        for vae, value in values.items():
            wanted = Results.read(path).values[vae, attack, threat, metric]
            assert value == pytest.approx(wanted, rel=1e-4) and len(str(value)) <= 6
    assert sum(map(len, kept["on-images"].values())) == len(ROWS)
    timings = Timings(purifiers={"jpeg-75": 0.0012345678}, encoders={"robust": 0.5}, device="cpu", n=4)
    (tmp_path / "on-images/timings.json").write_text(json.dumps(asdict(timings)))
    assert summary(tmp_path)["on-images"] == kept["on-images"] | {
        "clean | none | seconds of encoders": {"robust": 0.5},
        "clean | none | seconds of purifiers": {"jpeg-75": 0.0012346},
    }


def test_the_pages_pictures_are_found(tmp_path: Path) -> None:
    """Oracle: specification; by their names, and in the folder of figures."""
    for name in ("clips.png", "other.png", "figures/edits.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = pictures_of(tmp_path, "![A clip](clips.png)\n![Edits](edits.png) other.png")
    assert [path.name for path in found] == ["clips.png", "edits.png"]


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    """Oracle: one line that says what to run."""
    with pytest.raises(SystemExit, match="has no results"):
        summary(tmp_path)


def test_cells() -> None:
    """Oracle: mean and standard deviation by hand; a value that was not measured is no cell."""
    results = Results({(row["vae"], row["attack"], row["threat_model"], row["metric"]): row["value"] for row in ROWS})
    assert script.of(results, "original", "clean", "none", "psnr") == "26.1"
    assert script.of(results, "robust", "apgd-50", "adaptive", "psnr", 2) == "23.50 ± 0.71"
    assert script.mean_only(results, "robust", "apgd-50", "adaptive", "psnr") == "23.5"
    assert script.won_decibels(results, "robust", "apgd-50") == "57% ± 12"
    assert script.spread([-0.04, -0.02]) == "0.0 ± 0.0"
    with pytest.raises(script.NotMeasured, match="ssim of robust under apgd-50"):
        script.of(results, "robust", "apgd-50", "adaptive", "ssim")


def test_gains_are_means_over_data_sets() -> None:
    """Oracle: by hand; the seeds gain 1 and 2 dB on one data set, 3 and 6 dB on the other."""
    sets = [
        Results({(vae, "jpeg-1", "none", "psnr"): 20 + factor * gain for vae, gain in gains.items()})
        for factor in (1, 3)
        for gains in [{"original": 0, "robust": 1, "robust (seed 1)": 2}]
    ]
    assert script.gained(sets, "robust", "jpeg-1") == "3.0 ± 1.4"
