"""A fixed set of captioned scenes, drawn once and saved, for trainings that see each scene many times."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from miniature.scenes import COLORS, SHAPES, draw_scene
from srl_utils.files import make_once, write_atomically, write_text_atomically

SIZE = 64
PAIR_SHARE = 0.2
"""Share of scenes with two objects. Scenes with one object show better what a word looks like."""
LABELS = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
"""The classifier's names for a scene's object: the last two words of its phrase."""
NO_LABEL = -1


@dataclass(frozen=True, eq=False)
class SceneSet:
    """Scenes with their captions.

    Attributes:
        images: `[N,3,SIZE,SIZE]`, uint8.
        captions: one caption per scene.
        labels: `[N]`, index into `LABELS` for one object, `NO_LABEL` for two.
    """

    images: Tensor
    captions: list[str]
    labels: Tensor

    def pixels(self, numbers: Tensor) -> Tensor:
        """Return the scenes with these numbers `[n]`, as `[n,3,SIZE,SIZE]` in [-1,1]."""
        return self.images[numbers].float() / 127.5 - 1


def scene_set(folder: Path, *, seed: int, count: int, pair_share: float = PAIR_SHARE) -> SceneSet:
    """Return the first `count` scenes of the series `seed`, loaded from `folder` or drawn and saved there."""
    name = f"scenes-{seed}-{count}-{pair_share}"
    pixels, texts = folder / f"{name}.npy", folder / f"{name}.json"

    def write() -> None:
        images, captions, labels = _draw(seed, count, pair_share)
        write_atomically(pixels, partial(_save, images))
        write_text_atomically(texts, json.dumps({"captions": captions, "labels": labels}))

    make_once(texts, write)
    kept = json.loads(texts.read_text())
    return SceneSet(torch.from_numpy(np.load(pixels)), kept["captions"], torch.tensor(kept["labels"]))


def _save(images: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, images)


def _draw(seed: int, count: int, pair_share: float) -> tuple[np.ndarray, list[str], list[int]]:
    with ProcessPoolExecutor() as pool:
        drawn = list(pool.map(partial(_draw_one, seed, pair_share), range(count), chunksize=64))
    images, captions, labels = zip(*drawn, strict=True)
    return np.stack(images), list(captions), list(labels)


def _draw_one(seed: int, pair_share: float, index: int) -> tuple[np.ndarray, str, int]:
    scene = draw_scene(seed, index, size=SIZE, pair_share=pair_share)
    first, *others = scene.objects
    label = NO_LABEL if others else LABELS.index(f"{first.color} {first.shape}")
    return np.asarray(scene.image).transpose(2, 0, 1), scene.caption, label
