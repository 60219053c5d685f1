"""A comparison of any number of VAEs under any number of attacks, in cells that a crash does not undo."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from srl_utils.checkpoints import write_atomically, write_text_atomically
from srl_utils.codecs import Codec
from srl_utils.errors import UserError
from srl_utils.evaluation.reconstruction import (
    Perturbation,
    Record,
    drift,
    image_generators,
    measure,
    to_records,
    to_rows,
)
from srl_utils.losses import PerceptualDistance, ReconstructionLoss
from srl_utils.set_metrics import InceptionFeatures, frechet_distance

TRANSFER, ADAPTIVE, NO_THREAT = "transfer", "adaptive", "none"
THREAT_MODELS = (TRANSFER, ADAPTIVE)
LONGEST_NAME = 150  # characters


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What is measured: PSNR and SSIM always, the others where their networks are given.

    A name of `names` that is missing here could not be had; whoever built this has said so.
    """

    names: Sequence[str]
    perceptual: PerceptualDistance | None = None
    inception: InceptionFeatures | None = None


@dataclass(frozen=True)
class Cell:
    """One perturbation, made on one VAE, shown to the VAEs that this tells something about."""

    perturbation: Perturbation
    source: Codec
    judged: tuple[Codec, ...]
    threat_models: dict[str, tuple[str, ...]]
    """Under which threat models the results of each VAE count."""

    @property
    def key(self) -> str:
        made_on = f"-on-{self.source.name}" if self.perturbation.adversarial else ""
        return file_name(f"{self.perturbation.name}-{self.perturbation.epsilon:.5f}{made_on}")


def file_name(text: str) -> str:
    """A name for a file that is another one for each other text, and `text` itself where that is harmless."""
    harmless = re.sub(r"[^a-zA-Z0-9.-]+", "_", text)[:LONGEST_NAME]
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return text if harmless == text else f"{harmless}-{digest}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """Args:
    accelerator: each of its processes takes its share of the images.
    codecs: the VAEs by name, the baseline first: transferred attacks are made on it, drift is measured from it.
    perturbations: what is done to the images.
    threat_models: `transfer`, attacks made on the baseline; `adaptive`, made on the VAE under judgement.
    metrics: what is measured.
    images: all of them, `[n,3,H,W]` in [-1,1], on the CPU.
    output_dir: gets `cells/`, from which an interrupted study goes on.
    fingerprint: what the cells' values depend on beyond their keys; another one is refused.
    seed: of the attacks' starts and of the noise.
    batch_size: images attacked at a time by each process.
    """

    accelerator: Accelerator
    codecs: Sequence[Codec]
    perturbations: Sequence[Perturbation]
    threat_models: Sequence[str]
    metrics: Metrics
    images: Tensor
    output_dir: Path
    fingerprint: dict[str, Any]
    seed: int
    batch_size: int

    @property
    def baseline(self) -> Codec:
        return self.codecs[0]

    def run(self) -> list[Record]:
        """Computes the cells that are not there yet; returns the values of all of them, image by image.

        Raises:
            UserError: if `output_dir` holds cells of another study.
        """
        self._check_fingerprint()
        cells = list(self.cells())
        missing = [cell for cell in cells if not self._path(cell).exists()]
        self.accelerator.wait_for_everyone()  # before any process writes what another looks for
        with tqdm(
            total=sum(self._cost(cell) for cell in missing),
            desc="passes",
            unit="",
            disable=not self.accelerator.is_local_main_process,
        ) as bar:
            for cell in missing:
                bar.set_postfix_str(cell.key)
                self._compute(cell, bar.update)
        self.accelerator.wait_for_everyone()
        return [record for cell in cells for record in self._read(cell)]

    def cells(self) -> Iterator[Cell]:
        """In the order of the perturbations."""
        for perturbation in self.perturbations:
            yield from self._cells_of(perturbation)

    def rows(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Means with intervals in the project's row format, and rFID, which has no value per image."""
        rows = to_rows(records)
        if self.metrics.inception is not None:
            rows += [row for cell in self.cells() for row in self._rfid(cell)]
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
                yield Cell(perturbation, codec, (codec,), {codec.name: (ADAPTIVE,)})

    def _compute(self, cell: Cell, advance: Callable[[int], object]) -> None:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        numbers = range(rank, len(self.images), world)
        records: list[Record] = []
        features: list[tuple[str, int, np.ndarray]] = []
        for start in range(0, len(numbers), self.batch_size):
            batch = numbers[start : start + self.batch_size]
            clean = self.images[list(batch)].to(self.accelerator.device, memory_format=torch.channels_last)
            shown = cell.perturbation.apply(
                cell.source, ReconstructionLoss(), clean, image_generators(self.seed, batch)
            )
            for codec in cell.judged:
                values, pooled = self._judge(codec, cell, shown, clean)
                for threat_model in cell.threat_models[codec.name]:
                    records += to_records(codec.name, cell.perturbation, threat_model, batch, values)
                features += [(codec.name, number, row) for number, row in zip(batch, pooled, strict=False)]
            advance(self._cost_of(cell, len(batch)) * world)
        records = [Record(*record) for record in gather_object(records)]
        features = gather_object(features)
        if self.accelerator.is_main_process:
            self._write(cell, records, features)
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _judge(
        self, codec: Codec, cell: Cell, shown: Tensor, clean: Tensor
    ) -> tuple[dict[str, Tensor], np.ndarray | tuple[()]]:
        """Values per image, and the Inception features `[N,2048]` where rFID is asked for."""
        reconstruction = codec.reconstruct(shown)
        values = measure(reconstruction, clean, self.metrics.perceptual)
        if cell.perturbation.name == "clean":
            values["drift"] = drift(codec, self.baseline, clean)
        values = {name: value for name, value in values.items() if name in self.metrics.names}
        if self.metrics.inception is None:
            return values, ()
        return values, self.metrics.inception.features(reconstruction)["pool"].cpu().numpy()

    # --- what is kept ---

    def _path(self, cell: Cell) -> Path:
        return self.output_dir / "cells" / f"{cell.key}.json"

    def _write(self, cell: Cell, records: Sequence[Record], features: Sequence[tuple[str, int, np.ndarray]]) -> None:
        """The values last: their file says that the cell is complete."""
        if features:
            by_vae = {
                codec.name: np.stack([row for name, _, row in sorted(features, key=_place) if name == codec.name])
                for codec in cell.judged
            }
            write_atomically(self._path(cell).with_suffix(".npz"), lambda aside: _save_arrays(aside, by_vae))
        ordered = sorted(records, key=lambda record: (record.vae, record.threat_model, record.metric, record.index))
        write_text_atomically(self._path(cell), json.dumps(ordered) + "\n")

    def _read(self, cell: Cell) -> list[Record]:
        return [Record(*record) for record in json.loads(self._path(cell).read_text())]

    def _rfid(self, cell: Cell) -> Iterator[dict[str, Any]]:
        real = self._clean_features()
        with np.load(self._path(cell).with_suffix(".npz")) as features:
            for codec in cell.judged:
                value = frechet_distance(real, torch.from_numpy(features[codec.name]))
                for threat_model in cell.threat_models[codec.name]:
                    yield {
                        "vae": codec.name,
                        "attack": cell.perturbation.name,
                        "threat_model": threat_model,
                        "epsilon": cell.perturbation.epsilon,
                        "metric": "rfid",
                        "value": value,
                        "ci95": None,
                        "n": len(real),
                    }

    def _clean_features(self) -> Tensor:
        """Of the images themselves, `[n,2048]`."""
        path = self.output_dir / "cells" / "images.npz"
        if not path.exists():
            batches = self.images.split(self.batch_size)
            pooled = [self.metrics.inception.features(batch.to(self.accelerator.device))["pool"].cpu() for batch in batches]
            write_atomically(path, lambda aside: _save_arrays(aside, {"images": torch.cat(pooled).numpy()}))
        with np.load(path) as stored:
            return torch.from_numpy(stored["images"])

    def _check_fingerprint(self) -> None:
        path = self.output_dir / "study.json"
        text = json.dumps(self.fingerprint, indent=1) + "\n"
        if path.exists() and json.loads(path.read_text()) != json.loads(text):
            stored = json.loads(path.read_text())
            changed = sorted(key for key in stored.keys() | self.fingerprint if stored.get(key) != self.fingerprint.get(key))
            raise UserError(
                f"{self.output_dir} holds an evaluation with other settings ({', '.join(changed)}); choose another "
                "--output_dir"
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_text_atomically(path, text)

    # --- what it costs ---

    def _cost(self, cell: Cell) -> int:
        return self._cost_of(cell, len(self.images))

    def _cost_of(self, cell: Cell, images: int) -> int:
        return images * (cell.perturbation.passes + len(cell.judged))


def _place(feature: tuple[str, int, np.ndarray]) -> tuple[str, int]:
    return feature[:2]


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:  # numpy would add a suffix to a name
        np.savez(file, **arrays)
