"""Beginning or resuming a run: the checkpoint, the output folder, the repository on the Hub."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import ModelMixin

from srl_utils.errors import UserError
from srl_utils.files import read_json, write_text_atomically
from srl_utils.hub.publishing import Publisher, create_repository
from srl_utils.images.datasets import TrainingData
from srl_utils.training.checkpoints import ARGUMENTS_FILE, Checkpoints, load_checkpoint
from srl_utils.training.cli.arguments import json_arguments, package_versions
from srl_utils.training.cli.planning import Plan
from srl_utils.training.cli.run import Run
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
    told,
)


def find_earlier(args: argparse.Namespace) -> Earlier | None:
    """Return where the run resumes; None for a new run, and for `latest` if there is no checkpoint yet.

    Raises:
        UserError: if there is no such checkpoint, or if a flag differs that a resumed run cannot change.
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
    vae: ModelMixin,
    data: TrainingData,
    plan: Plan,
    earlier: Earlier | None,
) -> Settings:
    """Return what the run is asked for and what a resume changes; print the changes.

    Raises:
        UserError: if the original VAE or the validation images are not those of the resumed run.
    """
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


def prepare_output(args: argparse.Namespace, accelerator: Accelerator, settings: Settings) -> None:
    """Write the arguments into the output folder, remove what other runs left there, and start the trackers."""
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
    """Return everything that the results of the original VAE depend on."""
    flags = {name: settings.arguments[name] for name in ("epsilon", "seed")}
    flags["lpips"] = settings.arguments["lpips_net"] if settings.arguments["lpips_weight"] else None
    inputs = {} if settings.inputs is None else asdict(settings.inputs)
    inputs.pop("training_images", None)
    return {**flags, **inputs}


def remove_results_of_others(output_dir: Path, judged: dict[str, Any]) -> None:
    """Remove `results.json` unless the last command in this folder measured in the same way; a resume keeps its rows."""
    try:
        same = read_json(output_dir / ARGUMENTS_FILE).get("judged_with") == judged
    except (UserError, OSError, AttributeError):  # none, or damaged
        same = False
    if not same:
        (output_dir / "results.json").unlink(missing_ok=True)


def remove_logs(output_dir: Path, tracked: Path) -> None:
    """Remove the logs of an earlier run from the same folder, since TensorBoard would draw both runs as one.

    Its numbers stay in `metrics.jsonl` until this run begins. Folders outside `output_dir` may be shared and stay.
    """
    (output_dir / "hub.log").unlink(missing_ok=True)
    if tracked.resolve().is_relative_to(output_dir.resolve()):
        for events in tracked.rglob("events.out.tfevents.*"):
            events.unlink()


def open_repository(args: argparse.Namespace, accelerator: Accelerator) -> Publisher | None:
    """Create the repository on the Hub in the main process, early, so that a bad token or name shows at once."""
    if not args.push_to_hub or args.dry_run or not accelerator.is_main_process:
        return None
    name = args.hub_model_id or args.output_dir.resolve().name
    repo_id = create_repository(name, token=args.hub_token, private=args.hub_private_repo)
    return Publisher(repo_id, args.output_dir, token=args.hub_token, private=args.hub_private_repo)


def resume(run: Run, earlier: Earlier | None) -> None:
    """Load the state of the checkpoint that the run resumes from, if any."""
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
    """Remove rows and pictures from the output folder that do not belong to the steps of this run so far.

    Weights stay until new ones are saved.

    Returns:
        The step up to which they stay: 0 for a new run, and for a run that resumes from another folder's checkpoint.
    """
    here, named = run.args.output_dir.resolve(), run.args.resume_from_checkpoint
    elsewhere = named not in (None, "latest") and Path(named).exists() and Path(named).resolve().parent != here
    step = 0 if elsewhere else run.progress.step
    if run.accelerator.is_main_process:
        for place in run.checkpoints.set_aside(step):
            print(
                f"{place.name.removeprefix('abandoned-')} is later than step {step} and not part of this run; renamed to {place}"
            )
    run.journal.begin(step)
    run.validation.begin(step)
    return step
