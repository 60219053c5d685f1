"""Ending a run: the drop-in, its measurement, the model card, and pushing to the Hub."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from srl_utils.files import checksum, write_text_atomically
from srl_utils.hub.card import CardFacts, base_license, render_card
from srl_utils.hub.publishing import EXIT_PUSH_FAILED
from srl_utils.images.sources import PHOTOGRAPHS
from srl_utils.resources import device_name
from srl_utils.training.checkpoints import save_drop_in
from srl_utils.training.cli.arguments import package_versions
from srl_utils.training.cli.building import FINE_TUNED, ORIGINAL
from srl_utils.training.cli.run import Progress, Run, Stop, judged_weights, validate
from srl_utils.training.resuming import told
from srl_utils.training.validation import COMPARISON
from srl_utils.vae.codec import Codec
from srl_utils.vae.loading import (
    HALF_PRECISION,
    SINGLE_FILE,
    UPDATES_NAME,
    WEIGHTS_NAME,
    AutoencoderSource,
    inference_dtype,
    load_autoencoder,
    variant_name,
)
from srl_utils.vae.single_file import model_of

MAX_VARIANT_DIFFERENCE = 0.1
"""Difference in clean PSNR, in dB, from which the full weights are recommended."""


def save_and_stop(run: Run, stop: Stop) -> int:
    """Save a checkpoint, say why the run stopped and how to continue it; return the exit code."""
    checkpoint = run.checkpoints.save(run.accelerator, run.progress.step)
    if run.publisher is not None:
        run.publisher.close()
    run.accelerator.end_training()
    run.accelerator.print(
        f"{stop.reason}; saved {checkpoint}. To continue, run the same command with --resume_from_checkpoint latest"
    )
    return stop.exit_code


def finish(run: Run) -> int:
    """Save the drop-in, measure it, write the card, push; return the exit code."""
    args = run.args
    with judged_weights(run):
        if run.accelerator.is_main_process:
            save_drop_in(run.networks.vae, args.output_dir, variants=args.save_variant)
    validate(run)
    with judged_weights(run):
        table = run.validation.measure_result()
    variants = "".join(judge_variant(run, variant) for variant in args.save_variant if variant in HALF_PRECISION)
    write_card(run, args.output_dir, saved=[*saved_weights(run), *map(variant_name, args.save_variant)])
    run.accelerator.end_training()
    run.accelerator.print(f"\n{table}\n{variants}\n{time_summary(run.progress)}")
    left_out = "; ".join(filter(None, [run.ledger.summary(), *run.data.skipped]))
    run.accelerator.print(f"Saved to {args.output_dir}. {left_out}".rstrip())
    return publish_result(run)


def time_summary(progress: Progress) -> str:
    """Return one line on the time of the steps, without validation and checkpoints."""
    if progress.seconds == 0:
        return "No steps were left to make."
    return (
        f"The steps took {progress.seconds:.1f} s, {progress.first_steps:.1f} s of them the first step with its warm-up; "
        f"{progress.waiting / progress.seconds:.1%} of the time was spent waiting for images."
    )


def judge_variant(run: Run, variant: str) -> str:
    """Return one line on the PSNR that half-precision weights cost, measured on the saved file as diffusers runs it."""
    source = AutoencoderSource(pretrained_model_name_or_path=str(run.args.output_dir), variant=variant)
    vae = load_autoencoder(source).to(run.accelerator.device)
    codec = Codec.of(vae, f"{FINE_TUNED}-{variant}", autocast_dtype=inference_dtype(vae.config, variant))
    difference = run.validation.measure_variant(codec)
    advice = "" if abs(difference) < MAX_VARIANT_DIFFERENCE else "; prefer the full weights"
    return f"\nThe {variant} variant's clean PSNR differs by {difference:+.3f} dB{advice}.\n"


def saved_weights(run: Run) -> list[str]:
    """Return the names of the files of full weights, and of low-rank updates alone, if any."""
    return [WEIGHTS_NAME] if run.args.lora_rank is None else [WEIGHTS_NAME, UPDATES_NAME]


def publish_snapshot(run: Run, validation: dict[str, float]) -> None:
    """Push the validated weights in the background, if the run publishes checkpoints."""
    if run.publisher is None or run.args.hub_strategy != "checkpoint":
        return

    def save(folder: Path) -> None:
        folder.mkdir(parents=True)
        with judged_weights(run):
            save_drop_in(run.networks.vae, folder)
        for name in ("metrics.jsonl", "results.json"):
            shutil.copy(run.args.output_dir / name, folder)
        write_card(run, folder, saved=saved_weights(run))

    measured = ", ".join(
        f"{name.split('/')[1]} {value:.2f} dB" for name, value in validation.items() if name.endswith("psnr")
    )
    run.publisher.publish_snapshot(save, f"Step {run.progress.step}: {measured}")


def publish_result(run: Run) -> int:
    """Push the result, if the run publishes; return the exit code."""
    if run.publisher is None or run.publisher.publish_result():
        return 0
    print(
        f"the push failed; everything is saved in {run.args.output_dir}. To finish it: "
        f"{run.publisher.command_to_finish()}",
        file=sys.stderr,
    )
    return EXIT_PUSH_FAILED


def write_card(run: Run, folder: Path, *, saved: Sequence[str] = ()) -> None:
    """Write the model card with what is known so far: before the training, the results of the original VAE.

    Args:
        run: its main process writes.
        folder: gets `README.md`.
        saved: weight files of this run in `folder`, whose checksums the card lists.
    """
    if not run.accelerator.is_main_process:
        return
    args = run.args
    picture = Path("samples", COMPARISON)
    facts = CardFacts(
        model_id=run.publisher.repo_id if run.publisher else args.output_dir.name,
        base_model=args.pretrained_model_name_or_path,
        vae_class=type(run.networks.vae).__name__,
        family=model_of(run.networks.vae.config) if SINGLE_FILE in args.save_variant else None,
        base_license=base_license(args.pretrained_model_name_or_path),
        subfolder=args.subfolder,
        data=run.data.description,
        dataset=None
        if args.dataset_name in (None, PHOTOGRAPHS) or Path(args.dataset_name).exists()
        else args.dataset_name,
        resolution=args.resolution,
        num_frames=args.num_frames,
        objective=args.objective,
        lora_rank=args.lora_rank,
        num_validation_images=len(run.data.validation_images),
        steps=run.progress.step,
        images_per_step=run.plan.samples_per_step,
        images=run.progress.samples,
        changes=told(run.settings.changes),
        hardware=hardware(run.accelerator),
        minutes=run.progress.seconds / 60,
        command=run.command.line,
        arguments=json.dumps(run.command.arguments, indent=1),
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
    """Return what the training runs on, such as `2 x NVIDIA H200`."""
    return f"{accelerator.num_processes} x {device_name(accelerator.device)}"
