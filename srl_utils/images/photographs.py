"""Load the photographs that scikit-image ships: real training images on any machine, without a download."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance

from srl_utils.images.decoding import decode_rgb

Split = Literal["train", "validation"]

FILES: dict[Split, tuple[str, ...]] = {
    "train": (
        "astronaut.png",
        "brick.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "retina.jpg",
    ),
    "validation": ("camera.png", "chelsea.png", "rocket.jpg"),
}


def load_photographs(split: Split, *, short_side: int) -> list[Image.Image]:
    """Return the RGB photographs of a split, scaled down to `short_side` pixels if they are larger.

    No photograph is in both splits.
    """
    folder = files("skimage.data")
    photographs = []
    for name in FILES[split]:
        with as_file(folder / name) as path:
            photographs.append(limit_short_side(decode_rgb(path), short_side))
    return photographs


def photograph_tiles(split: Split, *, side: int, across: int = 2) -> list[Image.Image]:
    """Cut the photographs of a split into the `side` x `side` tiles that fit, row by row.

    Args:
        split: which photographs.
        side: of a tile, in pixels.
        across: tiles along the short side of a photograph. With fewer, a tile shows more of the scene.
    """
    photographs = load_photographs(split, short_side=across * side)
    return [tile for photograph in photographs for tile in tiles_of(photograph, side=side)]


def tiles_of(picture: Image.Image, *, side: int) -> list[Image.Image]:
    """Cut a picture into the `side` x `side` tiles that fit, row by row."""
    return [
        picture.crop((left, top, left + side, top + side))
        for top in range(0, picture.height - side + 1, side)
        for left in range(0, picture.width - side + 1, side)
    ]


def recoloured(photograph: Image.Image, seed: int) -> Image.Image:
    """Return the photograph unchanged for half of the seeds, else with exchanged channels and less brightness.

    The few photographs have few colours of skies and skins, and a network would not learn others.
    """
    rng = np.random.default_rng(seed)
    if rng.random() < 0.5:
        return photograph
    exchanged = Image.merge("RGB", [photograph.getchannel(int(channel)) for channel in rng.permutation(3)])
    return ImageEnhance.Brightness(exchanged).enhance(float(rng.uniform(0.4, 1.0)))


def limit_short_side(image: Image.Image, limit: int) -> Image.Image:
    """Return the image, scaled down so that its short side has `limit` pixels if it has more."""
    scale = limit / min(image.size)
    if scale >= 1:
        return image
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)
