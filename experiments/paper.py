"""Every experiment of the SRL-VAE paper (arXiv 2504.17219) on the miniature world, in one report.

    python -m experiments.paper --quick                # make paper-quick
    python -m experiments.paper                        # make paper

Trains the variants of the ablations and the controls, and runs the project's own commands on them: reconstruction,
generation, editing and poisoning. Finished trainings and evaluations are not made again, so the same command goes on
after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from srl_utils.console import progress_bar
from srl_utils.evaluation.report.tables import markdown_table
from srl_utils.files import write_text_atomically
from srl_utils.vae.loading import WEIGHTS_NAME

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "miniature/weights"
MOST_PROCESSES = 8
"""On a CPU: each takes about 2 GB."""
ORIGINAL, ROBUST = "original", "robust"

# The method as in `make demo`, on scenes; alpha is in scaled units, where 0.03 is about the paper's 0.001 on SD's latents
# and 0.3 its 0.01 (docs/training.md, "Choose the originality weight").
VARIANTS: dict[str, str] = {
    ROBUST: "--originality_weight 0.03",
    "alpha 0": "--originality_weight 0",
    "alpha 0.003": "--originality_weight 0.003",
    "alpha 0.3": "--originality_weight 0.3",
    "epsilon 4": "--originality_weight 0.03 --epsilon 4/255 --pgd_step_size 5/255",
    "epsilon 16": "--originality_weight 0.03 --epsilon 16/255 --pgd_step_size 20/255",
    "no attack": "--originality_weight 0.03 --pgd_steps 0",
    "random noise": "--originality_weight 0.03 --gaussian_noise 8/255",
}
DOWNSTREAM = (ROBUST, "alpha 0", "no attack")
"""Judged by editing and poisoning too, which take longer."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything there is."""

    training_steps: int
    training_scenes: int
    images: int
    edited: int
    attack_steps: int
    editing_attack_steps: int
    """Fewer, since PhotoGuard's diffusion attack takes the gradient of a whole edit ten times a step."""
    inference_steps: int
    poisons: tuple[int, ...]
    poisoned_set: int
    finetuning_steps: int
    generated: int
    checks: bool
    """Whether the robustness is checked too, in the reconstruction of all VAEs."""


FULL = Scale(
    training_steps=300, training_scenes=1000, images=96, edited=16, attack_steps=50, editing_attack_steps=20, inference_steps=20,
    poisons=(0, 32, 96), poisoned_set=1200, finetuning_steps=200, generated=32, checks=True,
)  # fmt: skip
QUICK = Scale(
    training_steps=60, training_scenes=200, images=24, edited=4, attack_steps=10, editing_attack_steps=3, inference_steps=10,
    poisons=(0, 24), poisoned_set=400, finetuning_steps=40, generated=20, checks=False,
)  # fmt: skip


def main() -> None:
    args = parse_args()
    scale = QUICK if args.quick else FULL
    run = Runner(args.output_dir, args.seed)
    run.scenes("training-scenes", scale.training_scenes, seed=1)
    run.scenes("scenes", max(scale.images, scale.poisoned_set), seed=0)
    for name, flags in VARIANTS.items():
        run.train(name, flags, scale)
    run.evaluate("reconstruction", VARIANTS, reconstruction_flags(scale, args.output_dir / "training-scenes/00000.png"))
    run.evaluate("generation", VARIANTS, generation_flags(scale))
    run.evaluate("editing", DOWNSTREAM, editing_flags(scale))
    run.evaluate("poisoning", DOWNSTREAM, poisoning_flags(scale))
    run.bar.close()
    write_text_atomically(args.output_dir / "paper.md", run.report(scale))
    print(f"Report: {args.output_dir / 'paper.md'}")


def networks(scale: Scale) -> list[str]:
    return [
        "--pipeline", WEIGHTS / "sd", "--clip_model", WEIGHTS / "clip", "--classifier", WEIGHTS / "classifier",
        "--caption_column", "text", "--guidance_scale", "5", "--num_inference_steps", scale.inference_steps,
    ]  # fmt: skip


def reconstruction_flags(scale: Scale, target: Path) -> list[object]:
    steps = scale.attack_steps
    return [
        "--num_images", scale.edited, "--attacks", "clean", "noise", f"apgd-{steps}", "photoguard-encoder", "mist-textural",
        "nightshade", "--target", target, "--max_attack_steps", steps, "--epsilons", "8/255",
        "--metrics", "psnr", "ssim", "drift", *(["--num_check_images", 2] if scale.checks else ["--no_checks"]),
    ]  # fmt: skip


def generation_flags(scale: Scale) -> list[object]:
    metrics = ["psnr", "ssim", "clip", "clip-text", "shown", "fid", "is", "denoising-loss", "difference"]
    return [
        *networks(scale),
        "--num_images",
        scale.images,
        "--strengths",
        "0.3",
        "0.6",
        "--metrics",
        *metrics,
        "--batch_size",
        scale.images // 4,
    ]


def editing_flags(scale: Scale) -> list[object]:
    shapes = ["circle", "square", "triangle", "diamond", "star", "cross", "ring", "hexagon"]
    edits = [f"{old}={new}" for old, new in zip(shapes, shapes[4:] + shapes[:4], strict=True)]
    return [
        *networks(scale), "--num_images", scale.edited, "--replace", *edits, "--epsilons", "16/255",
        "--attacks", "clean", "photoguard-encoder", "photoguard-diffusion", "mist-fused", "advdm", "apgd-20",
        "--max_attack_steps", scale.editing_attack_steps, "--strengths", "0.3", "0.5", "0.7", "--batch_size", scale.edited // 2,
        "--metrics", "psnr", "ssim", "clip", "clip-text", "shown", "fid", "--no_checks",
    ]  # fmt: skip


def poisoning_flags(scale: Scale) -> list[object]:
    return [
        *networks(scale), "--num_images", scale.poisoned_set, "--concept", "circle", "--target_concept", "star",
        "--epsilon", "16/255", "--num_poisons", *scale.poisons, "--num_generated", scale.generated, "--batch_size", 64,
        "--max_attack_steps", scale.attack_steps, "--finetuning_steps", scale.finetuning_steps, "--learning_rate", "3e-4",
        "--finetuning_batch_size", 16, "--metrics", "clip-text", "shown", "fid",
        "--no_checks",
    ]  # fmt: skip


def several_processes() -> list[object]:
    """Words for Python that run a module once for each GPU, or each core: networks so small gain little from threads."""
    gpus = torch.cuda.device_count()
    processes = gpus or min(MOST_PROCESSES, os.cpu_count() or 1)
    if processes == 1:
        return []
    return [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes, "--num_machines", 1,
        "--main_process_port", 0, "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", 1,
    ]  # fmt: skip


NUM_CALLS = 2 + len(VARIANTS) + 4
"""Two sets of scenes, the trainings, and four evaluations."""
LONGEST_LINE = 60
"""Of what a command prints, beside the bar."""


class Runner:
    """Runs the project's commands, each as a user would, and keeps what they print and how long they took."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        self.bar = progress_bar(NUM_CALLS, desc="paper", unit="part")

    def scenes(self, name: str, count: int, *, seed: int) -> None:
        if (self.folder / name / "metadata.jsonl").exists():
            self.bar.update()
        else:
            self._call(
                name, "-m", "miniature.draw", "--num_images", count, "--seed", seed, "--output_dir", self.folder / name
            )

    def train(self, name: str, flags: str, scale: Scale) -> None:
        output_dir = self._vae(name)
        if (output_dir / WEIGHTS_NAME).exists() and (output_dir / "README.md").exists():
            self.bar.update()
            return
        self._call(
            f"train {name}", "train_srl_vae.py", "--pretrained_model_name_or_path", WEIGHTS / "vae", "--recipe", "fast",
            "--train_data_dir", self.folder / "training-scenes", "--resolution", 64, "--train_batch_size", 8,
            "--max_train_steps", scale.training_steps, "--learning_rate", "5e-4", "--lpips_weight", 0, "--random_flip",
            "--no-torch_compile", "--num_validation_images", 2, "--validation_steps", 10_000, "--report_to", "none",
            "--seed", self.seed, *shlex.split(flags), "--output_dir", output_dir, "--resume_from_checkpoint", "latest",
        )  # fmt: skip

    def evaluate(self, name: str, variants: Sequence[str], flags: list[object]) -> None:
        vaes = [f"{variant}={self._vae(variant)}" for variant in variants]
        self._call(
            name, *several_processes(), "-m", "srl_utils.evaluation", name, "--baseline", WEIGHTS / "vae", "--vae", *vaes, "--data_dir",
            self.folder / "scenes", "--resolution", 64, "--seed", self.seed, *flags, "--output_dir", self.folder / name,
        )  # fmt: skip

    def _vae(self, name: str) -> Path:
        return self.folder / "vaes" / name.replace(" ", "-")

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
            for line in child.stdout:  # a bar's updates are lines of their own here
                log.write(line)
                self.bar.set_postfix_str(line.strip()[:LONGEST_LINE], refresh=False)
                self.bar.update(0)
            code = child.wait()
        self.bar.set_postfix_str("", refresh=False)
        self.bar.update()
        if code:
            raise SystemExit(f"{title} ended with exit code {code}; {self.folder / 'log.txt'} says why")
        seconds = json.loads(self._times.read_text()) if self._times.exists() else {}
        seconds[title] = seconds.get(title, 0) + round(time.time() - started)
        write_text_atomically(self._times, json.dumps(seconds, indent=1))

    @property
    def _times(self) -> Path:
        return self.folder / "seconds.json"

    # --- report ---

    def report(self, scale: Scale) -> str:
        seconds = json.loads(self._times.read_text())
        return REPORT.format(
            machine=f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
            date=date.today().isoformat(),
            seed=self.seed,
            minutes=f"{sum(seconds.values()) / 60:.0f}",
            scale=scale,
            reconstruction=self._table("reconstruction", [ORIGINAL, *VARIANTS]),
            generation=self._table("generation", [ORIGINAL, *VARIANTS]),
            editing=self._table("editing", [ORIGINAL, *DOWNSTREAM]),
            poisoning=self._table("poisoning", [ORIGINAL, *DOWNSTREAM]),
        )

    def _table(self, name: str, vaes: Sequence[str]) -> str:
        """A line for each attack, threat model and metric, a column for each VAE."""
        rows = json.loads((self.folder / name / "results.json").read_text())
        values = {(row["attack"], row["threat_model"], row["metric"], row["vae"]): row["value"] for row in rows}
        keys = list(dict.fromkeys(key[:3] for key in values))
        lines = [
            [*key, *("" if (*key, vae) not in values else f"{values[(*key, vae)]:.3f}" for vae in vaes)]
            for key in sorted(keys, key=keys.index)
        ]
        return markdown_table([["images", "threat model", "metric", *vaes], *lines])


REPORT = """# The paper's experiments on the miniature world

{machine}, {date}, seed {seed}, {minutes} minutes. Scale: {scale}.

`robust` is the method with alpha 0.03 in scaled units and epsilon 8/255; the other columns change one thing.
`no attack` and `random noise` are controls that were fine-tuned as long.

## Reconstruction

{reconstruction}

## Generation and denoising by the unchanged diffusion model

{generation}

## Editing clean and protected images

{editing}

## Fine-tuning on poisoned images

{poisoning}
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every command once, on little: a look and not a result")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/paper"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
