"""How well images are reconstructed, clean, corrupted and attacked."""

from __future__ import annotations

import argparse
from statistics import median_low

from srl_utils.command_line import Effects
from srl_utils.evaluation.catalogue import select
from srl_utils.evaluation.cli.common import (
    Scrutiny,
    add_attack_arguments,
    add_metrics_argument,
    add_shared_arguments,
    attack_effects,
    build_metrics,
    build_supplies,
    needs_denoiser,
    prepare,
    run_study,
    shared_effects,
    wants_painter,
)
from srl_utils.evaluation.sanity import Depth
from srl_utils.evaluation.tasks.base import Reconstruction, denoiser_of
from srl_utils.metrics.losses import LPIPS_METRICS

METRICS = ("psnr", "ssim", *LPIPS_METRICS, "clip", "rfid", "kid", "is", "drift")
QUICK = Depth(steps=(5, 20, 40), queries=100)


def run(args: argparse.Namespace) -> int:
    setup = prepare(args)
    task = Reconstruction(
        metrics=build_metrics(args, setup),
        baseline=setup.codecs[0],
        images=setup.images,
        denoiser=denoiser_of(setup.pipeline),
    )
    task.note_incomparable(setup.codecs, setup.notes)
    selection = select(args.attacks, args.epsilons, build_supplies(args, setup))
    setup.notes.extend(selection.notes)
    depth = QUICK if set(args.attacks) == {"quick"} else Depth()
    scrutiny = Scrutiny(epsilon=median_low(args.epsilons), depth=depth)
    return run_study(args, setup, task, selection.perturbations, title="Reconstruction under attack", scrutiny=scrutiny)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared_arguments(parser)
    add_attack_arguments(parser, attacks=["quick"], epsilons=[2 / 255, 4 / 255, 8 / 255, 16 / 255])
    parser.set_defaults(caption_column=None)
    add = parser.add_argument
    add_metrics_argument(parser, METRICS, default=["psnr", "ssim", "lpips-alex", "drift"])
    add("--pipeline", default=None, metavar="PLACE", help="diffusion pipeline for attacks that need a denoiser")


def effects(args: argparse.Namespace) -> Effects:
    """By flag, whether it has an effect beside the others, and what it needs to have one."""
    return {
        **shared_effects(args),
        **attack_effects(args),
        "pipeline": (
            needs_denoiser(args) or wants_painter(args),
            "an attack on a denoiser, or one whose target it draws",
        ),
    }
