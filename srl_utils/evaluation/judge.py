"""Validation during a training: the held-out images, shared out among the processes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor

from srl_utils.autoencoders import LatentEncoder
from srl_utils.checkpoints import read_json, write_text_atomically
from srl_utils.codecs import Codec
from srl_utils.evaluation.reconstruction import (
    CLEAN,
    Perturbation,
    Record,
    evaluate,
    noise,
    strong_attack,
    to_rows,
    usual_attack,
)
from srl_utils.evaluation.report import comparison_picture, comparison_table, reconstruction_picture, won_back
from srl_utils.losses import ReconstructionLoss

PICTURED = 8
COMPARISON = "comparison.png"


class Judge:
    """Measures the original VAE once and the fine-tuned one as often as asked, and writes what it finds.

    Args:
        accelerator: each of its processes measures its share of the images.
        original: the VAE as it was.
        current: the VAE as it is; the same objects throughout the training.
        loss: the objective of the attacks.
        images: `[n,3,H,W]` in [-1,1], held out from training.
        epsilon: of the attacks, units of a [0,1] image. They do not depend on how the training attacks, so that runs can
            be compared.
        output_dir: gets `results.json` and `samples/*.png`.
        seed: of the attacks' random starts and of the noise.
        batch_size: images attacked at a time by each process.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        original: Codec,
        current: Codec,
        loss: ReconstructionLoss,
        images: Tensor,
        epsilon: float,
        output_dir: Path,
        seed: int,
        batch_size: int,
    ) -> None:
        self.accelerator, self.original, self.current, self.loss = accelerator, original, current, loss
        self.images, self.output_dir, self.seed, self.batch_size = images, output_dir, seed, batch_size
        self.attack, self.strong_attack = usual_attack(epsilon), strong_attack(epsilon)
        self.noise = noise(epsilon)
        self.rows: list[dict[str, Any]] = []

    def begin(self, step: int) -> None:
        """Removes pictures that an earlier run, or this one after `step`, has drawn; they are drawn anew."""
        if self.accelerator.is_main_process:
            for picture in (self.output_dir / "samples").glob("step-*.png"):
                drawn = re.fullmatch(r"step-(\d+)\.png", picture.name)
                if drawn and (step == 0 or int(drawn[1]) > step):
                    picture.unlink()
            (self.output_dir / "samples" / COMPARISON).unlink(missing_ok=True)

    def judge_original(self, *, resumed: bool) -> None:
        """Measures the original VAE, unless a resumed run finds that done, on as many images, in `results.json`."""
        results = self.output_dir / "results.json"
        if resumed and results.exists():
            self.rows = [row for row in read_json(results) if row["vae"] == self.original.name]
        wanted = {(one.name, one.epsilon, len(self.images)) for one in self._everything()}
        if {(row["attack"], row["epsilon"], row["n"]) for row in self.rows} != wanted:
            self._record(self._measure(self.original, self._everything()))

    def judge_progress(self, step: int) -> dict[str, float]:
        """Clean and attacked quality of the current weights, by metric name; draws some reconstructions."""
        rows = self._measure(self.current, [CLEAN, self.attack])
        self._record(rows)
        shown = self.images[:PICTURED]
        self._draw(f"step-{step:06d}.png", lambda: reconstruction_picture(self.current, shown))
        return {f"validation/{row['attack']}/{row['metric']}": row["value"] for row in rows}

    def judge_result(self) -> str:
        """Everything, on the final weights; writes results and pictures, returns the table to print."""
        self._record(self._measure(self.current, self._everything()))
        self._draw(COMPARISON, self._comparison)
        return self.table()

    def judge_variant(self, variant: Codec) -> float:
        """Clean quality of the final weights at lower precision; returns the dB of PSNR by which it differs."""
        self._record(self._measure(variant, [CLEAN]))
        clean = {row["vae"]: row["value"] for row in self.rows if (row["attack"], row["metric"]) == ("clean", "psnr")}
        return clean[variant.name] - clean[self.current.name]

    def table(self) -> str:
        """The results so far, original beside fine-tuned, and what has become of the attack's damage."""
        table = comparison_table(self.rows, (self.original.name, self.current.name))
        if not any((row["vae"], row["attack"]) == (self.current.name, self.strong_attack.name) for row in self.rows):
            return table
        share = won_back(self.rows, self.strong_attack.name, self.original.name, self.current.name)
        if share is None:
            return table
        return f"{table}\n\nOf the PSNR that {self.strong_attack.name} costs the original VAE, {share:.0%} is won back."

    def _everything(self) -> list[Perturbation]:
        return [CLEAN, self.attack, self.strong_attack, self.noise]

    def _measure(self, codec: Codec, perturbations: list[Perturbation]) -> list[dict[str, Any]]:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        records = evaluate(
            codec,
            self.images[rank::world],
            perturbations,
            self.loss,
            indices=range(rank, len(self.images), world),
            seed=self.seed,
            batch_size=self.batch_size,
            reference=self.original,
            progress=codec.name if self.accelerator.is_main_process else None,
        )
        return to_rows([Record(*record) for record in gather_object(records)])

    def _comparison(self) -> Image.Image:
        spread = torch.linspace(0, len(self.images) - 1, min(4, len(self.images))).long()
        return comparison_picture(
            self.original, self.current, self.images[spread], self.strong_attack, self.loss, seed=self.seed
        )

    def _record(self, rows: list[dict[str, Any]]) -> None:
        """Keeps `rows` in place of earlier ones of the same VAE, and writes all."""
        renewed = {row["vae"] for row in rows}
        self.rows = [row for row in self.rows if row["vae"] not in renewed] + rows
        if self.accelerator.is_main_process:
            write_text_atomically(self.output_dir / "results.json", json.dumps(self.rows, indent=1) + "\n")

    def _draw(self, name: str, draw: Callable[[], Image.Image]) -> None:
        if self.accelerator.is_main_process:
            (self.output_dir / "samples").mkdir(exist_ok=True)
            draw().save(self.output_dir / "samples" / name)
        self.accelerator.wait_for_everyone()


@contextmanager
def averaged_weights(ema: EMAModel | None, encoder: LatentEncoder) -> Iterator[None]:
    """Within, `encoder` holds the weights of `ema`, where there is one."""
    if ema is None:
        yield
        return
    ema.store(encoder.parameters())
    ema.copy_to(encoder.parameters())
    try:
        yield
    finally:
        ema.restore(encoder.parameters())
