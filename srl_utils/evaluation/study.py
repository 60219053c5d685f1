"""Compare VAEs under attacks; finished cells are stored, so that an interrupted study continues from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from srl_utils.console import progress_bar
from srl_utils.errors import UnusableFile, UserError
from srl_utils.evaluation.cells import Job, attempted, batched, cells_of, compute
from srl_utils.evaluation.metering import Meter
from srl_utils.evaluation.motion import TRAVEL, USE, codebook_use, usual_distance
from srl_utils.evaluation.perturbations import ADAPTIVE, CLEAN, NO_THREAT, TRANSFER, Perturbation
from srl_utils.evaluation.results import Record, Row, Setting, to_row, to_rows
from srl_utils.evaluation.tasks.base import Cell, Task
from srl_utils.files import read_json, save_tensors, write_atomically, write_text_atomically
from srl_utils.images.pixels import frames_of
from srl_utils.metrics.features import SET_METRICS, changes_of_clips
from srl_utils.vae.codec import Codec

THREAT_MODELS = (TRANSFER, ADAPTIVE)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison of VAEs under attacks.

    Args:
        accelerator: divides the batches among its processes.
        codecs: the VAEs, the baseline first; transferred attacks are made on it, and drift is measured from it.
        perturbations: what is done to the images first.
        threat_models: `transfer`, attacks made on the baseline; `adaptive`, attacks made on the evaluated VAE itself.
        task: what is done with the images, and measured.
        images: all images, `[n,3,H,W]` in [-1,1], on the CPU.
        output_dir: gets `cells/` with the values; all processes must see it.
        fingerprint: what the values depend on beyond VAE, perturbation and image. A folder with another fingerprint
            is refused.
        seed: fixes the attacks' starts and the noise.
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
        """Return the VAE with which the others are compared."""
        return self.codecs[0]

    @property
    def undefended(self) -> list[Codec]:
        """Return the VAEs alone, without those behind purifiers."""
        return [codec for codec in self.codecs if codec.bare is codec]

    def run(self) -> list[Record]:
        """Compute the batches that are not stored yet; return the values of all images in all cells.

        Raises:
            UserError: if `output_dir` holds another study, or if a VAE returns values that are not finite.
        """
        check_fingerprint(self.accelerator, self.output_dir, self.fingerprint)
        missing = [job for cell in self.cells() for job in self._missing(cell)]
        self.accelerator.wait_for_everyone()  # before a process stores batches that another one still looks for
        own = missing[self.accelerator.process_index :: self.accelerator.num_processes]
        total = sum(job.cost(self.task.passes) for job in own)
        shown = self.accelerator.is_local_main_process
        with (
            progress_bar(total, desc="evaluation", unit="pass", disable=not shown) as bar,
            self.watched(bar) as meter,
        ):
            for job in own:
                self._compute(job, meter)
        self.accelerator.wait_for_everyone()
        return [record for cell in self.cells() for record in self._read(cell)]

    def cells(self) -> Iterator[Cell]:
        """Yield all cells in the order of the perturbations."""
        for perturbation in self.perturbations:
            yield from cells_of(perturbation, self.codecs, self.threat_models)

    @contextmanager
    def watched(self, bar: tqdm) -> Iterator[Meter]:
        """Within, each call of a VAE or of the task's denoiser moves `bar`."""
        meter = Meter(bar)
        with meter.watching(self.codecs, self.task.denoiser):
            yield meter

    def rows(self, records: Sequence[Record]) -> list[Row]:
        """Return the means with their intervals, and the metrics of whole sets of images, which have no interval."""
        rows = to_rows(records)
        if USE in self.task.metrics.names:
            rows += self._use_rows()
        if self.task.metrics.features is not None:
            cells = list(self.cells())
            with progress_bar(len(cells), desc="metrics of sets", unit="set") as bar:  # one FID takes seconds
                for cell in cells:
                    bar.set_description_str(f"metrics of sets, {cell.title}", refresh=False)
                    rows += self._set_rows(cell)
                    bar.update()
        return rows

    def _use_rows(self) -> Iterator[Row]:
        """Yield the share of the codes that clean images use, of each VAE alone with a codebook."""
        setting = Setting(CLEAN.name, None, NO_THREAT, 0.0, USE)
        for codec in self.undefended:
            share = codebook_use(codec, self.images, self.batch_size)
            if share is not None:
                yield to_row(codec.name, setting, share, n=len(self.images))

    def _missing(self, cell: Cell) -> Iterator[Job]:
        """Yield batches of the images without stored values, independent of the number of processes."""
        done = {record.index for record in self._read(cell)}
        numbers = [number for number in range(len(self.images)) if number not in done]
        yield from batched(cell, numbers, self.batch_size)

    def _compute(self, job: Job, meter: Meter) -> None:
        """Compute one batch and store its values, and its features if a metric of whole sets is wanted."""
        records: list[Record] = []
        features: dict[str, Tensor] = {}
        for measured in compute(job, self.task, self.images, seed=self.seed, meter=meter, unit=self._unit):
            records += measured.records
            features |= self._features(measured.outcome, f"{measured.codec.name}/{measured.variant}/")
        self._write(job, records, features)

    @cached_property
    def _unit(self) -> Callable[[Codec], float] | None:
        """Return a function that returns the usual distance of two images' latents, computed once for each VAE."""
        if TRAVEL not in self.task.metrics.names:
            return None
        units = {codec.name: usual_distance(codec, self.images, self.batch_size) for codec in self.undefended}
        return lambda codec: units[codec.bare.name]

    def _features(self, images: Tensor, prefix: str = "") -> dict[str, Tensor]:
        """Return the features of images, or of clips' frames, by layer, on the CPU; empty if no metric of sets is wanted."""
        if self.task.metrics.features is None:
            return {}
        layers = self.task.metrics.features.features(frames_of(images))
        if images.ndim == 5:
            layers["changes"] = changes_of_clips(layers["pool"], len(images))
        return {prefix + layer: value.cpu() for layer, value in layers.items()}

    # --- stored values ---

    def _folder(self, cell: Cell) -> Path:
        """Return the cell's folder; VAEs appear by their numbers, because names may contain any character."""
        made_on = f"-on-{self.codecs.index(cell.source)}" if cell.perturbation.adversarial else ""
        return self.output_dir / "cells" / f"{cell.perturbation.name}-{cell.perturbation.epsilon!r}{made_on}"

    def _write(self, job: Job, records: Sequence[Record], features: dict[str, Tensor]) -> None:
        """Store a batch; write the values last, because their file marks the batch as complete."""
        path = self._folder(job.cell) / f"{job.batch[0]:06d}.json"
        if features:
            write_atomically(path.with_suffix(".safetensors"), lambda aside: save_tensors(features, aside))
        write_text_atomically(path, json.dumps(records) + "\n")

    def _batches(self, cell: Cell) -> list[Path]:
        return sorted(self._folder(cell).glob("*.json"))

    def _read(self, cell: Cell) -> list[Record]:
        """Return the cell's stored values, sorted by VAE, threat model, metric and image."""
        records = chain.from_iterable(map(read_json, self._batches(cell)))
        return sorted(
            map(Record.from_json, records),
            key=lambda record: (record.vae, record.setting.threat_model, record.setting.metric, record.index),
        )

    def _set_rows(self, cell: Cell) -> Iterator[Row]:
        """Yield the metrics of whole sets for one cell, from its stored features."""
        batches = list(map(_features_beside, self._batches(cell)))
        for codec, variant in product(cell.judged, self.task.variants):
            real = self._reference_features[variant]
            shown = {
                layer: torch.cat([batch[f"{codec.name}/{variant}/{layer}"] for batch in batches]) for layer in real
            }
            for name, metric in SET_METRICS.items():
                if name not in self.task.metrics.names or metric.layer not in real:
                    continue
                value = metric.value(real[metric.layer], shown[metric.layer])
                done = (attempted(cell.perturbation.name, variant), cell.perturbation.objective)
                for threat_model in cell.threat_models[codec.name]:
                    setting = Setting(*done, threat_model, cell.perturbation.epsilon, name)
                    yield to_row(codec.name, setting, value, n=len(self.images))

    @cached_property
    def _reference_features(self) -> dict[str, dict[str, Tensor]]:
        """Return the features of the images that outcomes are compared with, by variant and layer."""
        return {variant: self._features_of_references(variant) for variant in self.task.variants}

    def _features_of_references(self, variant: str) -> dict[str, Tensor]:
        numbers = list(range(len(self.images)))
        parts = [numbers[start : start + self.batch_size] for start in range(0, len(numbers), self.batch_size)]
        references = (self.task.reference(self.baseline, part, variant) for part in parts)
        batches = [self._features(images.to(self.accelerator.device)) for images in references]
        return {layer: torch.cat([batch[layer] for batch in batches]) for layer in batches[0]}


def check_fingerprint(accelerator: Accelerator, output_dir: Path, fingerprint: Mapping[str, Any]) -> None:
    """Raise a UserError if `output_dir` holds an evaluation with another fingerprint; otherwise store it."""
    path = output_dir / "study.json"
    current = {**fingerprint, "records": list(Setting._fields)}  # older versions stored other fields
    text = json.dumps(current, indent=1) + "\n"
    wanted = json.loads(text)
    stored = read_json(path) if path.exists() else wanted
    # A flag that is not given counts as one that older versions did not have.
    changed = sorted(key for key in stored.keys() | wanted if stored.get(key) != wanted.get(key))
    if changed:
        raise UserError(
            f"{output_dir} holds an evaluation with other settings ({', '.join(changed)}); choose another folder",
            parameter="output_dir",
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_text_atomically(path, text)


def _features_beside(path: Path) -> dict[str, Tensor]:
    """Return the features of the batch whose values are in `path`.

    Raises:
        UnusableFile: an OSError, if their file is missing or damaged.
    """
    features = path.with_suffix(".safetensors")
    try:
        return load_file(features)
    except (OSError, SafetensorError):
        raise UnusableFile(
            f"{features} is damaged; remove {path} and run again, and both files are made again"
        ) from None
