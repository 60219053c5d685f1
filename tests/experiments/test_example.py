"""The picture for readers who have never heard of protections."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import example
from experiments.runner import WEIGHTS
from miniature import draw


def test_the_picture_compares_both_vaes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: invariance: with the original in place of the robust VAE, the last two edits are the same, and the edit of
    the unprotected scene is another one; the first picture is the scene."""
    monkeypatch.setattr("sys.argv", ["draw", "--num_images", "2", "--output_dir", str(tmp_path)])
    draw.main()
    monkeypatch.setattr(example, "STEPS", 2)
    monkeypatch.setattr(example, "SCENES_SHOWN", 1)
    example.draw_example(tmp_path, WEIGHTS / "vae", tmp_path / "example.png")
    picture = np.asarray(Image.open(tmp_path / "example.png").convert("RGB"))
    left, top, cell, gap = 12, 24, 192, 6
    shown = [picture[top : top + cell, left + (cell + gap) * place :][:, :cell] for place in range(5)]
    scene = np.asarray(Image.open(tmp_path / "00000.png").resize((cell, cell), Image.Resampling.NEAREST))
    assert np.array_equal(shown[0], scene)
    assert np.array_equal(shown[3], shown[4]) and not np.array_equal(shown[2], shown[3])
