"""The data sets that need no download."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from helpers.runs import ROOT
from PIL import Image

from srl_utils.errors import MissingPackage, UserError
from srl_utils.images.built_in import BUILT_IN, MEDICAL, PAGES
from srl_utils.images.datasets import DataSource, load_validation_images, open_data
from srl_utils.images.drawing import draw_lines, draw_text, draw_texture
from srl_utils.images.photographs import FILES, photograph_tiles

DRAWINGS = pytest.mark.parametrize("draw", [draw_lines, draw_text, draw_texture])


def test_no_picture_is_among_the_photographs() -> None:
    """Oracle: specification; a VAE trained on scikit-image's photographs has not seen the others."""
    seen = {name for names in FILES.values() for name in names}
    assert seen.isdisjoint((*PAGES, *MEDICAL))


def test_crops_are_as_many_as_the_documents_say() -> None:
    """Oracle: the sizes of the files in scikit-image, scaled to two tiles of 64 px along the short side."""
    crops = [image.name.split()[0] for name in ("pages", "medical") for image in BUILT_IN[name](64)]
    assert len(photograph_tiles("validation", side=64)) == 4 + 6 + 6  # 512 x 512, 451 x 300, 640 x 427
    assert [crops.count(name) for name in PAGES] == [8, 10]  # 384 x 191, 448 x 172
    assert [crops.count(name) for name in MEDICAL] == [4, 1, 4]  # 550 x 660, 102 x 102, 400 x 400
    text = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    assert all(f"| {told} of " in text for told in ("16 crops", "18 crops", "9 crops"))


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_data_set_is_read_without_a_download(name: str) -> None:
    """Oracle: specification; as many images as asked for, none blank all over, no two the same, the same again."""
    source = DataSource(dataset_name=name)
    found, again = (load_validation_images(source, num_images=6, resolution=32) for _ in range(2))
    assert found.images.shape == (6, 3, 32, 32) and torch.equal(found.images, again.images)
    assert len(set(found.names)) == 6 and not found.unreadable
    assert found.images.flatten(1).std(dim=1).max() > 0.1
    assert torch.pdist(found.images.flatten(1)).min() > 0


@pytest.mark.parametrize(
    ("name", "resolution", "sides"), [("digits", 16, [8] * 3), ("faces", 32, [25] * 3), ("text", 32, [])]
)
def test_enlarged_images_are_told(name: str, resolution: int, sides: list[int]) -> None:
    """Oracle: the sizes of the files; drawn images have the asked size."""
    found = load_validation_images(DataSource(dataset_name=name), num_images=3, resolution=resolution)
    assert found.enlarged == sides


def test_digits_are_those_of_scikit_learn() -> None:
    """Oracle: the library's array, whose values are 0 to 16, within the rounding to bytes."""
    pixels = np.asarray(BUILT_IN["digits"](16)[7].source, dtype=float)
    from sklearn.datasets import load_digits

    np.testing.assert_allclose(pixels / 255, load_digits().images[7] / 16, atol=0.5 / 255)


def test_digits_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: specification; one line that names the package."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingPackage, match="pip install scikit-learn"):
        BUILT_IN["digits"](16)


def test_a_training_is_refused() -> None:
    """Oracle: specification; built-in data sets are held out, and have no split for training."""
    with pytest.raises(UserError, match="faces has no split 'train'"):
        open_data(
            DataSource(dataset_name="faces"), resolution=16, seed=0, center_crop=True, random_flip=False,
            num_validation_images=2,
        )  # fmt: skip


@DRAWINGS
def test_drawings_depend_on_seed_and_number_alone(draw) -> None:
    """Oracle: invariance; size, mode, and another image for another seed or number."""
    first, again, other, another = (draw(*key, size=40) for key in ((0, 1), (0, 1), (0, 2), (1, 1)))
    assert first.mode == "RGB" and first.size == (40, 40)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other) and not np.array_equal(first, another)


def test_text_and_lines_have_contrast_and_edges() -> None:
    """Oracle: specification; paper and ink differ by at least 100 grey levels in every one of 20 images."""
    for draw in (draw_lines, draw_text):
        for number in range(20):
            grey = np.asarray(draw(0, number, size=48).convert("L"), dtype=float)
            assert np.ptp(grey) >= 95


def test_textures_are_blends_of_two_colours() -> None:
    """Oracle: linear algebra; the colours of a texture lie on a line, within the rounding to bytes."""
    pixels = np.asarray(draw_texture(0, 3, size=48), dtype=float).reshape(-1, 3)
    spread = np.linalg.svd(pixels - pixels.mean(axis=0), compute_uv=False) / len(pixels) ** 0.5
    assert spread[0] > 10 and spread[1] < 0.6


def test_labels_name_the_picture() -> None:
    """Oracle: specification; reports name images by them."""
    labels = [raw.name for raw in BUILT_IN["medical"](64)]
    assert {label.split(" tile")[0] for label in labels} == set(MEDICAL)
    assert isinstance(BUILT_IN["medical"](64)[0].source, Image.Image)
