"""Measure the geometry of VAEs part by part; finished parts are stored, so that an interrupted study continues from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from srl_utils.attacks.draws import image_generators
from srl_utils.console import progress_bar
from srl_utils.errors import UserError
from srl_utils.evaluation.metering import Meter, images_of
from srl_utils.evaluation.perturbations import Perturbation
from srl_utils.evaluation.results import Record
from srl_utils.evaluation.study import check_fingerprint
from srl_utils.evaluation.tasks.geometry import Batch, Found, Part
from srl_utils.files import kept_images, read_json, save_tensors, write_atomically, write_text_atomically
from srl_utils.vae.codec import Codec

ATTACKED = "attacked"
"""Folder of the attacked images, which several parts look at."""


@dataclass(frozen=True)
class Job:
    """A batch of images, the VAE that is looked at, and the parts that are not stored yet."""

    codec: Codec
    numbers: Sequence[int]
    missing: Sequence[Part]


@dataclass(frozen=True, kw_only=True)
class GeometryStudy:
    """A comparison of the geometry of VAEs.

    Args:
        accelerator: divides the batches among its processes.
        codecs: the VAEs, the baseline first.
        attack: made on each VAE itself, for the parts that look at attacked images.
        parts: what is measured.
        images: all images, `[n,3,H,W]` in [-1,1], on the CPU.
        output_dir: gets `parts/` with the values; all processes must see it.
        fingerprint: what all values depend on beyond VAE, part and image. A folder with another one is refused.
        own_fingerprints: what the values of single parts depend on as well, by the part's name, or `ATTACKED` for those
            that look at attacked images.
        seed: fixes the attacks' starts and all other draws.
        batch_size: images looked at together by each process.
    """

    accelerator: Accelerator
    codecs: Sequence[Codec]
    attack: Perturbation
    parts: Sequence[Part]
    images: Tensor
    output_dir: Path
    fingerprint: Mapping[str, Any]
    own_fingerprints: Mapping[str, Mapping[str, Any]]
    seed: int
    batch_size: int

    @property
    def passes(self) -> float:
        """Return the cost of the study, in passes through encoder and decoder."""
        return sum(self._cost(job) for job in self._jobs(self.parts))

    def run(self) -> list[Record]:
        """Measure what is not stored yet; return the values of all images.

        Raises:
            UserError: if `output_dir` holds another study, or if a VAE returns values that are not finite.
        """
        check_fingerprint(self.accelerator, self.output_dir, self.fingerprint)
        for name, fingerprint in self.own_fingerprints.items():
            check_fingerprint(self.accelerator, self.output_dir / "parts" / name, fingerprint)
        missing = [job for job in self._jobs() if job.missing]
        self.accelerator.wait_for_everyone()  # before a process stores parts that another one still looks for
        own = missing[self.accelerator.process_index :: self.accelerator.num_processes]
        total, shown = round(sum(map(self._cost, own))), self.accelerator.is_local_main_process
        with progress_bar(total, desc="geometry", unit="pass", disable=not shown) as bar:
            meter = Meter(bar)
            with meter.watching(self.codecs, None):
                for job in own:
                    self._compute(job, meter)
        self.accelerator.wait_for_everyone()
        return [record for part in self.parts for codec in self.codecs for record in self._records(part, codec)]

    def tensors(self, part: Part, codec: Codec) -> dict[str, Tensor]:
        """Return what a finished part kept of a VAE, of all images; empty if it keeps nothing."""
        files = [self._file(part, codec, numbers).with_suffix(".safetensors") for numbers in self._batches()]
        kept = [load_file(file) for file in files if file.exists()]
        return {name: torch.cat([each[name] for each in kept]) for name in (kept[0] if kept else ())}

    def _jobs(self, parts: Sequence[Part] | None = None) -> Iterator[Job]:
        """Yield a job for each VAE and batch, with these parts, or by default with those that are not stored."""
        for codec in self.codecs:
            for numbers in self._batches():
                unstored = [part for part in self.parts if not self._file(part, codec, numbers).exists()]
                yield Job(codec, numbers, unstored if parts is None else parts)

    def _batches(self) -> list[range]:
        count = len(self.images)
        return [range(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)]

    def _file(self, part: Part, codec: Codec, numbers: Sequence[int]) -> Path:
        """Return the file with a batch's values; VAEs appear by their numbers, as names may have any character."""
        return self._folder(part.name, codec) / f"{numbers[0]:06d}.json"

    def _folder(self, name: str, codec: Codec) -> Path:
        return self.output_dir / "parts" / f"{name}-{self.codecs.index(codec)}"

    def _cost(self, job: Job) -> float:
        attacked = any(part.uses_attack for part in job.missing)
        attack = len(job.numbers) * self.attack.passes if attacked else 0.0
        return attack + sum(part.cost(job.numbers) for part in job.missing)

    def _compute(self, job: Job, meter: Meter) -> None:
        """Measure the parts of one job and store each."""
        codec, numbers = job.codec, list(job.numbers)
        clean = self.images[numbers].to(codec.device)
        attacked, place = clean, images_of(numbers, len(self.images))
        if any(part.uses_attack for part in job.missing):
            with meter.stage(f"{codec.name}, {self.attack.name}: {place}", len(numbers) * self.attack.passes):
                attacked = self._attacked(codec, clean, numbers)
        following = self.images[[(number + 1) % len(self.images) for number in numbers]].to(codec.device)
        batch = Batch(codec=codec, numbers=numbers, clean=clean, following=following, attacked=attacked, seed=self.seed)
        for part in job.missing:
            with meter.stage(f"{codec.name}, {part.name}: {place}", part.cost(numbers)):
                found = part.measure(batch)
            self._write(self._file(part, codec, numbers), codec, part, found)

    def _attacked(self, codec: Codec, clean: Tensor, numbers: Sequence[int]) -> Tensor:
        """Return the attacked images of a batch, stored or made."""
        path = self._folder(ATTACKED, codec) / f"{numbers[0]:06d}.safetensors"
        make = lambda: self.attack.apply(codec, clean, image_generators(self.seed, numbers)).cpu()  # noqa: E731
        return kept_images(path, make).to(codec.device)

    def _write(self, path: Path, codec: Codec, part: Part, found: Found) -> None:
        """Store a batch of a part; write the values last, because their file marks the batch as complete."""
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in found.tensors.items()}
        values = torch.tensor([record.value for record in found.records])
        if not all(bool(tensor.isfinite().all()) for tensor in (values, *kept.values())):
            raise UserError(
                f"{codec.name} returns values that are not finite in the part {part.name}, from image "
                f"{int(path.stem)} on, so their mean is undefined"
            )
        if kept:
            write_atomically(path.with_suffix(".safetensors"), lambda aside: save_tensors(kept, aside))
        write_text_atomically(path, json.dumps(found.records) + "\n")

    def _records(self, part: Part, codec: Codec) -> list[Record]:
        files = [self._file(part, codec, numbers) for numbers in self._batches()]
        stored = [Record.from_json(fields) for file in files for fields in read_json(file)]
        return stored + part.conclude(codec, self.tensors(part, codec))
