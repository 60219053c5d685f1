"""A comparison of any number of VAEs under any number of attacks, in cells that a crash does not undo."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from srl_utils.attacks.draws import image_generators
from srl_utils.console import progress_bar
from srl_utils.errors import UnusableFile, UserError
from srl_utils.evaluation.metering import Meter, images_of
from srl_utils.evaluation.perturbations import Perturbation
from srl_utils.evaluation.results import Record, to_records, to_rows
from srl_utils.evaluation.tasks.base import Cell, Task
from srl_utils.files import read_json, write_atomically, write_text_atomically
from srl_utils.metrics.features import SET_METRICS
from srl_utils.metrics.losses import ReconstructionLoss
from srl_utils.vae.codec import Codec

TRANSFER, ADAPTIVE, NO_THREAT = "transfer", "adaptive", "none"
THREAT_MODELS = (TRANSFER, ADAPTIVE)


@dataclass(frozen=True)
class Job:
    """A batch of one cell, the numbers of its images."""

    cell: Cell
    batch: Sequence[int]

    def cost(self, passes: float) -> int:
        """In passes through a VAE, about, where one of them takes `passes` for its task."""
        return round(len(self.batch) * (self.cell.perturbation.passes + passes * len(self.cell.judged)))


@dataclass(frozen=True, kw_only=True)
class Study:
    """Args:
    accelerator: each of its processes takes its share of the images.
    codecs: the VAEs by name, the baseline first: transferred attacks are made on it, drift is measured from it.
    perturbations: what is done to the images.
    threat_models: `transfer`, attacks made on the baseline; `adaptive`, made on the VAE under judgement.
    task: what is done with the images, and measured.
    images: all of them, `[n,3,H,W]` in [-1,1], on the CPU.
    output_dir: gets `cells/`, from which an interrupted study goes on; all processes have to see it.
    fingerprint: what the cells' values depend on beyond their keys; another one is refused.
    seed: of the attacks' starts and of the noise.
    batch_size: images attacked at a time by each process.
    """

    accelerator: Accelerator
    codecs: Sequence[Codec]
    perturbations: Sequence[Perturbation]
    threat_models: Sequence[str]
    task: Task
    images: Tensor
    output_dir: Path
    fingerprint: dict[str, Any]
    seed: int
    batch_size: int

    @property
    def baseline(self) -> Codec:
        return self.codecs[0]

    def run(self) -> list[Record]:
        """Computes the batches that are not there yet; returns the values of all cells, image by image.

        Raises:
            UserError: if `output_dir` holds cells of another study, or if a VAE returns values that are not finite.
        """
        self._check_fingerprint()
        missing = [job for cell in self.cells() for job in self._missing(cell)]
        self.accelerator.wait_for_everyone()  # before any process writes what another looks for
        own = missing[self.accelerator.process_index :: self.accelerator.num_processes]
        costs = [job.cost(self.task.passes) for job in own]
        shown = self.accelerator.is_local_main_process
        with (
            progress_bar(sum(costs), desc="evaluation", unit="pass", disable=not shown) as bar,
            self.watched(bar) as meter,
        ):
            for job, cost in zip(own, costs, strict=True):
                with meter.stage(f"{job.cell.title}: {images_of(job.batch, len(self.images))}", cost):
                    self._compute(job, meter)
        self.accelerator.wait_for_everyone()
        return [record for cell in self.cells() for record in self._read(cell)]

    def cells(self) -> Iterator[Cell]:
        """In the order of the perturbations."""
        for perturbation in self.perturbations:
            yield from self._cells_of(perturbation)

    @contextmanager
    def watched(self, bar: tqdm) -> Iterator[Meter]:
        """Within, the work of all VAEs and of the task's denoiser moves `bar`."""
        meter = Meter(bar)
        with meter.watching(self.codecs, self.task.denoiser):
            yield meter

    def rows(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Means with intervals in the project's row format, and what has one value for all images and no interval."""
        rows = to_rows(records)
        if self.task.metrics.features is not None:
            cells = list(self.cells())
            with progress_bar(len(cells), desc="distances of sets", unit="set") as bar:  # a FID takes seconds
                for cell in cells:
                    bar.set_description_str(f"distances of sets, {cell.title}", refresh=False)
                    rows += self._set_rows(cell)
                    bar.update()
        return rows

    def _cells_of(self, perturbation: Perturbation) -> Iterator[Cell]:
        everyone = tuple(self.codecs)
        if not perturbation.adversarial:
            yield Cell(perturbation, self.baseline, everyone, {codec.name: (NO_THREAT,) for codec in everyone})
            return
        # On the baseline itself the two threat models are one and the same.
        labels = {self.baseline.name: tuple(self.threat_models)}
        if TRANSFER in self.threat_models:
            labels |= {codec.name: (TRANSFER,) for codec in everyone[1:]}
        yield Cell(perturbation, self.baseline, tuple(codec for codec in everyone if codec.name in labels), labels)
        if ADAPTIVE in self.threat_models:
            for codec in everyone[1:]:
                if codec.name not in perturbation.impossible_on:
                    yield Cell(perturbation, codec, (codec,), {codec.name: (ADAPTIVE,)})

    def _missing(self, cell: Cell) -> Iterator[Job]:
        """Batches of the images without values; they do not depend on the number of processes."""
        done = {record.index for record in self._read(cell)}
        numbers = [number for number in range(len(self.images)) if number not in done]
        for start in range(0, len(numbers), self.batch_size):
            yield Job(cell, numbers[start : start + self.batch_size])

    def _compute(self, job: Job, meter: Meter) -> None:
        cell, numbers = job.cell, job.batch
        clean = self.images[numbers].to(self.accelerator.device, memory_format=torch.channels_last)
        with _watched(cell.source) as finite:
            shown = cell.perturbation.apply(
                cell.source, ReconstructionLoss(), clean, image_generators(self.seed, numbers)
            )
        if not all(finite):  # such an attack would be weaker than it claims
            raise _not_finite(job, cell.source, numbers)
        records: list[Record] = []
        features: dict[str, Tensor] = {}
        for codec, variant in product(cell.judged, self.task.variants):
            made = attempted(cell.title, variant)
            meter.say(f"{codec.name} judged, {made}: {images_of(numbers, len(self.images))}")
            with torch.no_grad():
                outcome = self.task.attempt(cell, codec, shown, numbers, variant)
                _check_finite(outcome, job, codec)
                values = self.task.measure(cell, codec, outcome, numbers, variant)
                for value in values.values():
                    _check_finite(value[:, None], job, codec)
            named = replace(cell.perturbation, name=attempted(cell.perturbation.name, variant))
            for threat_model in cell.threat_models[codec.name]:
                records += to_records(codec.name, named, threat_model, numbers, values)
            features |= self._features(outcome, f"{codec.name}/{variant}/")
        self._write(job, records, features)

    def _features(self, images: Tensor, prefix: str = "") -> dict[str, Tensor]:
        """Of the network for distances of sets, by layer, on the CPU; nothing where no metric wants them."""
        if self.task.metrics.features is None:
            return {}
        return {prefix + layer: value.cpu() for layer, value in self.task.metrics.features.features(images).items()}

    # --- what is kept ---

    def _folder(self, cell: Cell) -> Path:
        """Numbers instead of names: any two VAEs or budgets have two folders, whatever they are called."""
        made_on = f"-on-{self.codecs.index(cell.source)}" if cell.perturbation.adversarial else ""
        return self.output_dir / "cells" / f"{cell.perturbation.name}-{cell.perturbation.epsilon!r}{made_on}"

    def _write(self, job: Job, records: Sequence[Record], features: dict[str, Tensor]) -> None:
        """The values last: their file says that the batch is complete."""
        path = self._folder(job.cell) / f"{job.batch[0]:06d}.json"
        if features:
            write_atomically(path.with_suffix(".safetensors"), lambda aside: save_file(features, aside))
        write_text_atomically(path, json.dumps(records) + "\n")

    def _batches(self, cell: Cell) -> list[Path]:
        return sorted(self._folder(cell).glob("*.json"))

    def _read(self, cell: Cell) -> list[Record]:
        records = chain.from_iterable(map(read_json, self._batches(cell)))
        return sorted(
            (Record(*record) for record in records),
            key=lambda record: (record.vae, record.threat_model, record.metric, record.index),
        )

    def _set_rows(self, cell: Cell) -> Iterator[dict[str, Any]]:
        batches = list(map(_features_beside, self._batches(cell)))
        for codec, variant in product(cell.judged, self.task.variants):
            real = self._reference_features[variant]
            shown = {
                layer: torch.cat([batch[f"{codec.name}/{variant}/{layer}"] for batch in batches]) for layer in real
            }
            for metric in (name for name in SET_METRICS if name in self.task.metrics.names):
                value = SET_METRICS[metric].value(real, shown)
                for threat_model in cell.threat_models[codec.name]:
                    yield {
                        "vae": codec.name,
                        "attack": attempted(cell.perturbation.name, variant),
                        "threat_model": threat_model,
                        "epsilon": cell.perturbation.epsilon,
                        "metric": metric,
                        "value": value,
                        "ci95": None,
                        "n": len(self.images),
                    }

    @cached_property
    def _reference_features(self) -> dict[str, dict[str, Tensor]]:
        """Of the images that all outcomes are held against, by variant and layer."""
        return {variant: self._features_of_references(variant) for variant in self.task.variants}

    def _features_of_references(self, variant: str) -> dict[str, Tensor]:
        numbers = list(range(len(self.images)))
        parts = [numbers[start : start + self.batch_size] for start in range(0, len(numbers), self.batch_size)]
        references = (self.task.reference(self.baseline, part, variant) for part in parts)
        batches = [self._features(images.to(self.accelerator.device)) for images in references]
        return {layer: torch.cat([batch[layer] for batch in batches]) for layer in batches[0]}

    def _check_fingerprint(self) -> None:
        path = self.output_dir / "study.json"
        text = json.dumps(self.fingerprint, indent=1) + "\n"
        stored = read_json(path) if path.exists() else None
        if stored is not None and stored != json.loads(text):
            changed = sorted(
                key for key in stored.keys() | self.fingerprint if stored.get(key) != self.fingerprint.get(key)
            )
            raise UserError(
                f"{self.output_dir} holds an evaluation with other settings ({', '.join(changed)}); choose another "
                "--output_dir"
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_text_atomically(path, text)


def attempted(perturbation: str, variant: str) -> str:
    """How results name what was done to the images and then with them."""
    return f"{perturbation}, {variant}" if variant else perturbation


def _features_beside(path: Path) -> dict[str, Tensor]:
    """Of a batch whose values are in `path`."""
    features = path.with_suffix(".safetensors")
    try:
        return load_file(features)
    except (OSError, SafetensorError):
        raise UnusableFile(f"{features} is damaged; remove {path}, and the same command makes both again") from None


@contextmanager
def _watched(codec: Codec) -> Iterator[list[Tensor]]:
    """Within, each pass through `codec` adds whether all it returns is finite; nothing waits for the device."""
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
    """Values `[N,...]`, a row for each image of the job."""
    finite = values.isfinite().flatten(1).all(dim=1).tolist()
    if not all(finite):
        raise _not_finite(job, codec, [number for number, good in zip(job.batch, finite, strict=True) if not good])


def _not_finite(job: Job, codec: Codec, numbers: Sequence[int]) -> UserError:
    return UserError(
        f"{codec.name} returns values that are not finite for the images {', '.join(map(str, numbers))} under "
        f"{job.cell.title}; a mean over the rest would say nothing. Try --mixed_precision no or bf16"
    )
