"""Whether an unchanged diffusion model still generates and denoises well with each VAE."""

from __future__ import annotations

import argparse

from srl_utils.command_line import Effects
from srl_utils.evaluation.cli.arguments import (
    add_metrics_argument,
    add_pipeline_arguments,
    add_shared_arguments,
    classifier_effects,
    share,
    shared_effects,
)
from srl_utils.evaluation.cli.loading import load_classifier
from srl_utils.evaluation.cli.running import run_study
from srl_utils.evaluation.cli.setup import build_metrics, check_captions, defended, exchangeable, prepare
from srl_utils.evaluation.perturbations import CLEAN
from srl_utils.evaluation.study import TRANSFER
from srl_utils.evaluation.tasks.editing import INPAINTING, build_edits, check_steps
from srl_utils.evaluation.tasks.generation import Generation, build_text_to_image
from srl_utils.metrics.losses import LPIPS_METRICS

METRICS = (
    "psnr", "ssim", *LPIPS_METRICS, "clip", "clip-text", "shown", "fid", "kid", "is", "denoising-loss", "difference",
)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the evaluation and return its exit code."""
    classifier = load_classifier(args.classifier, args.metrics)
    setup = defended(exchangeable(prepare(args)), args, classifier)
    check_captions(setup, "generation")
    settings = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    edits = build_edits(setup.pipeline, strengths=args.strengths, **settings)
    task = Generation(
        metrics=build_metrics(args, setup, classifier),
        baseline=setup.codecs[0],
        text_to_image=build_text_to_image(setup.pipeline, args.resolution, **settings),
        denoised={name: edit for name, edit in edits.items() if name != INPAINTING},
        images=setup.images,
        captions=setup.captions,
        classifier=classifier,
        seed=args.seed,
    )
    check_steps(task.denoised)
    run_study(args, setup, task, [CLEAN], title="Generation", prompts=setup.captions)
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this evaluation."""
    add_shared_arguments(parser)
    add_pipeline_arguments(parser)
    add_metrics_argument(
        parser, METRICS, default=["psnr", "lpips-alex", "clip-text", "fid", "denoising-loss", "difference"]
    )
    parser.add_argument(
        "--strengths", nargs="+", type=share, default=[0.3, 0.5, 0.7], help="of the noise added to encoded images"
    )
    parser.set_defaults(threat_models=[TRANSFER])


def effects(args: argparse.Namespace) -> Effects:
    """Return when each flag has an effect, and what it needs to have one."""
    return {**shared_effects(args), **classifier_effects(args)}
