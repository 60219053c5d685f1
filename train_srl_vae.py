#!/usr/bin/env python
"""Fine-tune the encoder of a diffusers autoencoder against adversarial perturbations: SRL-VAE (arXiv 2504.17219).

    accelerate launch train_srl_vae.py --train_data_dir photos --resolution 256 --output_dir srl-vae

One step, for images x, the encoder E being trained, its frozen original E0 and the frozen decoder D:

    delta     = argmax over |delta| <= epsilon of  MSE(D(E(x + delta)), x) + lambda LPIPS(D(E(x + delta)), x)
    L_robust  = MSE(D(E(x + delta)), x) + lambda LPIPS(D(E(x + delta)), x)
    L_orig    = |mean E(x) - mean E0(x)|^2 + |variance E(x) - variance E0(x)|^2
    E        <- E - gradient of  L_robust + alpha L_orig

`optimizer_step` below makes this update; `srl_utils/training/step.py` has the attack and the loss. Every random draw is
a function of --seed and of the image's place in the run, so neither the number of processes nor an interruption changes
the result.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin
from diffusers.optimization import SchedulerType
from torch import Tensor

from srl_utils.attacks.draws import image_generators
from srl_utils.command_line import (
    Parser,
    decay,
    exit_code,
    expanded_path,
    fraction,
    image_side,
    message_of,
    non_negative_float,
    non_negative_int,
    pixel_distance,
    positive_int,
    seed,
)
from srl_utils.errors import ResourceError, UserError
from srl_utils.files import home_expanded, sole_run
from srl_utils.images.datasets import open_flagged_data
from srl_utils.images.loading import Batch, training_batches
from srl_utils.images.sources import DataSource
from srl_utils.launching import Environment, check_launch, launched_arguments, on_cpu
from srl_utils.metrics.losses import LPIPS_TRUNKS
from srl_utils.training.checkpoints import Checkpoints
from srl_utils.training.cli.arguments import PublishedCommand, autoencoder_source, json_arguments, published_command
from srl_utils.training.cli.beginning import (
    begin_records,
    find_earlier,
    open_repository,
    prepare_output,
    resume,
    settle_settings,
)
from srl_utils.training.cli.building import build_accelerator, build_run
from srl_utils.training.cli.finishing import finish, publish_snapshot, save_and_stop, write_card
from srl_utils.training.cli.flag_effects import training_effects
from srl_utils.training.cli.listener import Clock, Listener, StepFacts, Waiting
from srl_utils.training.cli.planning import attacks, check_transformed_sides, describe, plan_steps
from srl_utils.training.cli.run import Run, Stop, validate
from srl_utils.training.execution import check_execution
from srl_utils.training.interruption import Interruption
from srl_utils.training.objectives import OBJECTIVES
from srl_utils.training.resuming import Earlier
from srl_utils.vae.families import family_of
from srl_utils.vae.loading import SINGLE_FILE, VARIANTS, load_autoencoder, read_config
from srl_utils.vae.networks import check_frames, check_resolution
from srl_utils.vae.single_file import check_single_file

# Found by experiments/time_to_robustness.py, see benchmarks/RESULTS.md.
FAST: dict[str, Any] = {
    "pgd_steps": 1,
    "pgd_step_size": 10 / 255,
    "originality_units": "scaled",
    "originality_weight": 0.03,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 10,
}
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},  # the defaults of the flags
    "fast": FAST,
    # The best of the table in docs/training.md that is not slower than the paper's.
    "latent": FAST | {"pgd_steps": 3, "pgd_step_size": 4 / 255, "latent_weight": 0.3, "latent_attack_share": 0.5},
}

# --- flags ----------------------------------------------------------------------------------------------


def parse_args(arguments: list[str] | None = None, environment: Environment = os.environ) -> argparse.Namespace:
    """Return the arguments of a run.

    Args:
        arguments: the command line; by default that of this process.
        environment: holds accelerate's settings, which replace flags that are not given.

    Raises:
        UserError: if a flag is unknown, has a bad value, or has no effect beside the others.
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
    add = parser.add_argument_group("Model").add_argument
    add(
        "--pretrained_model_name_or_path",
        type=home_expanded,
        default="stabilityai/sd-vae-ft-mse",
        help="Hub id or folder of a VAE of diffusers, or of a pipeline together with --subfolder vae; or a single .safetensors file",
    )
    add("--subfolder", default=None, help="folder of the VAE inside the model repository")
    add("--revision", default=None, help="branch, tag or commit on the Hub")
    add("--variant", default=None, help="variant of the weight files, such as fp16")
    add("--cache_dir", type=home_expanded, default=None, help="where downloaded models and datasets are kept")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Data").add_argument
    add(
        "--dataset_name",
        type=home_expanded,
        default=None,
        help="Hub dataset, local dataset folder, or scikit-image for the photographs that ship inside it",
    )
    add("--dataset_config_name", default=None, help="configuration of the Hub dataset")
    add("--train_split", default="train", help="split of the dataset to train on, or a part: train[:90%%]")
    add(
        "--train_data_dir",
        type=home_expanded,
        default=None,
        help="folder of images (nested) or of webdataset *.tar files; ignored beside --dataset_name",
    )
    add("--image_column", default="image", help="column of the dataset that holds the image")
    add("--streaming", action="store_true", help="read the dataset as a stream, without downloading it")
    add("--max_train_samples", type=positive_int, default=None, help="use only that many images")
    add("--validation_data_dir", type=home_expanded, default=None, help="folder of images to validate on")
    add(
        "--validation_split",
        default=None,
        help="split of the dataset to validate on, or the share of the training images to hold out, such as 0.05",
    )
    add("--resolution", type=image_side, default=256, help="side of the training images in pixels")
    add("--num_frames", type=positive_int, default=1, help="frames of a training clip; 1 trains on images")
    add("--center_crop", action="store_true", help="instead of random resized crops")
    add("--random_flip", action="store_true", help="mirror half of the training images")
    add("--dataloader_num_workers", type=non_negative_int, default=0, help="worker processes for images")
    add("--max_bad_images", type=fraction, default=0.05, help="share of unreadable images at which the run stops")


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("SRL-VAE").add_argument
    add(
        "--recipe",
        choices=sorted(RECIPES),
        default="paper",
        help="values of other flags, each of which can still be given: the paper's, ones that are robust sooner, or ones "
        "that guard the latents as well, which image protections attack",
    )
    add("--epsilon", type=pixel_distance, default=8 / 255, help="L-inf budget, units of a [0,1] image; 8/255 or 0.0314")
    add("--pgd_steps", type=non_negative_int, default=10, help="steps of the attack; 0 means no attack")
    add(
        "--gaussian_noise",
        type=pixel_distance,
        default=0.0,
        help="white noise of this standard deviation instead of an attack, such as 8/255: a control",
    )
    add("--pgd_step_size", type=pixel_distance, default=0.02, help="units of a [0,1] image")
    add("--no_pgd_random_start", action="store_true", help="start the attack at the clean image")
    add(
        "--lpips_weight",
        type=non_negative_float,
        default=1.0,
        help="lambda, weight of LPIPS in the attack and in the loss; 0 switches it off and loads nothing",
    )
    add("--lpips_net", choices=sorted(LPIPS_TRUNKS), default="vgg", help="trunk of LPIPS")
    add(
        "--objective",
        choices=OBJECTIVES,
        default="srl",
        help="what attack and loss are about: reconstructions of attacked images (srl), of images attacked on the original "
        "VAE (purify), of clean images beside latents that an attack does not move (trades), of images and latents that are "
        "scaled and rotated alike (equivariance), or latents of attacked images alone, without a decoder (feature)",
    )
    add("--originality_weight", type=non_negative_float, default=0.01, help="alpha, weight of the originality loss")
    add(
        "--originality_units",
        choices=("raw", "scaled"),
        default="raw",
        help="latents as they are, or at the scale of the denoiser so that one alpha suits every VAE",
    )
    add(
        "--latent_weight",
        type=non_negative_float,
        default=0.0,
        help="beta, weight of the distance of attacked images' latents from the clean ones; not in the paper",
    )
    add(
        "--latent_attack_share",
        type=fraction,
        default=0.0,
        help="share of the images whose attack maximises that distance instead of the reconstruction loss; not in the paper",
    )
    add("--sample_posterior", action="store_true", help="sample the latent instead of taking its mean")
    add(
        "--lora_rank",
        type=positive_int,
        default=None,
        help="train updates of this rank of the encoder's linear layers and convolutions (LoRA); by default, all its weights",
    )
    add("--validation_steps", type=positive_int, default=100, help="validate every that many steps")
    add("--num_validation_images", type=positive_int, default=16, help="held-out images to validate on")
    add("--dry_run", action="store_true", help="check everything, print configuration and arithmetic of a step, stop")


def add_loop_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Loop").add_argument
    add("--train_batch_size", type=positive_int, default=16, help="images per process and pass")
    add("--num_train_epochs", type=positive_int, default=1)
    add("--max_train_steps", type=positive_int, default=None, help="overrides --num_train_epochs")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="passes per update")
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    add(
        "--attack_batch_size",
        type=positive_int,
        default=None,
        help="attack that many images at a time; the update then has the peak of memory",
    )
    add("--seed", type=seed, default=0, help="of every random draw")


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Optimiser").add_argument
    add("--learning_rate", type=non_negative_float, default=1e-5)
    add("--scale_lr", action="store_true", help="multiply the learning rate by the images per step")
    schedules = [schedule.value for schedule in SchedulerType if schedule != SchedulerType.PIECEWISE_CONSTANT]
    add("--lr_scheduler", choices=schedules, default="constant")
    add("--lr_warmup_steps", type=non_negative_int, default=500)
    add("--lr_num_cycles", type=positive_int, default=1, help="restarts of cosine_with_restarts")
    add("--lr_power", type=non_negative_float, default=1.0, help="power of the polynomial schedule")
    add("--use_8bit_adam", action="store_true", help="8-bit AdamW of bitsandbytes")
    add("--adam_beta1", type=decay, default=0.9)
    add("--adam_beta2", type=decay, default=0.999)
    add("--adam_weight_decay", type=non_negative_float, default=1e-2)
    add("--adam_epsilon", type=non_negative_float, default=1e-8)
    add("--max_grad_norm", type=non_negative_float, default=1.0)


def add_precision_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Precision").add_argument
    add(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        default=None,
        help="precision of the networks (the trained weights stay float32); default: a half precision that accelerate is "
        "configured for, else what suits the device",
    )
    add(
        "--torch_compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compile encoder and decoder; default: where the run is long enough to repay it",
    )
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere GPUs and newer")
    add("--use_ema", action="store_true", help="keep, judge and save an average of the weights")


def add_state_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("State").add_argument
    add("--output_dir", type=expanded_path, default=Path("srl-vae"))
    add("--checkpointing_steps", type=positive_int, default=500, help="save every that many steps")
    add("--checkpoints_total_limit", type=positive_int, default=None, help="keep only that many, the newest")
    add(
        "--save_variant",
        nargs="+",
        choices=sorted(VARIANTS),
        default=[],
        help="weights to save beside the full ones: in half precision, measured too, or as one file for other programs",
    )
    add("--resume_from_checkpoint", type=home_expanded, default=None, help="latest, or the folder of a checkpoint")


def add_logging_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Logging").add_argument
    add("--logging_dir", type=home_expanded, default="logs", help="folder of the trackers, inside --output_dir")
    add("--report_to", choices=("tensorboard", "wandb", "trackio", "all", "none"), default="tensorboard")
    add("--tracker_project_name", default="srl-vae")


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Hub").add_argument
    add("--push_to_hub", action="store_true", help="publish the result on the Hugging Face Hub")
    add("--hub_model_id", default=None, help="repository; default: the name of --output_dir")
    add("--hub_private_repo", action="store_true", help="create it private; one that is public is made private")
    add(
        "--hub_strategy",
        choices=("end", "checkpoint"),
        default=None,
        help="push the result (end, the default), or every validated state as well, in the background (checkpoint)",
    )
    add("--hub_token", default=None, help="default: the token of `hf auth login`")


@cache
def recipe_arguments(recipe: str) -> dict[str, Any]:
    """Return `json_arguments` of a command line that gives only the recipe."""
    return json_arguments(parse_args(["--recipe", recipe], environment={}))


def published(args: argparse.Namespace, *, num_processes: int = 1) -> PublishedCommand:
    """Return the command line as the model card shows it."""
    recipes = recipe_arguments("paper"), recipe_arguments(args.recipe)
    return published_command(args, *recipes, num_processes=num_processes)


# --- main ---------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> int:
    """Train with the given flags; return the exit code."""
    vae, earlier = check(args)
    accelerator = build_accelerator(args, vae)
    publisher = open_repository(args, accelerator)
    data = open_flagged_data(args)
    plan = plan_steps(args, vae, accelerator, data, earlier)
    settings = settle_settings(args, accelerator, vae, data, plan, earlier)
    if args.dry_run:
        accelerator.print(describe(args, accelerator, data, plan, earlier))
        return 0

    accelerator.print(f"Running on {accelerator.device} in {plan.execution}")
    with sole_run(args.output_dir, is_main_process=accelerator.is_main_process):
        prepare_output(args, accelerator, settings)
        command = published(args, num_processes=accelerator.num_processes)
        run = build_run(args, accelerator, vae, data, plan, publisher, settings, command)
        run.checkpoints.check_room()
        resume(run, earlier)
        run.validation.measure_original(resumed=begin_records(run) > 0)
        write_card(run, args.output_dir)
        with Interruption() as interruption:
            stop = train(run, interruption)
        if stop is not None:
            return save_and_stop(run, stop)
        return finish(run)


# --- training -----------------------------------------------------------------------------------------


def train(run: Run, interruption: Interruption) -> Stop | None:
    """Train until `--max_train_steps` with validation and checkpoints; return the reason if it stops earlier."""
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


def optimizer_step(run: Run, batches: Waiting, *, interrupted: bool) -> tuple[Tensor, list[str]]:
    """Make one update of the encoder; it is queued on the device.

    Returns:
        The terms of the loss and `listener.OF_THE_UPDATE`, averaged over images and processes, and the names of the
        unreadable images of this process.
    """
    accelerator, method, encoder = run.accelerator, run.method, run.networks.wrapped_encoder
    passes, bad_images = [], []
    accelerator.step = 0  # passes so far; a checkpoint may bring the count of a run with more passes a step
    for _ in range(run.args.gradient_accumulation_steps):
        batch = next(batches)
        run.ledger.update(batch)
        bad_images += batch.bad_images
        with accelerator.accumulate(encoder):
            generators = image_generators(run.args.seed, batch.positions)
            clean = method.batch(batch.images, generators, batch.positions)
            attacked = method.attack(clean)  # x + delta
            loss, terms = method.loss(attacked, clean)  # L_robust + alpha L_orig (+ beta L_latent)
            accelerator.backward(loss)
            passes.append(terms)
    gradient_norm = accelerator.clip_grad_norm_(encoder.parameters(), run.args.max_grad_norm)
    update_weights(run, gradient_norm)
    run.optimizer.zero_grad()
    run.scheduler.step()
    if run.ema is not None:
        run.ema.step(run.networks.trained)
    run.progress.step += 1
    run.progress.samples += run.plan.samples_per_step
    others = [torch.full_like(gradient_norm, float(value)) for value in (interrupted, len(bad_images))]
    values = torch.cat([torch.stack(passes).mean(dim=0), torch.stack([gradient_norm, *others])])
    return accelerator.reduce(values, reduction="mean"), bad_images


def update_weights(run: Run, gradient_norm: Tensor) -> None:
    """Make the optimizer's step, unless the gradient is not finite."""
    if run.accelerator.scaler is not None:  # skips the step by itself, and lowers its scale
        run.optimizer.step()
    elif run.args.use_8bit_adam:
        if torch.isfinite(gradient_norm):  # this optimizer cannot skip on the device, so the host waits for the answer
            run.optimizer.step()
    else:
        # The flag by which a gradient scaler tells torch's fused optimizers to skip; the host does not wait.
        run.optimizer.optimizer.found_inf = 1.0 - torch.isfinite(gradient_norm).float()
        run.optimizer.step()


def own_batches(run: Run) -> Iterator[Batch]:
    """Return the batches of this process, from where the run is."""
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
    """Work that follows a step; it waits until the values of all steps are read back."""

    end: bool
    validation: bool
    checkpoint: bool

    @classmethod
    def after(cls, run: Run) -> Due:
        """Return what follows the step that the run has just made."""
        step = run.progress.step
        end = step == run.plan.max_train_steps  # `finish` validates this step
        return cls(end, step % run.args.validation_steps == 0 and not end, step % run.args.checkpointing_steps == 0)


def stop_without_data(run: Run, error: UserError) -> Stop:
    """Return the reason to stop if a single process runs out of data: its last whole step can be saved.

    Several processes may be in different steps by then, so the error ends them all.

    Raises:
        UserError: `error`, in a run of several processes or if the machine lacks something.
    """
    if isinstance(error, ResourceError) or run.accelerator.num_processes > 1:
        raise error
    return Stop(message_of(error), error.exit_code)


# --- checks before a run ------------------------------------------------------------------------------


def check(args: argparse.Namespace) -> tuple[ModelMixin, Earlier | None]:
    """Return the original VAE and where a resumed run was; refuse what cannot work before anything takes long.

    Raises:
        UserError: in one line that says what to change.
    """
    check_launch(os.environ)
    if args.output_dir.is_file():
        raise UserError(f"{args.output_dir} is a file; give a folder", parameter="output_dir")
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
    if args.objective == "trades" and args.latent_weight == 0:
        raise UserError("--objective trades needs a --latent_weight above 0: nothing else would make the VAE robust")
    objective = OBJECTIVES[args.objective]
    if args.no_pgd_random_start and objective.latent_share(args.latent_attack_share) > 0:
        raise UserError(
            "--no_pgd_random_start: an attack on latents needs a random start: at the clean image their distance has no gradient"
        )
    if args.objective == "feature" and not (attacks(args) or args.gaussian_noise):
        raise UserError("--objective feature needs an attack or --gaussian_noise: nothing else would train the VAE")
    if args.objective == "purify" and not attacks(args):
        raise UserError("--objective purify needs an attack: without one it would be --objective srl")
    check_transformed_sides(args)
    check_execution(args.mixed_precision, args.torch_compile, leave_gpu=on_cpu(os.environ))
    DataSource.from_flags(args).check()
    config = read_config(autoencoder_source(args))
    check_resolution(args.resolution, config)
    check_frames(args.num_frames, config)
    vae = load_autoencoder(autoencoder_source(args))
    if args.gradient_checkpointing and not family_of(vae).checkpointing:
        raise UserError(
            f"--gradient_checkpointing: diffusers has none that works for {type(vae).__name__}; take a smaller --train_batch_size with "
            "--gradient_accumulation_steps, or --attack_batch_size"
        )
    if args.sample_posterior and not family_of(vae).posterior:
        raise UserError(f"--sample_posterior: the encoder of {type(vae).__name__} has no posterior")
    if SINGLE_FILE in args.save_variant:
        check_single_file(vae)
    return vae, earlier


def command_line() -> int:
    """Run the command line; return the exit code."""
    return exit_code(lambda: main(parse_args()))


if __name__ == "__main__":
    sys.exit(command_line())
