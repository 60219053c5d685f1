"""The comparison of defences, by hand-made results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from experiments import defence_figures
from experiments.claims import ORIGINAL, Defence, Results, defence_of, trained_name
from experiments.defence_figures import draw_curves, draw_defences, kind_of, short_name

FID = {
    ("clean, img2img-0.3", "none"): {ORIGINAL: 0, "srl": 2, trained_name("srl", 1): 4, f"{ORIGINAL} + jpeg-75": 3},
    ("clean, inpainting", "none"): {ORIGINAL: 0, "srl": 0, trained_name("srl", 1): 2, f"{ORIGINAL} + jpeg-75": 5},
    ("sds, inpainting", "transfer"): {ORIGINAL: 20, "srl": 5, trained_name("srl", 1): 10, f"{ORIGINAL} + jpeg-75": 15},
    ("pid, inpainting", "transfer"): {ORIGINAL: 10, "srl": 5, trained_name("srl", 1): 10, f"{ORIGINAL} + jpeg-75": 12},
    ("mist, inpainting", "transfer"): {
        ORIGINAL: 0.5,
        "srl": 0.1,
        trained_name("srl", 1): 9,
        f"{ORIGINAL} + jpeg-75": 9,
    },
}


@pytest.fixture
def edits(tmp_path: Path) -> Results:
    rows = [
        {"vae": vae, "attack": attack, "threat_model": threat, "metric": "fid", "value": value}
        for (attack, threat), values in FID.items()
        for vae, value in values.items()
    ]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    return Results.read(tmp_path / "results.json")


def test_what_defences_cost_and_win(edits: Results) -> None:
    """Oracle: by hand; a threat model without results, and a protection without grip, are left out."""
    protections = ["sds", "pid", "mist"]
    srl = defence_of(edits, "srl", protections)
    assert srl == Defence([1, 3], {"transfer": {"sds": [75, 50], "pid": [50, 0]}, "adaptive": {}})
    assert srl.mean_won("transfer") == [62.5, 25] and srl.least_won("transfer") == [50, 0]
    assert srl.mean_won("adaptive") == srl.least_won("adaptive") == []
    jpeg = defence_of(edits, f"{ORIGINAL} + jpeg-75", protections)
    assert jpeg.harm == [4] and jpeg.mean_won("transfer") == pytest.approx([2.5])


def test_kinds_of_defences() -> None:
    """Oracle: specification; names as the evaluation makes them."""
    names = ["srl+feature", f"{ORIGINAL} + jpeg-75+resize-0.5", "srl+feature + jpeg-75"]
    assert [kind_of(name) for name in names] == ["a trained VAE", "a purifier", "both"]
    assert [short_name(name) for name in names] == ["srl+feature", "jpeg-75+resize-0.5", "jpeg-75"]


def test_figures_have_a_point_for_each_value(edits: Results, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: the points of the axes, by hand; a defence without adaptive results has none there."""
    drawn = []
    monkeypatch.setattr(defence_figures, "save", lambda figure, path: drawn.append((path.name, figure)))
    defences = {name: defence_of(edits, name, ["sds", "pid"]) for name in ("srl", f"{ORIGINAL} + jpeg-75")}
    draw_defences(defences, tmp_path / "defences.png")
    draw_curves({"srl": {0.3: (0.01, 20.0), 0.03: (0.03, 22.0)}}, tmp_path / "curves.png")
    (_, scatter), (_, curves) = drawn
    transfer, adaptive = ([line.get_xydata().tolist() for line in ax.lines] for ax in scatter.axes)
    assert transfer == [[[2, pytest.approx(43.75)]], [[4, pytest.approx(2.5)]]] and adaptive == []
    assert curves.axes[0].lines[0].get_xydata().tolist() == [[0.01, 20], [0.03, 22]]
    assert [text.get_text() for text in curves.axes[0].texts] == ["0.3", "0.03"]


def test_figures_are_drawn(edits: Results, tmp_path: Path) -> None:
    """Oracle: the files can be opened."""
    draw_defences({"srl": defence_of(edits, "srl", ["sds", "pid"])}, tmp_path / "defences.png")
    draw_curves({"srl": {0.3: (0.01, 20.0), 0.03: (0.03, 22.0)}}, tmp_path / "curves.png")
    for name in ("defences.png", "curves.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()
            assert picture.width > picture.height
