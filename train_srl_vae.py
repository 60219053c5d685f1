#!/usr/bin/env python
"""SRL-VAE: fine-tunes the encoder of an AutoencoderKL against adversarial perturbations (arXiv 2504.17219).

    accelerate launch train_srl_vae.py --train_data_dir photos --resolution 256 --output_dir srl-vae

One step, for images x, the encoder E being trained, its frozen original E0 and the frozen decoder D:

    delta     = argmax over |delta| <= epsilon of  MSE(D(E(x + delta)), x) + lambda LPIPS(D(E(x + delta)), x)
    L_robust  = MSE(D(E(x + delta)), x) + lambda LPIPS(D(E(x + delta)), x)
    L_orig    = |mean E(x) - mean E0(x)|^2 + |variance E(x) - variance E0(x)|^2
    E        <- E - gradient of  L_robust + alpha L_orig

Every random draw is a function of --seed and of the sample's place in the run, so neither the number of processes
nor an interruption changes the result.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import GradScalerKwargs, ProjectConfiguration, gather_object
from diffusers import AutoencoderKL
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from srl_utils.attacks.draws import image_generators
from srl_utils.attacks.gradient import PGDConfig
from srl_utils.command_line import (
    Parser,
    decay,
    exit_code,
    expanded_path,
    fraction,
    home_expanded,
    image_side,
    non_negative_float,
    non_negative_int,
    pixel_distance,
    positive_int,
    seed,
)
from srl_utils.console import progress_bar
from srl_utils.errors import ResourceError, UserError, one_line
from srl_utils.files import checksum, read_json, sole_run, write_text_atomically
from srl_utils.hub.card import CardFacts, base_license, render_card
from srl_utils.hub.publishing import EXIT_PUSH_FAILED, Publisher, create_repository
from srl_utils.images.datasets import TrainingData, open_data
from srl_utils.images.ledger import ImageLedger
from srl_utils.images.loading import Batch, training_batches
from srl_utils.images.sources import PHOTOGRAPHS, DataSource
from srl_utils.launching import (
    Environment,
    check_launch,
    launch_notes,
    launched_accelerator,
    launched_arguments,
    on_cpu,
)
from srl_utils.metrics.losses import LPIPS_TRUNKS, ReconstructionLoss, load_perceptual_distance
from srl_utils.training.arithmetic import StepArithmetic, step_arithmetic
from srl_utils.training.checkpoints import (
    ARGUMENTS_FILE,
    Checkpoints,
    load_checkpoint,
    register_state,
    save_drop_in,
    state_bytes,
)
from srl_utils.training.execution import Execution, check_execution, choose_execution, runs_in_fp16
from srl_utils.training.flag_effects import training_effects
from srl_utils.training.interruption import Interruption
from srl_utils.training.journal import Journal
from srl_utils.training.overfitting import OverfittingGuard
from srl_utils.training.readback import Readback
from srl_utils.training.resuming import (
    TRAINING_DATA,
    TRAINING_IMAGES,
    Earlier,
    Inputs,
    Settings,
    check_flags,
    digest,
    own_hyperparameters,
    read_earlier,
    settle,
    shortened,
    told,
)
from srl_utils.training.step import TERMS, Networks, Step, build_networks
from srl_utils.training.validation import COMPARISON, Validation, averaged_weights
from srl_utils.vae.codec import Codec, frozen_codec
from srl_utils.vae.latents import LatentScale
from srl_utils.vae.loading import (
    HALF_PRECISION,
    WEIGHTS_NAME,
    AutoencoderSource,
    inference_dtype,
    load_autoencoder,
    read_config,
    variant_name,
)
from srl_utils.vae.networks import LatentEncoder, check_resolution

ORIGINAL, FINE_TUNED = "original", "fine-tuned"
MAX_SKIPPED_IN_ROW = 10
MAX_VARIANT_DIFFERENCE = 0.1  # dB
EXIT_NOT_FINITE = 4
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},  # the defaults of the flags
    # Found by experiments/time_to_robustness.py, see benchmarks/RESULTS.md.
    "fast": {
        "pgd_steps": 1,
        "pgd_step_size": 10 / 255,
        "originality_units": "scaled",
        "originality_weight": 0.03,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 10,
    },
}


def main(args: argparse.Namespace) -> int:
    vae, earlier = check(args)
    accelerator = build_accelerator(args, vae.config)
    publisher = open_repository(args, accelerator)
    data = open_data(
        DataSource.from_flags(args),
        resolution=args.resolution,
        seed=args.seed,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        num_validation_images=args.num_validation_images,
    )
    plan = plan_steps(args, vae.config, accelerator, data, earlier)
    settings = settle_settings(args, accelerator, vae, data, plan, earlier)
    if args.dry_run:
        accelerator.print(describe(args, accelerator, data, plan, earlier))
        return 0

    accelerator.print(f"Running on {accelerator.device} in {plan.execution}")
    with sole_run(args.output_dir, is_main_process=accelerator.is_main_process):
        prepare_output(args, accelerator, settings)
        run = build_run(args, accelerator, vae, data, plan, publisher, settings)
        run.checkpoints.check_room()
        resume(run, earlier)
        run.validation.measure_original(resumed=begin_records(run) > 0)
        write_card(run, args.output_dir)
        with Interruption() as interruption:
            stop = train(run, interruption)
        if stop is not None:
            return save_and_stop(run, stop)
        return finish(run)


# --- checks and plan ------------------------------------------------------------------------------------


def check(args: argparse.Namespace) -> tuple[AutoencoderKL, Earlier | None]:
    """Refuses what cannot work before anything takes long; returns the VAE, and where a resumed run was."""
    check_launch(os.environ)
    if args.output_dir.is_file():
        raise UserError(f"--output_dir {args.output_dir} is a file; a folder is expected")
    if args.resume_from_checkpoint is None and Checkpoints(args.output_dir).found():
        raise UserError(
            f"{args.output_dir} holds checkpoints of an earlier run; add --resume_from_checkpoint latest to continue "
            "it, or choose another --output_dir"
        )
    earlier = find_earlier(args)
    if args.report_to in ("wandb", "all") and args.hub_token is not None:
        raise UserError("--hub_token would be shown by wandb; log in with `hf auth login` instead")
    for package, flag, wanted in (
        (args.report_to, "--report_to", args.report_to in ("tensorboard", "wandb", "trackio")),
        ("bitsandbytes", "--use_8bit_adam", args.use_8bit_adam),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"{flag} needs the package {package}: pip install {package}")
    check_execution(args.mixed_precision, args.torch_compile, leave_gpu=on_cpu(os.environ))
    DataSource.from_flags(args).check()
    check_resolution(args.resolution, read_config(autoencoder_source(args)))
    return load_autoencoder(autoencoder_source(args)), earlier


def find_earlier(args: argparse.Namespace) -> Earlier | None:
    """Returns where the run resumes; refuses flags that a resumed run cannot change.

    None for a new run, and for `latest` where there is no checkpoint yet.
    """
    if args.resume_from_checkpoint is None:
        return None
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # accelerate, which would know, is not set up yet
    checkpoint = Checkpoints(args.output_dir).resolve(
        args.resume_from_checkpoint, tell=lambda line: print(line) if speaks else None
    )
    if checkpoint is None:
        return None
    earlier = read_earlier(checkpoint)
    check_flags(json_arguments(args), earlier)
    return earlier


def settle_settings(
    args: argparse.Namespace,
    accelerator: Accelerator,
    vae: AutoencoderKL,
    data: TrainingData,
    plan: Plan,
    earlier: Earlier | None,
) -> Settings:
    """Returns what the run is asked for, together with what a resume changes, which is printed."""
    arguments = {
        **json_arguments(args), "num_processes": accelerator.num_processes, "execution": plan.execution.summary
    }  # fmt: skip
    inputs = Inputs(digest(vae.state_dict().values()), digest([data.validation_images]), data.num_images)
    if earlier is None:
        return Settings(arguments, inputs)
    settings = settle(Settings(arguments, inputs), earlier, steps_left=plan.max_train_steps > earlier.step)
    for line in told(change for change in settings.changes if change.step == earlier.step):
        accelerator.print(f"changed by this command: {line}")
    return settings


def autoencoder_source(args: argparse.Namespace) -> AutoencoderSource:
    return AutoencoderSource(**{name: getattr(args, name) for name in AutoencoderSource.__dataclass_fields__})


def attack_config(args: argparse.Namespace) -> PGDConfig:
    return PGDConfig(
        epsilon=args.epsilon,
        step_size=args.pgd_step_size,
        num_steps=args.pgd_steps,
        random_start=not args.no_pgd_random_start,
    )


@dataclass(frozen=True)
class Plan:
    """How many samples make a step, how many steps make the run, and how the networks run."""

    samples_per_pass: int
    """Over all processes; one pass is one forward and backward of the loss."""
    samples_per_step: int
    max_train_steps: int
    arithmetic: StepArithmetic
    execution: Execution


def plan_steps(
    args: argparse.Namespace,
    config: dict[str, Any],
    accelerator: Accelerator,
    data: TrainingData,
    earlier: Earlier | None,
) -> Plan:
    samples_per_pass = args.train_batch_size * accelerator.num_processes
    samples_per_step = samples_per_pass * args.gradient_accumulation_steps
    steps = args.max_train_steps
    if steps is None:
        steps = count_steps(args.num_train_epochs, data.num_images, samples_per_step, earlier)
    arithmetic = step_arithmetic(
        config,
        resolution=args.resolution,
        pgd_steps=0 if args.gaussian_noise else args.pgd_steps,
        lpips_net=args.lpips_net if args.lpips_weight else None,
        originality=args.originality_weight > 0,
    )
    execution = choose_execution(
        accelerator.device,
        precision=args.mixed_precision,
        torch_compile=args.torch_compile,
        force_upcast=config["force_upcast"],
        flops=arithmetic.image * steps * samples_per_step / accelerator.num_processes,
    )
    return Plan(samples_per_pass, samples_per_step, steps, arithmetic, execution)


def count_steps(epochs: int, num_images: int | None, samples_per_step: int, earlier: Earlier | None) -> int:
    """Returns the steps of the whole run, those before a resume included: they may have had another number of samples.

    Raises:
        UserError: for a stream, and if the resumed run has made more epochs already.
    """
    if num_images is None:
        raise UserError("the length of a stream is not known: --max_train_steps must be given with --streaming")
    done, seen = (earlier.step, earlier.samples) if earlier else (0, 0)
    left = epochs * num_images - seen
    if (
        earlier and done and -left >= max(samples_per_step, seen / done)
    ):  # the last step of a run may go a little beyond
        raise UserError(
            f"{earlier.checkpoint} has seen {seen} images, more than --num_train_epochs {epochs} of {num_images}; "
            "raise it, or resume from an earlier checkpoint"
        )
    return done + math.ceil(max(left, 0) / samples_per_step)


def describe(
    args: argparse.Namespace, accelerator: Accelerator, data: TrainingData, plan: Plan, earlier: Earlier | None
) -> str:
    """The resolved configuration and the arithmetic of a step."""
    arithmetic = plan.arithmetic
    done, before = (earlier.step, earlier.samples) if earlier else (0, 0)
    seen = before + plan.samples_per_step * (plan.max_train_steps - done)
    epochs = f", {seen / data.num_images:.2f} epochs" if data.num_images else ""
    settings = "\n".join(f"  {name:<32}{value}" for name, value in sorted(json_arguments(args).items()))
    launched = "".join(f"{note}\n" for note in launch_notes(os.environ, args))
    return (
        f"Configuration\n{settings}\n{launched}"
        f"Device {accelerator.device}, {accelerator.num_processes} process(es), {plan.execution}\n"
        f"Data: {'; '.join([data.description, *data.passed_over])}\n"
        f"Step: {args.train_batch_size} images x {accelerator.num_processes} process(es) x "
        f"{args.gradient_accumulation_steps} accumulated = {plan.samples_per_step} images\n"
        f"Run: {plan.max_train_steps} steps, {seen} images{epochs}\n"
        f"Arithmetic per image\n{arithmetic.table()}\n"
        f"  {'one step':<24}{arithmetic.image * plan.samples_per_step / 1e12:>12.4f} TFLOP"
    )


# --- building -------------------------------------------------------------------------------------------


def build_accelerator(args: argparse.Namespace, config: dict[str, Any]) -> Accelerator:
    scaled = runs_in_fp16(args.mixed_precision, config["force_upcast"])
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
        ],
    )
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return accelerator


def prepare_output(args: argparse.Namespace, accelerator: Accelerator, settings: Settings) -> None:
    if accelerator.is_main_process:
        if not Checkpoints(args.output_dir).found() and args.resume_from_checkpoint in (None, "latest"):
            remove_logs(args.output_dir, args.output_dir / args.logging_dir / args.tracker_project_name)
        judged = judged_with(settings)
        remove_results_of_others(args.output_dir, judged)
        record = {**asdict(settings), "judged_with": judged, "versions": package_versions()}
        write_text_atomically(args.output_dir / ARGUMENTS_FILE, json.dumps(record, indent=1) + "\n")
    accelerator.wait_for_everyone()
    if args.report_to != "none":
        tracked = {name: value for name, value in json_arguments(args).items() if value is not None}
        tracked["save_variant"] = " ".join(args.save_variant)  # TensorBoard takes no lists
        accelerator.init_trackers(args.tracker_project_name, config=tracked)


def judged_with(settings: Settings) -> dict[str, Any]:
    """Returns what the original VAE's results depend on."""
    flags = {name: settings.arguments[name] for name in ("epsilon", "seed")}
    flags["lpips"] = settings.arguments["lpips_net"] if settings.arguments["lpips_weight"] else None
    inputs = {} if settings.inputs is None else asdict(settings.inputs)
    inputs.pop("training_images", None)
    return {**flags, **inputs}


def remove_results_of_others(output_dir: Path, judged: dict[str, Any]) -> None:
    """Removes `results.json` unless the last command here judged in the same way: a resume would keep its rows."""
    try:
        same = read_json(output_dir / ARGUMENTS_FILE).get("judged_with") == judged
    except (UserError, OSError, AttributeError):  # none, or damaged
        same = False
    if not same:
        (output_dir / "results.json").unlink(missing_ok=True)


def remove_logs(output_dir: Path, tracked: Path) -> None:
    """Removes what an earlier run logged in the same folder: TensorBoard would draw both runs as one.

    The numbers of that run stay in its `metrics.jsonl` until this one begins. Folders elsewhere are shared with others.
    """
    (output_dir / "hub.log").unlink(missing_ok=True)
    if tracked.resolve().is_relative_to(output_dir.resolve()):
        for events in tracked.rglob("events.out.tfevents.*"):
            events.unlink()


def open_repository(args: argparse.Namespace, accelerator: Accelerator) -> Publisher | None:
    """Before anything takes long, so that a bad token or name is known at once; the main process alone publishes."""
    if not args.push_to_hub or args.dry_run or not accelerator.is_main_process:
        return None
    name = args.hub_model_id or args.output_dir.resolve().name
    repo_id = create_repository(name, token=args.hub_token, private=args.hub_private_repo)
    return Publisher(repo_id, args.output_dir, token=args.hub_token, private=args.hub_private_repo)


def build_step(args: argparse.Namespace, accelerator: Accelerator, vae: AutoencoderKL, execution: Execution) -> Step:
    """Sets up the networks and what is done with them."""
    perceptual = load_perceptual_distance(args.lpips_net) if args.lpips_weight else None
    loss = ReconstructionLoss(perceptual, weight=args.lpips_weight).to(accelerator.device)
    vae.to(accelerator.device)
    if args.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    networks = build_networks(
        vae,
        loss,
        autocast_dtype=execution.autocast_dtype,
        torch_compile=execution.torch_compile,
        wrap=accelerator.prepare_model,
    )
    return Step(
        networks=networks,
        attack=attack_config(args),
        noise=args.gaussian_noise,
        originality_weight=args.originality_weight,
        latent_scale=LatentScale.of(vae.config).factor_on(networks.device)
        if args.originality_units == "scaled"
        else 1.0,
        sample_posterior=args.sample_posterior,
        attack_batch_size=args.attack_batch_size,
    )


def build_optimizer(
    args: argparse.Namespace, accelerator: Accelerator, encoder: LatentEncoder, plan: Plan
) -> tuple[AcceleratedOptimizer, torch.optim.lr_scheduler.LambdaLR, EMAModel | None]:
    learning_rate = args.learning_rate * (plan.samples_per_step if args.scale_lr else 1)
    optimizer = adamw_class(args)(
        encoder.parameters(),
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
    ema = EMAModel(encoder.parameters()) if args.use_ema else None
    if ema is not None:
        ema.to(accelerator.device)
    return accelerator.prepare_optimizer(optimizer), scheduler, ema


def adamw_class(args: argparse.Namespace) -> Callable[..., torch.optim.Optimizer]:
    if not args.use_8bit_adam:
        return partial(torch.optim.AdamW, fused=True)
    import bitsandbytes  # an optional dependency

    return bitsandbytes.optim.AdamW8bit


# --- the training loop ----------------------------------------------------------------------------------


@dataclass
class Progress:
    """Where the run is. A step whose gradient was not finite counts as a step: its samples are used up."""

    step: int = 0
    samples: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    seconds: float = 0.0
    """In the steps alone, over all the sessions of the run."""
    first_steps: float = 0.0
    """Of them, in the first step of each session, where compiling happens."""
    waiting: float = 0.0
    """Of them, waiting for images."""

    def state_dict(self) -> dict[str, float]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.__dict__.update(state)


@dataclass(frozen=True)
class Run:
    """All that the loop works with."""

    args: argparse.Namespace
    accelerator: Accelerator
    data: TrainingData
    plan: Plan
    step: Step
    optimizer: AcceleratedOptimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    ema: EMAModel | None
    progress: Progress
    ledger: ImageLedger
    guard: OverfittingGuard
    checkpoints: Checkpoints
    journal: Journal
    validation: Validation
    publisher: Publisher | None
    settings: Settings

    @property
    def networks(self) -> Networks:
        return self.step.networks


@dataclass(frozen=True)
class Stop:
    """Why a run ends before its last step."""

    reason: str
    exit_code: int


@dataclass(frozen=True)
class StepFacts:
    """What the host knows of a step before the device has computed it."""

    step: int
    learning_rate: float
    seconds: float
    waited: float
    bad_images: list[str]


def train(run: Run, interruption: Interruption) -> Stop | None:
    """Steps until `max_train_steps`, with validation and checkpoints; returns why it stopped earlier, if so."""
    progress = run.progress
    batches, listener = Waiting(own_batches(run)), Listener(run, interruption)
    if progress.step == 0:
        listener.validation = validate(run)
    clock = Clock(progress)
    while progress.step < run.plan.max_train_steps:
        learning_rate = float(run.scheduler.get_last_lr()[0])
        try:
            values, bad_images = optimizer_step(run, batches, interrupted=interruption.signal is not None)
        except UserError as error:
            listener.drain()
            return stop_without_data(run, error)
        seconds, waited = clock.count_step(batches)
        facts = StepFacts(progress.step, learning_rate, seconds, waited, bad_images)
        due = Due.after(run)
        stop = listener.push(facts, values, wait=any(due))
        if stop is not None:
            listener.drain()
            return stop
        if due.validation:
            listener.validation = validate(run)
            publish_snapshot(run, listener.validation)
        if due.checkpoint:
            run.checkpoints.save(run.accelerator, progress.step)
        if any(due):
            clock.restart()
    listener.drain()
    return None


def own_batches(run: Run) -> Iterator[Batch]:
    """Of this process, from where the run is."""
    return training_batches(
        run.data,
        batch_size=run.args.train_batch_size,
        rank=run.accelerator.process_index,
        world_size=run.accelerator.num_processes,
        first_position=run.progress.samples,
        num_workers=run.args.dataloader_num_workers,
        pin_memory=run.accelerator.device.type == "cuda",
    )


class Due(NamedTuple):
    """What follows a step; each of them waits for the values of all steps first."""

    end: bool
    validation: bool
    checkpoint: bool

    @classmethod
    def after(cls, run: Run) -> Due:
        step = run.progress.step
        end = step == run.plan.max_train_steps  # which `finish` validates
        return cls(end, step % run.args.validation_steps == 0 and not end, step % run.args.checkpointing_steps == 0)


class Clock:
    """Adds the seconds of each step to the progress, without what validation and checkpoints take."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.first_step = progress, progress.step + 1
        self.restart()

    def restart(self) -> None:
        self.started = time.perf_counter()

    def count_step(self, batches: Waiting) -> tuple[float, float]:
        """The seconds since the last call, and how many of them `batches` was waited for."""
        seconds, waited = time.perf_counter() - self.started, batches.take_seconds()
        self.restart()
        self.progress.seconds += seconds
        self.progress.waiting += waited
        if self.progress.step == self.first_step:
            self.progress.first_steps += seconds
        return seconds, waited


def stop_without_data(run: Run, error: UserError) -> Stop:
    """Data that give out in the middle end a single process after its last whole step, which can be saved.

    Several processes may be in different steps by then, and end as they do when one of them dies.
    """
    if isinstance(error, ResourceError) or run.accelerator.num_processes > 1:
        raise error
    return Stop(str(error), error.exit_code)


class Waiting:
    """An iterator that measures how long it is waited for."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches, self.seconds = batches, 0.0

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = next(self.batches)
        self.seconds += time.perf_counter() - started
        return batch

    def take_seconds(self) -> float:
        """Seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def optimizer_step(run: Run, batches: Waiting, *, interrupted: bool) -> tuple[Tensor, list[str]]:
    """One update of the encoder, queued on the device.

    Returns the step's values, averaged over its samples and the processes, in the order of `VALUES`, and the names of
    this process's unreadable images.
    """
    accelerator, encoder, progress = run.accelerator, run.networks.wrapped_encoder, run.progress
    passes, bad_images = [], []
    accelerator.step = 0  # counts passes; a checkpoint brings the count of a run that may have had more of them a step
    for _ in range(run.args.gradient_accumulation_steps):
        batch = next(batches)
        run.ledger.update(batch)
        bad_images += batch.bad_images
        with accelerator.accumulate(encoder):
            loss, terms = run.step.loss(batch.images, image_generators(run.args.seed, batch.positions))
            accelerator.backward(loss)
            passes.append(terms)
    gradient_norm = accelerator.clip_grad_norm_(encoder.parameters(), run.args.max_grad_norm)
    update_weights(run, gradient_norm)
    run.optimizer.zero_grad()
    run.scheduler.step()
    if run.ema is not None:
        run.ema.step(run.networks.encoder.parameters())
    progress.step += 1
    progress.samples += run.plan.samples_per_step
    others = [torch.full_like(gradient_norm, float(value)) for value in (interrupted, len(bad_images))]
    values = torch.cat([torch.stack(passes).mean(dim=0), torch.stack([gradient_norm, *others])])
    return accelerator.reduce(values, reduction="mean"), bad_images


VALUES = (*TERMS, "gradient_norm", "interrupted", "bad_images")


def update_weights(run: Run, gradient_norm: Tensor) -> None:
    """A step of the optimizer, unless the gradient is not finite."""
    if run.accelerator.scaler is not None:  # skips by itself, and learns from it
        run.optimizer.step()
    elif run.args.use_8bit_adam:
        if torch.isfinite(gradient_norm):  # this optimizer has to be told by the host, which waits for the answer
            run.optimizer.step()
    else:
        # What a gradient scaler tells torch's fused optimizers: on the device, nobody waits.
        run.optimizer.optimizer.found_inf = 1.0 - torch.isfinite(gradient_norm).float()
        run.optimizer.step()


class Listener:
    """Writes down what has come of each step, and finds reasons to stop in it.

    The host hears of a step's values while the device computes the next one, so a reason that is in them ends the run
    one step later.
    """

    def __init__(self, run: Run, interruption: Interruption) -> None:
        self.run, self.interruption = run, interruption
        self.validation: dict[str, float] = {}
        """The last one's values, for the progress bar."""
        self.bar = progress_bar(
            run.plan.max_train_steps,
            desc="training",
            unit="step",
            initial=run.progress.step,
            disable=not run.accelerator.is_local_main_process,
        )
        self._readback: Readback[StepFacts] = Readback()

    def push(self, facts: StepFacts, values: Tensor, *, wait: bool) -> Stop | None:
        """Takes a step's `VALUES`; returns the first reason to stop in those heard of so far, with `wait` in all."""
        arrived = self._readback.push(facts, values)
        return self._first_reason(arrived + self._readback.drain() if wait else arrived)

    def drain(self) -> Stop | None:
        """Waits for the values that are still on their way, which are the last ones: the bar stays as they leave it."""
        reason = self._first_reason(self._readback.drain())
        self.bar.close()
        return reason

    def _first_reason(self, arrived: list[tuple[StepFacts, list[float]]]) -> Stop | None:
        reasons = [self._hear(facts, dict(zip(VALUES, numbers, strict=True))) for facts, numbers in arrived]
        return next((reason for reason in reasons if reason is not None), None)

    def _hear(self, facts: StepFacts, values: dict[str, float]) -> Stop | None:
        run, progress = self.run, self.run.progress
        interrupted, bad_images = values.pop("interrupted") > 0, values.pop("bad_images") > 0
        if bad_images:
            run.ledger.add(gather_object(facts.bad_images))
        finite = math.isfinite(values["gradient_norm"])
        progress.skipped += not finite
        progress.skipped_in_row = 0 if finite else progress.skipped_in_row + 1
        if finite:
            run.guard.count(values["attacked_psnr"])
        values |= {
            "learning_rate": facts.learning_rate,
            "skipped_steps": progress.skipped,
            "images_per_second": run.plan.samples_per_step / facts.seconds,
            "data_wait": facts.waited / facts.seconds,
        }
        run.journal.write(facts.step, values)
        self.bar.set_postfix_str(postfix(values, self.validation), refresh=False)
        self.bar.update()
        return reason_to_stop(run, facts.step, self.interruption if interrupted else None)


def judged_weights(run: Run) -> AbstractContextManager[None]:
    """Within, what is measured and saved are the weights that the run is after: the average, where one is kept."""
    return averaged_weights(run.ema, run.networks.encoder)


def validate(run: Run) -> dict[str, float]:
    with judged_weights(run):
        values = run.validation.measure_progress(run.progress.step)
    run.journal.write(run.progress.step, values)
    warning = run.guard.judge(values[f"validation/{run.validation.attack.name}/psnr"])
    if warning is not None:
        run.accelerator.print(f"Warning, step {run.progress.step}: {warning}")
    return values


def postfix(values: dict[str, float], validation: dict[str, float]) -> str:
    """Loss terms, PSNR of the attacked training images, validation PSNR, speed: for the progress bar."""
    parts = [f"{name} {values[name]:.4f}" for name in ("loss", "mse", "lpips", "originality")]
    parts.append(f"attacked {values['attacked_psnr']:.2f} dB")
    measured = [f"{name.split('/')[1]} {value:.2f}" for name, value in validation.items() if name.endswith("psnr")]
    if measured:
        parts.append(f"validation {', '.join(measured)} dB")
    return ", ".join([*parts, f"{values['images_per_second']:.1f} img/s"])


def reason_to_stop(run: Run, step: int, interruption: Interruption | None) -> Stop | None:
    """Why the run should end after what was heard of `step`, if it should."""
    progress = run.progress
    try:
        run.ledger.check(run.args.max_bad_images)
    except UserError as error:
        return Stop(str(error), error.exit_code)
    if progress.skipped_in_row >= MAX_SKIPPED_IN_ROW:
        first = step - progress.skipped_in_row + 1
        reason = f"the gradient has not been finite since step {first} ({progress.skipped} steps skipped in all)"
        return Stop(f"{reason}; a lower --learning_rate or --mixed_precision no may help", EXIT_NOT_FINITE)
    if interruption is not None:
        number = interruption.signal or signal.SIGTERM  # None where only another process got the signal
        return Stop(f"stopped by {signal.Signals(number).name} at step {progress.step}", 128 + number)
    return None


# --- beginning and end ----------------------------------------------------------------------------------


def build_run(
    args: argparse.Namespace,
    accelerator: Accelerator,
    vae: AutoencoderKL,
    data: TrainingData,
    plan: Plan,
    publisher: Publisher | None,
    settings: Settings,
) -> Run:
    original = frozen_codec(copy.deepcopy(vae), ORIGINAL, device=accelerator.device)
    step = build_step(args, accelerator, vae, plan.execution)
    networks = step.networks
    optimizer, scheduler, ema = build_optimizer(args, accelerator, networks.encoder, plan)
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
        step=step,
        optimizer=optimizer,
        scheduler=scheduler,
        ema=ema,
        progress=progress,
        ledger=ledger,
        guard=guard,
        checkpoints=Checkpoints(
            args.output_dir, args.checkpoints_total_limit, state_bytes(networks.vae, networks.encoder, ema)
        ),
        journal=Journal(accelerator, args.output_dir / "metrics.jsonl"),
        validation=build_validation(args, accelerator, original, networks, data),
        publisher=publisher,
        settings=settings,
    )


def build_validation(
    args: argparse.Namespace, accelerator: Accelerator, original: Codec, networks: Networks, data: TrainingData
) -> Validation:
    """Return what measures the VAE being trained beside the original one, both in float32."""
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


def resume(run: Run, earlier: Earlier | None) -> None:
    if earlier is None:
        if run.args.resume_from_checkpoint is not None:
            run.accelerator.print(f"no checkpoint in {run.args.output_dir} yet: starting from the beginning")
        return
    with own_hyperparameters(run.optimizer, run.scheduler):
        load_checkpoint(run.accelerator, earlier.checkpoint)
    if any(
        change.name in {*TRAINING_DATA, TRAINING_IMAGES} and change.step == earlier.step
        for change in run.settings.changes
    ):
        run.ledger.load_state_dict({**run.ledger.state_dict(), "read": 0, "bad_images": []})  # those of other images
    if run.accelerator.is_main_process and run.args.resume_from_checkpoint == "latest":  # else there is a later one
        run.checkpoints.tidy(earlier.checkpoint)
    run.accelerator.print(f"continuing from {earlier.checkpoint}, after step {run.progress.step}")


def begin_records(run: Run) -> int:
    """Takes back the rows and pictures in the folder that are not of this run's steps so far.

    Returns the step up to which they stay: 0 for a new run and for one that goes on from another folder's checkpoint.
    Weights stay until new ones are saved.
    """
    here, named = run.args.output_dir.resolve(), run.args.resume_from_checkpoint
    elsewhere = named not in (None, "latest") and Path(named).exists() and Path(named).resolve().parent != here
    step = 0 if elsewhere else run.progress.step
    if run.accelerator.is_main_process:
        for place in run.checkpoints.set_aside(step):
            print(
                f"{place.name.removeprefix('abandoned-')} is later than step {step} and of no use to this run: now {place}"
            )
    run.journal.begin(step)
    run.validation.begin(step)
    return step


def save_and_stop(run: Run, stop: Stop) -> int:
    checkpoint = run.checkpoints.save(run.accelerator, run.progress.step)
    if run.publisher is not None:
        run.publisher.close()
    run.accelerator.end_training()
    run.accelerator.print(
        f"{stop.reason}; saved {checkpoint}. To continue, run the same command with --resume_from_checkpoint latest"
    )
    return stop.exit_code


def finish(run: Run) -> int:
    """Saves the drop-in first, then judges it, writes the card, and pushes last."""
    args = run.args
    with judged_weights(run):
        if run.accelerator.is_main_process:
            save_drop_in(run.networks.vae, args.output_dir, variants=args.save_variant)
    validate(run)
    with judged_weights(run):
        table = run.validation.measure_result()
    variants = "".join(judge_variant(run, variant) for variant in args.save_variant)
    write_card(run, args.output_dir, saved=[WEIGHTS_NAME, *map(variant_name, args.save_variant)])
    run.accelerator.end_training()
    run.accelerator.print(f"\n{table}\n{variants}\n{time_summary(run.progress)}")
    left_out = "; ".join(filter(None, [run.ledger.summary(), *run.data.passed_over]))
    run.accelerator.print(f"Saved to {args.output_dir}. {left_out}".rstrip())
    return publish_result(run)


def time_summary(progress: Progress) -> str:
    """One line on where the training's time went, validation and checkpoints left out."""
    if progress.seconds == 0:
        return "No steps were left to make."
    return (
        f"The steps took {progress.seconds:.1f} s, {progress.first_steps:.1f} s of them the first step with its warm-up; "
        f"{progress.waiting / progress.seconds:.1%} of the time was spent waiting for images."
    )


def judge_variant(run: Run, variant: str) -> str:
    """One line on what half-precision weights cost, measured on the saved file as diffusers would run it."""
    source = AutoencoderSource(pretrained_model_name_or_path=str(run.args.output_dir), variant=variant)
    vae: AutoencoderKL = load_autoencoder(source).to(run.accelerator.device)
    codec = Codec.of(vae, f"{FINE_TUNED}-{variant}", autocast_dtype=inference_dtype(vae.config, variant))
    difference = run.validation.measure_variant(codec)
    advice = "" if abs(difference) < MAX_VARIANT_DIFFERENCE else "; prefer the full weights"
    return f"\nThe {variant} variant's clean PSNR differs by {difference:+.3f} dB{advice}.\n"


def publish_snapshot(run: Run, validation: dict[str, float]) -> None:
    """With --hub_strategy checkpoint: the validated weights, as a commit that is made while the training goes on."""
    if run.publisher is None or run.args.hub_strategy != "checkpoint":
        return

    def save(folder: Path) -> None:
        folder.mkdir(parents=True)
        with judged_weights(run):
            save_drop_in(run.networks.vae, folder)
        for name in ("metrics.jsonl", "results.json"):
            shutil.copy(run.args.output_dir / name, folder)
        write_card(run, folder, saved=[WEIGHTS_NAME])

    measured = ", ".join(
        f"{name.split('/')[1]} {value:.2f} dB" for name, value in validation.items() if name.endswith("psnr")
    )
    run.publisher.publish_snapshot(save, f"Step {run.progress.step}: {measured}")


def publish_result(run: Run) -> int:
    if run.publisher is None or run.publisher.publish_result():
        return 0
    print(
        f"the push failed; everything is saved in {run.args.output_dir}. To finish it: "
        f"{run.publisher.command_to_finish()}",
        file=sys.stderr,
    )
    return EXIT_PUSH_FAILED


def write_card(run: Run, folder: Path, *, saved: Sequence[str] = ()) -> None:
    """The model card, with what is known now: before the training, the original VAE's results.

    `saved` are the weights in `folder` that it describes; those that an earlier run left there are none of them.
    """
    if not run.accelerator.is_main_process:
        return
    args = run.args
    picture = Path("samples", COMPARISON)
    facts = CardFacts(
        model_id=run.publisher.repo_id if run.publisher else args.output_dir.name,
        base_model=args.pretrained_model_name_or_path,
        base_license=base_license(args.pretrained_model_name_or_path),
        subfolder=args.subfolder,
        data=run.data.description,
        dataset=None
        if args.dataset_name in (None, PHOTOGRAPHS) or Path(args.dataset_name).exists()
        else args.dataset_name,
        resolution=args.resolution,
        num_validation_images=len(run.data.validation_images),
        steps=run.progress.step,
        images_per_step=run.plan.samples_per_step,
        images=run.progress.samples,
        changes=told(run.settings.changes),
        hardware=hardware(run.accelerator),
        minutes=run.progress.seconds / 60,
        command=training_command(args),
        arguments=json.dumps(published_arguments(args), indent=1),
        versions=package_versions(),
        original_vae=ORIGINAL,
        judged_vae=FINE_TUNED,
        results=run.validation.rows,
        results_table=run.validation.table(),
        picture=str(picture) if (folder / picture).exists() else None,
        weights={name: checksum(folder / name) for name in saved},
    )
    write_text_atomically(folder / "README.md", render_card(facts))


def hardware(accelerator: Accelerator) -> str:
    """What the training runs on, such as `2 x NVIDIA H200`."""
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes} x {torch.cuda.get_device_name()}"
    return f"{accelerator.num_processes} x {accelerator.device.type.upper()} ({torch.get_num_threads()} threads)"


def package_versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "diffusers", "accelerate", "datasets")}


# --- arguments ------------------------------------------------------------------------------------------


def parse_args(arguments: list[str] | None = None, environment: Environment = os.environ) -> argparse.Namespace:
    """Return the arguments of a run.

    Args:
        arguments: the command line, by default that of this process.
        environment: where accelerate's settings stand; they take the place of flags that are not given.

    Raises:
        UserError: in one line.
    """
    parser = Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for add_group in (
        add_model_arguments, add_data_arguments, add_method_arguments, add_loop_arguments, add_optimizer_arguments,
        add_precision_arguments, add_state_arguments, add_logging_arguments, add_hub_arguments,
    ):  # fmt: skip
        add_group(parser)
    recipe = parser.parse_known_args(arguments)[0].recipe
    parser.set_defaults(**RECIPES[recipe])
    args = parser.parse_args(arguments)
    vars(args).update(launched_arguments(environment, parser.given))
    if args.dataset_name is not None and args.train_data_dir is not None:
        print(f"--train_data_dir {args.train_data_dir} is ignored: --dataset_name overrides it", file=sys.stderr)
        args.train_data_dir = None
    parser.refuse_without_effect(args, training_effects(args))
    return args


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Model")
    group.add_argument(
        "--pretrained_model_name_or_path",
        type=home_expanded,
        default="stabilityai/sd-vae-ft-mse",
        help="Hub id or folder of an AutoencoderKL, or of a pipeline together with --subfolder vae",
    )
    group.add_argument("--subfolder", default=None, help="folder of the VAE inside the model repository")
    group.add_argument("--revision", default=None, help="branch, tag or commit on the Hub")
    group.add_argument("--variant", default=None, help="variant of the weight files, such as fp16")
    group.add_argument(
        "--cache_dir", type=home_expanded, default=None, help="where downloaded models and datasets are kept"
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Data")
    group.add_argument(
        "--dataset_name",
        type=home_expanded,
        default=None,
        help="Hub dataset, local dataset folder, or scikit-image for the photographs that ship inside it",
    )
    group.add_argument("--dataset_config_name", default=None, help="configuration of the Hub dataset")
    group.add_argument(
        "--train_split", default="train", help="split of the dataset to train on, or a part: train[:90%%]"
    )
    group.add_argument(
        "--train_data_dir",
        type=home_expanded,
        default=None,
        help="folder of images (nested) or of webdataset *.tar files; ignored beside --dataset_name",
    )
    group.add_argument("--image_column", default="image", help="column of the dataset that holds the image")
    group.add_argument("--streaming", action="store_true", help="read the dataset as a stream, without downloading it")
    group.add_argument("--max_train_samples", type=positive_int, default=None, help="use only that many images")
    group.add_argument(
        "--validation_data_dir", type=home_expanded, default=None, help="folder of images to validate on"
    )
    group.add_argument(
        "--validation_split",
        default=None,
        help="split of the dataset to validate on, or the share of the training images to hold out, such as 0.05",
    )
    group.add_argument("--resolution", type=image_side, default=256, help="side of the training images in pixels")
    group.add_argument("--center_crop", action="store_true", help="instead of random resized crops")
    group.add_argument("--random_flip", action="store_true", help="mirror half of the training images")
    group.add_argument("--dataloader_num_workers", type=non_negative_int, default=0, help="worker processes for images")
    group.add_argument(
        "--max_bad_images", type=fraction, default=0.05, help="share of unreadable images at which the run stops"
    )


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("SRL-VAE")
    group.add_argument(
        "--recipe",
        choices=sorted(RECIPES),
        default="paper",
        help="values of other flags, each of which can still be given: the paper's, or ones that are robust sooner",
    )
    group.add_argument(
        "--epsilon", type=pixel_distance, default=8 / 255, help="L-inf budget, units of a [0,1] image; 8/255 or 0.0314"
    )
    group.add_argument("--pgd_steps", type=non_negative_int, default=10, help="steps of the attack; 0 means no attack")
    group.add_argument(
        "--gaussian_noise",
        type=pixel_distance,
        default=0.0,
        help="white noise of this standard deviation instead of an attack, such as 8/255: a control",
    )
    group.add_argument("--pgd_step_size", type=pixel_distance, default=0.02, help="units of a [0,1] image")
    group.add_argument("--no_pgd_random_start", action="store_true", help="start the attack at the clean image")
    group.add_argument(
        "--lpips_weight",
        type=non_negative_float,
        default=1.0,
        help="lambda, weight of LPIPS in the attack and in the loss; 0 switches it off and loads nothing",
    )
    group.add_argument("--lpips_net", choices=sorted(LPIPS_TRUNKS), default="vgg", help="trunk of LPIPS")
    group.add_argument(
        "--originality_weight", type=non_negative_float, default=0.01, help="alpha, weight of the originality loss"
    )
    group.add_argument(
        "--originality_units",
        choices=("raw", "scaled"),
        default="raw",
        help="latents as they are, or at the scale of the denoiser so that one alpha suits every VAE",
    )
    group.add_argument("--sample_posterior", action="store_true", help="sample the latent instead of taking its mean")
    group.add_argument("--validation_steps", type=positive_int, default=100, help="validate every that many steps")
    group.add_argument("--num_validation_images", type=positive_int, default=16, help="held-out images to validate on")
    group.add_argument(
        "--dry_run", action="store_true", help="check everything, print configuration and arithmetic of a step, stop"
    )


def add_loop_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Loop")
    group.add_argument("--train_batch_size", type=positive_int, default=16, help="images per process and pass")
    group.add_argument("--num_train_epochs", type=positive_int, default=1)
    group.add_argument("--max_train_steps", type=positive_int, default=None, help="overrides --num_train_epochs")
    group.add_argument("--gradient_accumulation_steps", type=positive_int, default=1, help="passes per update")
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory, more time")
    group.add_argument(
        "--attack_batch_size", type=positive_int, default=None, help="attack that many images at a time, to save memory"
    )
    group.add_argument("--seed", type=seed, default=0, help="of every random draw")


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Optimiser")
    group.add_argument("--learning_rate", type=non_negative_float, default=1e-5)
    group.add_argument("--scale_lr", action="store_true", help="multiply the learning rate by the images per step")
    schedules = [schedule.value for schedule in SchedulerType if schedule != SchedulerType.PIECEWISE_CONSTANT]
    group.add_argument("--lr_scheduler", choices=schedules, default="constant")
    group.add_argument("--lr_warmup_steps", type=non_negative_int, default=500)
    group.add_argument("--lr_num_cycles", type=positive_int, default=1, help="restarts of cosine_with_restarts")
    group.add_argument("--lr_power", type=non_negative_float, default=1.0, help="power of the polynomial schedule")
    group.add_argument("--use_8bit_adam", action="store_true", help="8-bit AdamW of bitsandbytes")
    group.add_argument("--adam_beta1", type=decay, default=0.9)
    group.add_argument("--adam_beta2", type=decay, default=0.999)
    group.add_argument("--adam_weight_decay", type=non_negative_float, default=1e-2)
    group.add_argument("--adam_epsilon", type=non_negative_float, default=1e-8)
    group.add_argument("--max_grad_norm", type=non_negative_float, default=1.0)


def add_precision_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Precision")
    group.add_argument(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        default=None,
        help="precision of the networks (the trained weights stay float32); default: a half precision that accelerate is "
        "configured for, else what suits the device",
    )
    group.add_argument(
        "--torch_compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compile encoder and decoder; default: where the run is long enough to repay it",
    )
    group.add_argument("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere GPUs and newer")
    group.add_argument("--use_ema", action="store_true", help="keep, judge and save an average of the weights")


def add_state_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("State")
    group.add_argument("--output_dir", type=expanded_path, default=Path("srl-vae"))
    group.add_argument("--checkpointing_steps", type=positive_int, default=500, help="save every that many steps")
    group.add_argument(
        "--checkpoints_total_limit", type=positive_int, default=None, help="keep only that many, the newest"
    )
    group.add_argument(
        "--save_variant",
        nargs="+",
        choices=sorted(HALF_PRECISION),
        default=[],
        help="half-precision weights to save beside the full ones, and to measure",
    )
    group.add_argument(
        "--resume_from_checkpoint", type=home_expanded, default=None, help="latest, or the folder of a checkpoint"
    )


def add_logging_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Logging")
    group.add_argument(
        "--logging_dir", type=home_expanded, default="logs", help="folder of the trackers, inside --output_dir"
    )
    group.add_argument("--report_to", choices=("tensorboard", "wandb", "trackio", "all", "none"), default="tensorboard")
    group.add_argument("--tracker_project_name", default="srl-vae")


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Hub")
    group.add_argument("--push_to_hub", action="store_true", help="publish the result on the Hugging Face Hub")
    group.add_argument("--hub_model_id", default=None, help="repository; default: the name of --output_dir")
    group.add_argument(
        "--hub_private_repo", action="store_true", help="create it private; one that is public is made private"
    )
    group.add_argument(
        "--hub_strategy",
        choices=("end", "checkpoint"),
        default=None,
        help="push the result (end, the default), or every validated state as well, in the background (checkpoint)",
    )
    group.add_argument("--hub_token", default=None, help="default: the token of `hf auth login`")


def json_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """All arguments as JSON values, without the secret one."""
    return {
        name: one_line(str(value)) if isinstance(value, (str, Path)) else value
        for name, value in vars(args).items()
        if name != "hub_token"
    }


@cache
def recipe_arguments(recipe: str) -> dict[str, Any]:
    """What `json_arguments` are where nothing but the recipe is given."""
    return json_arguments(parse_args(["--recipe", recipe], environment={}))


def published_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that differ from the paper's or the recipe's; of a path on this machine only its last part."""
    paper, recipe = recipe_arguments("paper"), recipe_arguments(args.recipe)
    return {
        name: shortened(value)
        for name, value in json_arguments(args).items()
        if value != paper[name] or value != recipe[name]
    }


def training_command(args: argparse.Namespace) -> str:
    """The command line of this run, with the published arguments that the recipe does not imply."""
    recipe = recipe_arguments(args.recipe)
    words = ["accelerate", "launch", "train_srl_vae.py"]
    for name, value in published_arguments(args).items():
        if name == "recipe" or value != recipe[name]:
            words += words_of_flag(name, value)
    return shlex.join(words)


def words_of_flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    values = [str(part) for part in (value if isinstance(value, list) else [value])]
    if values[0].startswith("-"):  # by itself it would be read as a flag
        return [f"--{name}={values[0]}"]
    return [f"--{name}", *values]


def command_line() -> int:
    return exit_code(lambda: main(parse_args()))


if __name__ == "__main__":
    sys.exit(command_line())
