"""Turn undecoded images into square training images `[3,R,R]` in [-1,1]."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypedDict

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from srl_utils.errors import UserError, one_line
from srl_utils.images.decoding import UnreadableImage, decode_rgb
from srl_utils.images.pixels import from_pil

CROP_AREA = (0.25, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
DECODE_ATTEMPTS = 20
AUGMENTATION_SEED = 1  # second word of seeds, so that these draws differ from those of the order of images

Box = tuple[float, float, float, float]


class RawImage(NamedTuple):
    """An undecoded image.

    Attributes:
        source: what `decode_rgb` takes.
        label: its path, key or row.
        caption: its caption, "" without one.
    """

    source: object
    label: str
    caption: str = ""

    @property
    def name(self) -> str:
        """Return the label in one line, or a hash of the content, which is the same in each epoch."""
        content = self.source.get("bytes") if isinstance(self.source, dict) else self.source
        if self.label or not isinstance(content, bytes):
            return one_line(self.label) or "a sample without image"
        return f"image with SHA-256 {hashlib.sha256(content).hexdigest()[:12]}"


class RawImages(Protocol):
    """Undecoded images by number: a list, a column of a dataset, or a selection of these."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> RawImage: ...


class Sample(TypedDict):
    """A training image `[3,R,R]` in [-1,1], and the names of the unreadable images that it replaces."""

    image: Tensor
    position: int
    bad: list[str]
    upscaled: bool


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How an image becomes a training image. All random draws depend on (seed, position) alone."""

    resolution: int
    seed: int
    center_crop: bool = False
    random_flip: bool = False

    def sample(self, position: int, candidate: Callable[[int], RawImage]) -> Sample:
        """Return the first readable image of candidate(0), candidate(1), ... as a training image.

        Raises:
            UserError: if the first `DECODE_ATTEMPTS` candidates are all unreadable.
        """
        bad: list[str] = []
        for attempt in range(DECODE_ATTEMPTS):
            raw = candidate(attempt)
            try:
                image = decode_rgb(raw.source)
            except UnreadableImage as error:
                bad.append(raw.name)
                reason = str(error)
                continue
            upscaled = min(image.size) < self.resolution
            return Sample(image=self._tensor(image, position), position=position, bad=bad, upscaled=upscaled)
        raise UserError(f"{DECODE_ATTEMPTS} training images in a row cannot be read, the last is {bad[-1]}: {reason}")

    def _tensor(self, image: Image.Image, position: int) -> Tensor:
        rng = np.random.default_rng((self.seed, AUGMENTATION_SEED, position))
        flip = self.random_flip and rng.random() < 0.5
        if self.center_crop:
            return to_tensor(centre_square(image, resolution=self.resolution), flip=flip)
        return to_tensor(random_square(image, resolution=self.resolution, rng=rng), flip=flip)


def centre_square(image: Image.Image, *, resolution: int) -> Image.Image:
    """Return the central square of an RGB image, scaled to `resolution` x `resolution`."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return _scale(image, (left, top, left + side, top + side), resolution)


def random_square(image: Image.Image, *, resolution: int, rng: np.random.Generator) -> Image.Image:
    """Return a random part of an RGB image (`CROP_AREA`, `CROP_RATIO`), scaled to `resolution` x `resolution`."""
    return _scale(image, random_box(*image.size, rng=rng), resolution)


def random_box(width: int, height: int, *, rng: np.random.Generator) -> Box:
    """Return a random box (left, top, right, bottom) within an image, drawn like torchvision's RandomResizedCrop.

    If no draw fits a long and narrow image, return its central square.
    """
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(*CROP_AREA)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            x, y = int(rng.integers(width - box_width + 1)), int(rng.integers(height - box_height + 1))
            return (x, y, x + box_width, y + box_height)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)


def to_tensor(image: Image.Image, *, flip: bool = False) -> Tensor:
    """Return an RGB image as a `[3,H,W]` tensor in [-1,1], mirrored left to right if `flip`."""
    return from_pil(ImageOps.mirror(image) if flip else image)


def _scale(image: Image.Image, box: Box, resolution: int) -> Image.Image:
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
