"""How well images, clean and protected, can be edited with each VAE in a diffusion pipeline."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median_low

from srl_utils.command_line import Effects, expanded_path
from srl_utils.errors import UserError
from srl_utils.evaluation.catalogue import select
from srl_utils.evaluation.cli.common import (
    Scrutiny,
    Setup,
    add_attack_arguments,
    add_metrics_argument,
    add_pipeline_arguments,
    add_shared_arguments,
    attack_effects,
    build_metrics,
    build_supplies,
    check_captions,
    exchangeable,
    load_judge,
    named,
    pipeline_effects,
    prepare,
    run_study,
    share,
    shared_effects,
)
from srl_utils.evaluation.tasks.editing import Edit, Editing, build_edits, check_steps, replace_words
from srl_utils.images.captions import decode_text, lines_of
from srl_utils.images.listing import few
from srl_utils.metrics.losses import LPIPS_METRICS

METRICS = ("psnr", "ssim", *LPIPS_METRICS, "clip", "clip-text", "shown", "fid", "kid")
PROTECTIONS = ("clean", "photoguard-encoder", "photoguard-diffusion", "mist-fused", "advdm", "glaze", "apgd-100")


def run(args: argparse.Namespace) -> int:
    if (args.prompts is None) == (args.replace is None):
        raise UserError("say what the images are to become: either --prompts FILE or --replace OLD=NEW, and not both")
    judge = load_judge(args)
    setup = exchangeable(prepare(args))
    edits = build_edits(
        setup.pipeline, strengths=args.strengths, num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
    )  # fmt: skip
    if args.edits is not None:
        edits = chosen_edits(args.edits, edits)
    setup, prompts = edit_prompts(args, setup)
    task = Editing(
        metrics=build_metrics(args, setup, judge),
        baseline=setup.codecs[0],
        edits=edits,
        images=setup.images,
        prompts=prompts,
        judge=judge,
        folder=args.output_dir / "clean-edits",
        seed=args.seed,
    )
    check_steps(edits)
    selection = select(args.attacks, args.epsilons, build_supplies(args, setup))
    setup.notes.extend(selection.notes)
    setup.notes.append(
        "edits of protected images are held against those of the clean images by the same VAE, edits of clean images "
        f"and all sets of edits against those by {setup.codecs[0].name}"
    )
    scrutiny = Scrutiny(epsilon=median_low(args.epsilons))
    return run_study(
        args, setup, task, selection.perturbations, title="Editing under protection", scrutiny=scrutiny, prompts=prompts
    )


def chosen_edits(names: Sequence[str], edits: dict[str, Edit]) -> dict[str, Edit]:
    unknown = [name for name in names if name not in edits]
    if unknown:
        raise UserError(f"--edits {unknown[0]}: this pipeline has {', '.join(edits)}")
    return {name: edits[name] for name in dict.fromkeys(names)}


def edit_prompts(args: argparse.Namespace, setup: Setup) -> tuple[Setup, Sequence[str]]:
    """The images that can be edited, and one prompt for each: a line of --prompts, or the caption with words replaced.

    Images in whose captions --replace changes nothing are left out; a note counts and names them.

    Raises:
        UserError: if there is no prompt for an image, or the words to be replaced are nowhere.
    """
    if args.prompts is not None:
        return setup, read_prompts(args.prompts, len(setup.images))
    check_captions(setup, "--replace")
    replacements = dict(args.replace)
    prompts = [replace_words(caption, replacements) for caption in setup.captions]
    changed = [number for number, prompt in enumerate(prompts) if prompt != " ".join(setup.captions[number].split())]
    unchanged = [number for number in range(len(prompts)) if number not in changed]
    texts = named([setup.captions[number] for number in unchanged])
    told = f"--replace changes nothing in {len(unchanged)} of {len(prompts)} captions ({texts})"
    if not changed:
        raise UserError(f"{told}; name words that they have")
    if unchanged:
        names = few([setup.names[number] for number in unchanged], 20)
        setup.notes.append(f"{told}; these images were left out: {names}")
    kept = replace(
        setup, images=setup.images[changed], captions=[setup.captions[number] for number in changed],
        names=[setup.names[number] for number in changed],
    )  # fmt: skip
    return kept, [prompts[number] for number in changed]


def read_prompts(path: Path, count: int) -> list[str]:
    """A line for each of `count` images, or one for all of them."""
    try:
        prompts = lines_of(decode_text(path.read_bytes()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read: {error}") from None
    if len(prompts) not in (1, count):
        raise UserError(f"--prompts {path} has {len(prompts)} lines; {count} images need as many, or one for all")
    return prompts * count if len(prompts) == 1 else prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared_arguments(parser)
    add_attack_arguments(parser, attacks=PROTECTIONS, epsilons=[8 / 255])
    add_pipeline_arguments(parser)
    add = parser.add_argument
    add_metrics_argument(parser, METRICS, default=["psnr", "ssim", "lpips-alex", "clip", "clip-text", "fid"])
    add("--prompts", type=expanded_path, default=None, help="text file: a line for each image, or one for all")
    add(
        "--replace",
        nargs="+",
        type=replacement,
        default=None,
        metavar="OLD=NEW",
        help="edit the captions' words instead",
    )
    add("--strengths", nargs="+", type=share, default=[0.3, 0.5, 0.7], help="of image-to-image")
    add(
        "--edits",
        nargs="+",
        default=None,
        metavar="NAME",
        help="only these, such as img2img-0.5 inpainting; default: all",
    )
    parser.set_defaults(num_images=16)


def effects(args: argparse.Namespace) -> Effects:
    """By flag, whether it has an effect beside the others, and what it needs to have one."""
    return {
        **shared_effects(args),
        **attack_effects(args),
        **pipeline_effects(args),
        "caption_column": (args.prompts is None, "--replace, which edits captions"),
    }


def replacement(text: str) -> tuple[str, str]:
    old, separator, new = text.partition("=")
    if not (old and separator and new) or len((old + new).split()) != 1:
        raise argparse.ArgumentTypeError(f"{text}: expected OLD=NEW, two words")
    return old, new
