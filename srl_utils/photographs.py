"""The photographs that ship inside scikit-image: real training data on any machine, without a download."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Literal

from PIL import Image

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
SHORT_SIDE: dict[Split, int] = {"train": 512, "validation": 192}


def load_photographs(split: Split) -> list[Image.Image]:
    """The RGB photographs of `split`; no photograph is in both, and larger ones are scaled to `SHORT_SIDE`."""
    folder = files("skimage.data")
    photographs = []
    for name in FILES[split]:
        with as_file(folder / name) as path, Image.open(path) as image:
            photographs.append(_limit_short_side(image.convert("RGB"), SHORT_SIDE[split]))
    return photographs


def photograph_tiles(split: Split, *, side: int) -> list[Image.Image]:
    """The photographs of `split` cut into the `side` x `side` tiles that fit, row by row."""
    return [
        photograph.crop((left, top, left + side, top + side))
        for photograph in load_photographs(split)
        for top in range(0, photograph.height - side + 1, side)
        for left in range(0, photograph.width - side + 1, side)
    ]


def _limit_short_side(image: Image.Image, limit: int) -> Image.Image:
    scale = limit / min(image.size)
    if scale >= 1:
        return image
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)
