"""How the paper's claims are judged, by hand-made results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.claims import (
    CONTROL,
    FAILS,
    HOLDS,
    IN_PART,
    ORIGINAL,
    ROBUST,
    UNTESTED,
    Results,
    beyond_spread,
    closeness_claim,
    compared,
    damage_verdict,
    decibels_won_back,
    edits_claims,
    poison_claim,
    share_verdict,
    spread,
    trained_name,
    won_back,
)

EDITS = ("img2img-0.3", "inpainting")


@pytest.fixture
def results(tmp_path: Path):
    """A function from values by VAE, attack, threat model and metric to results on the disk."""

    def write(values: dict[tuple[str, str, str, str], float]) -> Results:
        names = ("vae", "attack", "threat_model", "metric")
        rows = [dict(zip(names, key, strict=True)) | {"value": value} for key, value in values.items()]
        (tmp_path / "results.json").write_text(json.dumps(rows))
        return Results.read(tmp_path / "results.json")

    return write


def of_all_edits(vae: str, attack: str, threat: str, metric: str, values: tuple[float, float]) -> dict:
    return {(vae, f"{attack}, {edit}", threat, metric): value for edit, value in zip(EDITS, values, strict=True)}


def test_seeds_are_told_apart(results) -> None:
    """Oracle: counting; the first seed has the variant's own name."""
    names = [trained_name("robust", seed) for seed in range(3)]
    assert names[0] == "robust" and len(set(names)) == 3
    found = results({(name, "clean", "none", "psnr"): number for number, name in enumerate(names)})
    assert found.of("robust", "clean", "none", "psnr") == [0, 1, 2] and found.of("other", "clean", "none", "psnr") == []


def test_data_sets_are_told_apart(tmp_path: Path) -> None:
    """Oracle: the rows of two data sets, in one file as the evaluation writes them."""
    rows = [
        {
            "dataset": data_set,
            "vae": ORIGINAL,
            "attack": attack,
            "threat_model": "none",
            "metric": "psnr",
            "value": value,
        }
        for data_set, attack, value in (("faces", "clean", 1.0), ("text", "clean", 2.0), ("text", "jpeg-3", 3.0))
    ]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    found = Results.read(tmp_path / "results.json")
    assert found.on("faces").values == {(ORIGINAL, "clean", "none", "psnr"): 1.0}
    assert found.on("text").attacks == ["clean", "jpeg-3"] and found.on("text").of(
        ORIGINAL, "clean", "none", "psnr"
    ) == [2]
    assert not found.on("tex").values


def test_what_is_won_back(results) -> None:
    """Oracle: by hand; FID falls to 0, and a similarity rises to that of the original's edits of clean images."""
    found = results(
        of_all_edits(ORIGINAL, "pid", "transfer", "fid", (10, 30))
        | of_all_edits(ROBUST, "pid", "transfer", "fid", (4, 6))
        | of_all_edits(ORIGINAL, "clean", "none", "clip-text", (0.9, 0.8))
        | of_all_edits(ORIGINAL, "pid", "transfer", "clip-text", (0.7, 0.6))
        | of_all_edits(ROBUST, "pid", "transfer", "clip-text", (0.8, 0.7))
        | of_all_edits(trained_name(ROBUST, 1), "pid", "transfer", "clip-text", (0.7, 0.6))
    )
    assert won_back(found, ROBUST, "pid", "transfer", "fid") == [0.75]
    assert won_back(found, ROBUST, "pid", "transfer", "clip-text") == pytest.approx([0.5, 0.0])
    assert won_back(found, ORIGINAL, "pid", "transfer", "fid") == [0.0]


def test_decibels_won_back(results) -> None:
    """Oracle: by hand, of 10 dB lost; two seeds."""
    psnr = {(ORIGINAL, "clean", "none"): 30, (ORIGINAL, "apgd", "adaptive"): 20, (ROBUST, "apgd", "adaptive"): 26}
    psnr[trained_name(ROBUST, 1), "apgd", "adaptive"] = 18
    found = results({(*key, "psnr"): value for key, value in psnr.items()})
    assert decibels_won_back(found, ROBUST, "apgd") == pytest.approx([0.6, -0.2])
    assert decibels_won_back(found, ORIGINAL, "apgd") == [0.0]


@pytest.mark.parametrize(("between", "verdict"), [((38, 40), HOLDS), ((42, 44), FAILS)])
def test_clean_edits_stay_as_between_seeds(results, between: tuple[float, float], verdict: str) -> None:
    """Oracle: by hand; 40 dB against the original's edits, 39 or 43 dB between two robust VAEs."""
    edited = results(of_all_edits(ROBUST, "clean", "none", "psnr", (41, 39)))
    seeds = results(of_all_edits(trained_name(ROBUST, 1), "clean", "none", "psnr", between))
    claim = closeness_claim(edited, seeds)
    assert claim.robust == [40] and claim.verdict == verdict


def test_an_attack_without_grip_judges_nothing(results) -> None:
    """Oracle: specification; half a point of FID is no damage."""
    values: dict = {}
    for threat in ("transfer", "adaptive"):
        for vae in (ORIGINAL, CONTROL, ROBUST):
            values |= of_all_edits(vae, "advdm", threat, "fid", (0.5, 0.5))
            values |= of_all_edits(vae, "advdm", threat, "clip-text", (0.5, 0.5))
    values |= of_all_edits(ORIGINAL, "clean", "none", "clip-text", (0.5, 0.5))
    claims = edits_claims({"advdm": results(values)})
    assert [claim.verdict for claim in claims] == [UNTESTED] * 4


@pytest.mark.parametrize(
    ("control", "robust", "verdict"),
    [
        ([0.2], [0.8], HOLDS),
        ([0.5], [0.8], IN_PART),
        ([0.2], [0.6], IN_PART),
        ([0.7], [0.6], FAILS),
        ([], [-0.1], FAILS),
    ],
)
def test_verdict_on_shares(control: list[float], robust: list[float], verdict: str) -> None:
    """Oracle: specification; 70% are wanted, and twice the control's share."""
    assert share_verdict(control, robust, 0.7) == verdict


@pytest.mark.parametrize(
    ("control", "robust", "verdict"), [([25.0], [27.0], HOLDS), ([27.5], [27.0], IN_PART), ([24.0], [23.0], FAILS)]
)
def test_verdict_on_values(control: list[float], robust: list[float], verdict: str, results) -> None:
    """Oracle: specification; better than the original, and than the control."""
    setting = ("clean", "none", "psnr")
    values = {(ORIGINAL, *setting): 24.0, (CONTROL, *setting): control[0], (ROBUST, *setting): robust[0]}
    assert compared("x", "dB", results(values), setting, higher=True).verdict == verdict


def test_damage_of_poisons(results) -> None:
    """Oracle: by hand; the fine-tuning without poisons is the VAE's own."""
    shown = {ORIGINAL: (0.9, 0.3), CONTROL: (0.8, 0.3), ROBUST: (0.9, 0.8)}
    values: dict = {}
    for vae, (unharmed, harmed) in shown.items():
        values |= {
            (vae, "no poison", "none", "shown"): unharmed,
            (vae, "nightshade-96", "transfer", "shown"): harmed,
        }
    claim = poison_claim(results(values), "nightshade-96")
    assert claim.original == pytest.approx(0.6) and claim.verdict == HOLDS
    assert claim.control == pytest.approx([0.5]) and claim.robust == pytest.approx([0.1])


@pytest.mark.parametrize(
    ("original", "control", "robust", "verdict"),
    [
        (0.6, [0.5], [0.3], HOLDS),
        (0.6, [0.4], [0.3], IN_PART),
        (0.6, [0.2], [0.3], FAILS),
        (0.6, [0.6], [0.7], FAILS),
        (0.05, [0.05], [0.0], UNTESTED),
    ],
)
def test_verdict_on_damage(original: float, control: list[float], robust: list[float], verdict: str) -> None:
    """Oracle: specification; half of the damage is averted, and twice as much as by the control."""
    assert damage_verdict(original, control, robust) == verdict


def test_seeds_decide_what_is_a_gain() -> None:
    """Oracle: closed form; the mean must exceed two standard errors."""
    assert beyond_spread([1.0]) and beyond_spread([1.0, 1.1, 0.9]) and not beyond_spread([1.0, -1.0, 0.5])
    assert spread([1.0, 2.0, 3.0]) == "2 ± 1" and spread([0.25]) == "0.25" and spread([]) == ""
