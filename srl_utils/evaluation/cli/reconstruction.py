"""How well images are reconstructed, clean, corrupted and attacked."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from statistics import median_low

from srl_utils.command_line import Effects, message_of, positive_int
from srl_utils.errors import UserError
from srl_utils.evaluation.cli.arguments import (
    add_attack_arguments,
    add_classifier_argument,
    add_metrics_argument,
    add_shared_arguments,
    attack_effects,
    classifier_effects,
    draws_targets,
    listed,
    needs_denoiser,
    purified_by_pipeline,
    shared_effects,
)
from srl_utils.evaluation.cli.data_sets import data_sets, report_on_all
from srl_utils.evaluation.cli.loading import load_classifier
from srl_utils.evaluation.cli.running import run_study
from srl_utils.evaluation.cli.setup import Setup, build_metrics, chosen_perturbations, defended, prepare_each
from srl_utils.evaluation.motion import FLIPS, MOTION_METRICS, USE
from srl_utils.evaluation.report.document import ReportContent
from srl_utils.evaluation.sanity import CheckSettings
from srl_utils.evaluation.tasks.base import Reconstruction, denoiser_of
from srl_utils.metrics.clips import CLIP_METRICS, FLICKER
from srl_utils.metrics.features import RFID_CHANGES, ImageClassifier
from srl_utils.metrics.losses import LPIPS_METRICS

TITLE = "Reconstruction under attack"
DEFAULT_METRICS = ["psnr", "ssim", "lpips-alex", "drift", *MOTION_METRICS, USE, FLICKER]
METRICS = (
    "psnr", "ssim", *LPIPS_METRICS, "clip", "rfid", RFID_CHANGES, "kid", "is", "drift", *MOTION_METRICS, USE, *CLIP_METRICS,
)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the evaluation on each data set and return its exit code."""
    classifier = load_classifier(args.classifier, args.metrics)
    parts = data_sets(args)
    contents: dict[str, ReportContent] = {}
    for (name, part), setup in zip(parts.items(), prepare_each(list(parts.values())), strict=True):
        if len(parts) > 1:
            setup.accelerator.print(f"Data set {name}")
        content = evaluate(part, setup, classifier, checked=name == next(iter(parts)))
        if content is not None:
            contents[name] = content
    if len(contents) > 1:
        report_on_all(args, parts, contents)
    return 0


def evaluate(
    args: argparse.Namespace, setup: Setup, classifier: ImageClassifier | None, *, checked: bool
) -> ReportContent | None:
    """Run the evaluation on one data set; `checked` says whether it has the robustness checks. See `run_study`."""
    setup = defended(setup, args, classifier)
    task = Reconstruction(
        metrics=build_metrics(args, setup, classifier),
        baseline=setup.codecs[0],
        images=setup.images,
        denoiser=denoiser_of(setup.pipeline),
    )
    task.note_incomparable(setup.codecs, setup.notes)
    note_inapplicable(args.metrics, task.metrics.names, setup)
    perturbations = chosen_perturbations(args, setup, classifier)
    check_settings = CheckSettings(epsilon=median_low(args.epsilons))
    if set(args.attacks) == {"quick"}:
        check_settings = replace(check_settings, steps=(5, 20, 40), queries=100)
    return run_study(args, setup, task, perturbations, title=TITLE, check_settings=check_settings if checked else None)


def note_inapplicable(asked: Sequence[str], metrics: Sequence[str], setup: Setup) -> None:
    """Add a note for each metric that was asked for and has nothing to measure; the default ones need none.

    Args:
        asked: all metrics that were asked for.
        metrics: those of them that can be computed.
        setup: its notes are extended.

    Raises:
        UserError: if no metric is left.
    """
    lacking: dict[str, str] = {}
    if setup.num_frames == 1:
        lacking |= dict.fromkeys((RFID_CHANGES, *CLIP_METRICS), "clips; give `num_frames`")
    if all(codec.codebook is None for codec in setup.codecs):
        lacking |= dict.fromkeys((FLIPS, USE), "a VAE with a codebook")
    if list(asked) != DEFAULT_METRICS:
        notes = [f"{name} was left out: it needs {needed}" for name, needed in lacking.items() if name in asked]
        setup.notes.extend(message_of(UserError(note)) for note in notes)
    if set(metrics) <= lacking.keys():
        raise UserError(f"nothing is left to measure: {'; '.join(setup.notes)}", parameter="metrics")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this evaluation."""
    add_shared_arguments(parser, several_data_sets=True)
    add_attack_arguments(parser, attacks=["quick"], epsilons=[2 / 255, 4 / 255, 8 / 255, 16 / 255])
    parser.set_defaults(caption_column=None)
    add = parser.add_argument
    add_metrics_argument(parser, METRICS, default=DEFAULT_METRICS)
    add("--num_frames", type=positive_int, default=1, help="frames of a clip; 1 for images")
    add(
        "--reference",
        default=None,
        metavar="NAME",
        help="data set that the others are compared with; default: the first",
    )
    add_classifier_argument(parser, "replaces Inception, and LPIPS where Glaze or IMPRESS lack its weights")
    add("--pipeline", default=None, metavar="PLACE", help="diffusion pipeline for attacks and purifiers that need one")


def effects(args: argparse.Namespace) -> Effects:
    """Return when each flag has an effect, and what it needs to have one."""
    drawn = args.target is None and draws_targets(args.attacks)
    data_sets_given = [*listed(args.dataset_name), *listed(args.data_dir)]
    return {
        **shared_effects(args),
        **attack_effects(args.attacks, checked=not args.no_checks),
        **classifier_effects(args, args.attacks),
        "reference": (len(data_sets_given) > 1, "several data sets"),
        "pipeline": (
            needs_denoiser(args.attacks) or drawn or purified_by_pipeline(args),
            "an attack on a denoiser, one whose target it draws, or a purifier that uses a pipeline",
        ),
    }
