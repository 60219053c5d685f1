"""What evaluations share that fine-tune a model: flags, the learner, a picture of what the models generate."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from srl_utils.attacks.denoiser import Denoiser
from srl_utils.command_line import non_negative_float, non_negative_int, positive_int
from srl_utils.console import progress_bar
from srl_utils.errors import errors_about
from srl_utils.evaluation.cli.setup import Setup
from srl_utils.evaluation.report.grids import extremes_picture
from srl_utils.evaluation.study import Study
from srl_utils.evaluation.tasks.finetuning import FinetuningConfig
from srl_utils.evaluation.tasks.generation import build_text_to_image
from srl_utils.evaluation.tasks.learning import Learner

NUM_PICTURES = 8
"""Generated images of each fine-tuned model in the report."""


def add_finetuning_arguments(
    parser: argparse.ArgumentParser, *, steps: int, batch_size: int, learning_rate: float, lora_rank: int | None
) -> None:
    """Add the flags of the fine-tuning, with these defaults."""
    add = parser.add_argument
    add("--finetuning_steps", type=positive_int, default=steps, help="optimizer steps of each fine-tuning")
    add("--finetuning_batch_size", type=positive_int, default=batch_size, help="images per step")
    add("--learning_rate", type=non_negative_float, default=learning_rate, help="of AdamW, constant")
    add(
        "--lora_rank", type=adapter_rank, default=lora_rank,
        help="fine-tune adapters of this rank (peft) instead of the whole UNet; 0 fine-tunes the whole UNet",
    )  # fmt: skip


def adapter_rank(text: str) -> int | None:
    """Return the rank of adapters; None, for no adapters, if it is 0."""
    return non_negative_int(text) or None


def finetuning_config(args: argparse.Namespace) -> FinetuningConfig:
    """Return the fine-tuning that the flags of `add_finetuning_arguments` describe.

    Raises:
        MissingPackage: an ImportError, if peft is needed and not installed.
    """
    config = FinetuningConfig(
        num_steps=args.finetuning_steps, batch_size=args.finetuning_batch_size, learning_rate=args.learning_rate,
        lora_rank=args.lora_rank,
    )  # fmt: skip
    config.check()
    return config


def build_learner(args: argparse.Namespace, setup: Setup, finetuning: FinetuningConfig) -> Learner:
    """Return the model that learns and generates.

    Args:
        args: the flags of `add_shared_arguments` and `add_pipeline_arguments`.
        setup: has the pipeline.
        finetuning: how it learns.

    Raises:
        UserError: if the pipeline cannot generate from text, or if its denoiser cannot be fine-tuned.
    """
    sampling = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    with errors_about("pipeline"):
        text_to_image = build_text_to_image(setup.pipeline, args.resolution, **sampling)
        Denoiser.from_pipeline(setup.pipeline, "")
    return Learner(
        text_to_image=text_to_image, finetuning=finetuning, folder=args.output_dir / "finetuning",
        batch_size=args.batch_size, seed=args.seed,
    )  # fmt: skip


def generated_picture(study: Study, learner: Learner, first_lines: Sequence[tuple[str, Tensor]] = ()) -> Image.Image:
    """Return a picture with a row of generated images for each fine-tuned model.

    Args:
        study: its task generates the images.
        learner: of the task.
        first_lines: labels and images `[n,3,H,W]` in [-1,1] of rows above them.
    """
    numbers = list(range(min(NUM_PICTURES, len(study.images))))
    lines = list(first_lines)
    shown = [(cell, codec) for cell in study.cells() for codec in cell.judged]
    cost = len(numbers) * learner.text_to_image.passes
    with progress_bar(round(cost * len(shown)), desc="picture", unit="pass") as bar, study.watched(bar) as meter:
        for cell, codec in shown:
            title = f"{codec.name}: {cell.title}"
            with meter.stage(f"picture, {title}", cost), torch.no_grad():
                images = study.task.attempt(cell, codec, study.images[numbers].to(codec.device), numbers, "")
            lines.append((title, images))
    rows = [(title, [(image, "") for image in images[: len(numbers)]]) for title, images in lines]
    return extremes_picture(rows, titles=[""] * len(numbers), cell=80, label=300)
