"""Building a run from the flags of the training."""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedDataParallelKwargs, GradScalerKwargs, ProjectConfiguration
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from srl_utils.attacks.gradient import PGDConfig
from srl_utils.hub.publishing import Publisher
from srl_utils.images.datasets import TrainingData
from srl_utils.images.ledger import ImageLedger
from srl_utils.launching import launched_accelerator
from srl_utils.metrics.losses import ReconstructionLoss, load_perceptual_distance
from srl_utils.training.checkpoints import Checkpoints, register_state, state_bytes
from srl_utils.training.cli.arguments import PublishedCommand
from srl_utils.training.cli.planning import Plan, perceptual_trunk
from srl_utils.training.cli.run import Progress, Run
from srl_utils.training.execution import Execution, runs_in_fp16
from srl_utils.training.journal import Journal
from srl_utils.training.objectives import OBJECTIVES
from srl_utils.training.overfitting import OverfittingGuard
from srl_utils.training.resuming import Settings
from srl_utils.training.step import Networks, Step, build_networks
from srl_utils.training.validation import Validation
from srl_utils.vae.codec import Codec, frozen_codec
from srl_utils.vae.families import family_of
from srl_utils.vae.latents import RAW, LatentScale

ORIGINAL, FINE_TUNED = "original", "fine-tuned"


def build_accelerator(args: argparse.Namespace, vae: ModelMixin) -> Accelerator:
    """Set up accelerate for the flags of a training and its VAE."""
    scaled = runs_in_fp16(args.mixed_precision, vae.config.get("force_upcast", False))
    accelerator = launched_accelerator(
        os.environ,
        # The networks bring their own autocast; accelerate is needed for the scaler that gradients in fp16 need.
        precision="fp16" if scaled else "no",
        steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=str(args.output_dir), logging_dir=str(args.output_dir / args.logging_dir)
        ),
        kwargs_handlers=[
            # Starting at 2^16 would cost several skipped steps, and ten in a row end the run.
            GradScalerKwargs(init_scale=2.0**10),
            InitProcessGroupKwargs(timeout=timedelta(minutes=30)),
            # Convolutions over time alone have no part in a clip of one frame, and get no gradient.
            DistributedDataParallelKwargs(find_unused_parameters=family_of(vae).video),
        ],
    )
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return accelerator


def build_run(
    args: argparse.Namespace,
    accelerator: Accelerator,
    vae: ModelMixin,
    data: TrainingData,
    plan: Plan,
    publisher: Publisher | None,
    settings: Settings,
    command: PublishedCommand,
) -> Run:
    """Build networks, optimizer, records and validation of a run; register its state for checkpoints.

    Args:
        args: flags of the training.
        accelerator: from `build_accelerator`.
        vae: original VAE in float32; its encoder is trained in place.
        data: training and validation images.
        plan: steps and precision.
        publisher: pushes to the Hub; None for a run that does not.
        settings: what the run is asked for, with the changes of a resume.
        command: the command line that the card shows.
    """
    original = frozen_codec(copy.deepcopy(vae), ORIGINAL, device=accelerator.device)
    method = build_step(args, accelerator, vae, plan.execution)
    networks = method.networks
    optimizer, scheduler, ema = build_optimizer(args, accelerator, networks.trained, plan)
    progress, guard = Progress(), OverfittingGuard()
    ledger = ImageLedger(data.num_images, world_size=accelerator.num_processes)
    register_state(
        accelerator,
        networks.vae,
        ema,
        {"progress": progress, "images": ledger, "scheduler": scheduler, "guard": guard},
        settings.to_json(),
    )
    return Run(
        args=args,
        accelerator=accelerator,
        data=data,
        plan=plan,
        method=method,
        optimizer=optimizer,
        scheduler=scheduler,
        ema=ema,
        progress=progress,
        ledger=ledger,
        guard=guard,
        checkpoints=Checkpoints(
            args.output_dir, args.checkpoints_total_limit, state_bytes(networks.vae, networks.trained, ema)
        ),
        journal=Journal(accelerator, args.output_dir / "metrics.jsonl"),
        validation=build_validation(args, accelerator, original, networks, data),
        publisher=publisher,
        settings=settings,
        command=command,
    )


def build_step(args: argparse.Namespace, accelerator: Accelerator, vae: ModelMixin, execution: Execution) -> Step:
    """Build the step: the networks on the device, and the settings of attack and loss."""
    perceptual = None if perceptual_trunk(args) is None else load_perceptual_distance(args.lpips_net)
    loss = ReconstructionLoss(perceptual, weight=args.lpips_weight).to(accelerator.device)
    vae.to(accelerator.device)
    if args.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    networks = build_networks(
        vae,
        loss,
        autocast_dtype=execution.autocast_dtype,
        torch_compile=execution.torch_compile,
        lora_rank=args.lora_rank,
        seed=args.seed,
        wrap=accelerator.prepare_model,
    )
    return Step(
        networks=networks,
        pgd=attack_config(args),
        noise=args.gaussian_noise,
        objective=OBJECTIVES[args.objective],
        originality_weight=args.originality_weight,
        latent_weight=args.latent_weight,
        latent_attack_share=args.latent_attack_share,
        latent_scale=LatentScale.of(vae).on(networks.device) if args.originality_units == "scaled" else RAW,
        sample_posterior=args.sample_posterior,
        attack_batch_size=args.attack_batch_size,
    )


def attack_config(args: argparse.Namespace) -> PGDConfig:
    """Return the attack that the flags describe."""
    return PGDConfig(
        epsilon=args.epsilon,
        step_size=args.pgd_step_size,
        num_steps=args.pgd_steps,
        random_start=not args.no_pgd_random_start,
    )


def build_optimizer(
    args: argparse.Namespace, accelerator: Accelerator, trained: Sequence[nn.Parameter], plan: Plan
) -> tuple[AcceleratedOptimizer, LambdaLR, EMAModel | None]:
    """Build AdamW over the trained weights, its schedule, and the average of the weights if one is kept."""
    learning_rate = args.learning_rate * (plan.samples_per_step if args.scale_lr else 1)
    optimizer = adamw_class(eight_bit=args.use_8bit_adam)(
        trained,
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    # Left out of `prepare`, which would step it once per process.
    scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=plan.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    ema = EMAModel(trained) if args.use_ema else None
    if ema is not None:
        ema.to(accelerator.device)
    return accelerator.prepare_optimizer(optimizer), scheduler, ema


def adamw_class(*, eight_bit: bool) -> Callable[..., torch.optim.Optimizer]:
    """Return AdamW: torch's fused one, or the 8-bit one of bitsandbytes."""
    if not eight_bit:
        return partial(torch.optim.AdamW, fused=True)
    import bitsandbytes  # an optional dependency

    return bitsandbytes.optim.AdamW8bit


def build_validation(
    args: argparse.Namespace, accelerator: Accelerator, original: Codec, networks: Networks, data: TrainingData
) -> Validation:
    """Build the validation of the VAE being trained, beside the original one, both in float32."""
    return Validation(
        accelerator,
        original=original,
        current=Codec.of(networks.vae, FINE_TUNED),
        images=data.validation_images,
        perceptual=networks.loss.perceptual,
        epsilon=args.epsilon,
        output_dir=args.output_dir,
        seed=args.seed,
        batch_size=args.attack_batch_size or args.train_batch_size,
    )
