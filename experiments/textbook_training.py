"""Repeat a finished run of train_srl_vae.py with the textbook's step, to compare the times of whole trainings.

    python -m experiments.textbook_training --like outputs/paper --output_dir outputs/textbook

VAE, images, starts of the attack, learning rates and number of steps are those of the run. Checkpoints have the parts
that `experiments/time_to_robustness.py` reads; the training cannot be resumed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.optimization import get_scheduler
from tqdm.auto import trange

from benchmarks.textbook import TextbookStep
from srl_utils.attacks.draws import image_generators
from srl_utils.attacks.gradient import PGDConfig
from srl_utils.command_line import Parser, exit_code
from srl_utils.errors import UserError
from srl_utils.files import write_text_atomically
from srl_utils.images.datasets import open_flagged_data
from srl_utils.images.loading import Batch, training_batches
from srl_utils.metrics.losses import load_perceptual_distance
from srl_utils.training.checkpoints import STATE_FILE, save_drop_in
from srl_utils.vae.loading import AutoencoderSource, load_autoencoder, save_autoencoder

FIXED = {
    "originality_units": "raw",
    "sample_posterior": False,
    "gradient_accumulation_steps": 1,
    "use_ema": False,
    "use_8bit_adam": False,
    "scale_lr": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 0.01,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
}
"""Settings that the textbook's step supports, with their only values."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = parse_args(arguments)
    settings = argparse.Namespace(**json.loads((args.like / "training_args.json").read_text())["arguments"])
    for name, value in FIXED.items():
        if getattr(settings, name) != value:
            raise UserError(
                f"{args.like} was trained with --{name} {getattr(settings, name)}; "
                f"the textbook's step supports only {value}"
            )
    train(settings, build_step(settings, args.device), args.output_dir)
    return 0


def build_step(settings: argparse.Namespace, device: str) -> TextbookStep:
    """Return the textbook's step with the settings of a run of train_srl_vae.py."""
    names = AutoencoderSource.__dataclass_fields__
    vae = load_autoencoder(AutoencoderSource(**{name: getattr(settings, name) for name in names})).to(device)
    perceptual = load_perceptual_distance(settings.lpips_net).network.to(device) if settings.lpips_weight else None
    return TextbookStep(
        vae,
        perceptual,
        epsilon=2 * settings.epsilon,
        step_size=2 * settings.pgd_step_size,
        num_steps=settings.pgd_steps,
        lpips_weight=settings.lpips_weight,
        originality_weight=settings.originality_weight,
        learning_rate=settings.learning_rate,
    )


def train(settings: argparse.Namespace, step: TextbookStep, output_dir: Path) -> None:
    """Train with `step`, writing checkpoints. A step's time includes its wait for images, but not the saving."""
    attack = PGDConfig(epsilon=settings.epsilon, random_start=not settings.no_pgd_random_start)
    scheduler = get_scheduler(
        settings.lr_scheduler,
        step.optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.max_train_steps,
        num_cycles=settings.lr_num_cycles,
        power=settings.lr_power,
    )
    batches, seconds = open_batches(settings), []
    for number in trange(1, settings.max_train_steps + 1):
        started = time.perf_counter()
        batch = next(batches)
        clean = batch.images.to(step.parameters[0].device)
        step(clean, attack.start(clean, image_generators(settings.seed, batch.positions))).item()
        scheduler.step()
        seconds.append(time.perf_counter() - started)
        if number % settings.checkpointing_steps == 0:
            save(step, output_dir / f"checkpoint-{number}", seconds)
    save_drop_in(step.vae, output_dir)


def open_batches(settings: argparse.Namespace) -> Iterator[Batch]:
    """Return the batches of a run of train_srl_vae.py."""
    data = open_flagged_data(settings)
    return training_batches(data, batch_size=settings.train_batch_size, num_workers=settings.dataloader_num_workers)


def save(step: TextbookStep, checkpoint: Path, seconds: list[float]) -> None:
    """Write the VAE, and the times as `train_srl_vae.py` counts them."""
    save_autoencoder(step.vae, checkpoint / "vae")
    progress = {"seconds": sum(seconds), "first_steps": seconds[0]}
    write_text_atomically(checkpoint / STATE_FILE, json.dumps({"progress": progress}))


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m experiments.textbook_training", description=__doc__.splitlines()[0])
    parser.add_argument("--like", type=Path, required=True, help="--output_dir of the run to repeat")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
