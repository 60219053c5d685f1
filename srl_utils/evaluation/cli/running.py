"""Run a study, check the robustness, and write the report."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from hashlib import sha256
from importlib.metadata import version
from os.path import abspath
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from srl_utils.evaluation.cells import Job
from srl_utils.evaluation.cli.setup import Setup
from srl_utils.evaluation.perturbations import Perturbation
from srl_utils.evaluation.report.caveats import Caveat, caveat_of_precision, caveats_of_metrics, caveats_of_prompts
from srl_utils.evaluation.report.defences import defence_panels
from srl_utils.evaluation.report.document import ReportContent, write_report
from srl_utils.evaluation.report.extremes import draw_extremes
from srl_utils.evaluation.report.tables import Panel
from srl_utils.evaluation.results import Record, Rows
from srl_utils.evaluation.sanity import Check, CheckSettings, check_robustness
from srl_utils.evaluation.study import Study
from srl_utils.evaluation.tasks.base import Metrics, Task
from srl_utils.evaluation.timings import kept_timings
from srl_utils.files import read_json, sole_run, write_text_atomically
from srl_utils.resources import device_name
from srl_utils.vae.places import parse_place, resolved_commit

NOT_IN_FINGERPRINT = frozenset(
    {
        "attacks",
        "epsilons",
        "arguments",
        "dry_run",
        "output_dir",
        "batch_size",
        "no_checks",
        "num_check_images",
        "parts",
        "reference",
    }
)
"""Flags that may change between runs in one folder: stored values do not depend on them."""
Draw = Callable[[Study, Rows, Sequence[Record]], dict[str, Path]]
"""Study, rows and records to the report's pictures: PNG files by title."""


def run_study(
    args: argparse.Namespace,
    setup: Setup,
    task: Task,
    perturbations: Sequence[Perturbation],
    *,
    title: str,
    check_settings: CheckSettings | None = None,
    images: Tensor | None = None,
    prompts: Sequence[str] = (),
    draw: Draw = lambda study, rows, records: draw_extremes(study, records),
) -> ReportContent | None:
    """Run a study and write its report.

    Args:
        args: the flags of `add_shared_arguments` and `add_check_arguments`, and `threat_models`.
        setup: what is loaded.
        task: what is done with the images, and measured.
        perturbations: what is done to the images first.
        title: of the report.
        check_settings: of the robustness checks, which `args.no_checks` leaves out; None for a task without them.
        images: images of the study, `[n,3,H,W]` in [-1,1]; by default all that were loaded.
        prompts: texts that the text encoders read.
        draw: makes the report's pictures.

    Returns:
        What the report contains; None in a dry run, and in all processes but the first.
    """
    study = Study(
        accelerator=setup.accelerator,
        codecs=setup.codecs,
        perturbations=perturbations,
        threat_models=args.threat_models,
        task=task,
        images=setup.images if images is None else images,
        output_dir=args.output_dir,
        fingerprint=fingerprint(args, setup, task.metrics),
        seed=args.seed,
        batch_size=args.batch_size,
    )
    for note in setup.notes:
        setup.accelerator.print(note)
    if args.dry_run:
        setup.accelerator.print(f"Running on {used_device(setup.accelerator)}\n{describe(study)}")
        return None
    with sole_run(args.output_dir, is_main_process=setup.accelerator.is_main_process):
        records = study.run()
        if not setup.accelerator.is_main_process:
            return None
        checks = None
        if check_settings is not None:
            checks = {} if args.no_checks else run_checks(study, check_settings, num_images=args.num_check_images)
        rows = study.rows(records)
        content = ReportContent(
            title=title,
            baseline=study.baseline.name,
            vaes=[codec.name for codec in study.undefended],
            panels=panels_of_defences(args, study, rows, records),
            rows=rows,
            records=records,
            checks=checks,
            pictures=draw(study, rows, records),
            caveats=all_caveats(setup, study, prompts, max_attack_steps=getattr(args, "max_attack_steps", None)),
            notes=setup.notes,
            settings=settings(args, setup),
        )
        write_report(content, args.output_dir)
        print(f"{verdict(checks)}Report: {args.output_dir / 'report.html'}, {args.output_dir / 'report.md'}")
        return content


def panels_of_defences(args: argparse.Namespace, study: Study, rows: Rows, records: Sequence[Record]) -> list[Panel]:
    """Return the panels on purifiers, after timing those that were not timed yet; none without purifiers."""
    if not args.purifiers:
        return []
    timings = kept_timings(
        study.output_dir / "timings.json", study.codecs, study.images, seed=study.seed,
        device=used_device(study.accelerator),
    )  # fmt: skip
    return defence_panels(study.codecs, rows, records, timings)


def describe(study: Study) -> str:
    """Return what the study would compute: its size, its cost, and the title of each cell."""
    cells = list(study.cells())
    passes = sum(Job(cell, range(len(study.images))).cost(study.task.passes) for cell in cells)
    titles = "\n".join(f"  {cell.title}" for cell in cells)
    sizes = f"{len(study.images)} images, {len(study.codecs)} VAEs, {passes} passes through one, in {len(cells)} cells"
    return f"{sizes}\n{titles}"


# --- robustness checks ---


def run_checks(study: Study, settings: CheckSettings, *, num_images: int) -> dict[str, list[Check]]:
    """Check every VAE except the baseline, without purifiers, on the first `num_images` images; finished checks are read from the disk."""
    images = study.images[:num_images]
    checks = {}
    for number, codec in enumerate(study.undefended[1:], start=1):
        path = study.output_dir / "checks" / f"{number}-{settings.epsilon!r}-{len(images)}-{settings.name}.json"
        if not path.exists():
            found = check_robustness(codec, study.baseline, images, settings, seed=study.seed)
            write_text_atomically(path, json.dumps([asdict(check) for check in found], indent=1) + "\n")
        checks[codec.name] = [Check(**check) for check in read_json(path)]
    return checks


def verdict(checks: dict[str, list[Check]] | None) -> str:
    """Return one sentence on the checks by VAE; an empty text if the task has none (None)."""
    if checks is None:
        return ""
    failed = [f"{name}: {check.question}" for name, of_vae in checks.items() for check in of_vae if not check.passed]
    if failed:
        return f"{len(failed)} checks of the robustness FAILED ({'; '.join(failed)}). "
    return "All checks of the robustness passed. " if checks else "The robustness was not checked. "


# --- what the report says of the run ---


def all_caveats(setup: Setup, study: Study, prompts: Sequence[str], *, max_attack_steps: int | None) -> list[Caveat]:
    """Return what limits the numbers of this study."""
    metrics = study.task.metrics
    found = caveats_of_metrics(metrics, study.images[:1].to(setup.accelerator.device), n=len(study.images))
    found += caveat_of_precision(setup.accelerator.mixed_precision)
    if prompts:
        found += caveats_of_prompts(metrics, setup.pipeline, prompts)
    if max_attack_steps:
        found.append(
            Caveat(
                f"Published protections take at most {max_attack_steps} steps, and are weaker if their authors use more."
            )
        )
    return found


def settings(args: argparse.Namespace, setup: Setup) -> dict[str, str]:
    """Return how the study was run, for the report."""
    return {
        "command": shlex.join(["python", "-m", "srl_utils.evaluation", *args.arguments]),
        **setup.origins,
        "images": described_images(args, setup),
        "seed": str(args.seed),
        "device": used_device(setup.accelerator),
        "versions": used_versions(),
        "date": date.today().isoformat(),
    }


def described_images(args: argparse.Namespace, setup: Setup) -> str:
    """Return number, origin and size of the images or clips."""
    clips = f" clips of {setup.num_frames} frames" if setup.num_frames > 1 else ""
    place = args.dataset_name or Path(abspath(args.data_dir)).name
    return f"{len(setup.images)}{clips} from {place}, {args.resolution} px"


def used_versions() -> str:
    """Return the versions of the packages that values depend on, and of Python."""
    packages = ("torch", "diffusers", "torchmetrics", "accelerate")
    return ", ".join(f"{name} {version(name)}" for name in packages) + f", Python {platform.python_version()}"


def used_device(accelerator: Accelerator) -> str:
    """Return the number and kind of devices, and the precision."""
    device = device_name(accelerator.device)
    return f"{accelerator.num_processes} x {device}, mixed precision {accelerator.mixed_precision}"


# --- what stored values depend on ---


def fingerprint(args: argparse.Namespace, setup: Setup, metrics: Metrics) -> dict[str, object]:
    """Return all that the stored values depend on, except attacks and epsilons, which may be added later."""
    given = {name: value for name, value in sorted(vars(args).items()) if name not in NOT_IN_FINGERPRINT}
    if given.get("target"):
        files = sorted(args.target.iterdir()) if args.target.is_dir() else [args.target]
        given["target"] = digest(b"".join(file.read_bytes() for file in files if file.is_file()))
    if args.pipeline is not None:
        given["pipeline"] = with_commit(args.pipeline)
    if places := given.get("purifier_pipelines"):
        given["purifier_pipelines"] = [with_commit(place) for place in places]
    return {
        **json.loads(json.dumps(given, default=str)),
        "vaes": {codec.name: codec.digest for codec in setup.codecs},
        "images": [*setup.images.shape, digest(setup.images.numpy().tobytes())],
        "threat_models": sorted(args.threat_models),
        "metrics": sorted(metrics.names),
        "mixed_precision": setup.accelerator.mixed_precision,
    }


def with_commit(place: str) -> str:
    """Return the place of a pipeline, and the commit that was loaded if it is on the Hub, where a name can move on."""
    commit = resolved_commit(parse_place(place), "model_index.json")
    return place if commit is None else f"{place}, commit {commit}"


def digest(content: bytes) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of `content`."""
    return sha256(content).hexdigest()[:16]
