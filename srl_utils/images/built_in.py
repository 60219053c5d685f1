"""Serve data sets that need no download, for evaluations on images that no training here has seen.

`digits` and `faces` are smaller than any resolution and get enlarged. `pages` and `medical` are tiles of few pictures that
scikit-image ships and the photographs of `photographs.py` leave out. The retina of `medical` is a detail of 07_dr.JPG of the
HRF database, that of `photographs.py` one of Wikimedia's. The others are drawn at the asked resolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import as_file, files

import numpy as np
from PIL import Image

from srl_utils.errors import MissingPackage
from srl_utils.images.decoding import decode_rgb
from srl_utils.images.drawing import draw_lines, draw_text, draw_texture
from srl_utils.images.framing import RawImage
from srl_utils.images.photographs import limit_short_side, tiles_of

NUM_DRAWN = 1000
SERIES = 0
NUM_FACES = 100  # of the 200 images of the file; the others show none
TILES_ACROSS = 2
PAGES = ("page.png", "text.png")
MEDICAL = ("cell.png", "microaneurysms.png", "phantom.png")


@dataclass(frozen=True)
class Drawn:
    """A series of images, each drawn when it is asked for."""

    name: str
    draw: Callable[[int], Image.Image]
    """Number to image."""

    def __len__(self) -> int:
        return NUM_DRAWN

    def __getitem__(self, index: int) -> RawImage:
        if not 0 <= index < NUM_DRAWN:
            raise IndexError(index)
        return RawImage(self.draw(index), f"{self.name} {index}")


def digits(side: int) -> list[RawImage]:
    """Return the 1797 handwritten digits of scikit-learn, grey, 8 x 8 pixels.

    Raises:
        MissingPackage: a UserError, if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # optional, and slow to import
    except ImportError:
        problem = "digits needs scikit-learn; run pip install scikit-learn"
        raise MissingPackage(problem, parameter="dataset_name") from None
    found = load_digits()
    return [
        RawImage(_grey(values / 16), f"digit {number} ({label})")  # scikit-learn's range is 0 to 16
        for number, (values, label) in enumerate(zip(found.images, found.target, strict=True))
    ]


def faces(side: int) -> list[RawImage]:
    """Return scikit-image's 100 faces of Labeled Faces in the Wild, grey, 25 x 25 pixels."""
    with as_file(files("skimage.data") / "lfw_subset.npy") as path:
        values = np.load(path)[:NUM_FACES]
    return [RawImage(_grey(face), f"face {number}") for number, face in enumerate(values)]


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(255 * values).astype(np.uint8))


def _pictures(names: tuple[str, ...], side: int) -> list[RawImage]:
    """Return tiles of pictures in scikit-image, `side` pixels or as large as the picture's short side allows."""
    images = []
    for name in names:
        with as_file(files("skimage.data") / name) as path:
            picture = limit_short_side(decode_rgb(path), TILES_ACROSS * side)
        tiles = tiles_of(picture, side=min(side, *picture.size))
        images += [RawImage(tile, f"{name} tile {number}") for number, tile in enumerate(tiles)]
    return images


def _drawn(name: str, draw: Callable[..., Image.Image], side: int) -> Drawn:
    return Drawn(name, partial(draw, SERIES, size=side))


BUILT_IN: dict[str, Callable[[int], list[RawImage] | Drawn]] = {
    "digits": digits,
    "faces": faces,
    "pages": partial(_pictures, PAGES),
    "medical": partial(_pictures, MEDICAL),
    "text": partial(_drawn, "text", draw_text),
    "drawings": partial(_drawn, "drawing", draw_lines),
    "textures": partial(_drawn, "texture", draw_texture),
}
"""By name: a function of the resolution in pixels that returns the undecoded images."""
