"""Serve images from folders, tars and Hugging Face datasets as training samples and as a validation set.

A training sample is a function of (seed, position), where position 0, 1, 2, ... counts the samples of a whole run
over all processes. So the order does not depend on saved random state, the number of workers or the number of
processes, and a run resumes at any position.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count, islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from srl_utils.errors import UserError
from srl_utils.images.decoding import UnreadableImage
from srl_utils.images.framing import DECODE_ATTEMPTS, Crop, Framing, RawImage, RawImages, Sample, decode_square
from srl_utils.images.listing import Skipped
from srl_utils.images.sources import DataSource, Images, StreamImages, captioned, open_images, open_validation

logger = logging.getLogger(__name__)

PROBED_IMAGES = 16
NO_CAPTIONS = "none of {} images has a caption, the first is {}"
ORDER_SEED = 2  # second word of seeds: framing.py has 1 and sources.py 3, so that no two share random numbers


class ValidationImages(NamedTuple):
    """Images `[n,3,R,R]` or clips `[n,3,T,R,R]` in [-1,1], caption ("" if none is wanted) and name of each, and what was left out."""

    images: Tensor
    unreadable: list[str]
    """The names of images that cannot be decoded."""
    captions: list[str]
    names: list[str]
    without_caption: list[str]
    """The names of images without a caption, if captions are wanted."""
    skipped: list[Skipped]
    """Files and members of tars that were skipped."""
    enlarged: list[int]
    """The short side, in pixels, of each image that was smaller than the resolution."""


class TrainingSamples(Dataset):
    """Map-style images in a new order each epoch, as samples indexed by position."""

    def __init__(self, images: RawImages, framing: Framing) -> None:
        self.images = images
        self.framing = framing

    def __getitem__(self, position: int) -> Sample:
        """Return the sample at `position`; an unreadable image is replaced by the next one of the epoch."""
        epoch, place = divmod(position, len(self.images))
        order = epoch_order(self.framing.seed, epoch, len(self.images))
        return self.framing.sample(position, lambda attempt: self.images[order[(place + attempt) % len(order)]])


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """Return the order in which an epoch reads the images: a permutation of `num_images` indices."""
    return np.random.default_rng((seed, ORDER_SEED, epoch)).permutation(num_images)


@dataclass(frozen=True, kw_only=True)
class BatchPositions:
    """The positions of each batch of one process, without end.

    Of every batch_size * world_size consecutive positions each process takes batch_size consecutive ones, so that
    the processes together read the order that one process with a larger batch would read.
    """

    batch_size: int
    rank: int
    world_size: int
    first_position: int

    def __iter__(self) -> Iterator[list[int]]:
        start = self.first_position + self.rank * self.batch_size
        for position in count(start, self.batch_size * self.world_size):
            yield list(range(position, position + self.batch_size))


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamSamples(IterableDataset):
    """Streamed images as the samples at `positions`.

    Every process reads the whole stream and decodes only its own samples, so that uneven files or worlds never leave
    a process without data.
    """

    images: StreamImages
    framing: Framing
    positions: BatchPositions = field(
        default_factory=lambda: BatchPositions(batch_size=1, rank=0, world_size=1, first_position=0)
    )

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples; an unreadable image is replaced by the next one of the stream."""
        start = self.positions.first_position
        stream = self._read(start)
        window: deque[RawImage] = deque()  # what the stream has yielded, starting at position `start`

        def candidate(attempt: int) -> RawImage:
            while len(window) <= attempt:
                window.append(next(stream))
            return window[attempt]

        for position in (position for batch in self.positions for position in batch):
            for _ in range(position - start):
                candidate(0)
                window.popleft()
            start = position
            yield self.framing.sample(position, candidate)

    def _read(self, position: int) -> Iterator[RawImage]:
        """Yield the undecoded images from `position` on, epoch after epoch. All epochs have the same length.

        Raises:
            UserError: if the stream is empty.
        """
        epoch, to_skip = 0, position
        while True:
            length = 0
            for length, raw in enumerate(self.images.shuffled(seed=self.framing.seed, epoch=epoch), start=1):
                if length > to_skip:
                    yield raw
            if length == 0:
                raise UserError("the streamed training data holds no images; check the dataset and its split")
            skipped_epochs, to_skip = divmod(max(to_skip - length, 0), length)
            epoch += 1 + skipped_epochs


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Training samples (`num_images` is None for a stream), and validation images as in `ValidationImages`."""

    samples: TrainingSamples | StreamSamples
    num_images: int | None
    validation_images: Tensor
    description: str
    skipped: list[str]
    """Lines on skipped files, without their names."""


def open_flagged_data(args: Namespace) -> TrainingData:
    """Open the images that the flags of a training describe; see `open_data`."""
    return open_data(
        DataSource.from_flags(args),
        resolution=args.resolution,
        seed=args.seed,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        num_validation_images=args.num_validation_images,
    )


def open_data(
    source: DataSource,
    *,
    resolution: int,
    seed: int,
    center_crop: bool,
    random_flip: bool,
    num_validation_images: int,
) -> TrainingData:
    """Open the training and validation images, and check that both can be decoded.

    If `source.num_frames` is above 1, they are clips.

    Args:
        source: where the images come from.
        resolution: side of the images in pixels.
        seed: decides order, crops, flips and held-out images.
        center_crop: take the central square instead of a random part of each training image.
        random_flip: mirror a random half of the training images.
        num_validation_images: largest number of validation images.

    Raises:
        UserError: if there are no images, if settings conflict, or if none of the images tried can be decoded.
    """
    num_frames = source.num_frames
    framing = Framing(
        resolution=resolution, seed=seed, center_crop=center_crop, random_flip=random_flip, num_frames=num_frames
    )
    training, validation, skipped = open_images(source, resolution, seed)
    for part in filter(None, skipped):
        logger.warning("%s", part.report())
    _check_readable(training, resolution, num_frames)
    validation_images = _decode_evenly(validation, num_validation_images, resolution, num_frames).images
    if len(validation_images) < num_validation_images:
        logger.warning(
            "there are only %d validation images, fewer than the %d of --num_validation_images",
            len(validation_images), num_validation_images,
        )  # fmt: skip
    # The description is published with the model, so it holds only the last part of a path.
    place = str(source.dataset_name or source.train_data_dir)
    place = Path(place).resolve().name if Path(place).exists() else place
    samples: TrainingSamples | StreamSamples
    num_images: int | None
    if isinstance(training, StreamImages):
        samples, num_images, amount = StreamSamples(images=training, framing=framing), None, "a stream of"
    else:
        samples, num_images, amount = TrainingSamples(training, framing), len(training), str(len(training))
    kind = "images" if num_frames == 1 else f"clips of {num_frames} frames"
    return TrainingData(
        samples=samples,
        num_images=num_images,
        validation_images=validation_images,
        description=f"{place}: {amount} training {kind}, {len(validation_images)} validation {kind}",
        skipped=[part.summary() for part in skipped if part],
    )


def load_validation_images(source: DataSource, *, num_images: int, resolution: int, seed: int = 0) -> ValidationImages:
    """Return the central squares of images spread evenly over the validation images, or of the first ones of a stream.

    If `source.num_frames` is above 1, the images are clips, and the frames in the middle of each are returned. The
    choice is the same in each call. If `source` names captions, images without one are left out.

    Args:
        source: where the images come from; with `validation_data_dir` it needs no training images.
        num_images: largest number of images.
        resolution: side of the images in pixels.
        seed: the seed of the training, which decides the held-out images.

    Raises:
        UserError: if there are no validation images, or none of them can be used.
    """
    validation, skipped = open_validation(source, resolution, seed)
    wanted = source.caption_column is not None
    without: list[str] = []
    if wanted and not isinstance(validation, StreamImages):
        validation, without = captioned(validation)
        if without and not validation:
            raise UserError(NO_CAPTIONS.format(len(without), without[0]))
    loaded = _decode_evenly(validation, num_images, resolution, source.num_frames, captioned=wanted)
    return loaded._replace(without_caption=without + loaded.without_caption, skipped=skipped)


def _probes(images: Images, number: int) -> Iterator[RawImage]:
    """Return some images: spread evenly, since bad images are often neighbours; of a stream the first ones."""
    if isinstance(images, StreamImages):
        return islice(images, number)
    return (
        images[index] for index in np.linspace(0, len(images), min(number, len(images)), endpoint=False).astype(int)
    )


def _check_readable(images: Images, resolution: int, num_frames: int) -> None:
    problems: list[str] = []
    for raw in _probes(images, PROBED_IMAGES):
        try:
            decode_square(raw.source, Crop(resolution=resolution), num_frames=num_frames)
            return
        except UnreadableImage as error:
            problems.append(f"{raw.name}: {error}")
    if not problems:
        raise UserError("the training data holds no images; check its files and `max_train_samples`")
    raise UserError(f"none of {len(problems)} training images tried can be read; {problems[0]}")


def _decode_evenly(
    images: Images, number: int, resolution: int, num_frames: int, *, captioned: bool = False
) -> ValidationImages:
    """Decode images spread evenly over all. If captions are wanted, skip images without one."""
    decoded: list[Tensor] = []
    captions: list[str] = []
    names: list[str] = []
    unreadable: list[str] = []
    without: list[str] = []
    enlarged: list[int] = []

    def is_candidate(raw: RawImage) -> bool:
        if captioned and not raw.caption:
            without.append(raw.name)
        return bool(raw.caption) or not captioned

    for candidates in _stretches(images, number, is_candidate):
        for raw in candidates:
            crop = Crop(resolution=resolution)
            try:
                decoded.append(decode_square(raw.source, crop, num_frames=num_frames))
                captions.append(raw.caption)
                names.append(raw.name)
                if crop.size is not None and crop.upscales:
                    enlarged.append(min(crop.size))
                break
            except UnreadableImage as error:
                unreadable.append(raw.name)
                logger.warning("unreadable validation image, skipped: %s (%s)", raw.name, error)
    if not decoded and without:
        raise UserError(NO_CAPTIONS.format(len(without), without[0]))
    if not decoded:
        raise UserError(f"none of {len(unreadable)} validation images can be read; check the validation data")
    return ValidationImages(torch.stack(decoded), unreadable, captions, names, without, [], enlarged)


def _stretches(images: Images, number: int, is_candidate: Callable[[RawImage], bool]) -> list[Iterator[RawImage]]:
    """Return one iterator of candidates for each validation image.

    The first readable candidate becomes the validation image.
    """
    if isinstance(images, StreamImages):
        # The same iterator each time, so each stretch begins where the last one ended.
        return [islice(filter(is_candidate, images), number + DECODE_ATTEMPTS)] * number
    bounds = np.linspace(0, len(images), min(number, len(images)) + 1).astype(int).tolist()
    return [
        islice(filter(is_candidate, map(images.__getitem__, range(start, end))), DECODE_ATTEMPTS)
        for start, end in pairwise(bounds)
    ]
