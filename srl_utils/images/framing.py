"""Turn undecoded images into square training images `[3,R,R]` in [-1,1], and clips into `[3,T,R,R]`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypedDict

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from srl_utils.errors import UserError, one_line
from srl_utils.images.clips import MIDDLE, decode_clip
from srl_utils.images.decoding import UnreadableImage, decode_rgb
from srl_utils.images.pixels import from_pil

CROP_AREA = (0.25, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
DECODE_ATTEMPTS = 20
AUGMENTATION_SEED = 1  # second word of seeds, so that these draws differ from those of the order of images

Box = tuple[float, float, float, float]


class RawImage(NamedTuple):
    """An undecoded image or clip.

    Attributes:
        source: what `decode_rgb` or `decode_clip` takes.
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
    """A training image `[3,R,R]` or clip `[3,T,R,R]` in [-1,1], and the names of the unreadable ones that it replaces."""

    image: Tensor
    position: int
    bad: list[str]
    upscaled: bool


@dataclass(kw_only=True, eq=False)
class Crop:
    """Turns an image, or each frame of a clip, into a square tensor. The first frame decides the box of the others."""

    resolution: int
    rng: np.random.Generator | None = None
    """Draws the box; None takes the central square."""
    flip: bool = False
    size: tuple[int, int] | None = None
    box: Box = field(init=False)

    def __call__(self, frame: Image.Image) -> Tensor:
        """Return the part of an RGB frame as `[3,R,R]` in [-1,1].

        Raises:
            UnreadableImage: if the frames before had another size.
        """
        if self.size is None:
            self.size = frame.size
            self.box = centre_box(*frame.size) if self.rng is None else random_box(*frame.size, rng=self.rng)
        if frame.size != self.size:
            sizes = " and ".join(f"{width}x{height}" for width, height in (self.size, frame.size))
            raise UnreadableImage(f"has frames of different sizes: {sizes}")
        return to_tensor(_scale(frame, self.box, self.resolution), flip=self.flip)

    @property
    def upscales(self) -> bool:
        """Return whether the frames were smaller than the resolution."""
        return self.size is not None and min(self.size) < self.resolution


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How an image becomes a training image, and a clip one of `num_frames`.

    All random draws depend on (seed, position) alone.
    """

    resolution: int
    seed: int
    center_crop: bool = False
    random_flip: bool = False
    num_frames: int = 1

    def sample(self, position: int, candidate: Callable[[int], RawImage]) -> Sample:
        """Return the first readable image of candidate(0), candidate(1), ... as a training image.

        Raises:
            UserError: if the first `DECODE_ATTEMPTS` candidates are all unreadable.
        """
        bad: list[str] = []
        for attempt in range(DECODE_ATTEMPTS):
            raw = candidate(attempt)
            crop, start = self._draw(position)
            try:
                image = decode_square(raw.source, crop, num_frames=self.num_frames, start=start)
            except UnreadableImage as error:
                bad.append(raw.name)
                reason = str(error)
                continue
            return Sample(image=image, position=position, bad=bad, upscaled=crop.upscales)
        raise UserError(f"{DECODE_ATTEMPTS} training images in a row cannot be read, the last is {bad[-1]}: {reason}")

    def _draw(self, position: int) -> tuple[Crop, float]:
        """Return the part of the image to take, and where in a clip to begin."""
        rng = np.random.default_rng((self.seed, AUGMENTATION_SEED, position))
        flip = self.random_flip and rng.random() < 0.5
        start = rng.random() if self.num_frames > 1 else MIDDLE
        return Crop(resolution=self.resolution, rng=None if self.center_crop else rng, flip=flip), start


def decode_square(source: object, crop: Crop, *, num_frames: int = 1, start: float = MIDDLE) -> Tensor:
    """Return the part of an image as `[3,R,R]` in [-1,1], or of `num_frames` frames of a clip as `[3,T,R,R]`.

    Args:
        source: what `decode_rgb` takes if `num_frames` is 1, else what `decode_clip` takes.
        crop: the part to take, which is the same for all frames.
        num_frames: T.
        start: as for `decode_clip`; the default takes the middle of the clip.

    Raises:
        UnreadableImage: if the image or clip is broken, or the clip too short.
    """
    if num_frames == 1:
        return crop(decode_rgb(source))
    return decode_clip(source, crop, num_frames=num_frames, start=start)


def centre_box(width: int, height: int) -> Box:
    """Return the box (left, top, right, bottom) of the central square."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)


def random_box(width: int, height: int, *, rng: np.random.Generator) -> Box:
    """Return a random box (left, top, right, bottom) within an image, drawn like torchvision's RandomResizedCrop.

    Its area and ratio are in `CROP_AREA` and `CROP_RATIO`. If no draw fits a long and narrow image, return its central square.
    """
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(*CROP_AREA)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            x, y = int(rng.integers(width - box_width + 1)), int(rng.integers(height - box_height + 1))
            return (x, y, x + box_width, y + box_height)
    return centre_box(width, height)


def to_tensor(image: Image.Image, *, flip: bool = False) -> Tensor:
    """Return an RGB image as a `[3,H,W]` tensor in [-1,1], mirrored left to right if `flip`."""
    return from_pil(ImageOps.mirror(image) if flip else image)


def _scale(image: Image.Image, box: Box, resolution: int) -> Image.Image:
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
