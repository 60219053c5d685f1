"""Compute cells: make one perturbation on one VAE, run the task with the evaluated VAEs, and measure the outcome.

The validation during training and the evaluation commands both use `compute`, so the same names mean the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, product
from typing import NamedTuple

import torch
from torch import Tensor

from srl_utils.attacks.draws import image_generators, purifying_generators
from srl_utils.console import progress_bar
from srl_utils.errors import UserError
from srl_utils.evaluation.metering import Meter, images_of
from srl_utils.evaluation.motion import MOTION_METRICS, SHARE, motion
from srl_utils.evaluation.perturbations import ADAPTIVE, CLEAN, NO_THREAT, TRANSFER, Perturbation
from srl_utils.evaluation.results import Record, to_records
from srl_utils.evaluation.tasks.base import Cell, Task
from srl_utils.images.pixels import on_device
from srl_utils.vae.codec import Codec
from srl_utils.vae.networks import frozen


@dataclass(frozen=True)
class Job:
    """A batch of one cell: the numbers of its images."""

    cell: Cell
    batch: Sequence[int]

    def cost(self, passes: float) -> int:
        """Return the cost in passes through a VAE, if the task takes `passes` for one image and VAE."""
        return round(len(self.batch) * (self.cell.perturbation.passes + passes * len(self.cell.judged)))


class Measured(NamedTuple):
    """Outcome and values of one VAE, batch and variant of the task."""

    codec: Codec
    variant: str
    outcome: Tensor
    """`[N,3,H,W]` in [-1,1], on the VAE's device."""
    records: list[Record]


def cells_of(
    perturbation: Perturbation, codecs: Sequence[Codec], threat_models: Sequence[str] = (ADAPTIVE,)
) -> Iterator[Cell]:
    """Yield the cells of one perturbation.

    Args:
        perturbation: attack or corruption.
        codecs: the VAEs, the baseline first; transferred attacks are made on it. Adaptive attacks are made on what the
            attacker can compute gradients of, which is among them.
        threat_models: `transfer`, `adaptive` or both.
    """
    baseline, *others = codecs
    if not perturbation.adversarial:
        yield Cell(perturbation, baseline, tuple(codecs), {codec.name: (NO_THREAT,) for codec in codecs})
        return
    # On the baseline, both threat models are the same attack.
    labels = {
        codec.name: tuple(
            threat for threat in threat_models if threat == TRANSFER or codec.exposed.name == baseline.name
        )
        for codec in codecs
    }
    yield Cell(perturbation, baseline, tuple(codec for codec in codecs if labels[codec.name]), labels)
    if ADAPTIVE not in threat_models:
        return
    for source in codecs[1:]:
        judged = tuple(codec for codec in others if codec.exposed.name == source.name)
        if judged and source.bare.name not in perturbation.impossible_on:
            yield Cell(perturbation, source, judged, {codec.name: (ADAPTIVE,) for codec in judged})


def batched(cell: Cell, numbers: Sequence[int], batch_size: int) -> Iterator[Job]:
    """Yield the cell's jobs: batches of at most `batch_size` of the images `numbers`.

    To a joint perturbation each image is a set of its own, so that no value depends on the batches.
    """
    size = 1 if cell.perturbation.joint else batch_size
    for start in range(0, len(numbers), size):
        yield Job(cell, numbers[start : start + size])


def compute(
    job: Job, task: Task, images: Tensor, *, seed: int, meter: Meter, unit: Callable[[Codec], float] | None = None
) -> Iterator[Measured]:
    """Perturb a batch, and yield the outcome of each VAE and each variant of the task.

    How far the latents moved is no matter of the variants: it is in the records of the first one, by its own name.

    Args:
        job: the cell and the numbers of its images.
        task: what is done with the images, and measured.
        images: all images, `[n,3,H,W]` in [-1,1], on the CPU.
        seed: with an image's number, it fixes the attack's start and the noise of that image.
        meter: shows the current title and advances by the job's cost.
        unit: returns the usual distance of two images' latents, in which `latent-travel` is measured; None to leave that
            metric out.

    Raises:
        UserError: if a VAE returns values that are not finite.
    """
    title = f"{job.cell.title}: {images_of(job.batch, len(images))}"
    with meter.stage(title, job.cost(task.passes)):
        yield from _compute(job, task, images, seed=seed, meter=meter, unit=unit)


def _compute(
    job: Job, task: Task, images: Tensor, *, seed: int, meter: Meter, unit: Callable[[Codec], float] | None
) -> Iterator[Measured]:
    cell, numbers = job.cell, job.batch
    clean = on_device(images[numbers], cell.source.device)
    attackers_draws = purifying_generators(seed, numbers, attacked=True)
    with _finite_outputs(cell.source) as finite, cell.source.drawing(attackers_draws):
        shown = cell.perturbation.apply(cell.source, clean, image_generators(seed, numbers))
    if not all(finite):  # the attack would be weaker than its name says
        raise _not_finite(job, cell.source, numbers)
    for codec, variant in product(cell.judged, task.variants):
        meter.say(f"{codec.name} judged, {attempted(cell.title, variant)}: {images_of(numbers, len(images))}")
        # Freeze the encoder: convolution kernels depend on whether weights require gradients, and inference has none.
        draws = purifying_generators(seed, numbers)
        with torch.no_grad(), frozen(codec.encoder), codec.drawing(draws):
            outcome = task.attempt(cell, codec, shown, numbers, variant)
            _check_finite(outcome, job, codec)
            values = task.measure(cell, codec, outcome, numbers, variant)
            for value in values.values():
                _check_finite(value[:, None], job, codec)
        records = _labelled(cell, codec, numbers, values, variant)
        if variant == task.variants[0] and cell.perturbation.name != CLEAN.name:
            own_unit = None if unit is None else unit(codec)
            records += _labelled(cell, codec, numbers, _motion(job, task, codec, clean, shown, own_unit, seed))
        yield Measured(codec, variant, outcome, records)


def _labelled(
    cell: Cell, codec: Codec, numbers: Sequence[int], values: Mapping[str, Tensor], variant: str = ""
) -> list[Record]:
    """Return one record per image, metric and threat model of the cell's results."""
    named = replace(cell.perturbation, name=attempted(cell.perturbation.name, variant))
    return [
        record
        for threat_model in cell.threat_models[codec.name]
        for record in to_records(codec.name, named, threat_model, numbers, values)
    ]


@torch.no_grad()
def _motion(
    job: Job, task: Task, codec: Codec, clean: Tensor, shown: Tensor, unit: float | None, seed: int
) -> dict[str, Tensor]:
    """Return how far the latents of `codec` moved, of the wanted `MOTION_METRICS`, `[N]` each."""
    wanted = [name for name in MOTION_METRICS if name in task.metrics.names]
    find_goal = job.cell.perturbation.goal if SHARE in wanted else None  # a pipeline may have to draw the target
    draws = partial(purifying_generators, seed, job.batch)
    with frozen(codec.encoder), codec.drawing(draws()):
        goal = None if find_goal is None else find_goal(codec, clean, image_generators(seed, job.batch))
        return motion(codec, clean, shown, wanted=wanted, unit=unit, goal=goal, draws=draws)


def measure(
    codecs: Sequence[Codec],
    perturbations: Sequence[Perturbation],
    task: Task,
    images: Tensor,
    *,
    numbers: Sequence[int],
    seed: int,
    batch_size: int,
    title: str | None = None,
) -> list[Record]:
    """Return the values of some images, with attacks made on each VAE itself; store nothing on the disk.

    Args:
        codecs: the VAEs, which may be compiled.
        perturbations: what is done to the images first.
        task: what is done with the images, and measured.
        images: all images, `[n,3,H,W]` in [-1,1], on the CPU.
        numbers: of the images to measure.
        seed: with an image's number, it fixes the attack's start and the noise of that image.
        batch_size: images attacked at a time.
        title: of the progress bar; None for no bar.

    Raises:
        UserError: if a VAE returns values that are not finite.
    """
    total = len(numbers) * sum((each.passes + task.passes) * len(codecs) for each in perturbations)
    with progress_bar(round(total), desc=title or "", unit="pass", disable=title is None) as bar:
        meter = Meter(bar)
        watched = [meter.watched(codec) for codec in codecs]
        cells = chain.from_iterable(cells_of(perturbation, watched) for perturbation in perturbations)
        jobs = chain.from_iterable(batched(cell, numbers, batch_size) for cell in cells)
        computed = chain.from_iterable(compute(job, task, images, seed=seed, meter=meter) for job in jobs)
        return [record for measured in computed for record in measured.records]


def attempted(perturbation: str, variant: str) -> str:
    """Return how results name a perturbation and a variant of the task."""
    return f"{perturbation}, {variant}" if variant else perturbation


@contextmanager
def _finite_outputs(codec: Codec) -> Iterator[list[Tensor]]:
    """Within, list after each call of `codec` whether its output is finite, without waiting for the device."""
    finite: list[Tensor] = []
    hooks = [
        part.register_forward_hook(lambda module, inputs, output: finite.append(output.detach().isfinite().all()))
        for part in (codec.encoder, codec.decoder)
    ]
    try:
        yield finite
    finally:
        for hook in hooks:
            hook.remove()


def _check_finite(values: Tensor, job: Job, codec: Codec) -> None:
    """Raise a UserError unless all values `[N,...]` of the job's images are finite."""
    finite = values.isfinite().flatten(1).all(dim=1).tolist()
    if not all(finite):
        raise _not_finite(job, codec, [number for number, good in zip(job.batch, finite, strict=True) if not good])


def _not_finite(job: Job, codec: Codec, numbers: Sequence[int]) -> UserError:
    return UserError(
        f"{codec.name} returns values that are not finite for the images {', '.join(map(str, numbers))} under "
        f"{job.cell.title}, so their mean is undefined; use full precision or bf16"
    )
