"""Validation during a training, on held-out images that the processes share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn

from srl_utils.evaluation.cells import measure
from srl_utils.evaluation.motion import FLIPS
from srl_utils.evaluation.perturbations import CLEAN, Perturbation, noise, strong_attack, usual_attack
from srl_utils.evaluation.report.grids import comparison_picture, reconstruction_picture
from srl_utils.evaluation.report.tables import comparison_table, won_back
from srl_utils.evaluation.results import Record, Row, to_rows
from srl_utils.evaluation.tasks.base import DRIFT, Metrics, Reconstruction
from srl_utils.files import read_json, write_text_atomically
from srl_utils.metrics.clips import CLIP_METRICS
from srl_utils.metrics.losses import PerceptualDistance
from srl_utils.vae.codec import Codec

PICTURED = 8
COMPARISON = "comparison.png"


class Validation:
    """Measures the original VAE once and the fine-tuned one at each call, and writes rows and pictures.

    The attacks are those of `python -m srl_utils.evaluation` of the same names: they maximise the mean squared error,
    whatever the training attacks. VAEs are measured in float32, as they are saved.

    Args:
        accelerator: each of its processes measures its share of the images.
        original: the VAE before the training.
        current: the VAE being trained; the same object throughout the training.
        images: `[n,3,H,W]` in [-1,1], held out from training; clips `[n,3,T,H,W]` are judged in time, too.
        perceptual: LPIPS; None to measure PSNR, SSIM and drift alone.
        epsilon: budget of the attacks, units of a [0,1] image.
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
        images: Tensor,
        perceptual: PerceptualDistance | None,
        epsilon: float,
        output_dir: Path,
        seed: int,
        batch_size: int,
    ) -> None:
        self.accelerator, self.original, self.current = accelerator, original, current
        self.images, self.output_dir, self.seed, self.batch_size = images, output_dir, seed, batch_size
        self.special = [
            *([FLIPS] if original.codebook is not None else []),
            *(CLIP_METRICS if images.ndim == 5 else []),
        ]
        names = ["psnr", "ssim", DRIFT, *self.special, *([perceptual.name] if perceptual else [])]
        metrics = Metrics(names=names, perceptual=[perceptual] if perceptual else [])
        self.task = Reconstruction(metrics=metrics, baseline=original, images=images)
        self.attack, self.strong_attack = usual_attack(epsilon), strong_attack(epsilon)
        self.noise = noise(epsilon)
        self.rows: list[Row] = []

    def begin(self, step: int) -> None:
        """Remove the pictures of an earlier run and those of steps after `step`; the run draws them again."""
        if self.accelerator.is_main_process:
            for picture in (self.output_dir / "samples").glob("step-*.png"):
                drawn = re.fullmatch(r"step-(\d+)\.png", picture.name)
                if drawn and (step == 0 or int(drawn[1]) > step):
                    picture.unlink()
            (self.output_dir / "samples" / COMPARISON).unlink(missing_ok=True)

    def measure_original(self, *, resumed: bool) -> None:
        """Measure the original VAE, unless a resumed run finds its rows of as many images in `results.json`."""
        results = self.output_dir / "results.json"
        if resumed and results.exists():
            rows = map(Row.from_json, read_json(results))
            self.rows = [row for row in rows if row.vae == self.original.name]
        wanted = {(one.name, one.epsilon, len(self.images)) for one in self._everything()}
        known = {(row.attack, row.epsilon, row.n) for row in self.rows}
        unmeasured = set(self.special) - {row.metric for row in self.rows}  # by older versions
        if known != wanted or unmeasured:
            self._keep(self._measure(self.original, self._everything()))

    def measure_progress(self, step: int) -> dict[str, float]:
        """Return clean and attacked quality of the current weights, by metric name; draw some reconstructions."""
        rows = self._measure(self.current, [CLEAN, self.attack])
        self._keep(rows)
        shown = self.images[:PICTURED]
        self._draw(f"step-{step:06d}.png", lambda: reconstruction_picture(self.current, shown))
        return {f"validation/{row.attack}/{row.metric}": row.value for row in rows}

    def measure_result(self) -> str:
        """Measure everything on the final weights; write results and pictures, return the table to print."""
        self._keep(self._measure(self.current, self._everything()))
        self._draw(COMPARISON, self._comparison)
        return self.table()

    def measure_variant(self, variant: Codec) -> float:
        """Measure the final weights at lower precision; return the dB by which their clean PSNR differs."""
        self._keep(self._measure(variant, [CLEAN]))
        clean = {row.vae: row.value for row in self.rows if (row.attack, row.metric) == ("clean", "psnr")}
        return clean[variant.name] - clean[self.current.name]

    def table(self) -> str:
        """Return the results so far, original beside fine-tuned, and the share of the attack's damage undone."""
        table = comparison_table(self.rows, (self.original.name, self.current.name))
        if not any((row.vae, row.attack) == (self.current.name, self.strong_attack.name) for row in self.rows):
            return table
        share = won_back(self.rows, self.strong_attack.name, self.original.name, self.current.name)
        if share is None:
            return table
        return f"{table}\n\nOf the PSNR that {self.strong_attack.name} costs the original VAE, {round(share, 2) + 0.0:.0%} is won back."

    def _everything(self) -> list[Perturbation]:
        return [CLEAN, self.attack, self.strong_attack, self.noise]

    def _measure(self, codec: Codec, perturbations: Sequence[Perturbation]) -> list[Row]:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        records = measure(
            [codec],
            perturbations,
            self.task,
            self.images,
            numbers=range(rank, len(self.images), world),
            seed=self.seed,
            batch_size=self.batch_size,
            title=codec.name if self.accelerator.is_main_process else None,
        )
        return to_rows([Record.from_json(record) for record in gather_object(records)])

    def _comparison(self) -> Image.Image:
        spread = torch.linspace(0, len(self.images) - 1, min(4, len(self.images))).long()
        return comparison_picture(self.original, self.current, self.images[spread], self.strong_attack, seed=self.seed)

    def _keep(self, rows: list[Row]) -> None:
        """Replace earlier rows of the same VAE by `rows`, and write all rows."""
        renewed = {row.vae for row in rows}
        self.rows = [row for row in self.rows if row.vae not in renewed] + rows
        if self.accelerator.is_main_process:
            text = json.dumps([row.to_json() for row in self.rows], indent=1)
            write_text_atomically(self.output_dir / "results.json", f"{text}\n")

    def _draw(self, name: str, draw: Callable[[], Image.Image]) -> None:
        if self.accelerator.is_main_process:
            (self.output_dir / "samples").mkdir(exist_ok=True)
            draw().save(self.output_dir / "samples" / name)
        self.accelerator.wait_for_everyone()


@contextmanager
def averaged_weights(ema: EMAModel | None, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Put the weights of `ema`, if any, in the place of the trained ones inside the context."""
    if ema is None:
        yield
        return
    ema.store(trained)
    ema.copy_to(trained)
    try:
        yield
    finally:
        ema.restore(trained)
