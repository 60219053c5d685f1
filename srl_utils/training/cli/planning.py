"""The plan of a run: images per step, number of steps, precision; and its description for a dry run."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from math import ceil

from accelerate import Accelerator
from diffusers import ModelMixin

from srl_utils.errors import UserError
from srl_utils.images.datasets import TrainingData
from srl_utils.launching import launch_notes
from srl_utils.metrics.losses import LPIPS_LEAST_SIDES
from srl_utils.training.arithmetic import StepArithmetic, step_arithmetic
from srl_utils.training.cli.arguments import json_arguments
from srl_utils.training.execution import Execution, choose_execution
from srl_utils.training.objectives import OBJECTIVES
from srl_utils.training.resuming import Earlier
from srl_utils.training.similarities import LEAST_SCALE


@dataclass(frozen=True)
class Plan:
    """How many samples make a step, how many steps make the run, and how the networks run."""

    samples_per_step: int
    max_train_steps: int
    arithmetic: StepArithmetic
    execution: Execution


def plan_steps(
    args: argparse.Namespace,
    vae: ModelMixin,
    accelerator: Accelerator,
    data: TrainingData,
    earlier: Earlier | None,
) -> Plan:
    """Return the plan of a run.

    Args:
        args: flags of the training.
        vae: the original VAE.
        accelerator: knows the number of processes and the device.
        data: the images; their number counts the steps of an epoch.
        earlier: where the run resumes; None for a new run.

    Raises:
        UserError: as `count_steps` does.
    """
    samples_per_step = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    steps = args.max_train_steps
    if steps is None:
        steps = count_steps(args.num_train_epochs, data.num_images, samples_per_step, earlier)
    objective = OBJECTIVES[args.objective]
    arithmetic = step_arithmetic(
        vae,
        resolution=args.resolution,
        num_frames=args.num_frames,
        pgd_steps=0 if args.gaussian_noise else args.pgd_steps,
        lpips_net=perceptual_trunk(args),
        objective=objective,
        originality=args.originality_weight > 0,
        latent_distance=args.latent_weight > 0,
        latent_attack_share=args.latent_attack_share,
    )
    execution = choose_execution(
        accelerator.device,
        precision=args.mixed_precision,
        torch_compile=False if objective.decodes == "transformed" else args.torch_compile,  # its images have many sizes
        force_upcast=vae.config.get("force_upcast", False),
        flops=arithmetic.image * steps * samples_per_step / accelerator.num_processes,
    )
    return Plan(samples_per_step, steps, arithmetic, execution)


def attacks(args: argparse.Namespace) -> bool:
    """Return whether the training attacks its images."""
    return args.pgd_steps > 0 and may_attack(args)


def may_attack(args: argparse.Namespace) -> bool:
    """Return whether the training attacks its images if the attack has steps."""
    return OBJECTIVES[args.objective].victim is not None and args.epsilon > 0 and not args.gaussian_noise


def perceptual_trunk(args: argparse.Namespace) -> str | None:
    """Return the trunk of LPIPS; None if it is not part of attack and loss."""
    return args.lpips_net if args.lpips_weight and OBJECTIVES[args.objective].decodes else None


def check_transformed_sides(args: argparse.Namespace) -> None:
    """Raise a UserError if the training makes images smaller than LPIPS takes them."""
    trunk = perceptual_trunk(args)
    if trunk is None or OBJECTIVES[args.objective].decodes != "transformed":
        return
    least = ceil(LPIPS_LEAST_SIDES[trunk] / LEAST_SCALE)
    if args.resolution < least:
        raise UserError(
            f"{args.resolution} pixels are too few for --objective {args.objective} with LPIPS, which compares images of a "
            f"quarter of that side; give {least} or more, or a --lpips_weight of 0",
            parameter="resolution",
        )


def count_steps(epochs: int, num_images: int | None, samples_per_step: int, earlier: Earlier | None) -> int:
    """Return the steps of the whole run, including those before a resume, whose batch size may differ.

    Args:
        epochs: passes over the images.
        num_images: images of an epoch; None for a stream.
        samples_per_step: images of one step, over all processes.
        earlier: where the run resumes; None for a new run.

    Raises:
        UserError: for a stream, and if the resumed run has already made more epochs.
    """
    if num_images is None:
        raise UserError("the length of a stream is unknown; give the number of steps", parameter="max_train_steps")
    done, seen = (earlier.step, earlier.samples) if earlier else (0, 0)
    left = epochs * num_images - seen
    # The last step of a run may go a little beyond the last epoch.
    if earlier and done and -left >= max(samples_per_step, seen / done):
        raise UserError(
            f"{epochs} x {num_images} images are fewer than the {seen} that {earlier.checkpoint} has seen; give more "
            "epochs, or resume from an earlier checkpoint",
            parameter="num_train_epochs",
        )
    return done + ceil(max(left, 0) / samples_per_step)


def describe(
    args: argparse.Namespace, accelerator: Accelerator, data: TrainingData, plan: Plan, earlier: Earlier | None
) -> str:
    """Return what `--dry_run` prints: the resolved configuration and the arithmetic of a step."""
    arithmetic = plan.arithmetic
    done, before = (earlier.step, earlier.samples) if earlier else (0, 0)
    seen = before + plan.samples_per_step * (plan.max_train_steps - done)
    epochs = f", {seen / data.num_images:.2f} epochs" if data.num_images else ""
    settings = "\n".join(f"  {name:<32}{value}" for name, value in sorted(json_arguments(args).items()))
    samples = "images" if args.num_frames == 1 else "clips"
    launched = "".join(f"{note}\n" for note in launch_notes(os.environ, args))
    return (
        f"Configuration\n{settings}\n{launched}"
        f"Device {accelerator.device}, {accelerator.num_processes} process(es), {plan.execution}\n"
        f"Data: {'; '.join([data.description, *data.skipped])}\n"
        f"Step: {args.train_batch_size} {samples} x {accelerator.num_processes} process(es) x "
        f"{args.gradient_accumulation_steps} accumulated = {plan.samples_per_step} {samples}\n"
        f"Run: {plan.max_train_steps} steps, {seen} {samples}{epochs}\n"
        f"Arithmetic per {samples[:-1]}\n{arithmetic.table()}\n"
        f"  {'one step':<24}{arithmetic.image * plan.samples_per_step / 1e12:>12.4f} TFLOP"
    )
