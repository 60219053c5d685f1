"""Images from folders, tars and Hugging Face datasets to training batches and a validation set.

A training sample is a function of (seed, position), where position 0, 1, 2, ... counts the samples of a whole run
over all processes. The order therefore depends on no saved random state, number of workers or number of processes,
and a run resumes at any position.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import signal
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count, islice, pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from srl_utils.decoding import UnreadableImage, decode_rgb
from srl_utils.errors import ResourceError, UserError
from srl_utils.listing import PassedOver
from srl_utils.pictures import (
    DECODE_ATTEMPTS,
    Framing,
    RawImage,
    Sample,
    centre_square,
    to_tensor,
)
from srl_utils.resources import LOST_WORKER
from srl_utils.sources import DataSource, Images, StreamImages, captioned, open_images, open_validation

logger = logging.getLogger(__name__)

PROBED_IMAGES = 16
BATCHES_AHEAD = 2
LONGEST_STALL = 600  # seconds without a batch; the Hub's client tries for about 5 minutes to reach a server again
STALLED = "no training image has come for {} s: the data, or the server that they are on, do not answer"
NO_CAPTIONS = "none of {} images has a caption, the first is {}"
LONGEST_LAST_BATCH = 5  # seconds that the end of a run waits for a batch that is being made
STREAM_TRIAL = 200  # images read before the share of bad ones in a stream means anything
ORDER_SEED = 2  # second word of seeds: pictures.py has 1 and sources.py 3, so that no two share random numbers


class Batch(NamedTuple):
    """Images `[b,3,R,R]` in [-1,1], their positions, and names and numbers for the `ImageLedger`."""

    images: Tensor
    positions: list[int]
    bad_images: list[str]
    upscaled: int


class ValidationImages(NamedTuple):
    """Images `[n,3,R,R]` in [-1,1], caption ("" if none was asked for) and name of each, and what was left out."""

    images: Tensor
    unreadable: list[str]
    """The names of images that cannot be decoded."""
    captions: list[str]
    names: list[str]
    without_caption: list[str]
    """The names of images that have none of the captions asked for."""
    passed_over: list[PassedOver]
    """What of a folder or of tars was not looked at."""


class TrainingSamples(Dataset):
    """Map-style images in a new order each epoch, as samples indexed by position."""

    def __init__(self, images: Sequence[RawImage], framing: Framing) -> None:
        self.images = images
        self.framing = framing

    def __getitem__(self, position: int) -> Sample:
        """The sample at `position`; an unreadable image is replaced by the next one of the epoch."""
        epoch, place = divmod(position, len(self.images))
        order = epoch_order(self.framing.seed, epoch, len(self.images))
        return self.framing.sample(position, lambda attempt: self.images[order[(place + attempt) % len(order)]])


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The permutation of `num_images` indices in which an epoch reads them."""
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
        """The samples; an unreadable image is replaced by the next one of the stream."""
        start = self.positions.first_position
        stream = self._read(start)
        window: deque[RawImage] = deque()  # what the stream has yielded from position `start` on

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
        """The undecoded images from `position` on, epoch after epoch; the epochs are of equal length.

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
                raise UserError("the streamed training data holds no images; check the data set and its split")
            skipped_epochs, to_skip = divmod(max(to_skip - length, 0), length)
            epoch += 1 + skipped_epochs


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Training samples (`num_images` is None for a stream) and validation images `[n,3,R,R]` in [-1,1]."""

    samples: TrainingSamples | StreamSamples
    num_images: int | None
    validation_images: Tensor
    description: str
    passed_over: list[str]
    """Lines on files that were not looked at, without their names."""


def open_data(
    source: DataSource,
    *,
    resolution: int,
    seed: int,
    center_crop: bool,
    random_flip: bool,
    num_validation_images: int,
) -> TrainingData:
    """Opens the training and validation images and makes sure that both can be read.

    Raises:
        UserError: if there are none, if flags conflict, or if none of the images tried can be decoded.
    """
    framing = Framing(resolution=resolution, seed=seed, center_crop=center_crop, random_flip=random_flip)
    training, validation, passed_over = open_images(source, resolution, seed)
    for part in filter(None, passed_over):
        logger.warning("%s", part.report())
    _check_readable(training)
    validation_images = _decode_evenly(validation, num_validation_images, resolution).images
    # The last part of a path: the description is published with the model.
    place = source.dataset_name or source.train_data_dir
    place = Path(place).resolve().name if Path(place).exists() else place
    if isinstance(training, StreamImages):
        samples, num_images, amount = StreamSamples(images=training, framing=framing), None, "a stream of"
    else:
        samples, num_images, amount = TrainingSamples(training, framing), len(training), str(len(training))
    return TrainingData(
        samples=samples,
        num_images=num_images,
        validation_images=validation_images,
        description=f"{place}: {amount} training images, {len(validation_images)} validation images",
        passed_over=[part.summary() for part in passed_over if part],
    )


def load_validation_images(source: DataSource, *, num_images: int, resolution: int, seed: int = 0) -> ValidationImages:
    """Central squares spread evenly over the validation images (of a stream: the first), always the same ones.

    A `source` with `validation_data_dir` needs no training data. The seed matters for held-out training images. If the
    source names captions, images without one are left out.

    Returns:
        Up to `num_images` images.

    Raises:
        UserError: if there are no validation images or none of them can be used.
    """
    validation, passed_over = open_validation(source, resolution, seed)
    wanted, without = source.caption_column is not None, []
    if wanted and not isinstance(validation, StreamImages):
        validation, without = captioned(validation)
        if without and not validation:
            raise UserError(NO_CAPTIONS.format(len(without), without[0]))
    loaded = _decode_evenly(validation, num_images, resolution, captioned=wanted)
    return loaded._replace(without_caption=without + loaded.without_caption, passed_over=passed_over)


def training_batches(
    data: TrainingData,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    first_position: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The batches of process `rank`, without end, from `first_position` of the whole run on.

    They are made ahead of their use: by `num_workers` processes, or else by a thread of this one.

    Raises:
        UserError: while iterating, if too many images in a row cannot be read.
    """
    positions = BatchPositions(batch_size=batch_size, rank=rank, world_size=world_size, first_position=first_position)
    if isinstance(data.samples, StreamSamples):
        # A second worker would read the same stream again.
        layout = {"dataset": replace(data.samples, positions=positions), "batch_size": batch_size}
        num_workers = min(num_workers, 1)
    else:
        layout = {"dataset": data.samples, "batch_sampler": positions}
    loader = DataLoader(
        **layout,
        num_workers=num_workers,
        timeout=LONGEST_STALL if num_workers else 0,
        pin_memory=pin_memory,
        collate_fn=_collate,
        worker_init_fn=_ignore_interrupt,
        # Without one the loader draws from torch's global generator.
        generator=torch.Generator(),
    )
    batches = _without_worker_traceback(loader)
    if not num_workers:
        return _made_ahead(batches)
    atexit.register(_end_workers, weakref.ref(batches))
    return batches


class ImageLedger:
    """Counts what `training_batches` met, and logs the name of each unreadable image once.

    Args:
        num_images: of the training set; None for a stream.
        world_size: processes that read as many images as this one; what they met is told by `add`.
    """

    def __init__(self, num_images: int | None, *, world_size: int = 1) -> None:
        self.num_images = num_images
        self.world_size = world_size
        self.read = 0
        self.upscaled = 0
        self.bad_images: dict[str, None] = {}

    def update(self, batch: Batch) -> None:
        """Adds one batch of this process."""
        self.read += len(batch.positions) * self.world_size
        self.upscaled += batch.upscaled
        self.add(batch.bad_images)

    def add(self, bad_images: Sequence[str]) -> None:
        """Adds the names of unreadable images; those already known count once."""
        for name in bad_images:
            if name not in self.bad_images:
                self.bad_images[name] = None
                logger.warning("unreadable training image, replaced by another one: %s", name)

    @property
    def share(self) -> float:
        """Distinct unreadable images per image of the training set, or per image read so far of a stream."""
        return len(self.bad_images) / max(self.num_images or self.read, 1)

    def check(self, max_bad_images: float) -> None:
        """Raises a UserError if `share` is above `max_bad_images`; of a stream, not before `STREAM_TRIAL` images."""
        if self.share <= max_bad_images or (self.num_images is None and self.read < STREAM_TRIAL):
            return
        total = f"{self.num_images} training images" if self.num_images else f"the {self.read} images read so far"
        raise UserError(
            f"{len(self.bad_images)} of {total} cannot be read ({', '.join(islice(self.bad_images, 3))}, ...); "
            f"repair or remove them, or allow a larger share than --max_bad_images {max_bad_images:g}"
        )

    def summary(self) -> str:
        """A line on what was replaced and scaled up; empty where nothing was."""
        parts = []
        if self.bad_images:
            parts.append(f"{len(self.bad_images)} unreadable images were replaced by others")
        if self.upscaled:
            parts.append(f"images smaller than the resolution were scaled up {self.upscaled} times")
        return "; ".join(parts)

    def state_dict(self) -> dict[str, int | list[str]]:
        """The counts as JSON values."""
        return {"read": self.read, "upscaled": self.upscaled, "bad_images": list(self.bad_images)}

    def load_state_dict(self, state: Mapping[str, int | list[str]]) -> None:
        """Continues from the counts of `state_dict`."""
        self.read, self.upscaled = state["read"], state["upscaled"]
        self.bad_images = dict.fromkeys(state["bad_images"])


def _probes(images: Images, number: int) -> Iterator[RawImage]:
    """Some images from all over, for bad ones are often neighbours; of a stream the first."""
    if isinstance(images, StreamImages):
        return islice(images, number)
    return (
        images[index] for index in np.linspace(0, len(images), min(number, len(images)), endpoint=False).astype(int)
    )


def _check_readable(images: Images) -> None:
    problems: list[str] = []
    for raw in _probes(images, PROBED_IMAGES):
        try:
            decode_rgb(raw.source)
            return
        except UnreadableImage as error:
            problems.append(f"{raw.name}: {error}")
    if not problems:
        raise UserError("the training data holds no images; check its files and --max_train_samples")
    raise UserError(f"none of {len(problems)} training images tried can be read; {problems[0]}")


def _decode_evenly(images: Images, number: int, resolution: int, *, captioned: bool = False) -> ValidationImages:
    """Decode images from all over; where they must have captions, those without one are passed over."""
    decoded: list[Tensor] = []
    captions: list[str] = []
    names: list[str] = []
    unreadable: list[str] = []
    without: list[str] = []

    def is_candidate(raw: RawImage) -> bool:
        if captioned and not raw.caption:
            without.append(raw.name)
        return bool(raw.caption) or not captioned

    for candidates in _stretches(images, number, is_candidate):
        for raw in candidates:
            try:
                decoded.append(to_tensor(centre_square(decode_rgb(raw.source), resolution=resolution)))
                captions.append(raw.caption)
                names.append(raw.name)
                break
            except UnreadableImage as error:
                unreadable.append(raw.name)
                logger.warning("unreadable validation image, passed over: %s (%s)", raw.name, error)
    if not decoded and without:
        raise UserError(NO_CAPTIONS.format(len(without), without[0]))
    if not decoded:
        raise UserError(f"none of {len(unreadable)} validation images can be read; check the validation data")
    return ValidationImages(torch.stack(decoded), unreadable, captions, names, without, passed_over=[])


def _stretches(images: Images, number: int, is_candidate: Callable[[RawImage], bool]) -> list[Iterator[RawImage]]:
    """For each validation image to be shown, the candidates of which the first readable one is taken."""
    if isinstance(images, StreamImages):
        # One iterator, repeated: each stretch begins where the one before it ended.
        return [islice(filter(is_candidate, images), number + DECODE_ATTEMPTS)] * number
    bounds = np.linspace(0, len(images), min(number, len(images)) + 1).astype(int).tolist()
    return [
        islice(filter(is_candidate, map(images.__getitem__, range(start, end))), DECODE_ATTEMPTS)
        for start, end in pairwise(bounds)
    ]


def _collate(samples: list[Sample]) -> Batch:
    return Batch(
        images=torch.stack([sample["image"] for sample in samples]),
        positions=[sample["position"] for sample in samples],
        bad_images=[name for sample in samples for name in sample["bad"]],
        upscaled=sum(sample["upscaled"] for sample in samples),
    )


def _ignore_interrupt(worker_id: int) -> None:
    """Leaves signals sent to the whole group to the main process, which needs the workers to finish its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _without_worker_traceback(loader: DataLoader) -> Iterator[Batch]:
    try:
        yield from loader
    except Exception as error:
        # The traceback refers to the loader's iterator, whose workers end when it is freed.
        traceback.clear_frames(error.__traceback__)
        if "DataLoader timed out" in str(error):
            raise UserError(STALLED.format(LONGEST_STALL)) from None
        if isinstance(error, UserError):  # torch puts the traceback of the worker in front of the message
            kind = type(error)
            raise kind(str(error).strip().rsplit(f"{kind.__name__}: ", 1)[-1]) from None
        of_a_worker = str(error).startswith("Caught")  # one that lives, and sends what it caught
        if loader.num_workers and isinstance(error, (EOFError, OSError)) and not of_a_worker:
            raise ResourceError(LOST_WORKER) from None
        raise


def _made_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same, `BATCHES_AHEAD` of them made by a thread before they are asked for; decoding lets other threads run.

    The thread keeps no program alive: what it waits for may never come.
    """
    wanted: SimpleQueue[bool] = SimpleQueue()
    made: SimpleQueue[Future[Batch]] = SimpleQueue()
    ended = threading.Event()

    def make() -> None:
        while wanted.get() and not ended.is_set():
            batch: Future[Batch] = Future()
            made.put(batch)
            try:
                batch.set_result(next(batches))
            except BaseException as error:
                batch.set_exception(error)

    thread = threading.Thread(target=make, name="batches", daemon=True)
    thread.start()
    for _ in range(BATCHES_AHEAD):
        wanted.put(True)
    try:
        while True:
            batch = made.get().result(timeout=LONGEST_STALL)
            wanted.put(True)
            yield batch
    except TimeoutError:
        raise UserError(STALLED.format(LONGEST_STALL)) from None
    finally:
        ended.set()
        wanted.put(False)
        thread.join(LONGEST_LAST_BATCH)


def _end_workers(batches: weakref.ref[Iterator[Batch]]) -> None:
    """At exit multiprocessing sends SIGTERM to its children and waits for them; these workers ignore it."""
    if (generator := batches()) is not None:
        generator.close()
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
