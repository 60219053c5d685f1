"""The figure of loss surfaces, from a finished evaluation of geometry."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from helpers.runs import write_photos
from PIL import Image

from experiments import surfaces
from experiments.surfaces import draw_loss_surfaces
from srl_utils.evaluation.__main__ import main as evaluate
from srl_utils.evaluation.tasks.geometry import AREA, CURVATURE, Surface

COUNT = 3


@pytest.fixture
def geometry(tiny_vae, other_tiny_vae, images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for setting, value in (("points", 3), ("places", 1)):
        monkeypatch.setitem(Surface.__init__.__kwdefaults__, setting, value)
    tiny_vae.save_pretrained(tmp_path / "original")
    other_tiny_vae.save_pretrained(tmp_path / "robust")
    write_photos(tmp_path / "photos", images(COUNT))
    evaluate([
        "geometry", "--baseline", str(tmp_path / "original"), "--vae", f"robust={tmp_path / 'robust'}", "--data_dir",
        str(tmp_path / "photos"), "--resolution", "16", "--num_images", str(COUNT), "--attack_steps", "2",
        "--parts", "surface", "--output_dir", str(tmp_path / "out"),
    ])  # fmt: skip
    return tmp_path / "out"


def test_the_numbers_are_those_of_the_evaluation(geometry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the evaluation's rows; their means are those of what stands above the pictures."""
    drawn: list[Any] = []
    monkeypatch.setattr(surfaces, "draw_surfaces", lambda *arguments, **titles: drawn.extend(arguments))
    draw_loss_surfaces(geometry, {"fine-tuned": 1}, geometry / "surface.png")
    errors, clean, numbers, _ = drawn
    assert errors["fine-tuned"].shape == (COUNT, 3, 3) and clean["fine-tuned"].shape == (COUNT,)
    rows = json.loads((geometry / "results.json").read_text())
    for metric in (CURVATURE, AREA):
        (mean,) = (row["value"] for row in rows if (row["vae"], row["metric"]) == ("robust", metric))
        assert fmean(each[metric] for each in numbers["fine-tuned"]) == pytest.approx(mean)


def test_the_surfaces_are_drawn(geometry: Path) -> None:
    """Oracle: the file can be opened."""
    draw_loss_surfaces(geometry, {"original": 0, "robust": 1}, geometry / "surface.png")
    with Image.open(geometry / "surface.png") as picture:
        picture.load()
