"""Runs the project's commands as a user would, and keeps their output and their times."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from experiments.claims import ORIGINAL, trained_name
from experiments.plan import SCENES, TRAINING_SCENES, VARIANTS, WEIGHTS, Evaluation, Scale
from srl_utils.console import progress_bar
from srl_utils.files import write_text_atomically
from srl_utils.vae.loading import WEIGHTS_NAME

ROOT = Path(__file__).parents[1]
BATCH = 8
"""Images of a training step. At most as many processes share them; on a CPU, each needs about 2 GB."""
LONGEST_LINE = 60
"""Characters of a command's output beside the progress bar."""


class Runner:
    """Runs commands whose results are in `folder`."""

    def __init__(self, folder: Path, seed: int, *, num_calls: int) -> None:
        """Make the folder and a progress bar.

        Args:
            folder: of all results.
            seed: of the evaluations.
            num_calls: number of commands.
        """
        self.folder, self.seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        self.bar = progress_bar(num_calls, desc="paper", unit="part")

    def scenes(self, name: str, count: int, *, seed: int) -> None:
        """Draw scenes into the folder `name`, unless they exist."""
        if (self.folder / name / "metadata.jsonl").exists():
            self.bar.update()
        else:
            self._call(
                name, "-m", "miniature.draw", "--num_images", count, "--seed", seed, "--output_dir", self.folder / name
            )

    def train(self, variant: str, scale: Scale, *, seed: int) -> None:
        """Train a VAE of a variant, unless it exists."""
        output_dir = self._vae(trained_name(variant, seed))
        if (output_dir / WEIGHTS_NAME).exists() and (output_dir / "README.md").exists():
            self.bar.update()
            return
        processes = num_processes()
        self._call(
            f"train {trained_name(variant, seed)}", *launched(processes), ROOT / "train_srl_vae.py",
            "--pretrained_model_name_or_path", self._vae(ORIGINAL), "--train_data_dir", self.folder / TRAINING_SCENES,
            "--resolution", 64, "--train_batch_size", BATCH // processes, "--max_train_steps", scale.training_steps,
            "--learning_rate", "5e-4", "--lpips_weight", 0, "--random_flip", "--no-torch_compile",
            "--num_validation_images", 2, "--validation_steps", 10_000, "--report_to", "none", "--seed", seed,
            *shlex.split(VARIANTS[variant].flags), "--output_dir", output_dir, "--resume_from_checkpoint", "latest",
        )  # fmt: skip

    def evaluate(self, evaluation: Evaluation) -> None:
        """Evaluate the baseline and the VAEs of the evaluation's variants; finished parts are kept."""
        names = [
            name
            for variant in evaluation.variants
            for seed in range(min(evaluation.seeds, VARIANTS[variant].seeds))
            if (name := trained_name(variant, seed)) != evaluation.baseline
        ]
        vaes = ["--vae", *(f"{name}={self._vae(name)}" for name in names)] if names else []
        self._call(
            evaluation.name, *launched(num_processes()), "-m", "srl_utils.evaluation", evaluation.command,
            "--baseline", self._vae(evaluation.baseline), *vaes, "--data_dir", self.folder / SCENES, "--resolution", 64,
            "--seed", self.seed, *evaluation.flags, "--output_dir", self.folder / evaluation.name,
        )  # fmt: skip

    def minutes(self) -> float:
        """Return how long all commands took, those of earlier runs included."""
        return sum(json.loads(self._times.read_text()).values()) / 60

    def _vae(self, name: str) -> Path:
        return WEIGHTS / "vae" if name == ORIGINAL else self.folder / "vaes" / re.sub(r"\W+", "-", name)

    def _call(self, title: str, *command: object) -> None:
        started = time.time()
        self.bar.set_description_str(title)
        words = [sys.executable, *map(str, command)]
        with (
            (self.folder / "log.txt").open("a", encoding="utf-8") as log,
            subprocess.Popen(
                words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
            ) as child,
        ):
            for line in child.stdout:  # each update of a progress bar is a line
                log.write(line)
                self.bar.set_postfix_str(line.strip()[:LONGEST_LINE], refresh=False)
                self.bar.update(0)
            code = child.wait()
        self.bar.set_postfix_str("", refresh=False)
        self.bar.update()
        if code:
            raise SystemExit(f"{title} failed with exit code {code}; see {self.folder / 'log.txt'}")
        seconds = json.loads(self._times.read_text()) if self._times.exists() else {}
        seconds[title] = seconds.get(title, 0) + round(time.time() - started)
        write_text_atomically(self._times, json.dumps(seconds, indent=1))

    @property
    def _times(self) -> Path:
        return self.folder / "seconds.json"


def num_processes() -> int:
    """Return one process per GPU, or per core: networks this small gain little from threads."""
    available = torch.cuda.device_count() or os.cpu_count() or 1
    return max(count for count in (1, 2, 4, BATCH) if count <= available)


def launched(processes: int) -> list[object]:
    """Return arguments for Python that run what follows in a number of processes."""
    if processes == 1:
        return []
    return [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes, "--num_machines", 1,
        "--main_process_port", 0, "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", 1,
    ]  # fmt: skip
