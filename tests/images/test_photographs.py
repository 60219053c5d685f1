from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from PIL import Image

from srl_utils.images.photographs import FILES, Split, load_photographs, photograph_tiles, recoloured

SHORT_SIDE = 200


@pytest.fixture(scope="module")
def photographs() -> dict[Split, list[Image.Image]]:
    return {split: load_photographs(split, short_side=SHORT_SIDE) for split in FILES}


def test_splits_share_no_photograph(photographs) -> None:
    """Oracle: specification, by file name and by content: thumbnails of any two photographs differ clearly.

    The two views of the motorcycle are alike and both in the training split; so only pairs across are compared.
    """
    assert not set(FILES["train"]) & set(FILES["validation"])
    assert all(len(set(names)) == len(names) for names in FILES.values())
    thumbnails = {
        split: [np.asarray(image.convert("L").resize((16, 16)), dtype=float) for image in loaded]
        for split, loaded in photographs.items()
    }
    for train in thumbnails["train"]:
        for validation in thumbnails["validation"]:
            assert np.abs(train - validation).mean() > 10


@pytest.mark.parametrize("split", FILES)
def test_every_file_loads_as_rgb_of_limited_size(split, photographs) -> None:
    """Oracle: specification; every file ships in the installed package, none is blank, none above the short side."""
    assert len(photographs[split]) == len(FILES[split])
    for image in photographs[split]:
        assert image.mode == "RGB"
        assert min(image.size) <= SHORT_SIDE
        assert np.asarray(image).std() > 5


@pytest.mark.parametrize("split", FILES)
def test_limiting_keeps_the_proportions(split, photographs) -> None:
    """Oracle: the sizes in the files; a side is rounded to a whole pixel."""
    from importlib.resources import files

    for name, image in zip(FILES[split], photographs[split], strict=True):
        with Image.open(str(files("skimage.data") / name)) as original:
            scale = min(1, SHORT_SIDE / min(original.size))
            assert image.size == pytest.approx([scale * side for side in original.size], abs=0.5)


@pytest.mark.parametrize(("split", "side"), [("validation", 64), ("validation", 100), ("train", 128)])
def test_tiles_are_the_grid_that_fits(split, side) -> None:
    """Oracle: slices of the photographs, two tiles high or wide, as arrays, row by row, whole tiles only."""
    expected = []
    for image in load_photographs(split, short_side=2 * side):
        pixels = np.asarray(image)
        for row in range(image.height // side):
            strip = pixels[row * side : (row + 1) * side]
            expected += [strip[:, left * side : (left + 1) * side] for left in range(image.width // side)]
    tiles = photograph_tiles(split, side=side)
    assert len(tiles) == len(expected)
    assert all(tile.size == (side, side) for tile in tiles)
    assert all(np.array_equal(np.asarray(tile), pixels) for tile, pixels in zip(tiles, expected, strict=True))


def test_recoloured_exchanges_channels_and_dims() -> None:
    """Oracle: each result is a permutation of the channels times one factor in [0.4,1]; half are left alone."""
    colours = np.random.default_rng(0).integers(30, 255, size=(8, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(colours)
    untouched = 0
    for seed in range(200):
        result = np.asarray(recoloured(picture, seed), dtype=float)
        untouched += bool((result == colours).all())
        candidates = [colours[..., list(order)].astype(float) for order in permutations(range(3))]
        fits = [(result * channel).sum() / (channel * channel).sum() for channel in candidates]
        errors = [np.abs(result - fit * channel).max() for fit, channel in zip(fits, candidates, strict=True)]
        best = int(np.argmin(errors))
        assert errors[best] <= 1.5
        assert 0.39 <= fits[best] <= 1.01
    assert 70 <= untouched <= 130
    assert np.array_equal(np.asarray(recoloured(picture, 3)), np.asarray(recoloured(picture, 3)))
