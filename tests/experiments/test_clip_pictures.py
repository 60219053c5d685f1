"""The pictures of clips: which frames they show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from experiments.clip_pictures import draw_animation, draw_strip

GREYS = torch.linspace(-1, 1, 9).view(1, 9, 1, 1).expand(3, 9, 16, 16)
"""A clip that turns from black to white."""


def centre(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"), dtype=float)[image.height // 2]


def test_an_animation_plays_every_frame(tmp_path: Path) -> None:
    """Oracle: the clip, whose frames grow brighter, beside its inverse, whose frames grow darker."""
    draw_animation({"clip": GREYS, "inverse": -GREYS}, tmp_path / "clips.gif")
    with Image.open(tmp_path / "clips.gif") as animation:
        assert animation.n_frames == 9 and animation.info["loop"] == 0
        rows = []
        for number in range(9):
            animation.seek(number)
            rows.append(centre(animation))
    left, right = (np.array([row[len(row) * part // 8] for row in rows]) for part in (2, 6))
    assert np.all(np.diff(left) > 10) and np.all(np.diff(right) < -10)


def test_a_strip_shows_every_second_frame(tmp_path: Path) -> None:
    """Oracle: the clip: its first frame is black at the left, its last one white at the right, the others between."""
    draw_strip({"clip": GREYS}, tmp_path / "strip.png")
    with Image.open(tmp_path / "strip.png") as strip:
        row = centre(strip)
    greys = [row[int(len(row) * (0.13 + 0.19 * number))] for number in range(5)]
    np.testing.assert_allclose(greys, [0, 64, 128, 191, 255], atol=3)
