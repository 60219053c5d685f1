"""The figures of the paper's claims, by hand-made results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.claims import CONTROL, ORIGINAL, ROBUST, Results, trained_name
from experiments.figures import draw_all, edits_figure, poisons_figure

POISONS = {"nightshade-32": 32, "nightshade-96": 96}


def results_of(values: dict[tuple[str, str, str, str], float], path: Path) -> Results:
    names = ("vae", "attack", "threat_model", "metric")
    path.write_text(
        json.dumps([dict(zip(names, key, strict=True)) | {"value": value} for key, value in values.items()])
    )
    return Results.read(path)


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Results]:
    """Results of two seeds of the robust VAE; the control was not poisoned."""
    reconstruction, editing, poisoning, controls = {}, {}, {}, {}
    robust = [ROBUST, trained_name(ROBUST, 1)]
    for place, vae in enumerate([ORIGINAL, CONTROL, *robust]):
        for attack, threats in (("clean", ["none"]), ("apgd-5", ["transfer", "adaptive"])):
            for threat in threats:
                reconstruction |= {(vae, attack, threat, "psnr"): 20 + place, (vae, attack, threat, "ssim"): 0.5}
        for threat in ("transfer", "adaptive"):
            editing[vae, "mist-fused, img2img-0.5", threat, "fid"] = 20 - 5 * place
    for vae in [ORIGINAL, *robust]:
        poisoning[vae, "no poison", "none", "shown"] = 0.9
        for name, number in POISONS.items():
            poisoning[vae, name, "transfer", "shown"] = 0.9 - number / 200 * (vae == ORIGINAL)
    controls[ORIGINAL, "no poison", "none", "shown"] = 0.9
    for share in (50, 100):
        controls[ORIGINAL, f"interpolated-{share}-32", "none", "shown"] = 0.8
        controls[ORIGINAL, f"interpolated-{share}-96", "none", "shown"] = 0.9 - share / 200
    named = {"reconstruction": reconstruction, "editing": editing, "poisoning": poisoning, "controls": controls}
    return {name: results_of(values, tmp_path / f"{name}.json") for name, values in named.items()}


def test_every_claim_has_its_figure(results, tmp_path: Path) -> None:
    """Oracle: specification; one picture for each."""
    draw_all(results, tmp_path / "figures", attack="apgd-5", edits={"mist-fused": results["editing"]}, poisons=POISONS)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "reconstruction.png",
        "edits.png",
        "poisons.png",
    }


def test_bars_are_what_is_won_back(results) -> None:
    """Oracle: by hand; FID 20 of the original, 15 of the control, 10 and 5 of the robust VAEs."""
    transfer, adaptive = edits_figure({"mist-fused": results["editing"]}).axes
    for ax in (transfer, adaptive):
        assert [bar.get_height() for bar in ax.patches] == pytest.approx([25.0, 62.5])


def test_poisons_are_followed_by_number_and_by_way(results) -> None:
    """Oracle: by hand; the largest number of poisons stands for the way, and the control is left out."""
    by_number, by_way = poisons_figure(results["poisoning"], results["controls"], POISONS).axes
    original, control, robust = (container.lines[0] for container in by_number.containers)
    assert list(original.get_xdata()) == [0, 32, 96] and list(original.get_ydata()) == pytest.approx([90, 74, 42])
    assert list(robust.get_ydata()) == pytest.approx([90, 90, 90]) and not len(control.get_xdata())
    way = by_way.containers[0].lines[0]
    assert list(way.get_xdata()) == [0, 50, 100] and list(way.get_ydata()) == pytest.approx([90, 65, 40])
