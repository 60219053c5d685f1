"""How well images, clean and protected, can be edited with each VAE in a diffusion pipeline."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median_low

from srl_utils.command_line import Effects, expanded_path
from srl_utils.errors import UserError
from srl_utils.evaluation.catalogue import NOISE
from srl_utils.evaluation.cli.arguments import (
    add_attack_arguments,
    add_metrics_argument,
    add_pipeline_arguments,
    add_shared_arguments,
    attack_effects,
    classifier_effects,
    share,
    shared_effects,
)
from srl_utils.evaluation.cli.loading import load_classifier
from srl_utils.evaluation.cli.running import run_study
from srl_utils.evaluation.cli.setup import (
    Setup,
    build_metrics,
    check_captions,
    chosen_perturbations,
    defended,
    exchangeable,
    prepare,
    quoted,
)
from srl_utils.evaluation.motion import MOTION_METRICS
from srl_utils.evaluation.sanity import CheckSettings
from srl_utils.evaluation.tasks.editing import Edit, Editing, build_edits, check_steps, replace_words
from srl_utils.images.captions import decode_text, lines_of
from srl_utils.images.listing import few
from srl_utils.metrics.losses import LPIPS_METRICS

METRICS = ("psnr", "ssim", *LPIPS_METRICS, "clip", "clip-text", "shown", "fid", "kid", *MOTION_METRICS)
DEFAULT_METRICS = ("psnr", "ssim", "lpips-alex", "clip", "clip-text", "fid", *MOTION_METRICS)
DEFAULT_ATTACKS = (
    "clean",
    NOISE,
    "photoguard-encoder",
    "photoguard-diffusion",
    "mist-fused",
    "advdm",
    "glaze",
    "apgd-100",
)


def run(args: argparse.Namespace) -> int:
    """Run the evaluation and return its exit code."""
    classifier = load_classifier(args.classifier, args.metrics)
    setup = defended(exchangeable(prepare(args)), args, classifier)
    edits = build_edits(
        setup.pipeline, strengths=args.strengths, num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
    )  # fmt: skip
    if args.edits is not None:
        edits = chosen_edits(args.edits, edits)
    if args.prompts is not None:
        prompts = read_prompts(args.prompts, len(setup.images))
    else:
        setup, prompts = edit_captions(setup, dict(args.replace))
    task = Editing(
        metrics=build_metrics(args, setup, classifier),
        baseline=setup.codecs[0],
        edits=edits,
        images=setup.images,
        prompts=prompts,
        classifier=classifier,
        folder=args.output_dir / "clean-edits",
        seed=args.seed,
    )
    check_steps(edits)
    perturbations = chosen_perturbations(args, setup, classifier)
    baseline = setup.codecs[0].name
    setup.notes.append(
        "edits of protected images are compared with edits of the clean images by the same VAE alone; edits of clean images "
        f"are compared with those by {baseline}, and so are all sets of edits"
    )
    run_study(
        args,
        setup,
        task,
        perturbations,
        title="Editing under protection",
        check_settings=CheckSettings(epsilon=median_low(args.epsilons)),
        prompts=prompts,
    )
    return 0


def chosen_edits(names: Sequence[str], edits: dict[str, Edit]) -> dict[str, Edit]:
    """Return the edits of these names.

    Raises:
        UserError: if the pipeline has no edit of a name.
    """
    unknown = [name for name in names if name not in edits]
    if unknown:
        raise UserError(f"there is no edit {unknown[0]}; this pipeline has {', '.join(edits)}", parameter="edits")
    return {name: edits[name] for name in dict.fromkeys(names)}


def edit_captions(setup: Setup, replacements: Mapping[str, str]) -> tuple[Setup, list[str]]:
    """Return the images whose captions the replacements change, and each changed caption as the image's prompt.

    A note counts and names the other images.

    Args:
        setup: has images and captions; its notes are extended.
        replacements: new words by the words that they replace.

    Raises:
        UserError: if an image has no caption, or if no caption changes.
    """
    check_captions(setup, "--replace")
    prompts = [replace_words(caption, replacements) for caption in setup.captions]
    changed = [number for number, prompt in enumerate(prompts) if prompt != " ".join(setup.captions[number].split())]
    unchanged = [number for number in range(len(prompts)) if number not in changed]
    texts = quoted([setup.captions[number] for number in unchanged])
    effect = f"--replace changes nothing in {len(unchanged)} of {len(prompts)} captions ({texts})"
    if not changed:
        raise UserError(f"{effect}; name words that the captions have")
    if unchanged:
        names = few([setup.names[number] for number in unchanged], 20)
        setup.notes.append(f"{effect}; these images were left out: {names}")
    return setup.only(changed), [prompts[number] for number in changed]


def read_prompts(path: Path, count: int) -> list[str]:
    """Return one prompt for each of `count` images from a text file with one line for each, or one line for all.

    Raises:
        UserError: if the file cannot be read, or has another number of lines.
    """
    try:
        prompts = lines_of(decode_text(path.read_bytes()))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {reason}", parameter="prompts") from None
    if len(prompts) not in (1, count):
        problem = f"{path} has {len(prompts)} lines; {count} images need {count} lines, or one for all"
        raise UserError(problem, parameter="prompts")
    return prompts * count if len(prompts) == 1 else prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this evaluation."""
    add_shared_arguments(parser)
    add_attack_arguments(parser, attacks=DEFAULT_ATTACKS, epsilons=[8 / 255])
    add_pipeline_arguments(parser)
    add = parser.add_argument
    add_metrics_argument(parser, METRICS, default=DEFAULT_METRICS)
    edited = parser.add_mutually_exclusive_group(required=True)
    edited.add_argument(
        "--prompts", type=expanded_path, default=None, help="text file: a line for each image, or one for all"
    )
    edited.add_argument(
        "--replace",
        nargs="+",
        type=replacement,
        default=None,
        metavar="OLD=NEW",
        help="make prompts from the captions by replacing words",
    )
    add("--strengths", nargs="+", type=share, default=[0.3, 0.5, 0.7], help="of image-to-image, in (0,1]")
    add(
        "--edits",
        nargs="+",
        default=None,
        metavar="NAME",
        help="only these, such as img2img-0.5 inpainting; default: all",
    )
    parser.set_defaults(num_images=16)


def effects(args: argparse.Namespace) -> Effects:
    """Return when each flag has an effect, and what it needs to have one."""
    return {
        **shared_effects(args),
        **attack_effects(args.attacks, checked=not args.no_checks),
        **classifier_effects(args, args.attacks),
        "caption_column": (args.prompts is None, "--replace, which edits captions"),
    }


def replacement(text: str) -> tuple[str, str]:
    """Return the two words of OLD=NEW."""
    old, separator, new = text.partition("=")
    if not (old and separator and new) or len((old + new).split()) != 1:
        raise argparse.ArgumentTypeError(f"{text}: expected OLD=NEW, two words")
    return old, new
