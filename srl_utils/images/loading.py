"""Make training batches of samples ahead of time, in worker processes or in a thread."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import signal
import threading
import traceback
import weakref
from collections.abc import Generator, Iterator
from concurrent.futures import Future, TimeoutError
from dataclasses import fields, replace
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from srl_utils.errors import ResourceError, UserError
from srl_utils.images.datasets import BatchPositions, StreamSamples, TrainingData
from srl_utils.images.framing import Sample
from srl_utils.images.sources import DataSource
from srl_utils.resources import LOST_WORKER

logger = logging.getLogger(__name__)

BATCHES_AHEAD = 2
LONGEST_STALL = 600  # seconds without a batch; the Hub's client tries for about 5 minutes to reach a server again
STALLED = "no training image has come for {} s: the data, or the server that they are on, do not answer"
LONGEST_LAST_BATCH = 5  # seconds that the end of a run waits for a batch that is being made


class Batch(NamedTuple):
    """Images `[b,3,R,R]` or clips `[b,3,T,R,R]` in [-1,1], their positions, and names and numbers for the `ImageLedger`."""

    images: Tensor
    positions: list[int]
    bad_images: list[str]
    upscaled: int


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
    """Yield the batches of process `rank` without end, starting at `first_position` of the whole run.

    Batches are made ahead of time by `num_workers` processes, or by a thread if that is 0.

    Args:
        data: the samples.
        batch_size: images in a batch of one process.
        rank: number of this process.
        world_size: number of processes.
        first_position: position in the whole run at which to start.
        num_workers: worker processes; a stream uses one at most.
        pin_memory: copy batches to pinned memory.

    Raises:
        UserError: while iterating, if too many images in a row cannot be read.
    """
    positions = BatchPositions(batch_size=batch_size, rank=rank, world_size=world_size, first_position=first_position)
    if isinstance(data.samples, StreamSamples):
        # A second worker would read the same stream again.
        layout: dict[str, Any] = {"dataset": replace(data.samples, positions=positions), "batch_size": batch_size}
        num_workers = min(num_workers, 1)
    else:
        layout = {"dataset": data.samples, "batch_sampler": positions}
    loader: DataLoader[Batch] = DataLoader(
        **layout,
        num_workers=num_workers,
        timeout=LONGEST_STALL if num_workers else 0,
        pin_memory=pin_memory,
        collate_fn=_collate,
        worker_init_fn=_ignore_interrupt,
        # Otherwise the loader draws from torch's global generator.
        generator=torch.Generator(),
    )
    batches = _without_worker_traceback(loader)
    if not num_workers:
        return _made_ahead(batches)
    atexit.register(_end_workers, weakref.ref(batches))
    return batches


def _collate(samples: list[Sample]) -> Batch:
    return Batch(
        images=torch.stack([sample["image"] for sample in samples]),
        positions=[sample["position"] for sample in samples],
        bad_images=[name for sample in samples for name in sample["bad"]],
        upscaled=sum(sample["upscaled"] for sample in samples),
    )


def _ignore_interrupt(worker_id: int) -> None:
    """Ignore signals sent to the whole process group: the main process needs its workers to finish the step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _without_worker_traceback(loader: DataLoader[Batch]) -> Generator[Batch, None, None]:
    """Yield the loader's batches; turn an error of a worker into one line."""
    try:
        yield from loader
    except Exception as error:
        # The traceback refers to the loader's iterator, whose workers end when it is freed.
        traceback.clear_frames(error.__traceback__)
        if "DataLoader timed out" in str(error):
            raise UserError(STALLED.format(LONGEST_STALL)) from None
        if isinstance(error, UserError):  # torch puts the traceback of the worker in front of the message
            raise _of_worker(error) from None
        of_a_worker = str(error).startswith("Caught")  # torch's prefix for an error that a living worker has sent
        if loader.num_workers and isinstance(error, (EOFError, OSError)) and not of_a_worker:
            raise ResourceError(LOST_WORKER) from None
        raise


def _of_worker(error: UserError) -> UserError:
    """Return the error as the worker raised it: torch carries over its text alone, and not its parameter."""
    kind = type(error)
    problem = str(error).strip().rsplit(f"{kind.__name__}: ", 1)[-1]
    name, colon, rest = problem.partition(": ")
    if colon and name in {field.name for field in fields(DataSource)}:
        return kind(rest, parameter=name)
    return kind(problem)


def _made_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches, of which a thread makes `BATCHES_AHEAD` ahead of time.

    Decoding lets other threads run. The thread is a daemon, so a batch that never comes does not keep the program
    alive.
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


def _end_workers(batches: weakref.ref[Generator[Batch, None, None]]) -> None:
    """End the workers at exit, where multiprocessing would send them SIGTERM, which they ignore, and wait."""
    if (generator := batches()) is not None:
        generator.close()
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
