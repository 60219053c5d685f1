"""The flags that several evaluations share, and when each of them has an effect."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from os.path import exists, isdir  # unlike those of pathlib, they return False for a name that is too long
from pathlib import Path

from srl_utils.attacks.protections import PROTECTIONS, Protection
from srl_utils.command_line import (
    Effects,
    checked,
    expanded_path,
    fraction,
    image_side,
    non_negative_float,
    pixel_distance,
    positive_int,
    seed,
)
from srl_utils.evaluation.catalogue import ITERATED, NOISE, expanded, known_names
from srl_utils.evaluation.study import THREAT_MODELS
from srl_utils.files import home_expanded
from srl_utils.images.sources import NEED_NO_DOWNLOAD
from srl_utils.metrics.features import CLIP_MODEL, FEATURE_SIMILARITY, SET_METRICS
from srl_utils.purifiers import check_purifier, known_purifiers, uses_perceptual, uses_pipeline
from srl_utils.vae.places import FORM

CLIP_METRICS = ("clip", "clip-text")

# --- flags ---


def add_shared_arguments(parser: argparse.ArgumentParser, *, several_data_sets: bool = False) -> None:
    """Add the flags of evaluations under attack: those of `add_study_arguments`, purifiers and metric weights."""
    add_study_arguments(parser, several_data_sets=several_data_sets)
    add = parser.add_argument
    add(
        "--purifiers", nargs="+", type=checked(check_purifier), default=None, metavar="NAME",
        help=f"judge each VAE also with these purifiers in front; A+B chains two: {', '.join(known_purifiers())}",
    )  # fmt: skip
    add(
        "--purifier_pipelines", nargs="+", default=None, metavar="PLACE",
        help="diffusion pipelines of purifiers, written like --baseline; img2img also takes that of --pipeline",
    )  # fmt: skip
    add(
        "--inception_weights", type=expanded_path, default=None,
        help="torch-fidelity's Inception weights, for FID, rFID, KID and Inception Score",
    )  # fmt: skip
    add(
        "--clip_model", type=home_expanded, default=CLIP_MODEL, help="CLIP model (Hub id or folder); needs transformers"
    )


def add_study_arguments(parser: argparse.ArgumentParser, *, several_data_sets: bool = False) -> None:
    """Add the flags of every evaluation: VAEs, images, and how it runs."""
    add = parser.add_argument
    add_data = partial(add, nargs="+" if several_data_sets else None)
    each = "; one for each data set, or one for all" if several_data_sets else ""
    add("--baseline", required=True, metavar="PLACE", help=f"the original VAE, a folder or Hub id: {FORM}")
    add(
        "--vae", nargs="+", default=[], metavar="NAME=PLACE",
        help="VAEs to compare with the baseline; the name may be left out. Without one, only the baseline is evaluated",
    )  # fmt: skip
    add_data(
        "--dataset_name", type=home_expanded, default=None,
        help=f"Hub dataset, local dataset folder, or a built-in one: {', '.join(NEED_NO_DOWNLOAD)}",
    )  # fmt: skip
    add_data("--data_dir", type=home_expanded, default=None, help="folder of images (nested)")
    add_data(
        "--split", default=None,
        help=f"split of the dataset, or a part: test[:10%%]; default: its validation, test or only split{each}",
    )  # fmt: skip
    add_data("--image_column", default="image", help=f"column of the dataset that holds the image{each}")
    add("--streaming", action="store_true", help="read the dataset as a stream, without downloading it")
    add("--resolution", type=image_side, default=256, help="side of the images in pixels")
    add("--num_images", type=positive_int, default=64, help="number of images to evaluate on")
    add("--batch_size", type=positive_int, default=16, help="images per batch on each process")
    add("--seed", type=seed, default=0, help="fixes the attacks' starts and the noise of each image")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), default=None, help="default: accelerate's configuration")
    add("--dry_run", action="store_true", help="check everything, print what would be computed, stop")
    add(
        "--output_dir", type=folder, default=Path("outputs/evaluation"),
        help="gets the report; an interrupted evaluation continues from what it holds",
    )  # fmt: skip


def add_metrics_argument(parser: argparse.ArgumentParser, known: Sequence[str], *, default: Sequence[str]) -> None:
    """Add `--metrics`; `lpips` stands for LPIPS on AlexNet, as papers report it."""
    parser.add_argument(
        "--metrics", nargs="+", type=lambda name: "lpips-alex" if name == "lpips" else name, choices=known,
        default=list(default), help="what to measure",
    )  # fmt: skip


def add_attack_arguments(parser: argparse.ArgumentParser, *, attacks: Sequence[str], epsilons: Sequence[float]) -> None:
    """Add the flags that choose attacks and their budgets, with these defaults (budgets in units of a [0,1] image)."""
    add = parser.add_argument
    add("--attacks", nargs="+", default=list(attacks), help=f"presets or names: {', '.join(known_names())}")
    add("--epsilons", nargs="+", type=budget, default=list(epsilons), help="budgets, such as 8/255")
    add(
        "--threat_models", nargs="+", choices=THREAT_MODELS, default=list(THREAT_MODELS),
        help="transfer: attacks made on the baseline; adaptive: attacks made on each VAE itself",
    )  # fmt: skip
    add(
        "--target", type=expanded_path, default=None,
        help="image (or clip, with clips) that targeted protections make others look like",
    )  # fmt: skip
    add("--max_attack_steps", type=positive_int, default=None, help="shortens the published protections")
    add_check_arguments(parser)


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the robustness checks."""
    add = parser.add_argument
    add("--no_checks", action="store_true", help="leave out the robustness checks")
    add("--num_check_images", type=positive_int, default=8, help="images that the checks use")


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of evaluations with a diffusion pipeline, which take images and no clips."""
    parser.set_defaults(num_frames=1)
    add = parser.add_argument
    add("--pipeline", required=True, metavar="PLACE", help="diffusion pipeline, written like --baseline")
    add(
        "--caption_column", default=None,
        help="of the dataset, the tars, or the metadata.jsonl, metadata.csv or text files in --data_dir",
    )  # fmt: skip
    add_classifier_argument(parser, "replaces Inception, and checks whether images show their prompts")
    add("--num_inference_steps", type=positive_int, default=50, help="denoising steps at full strength")
    add("--guidance_scale", type=non_negative_float, default=7.5, help="of classifier-free guidance")


def add_classifier_argument(parser: argparse.ArgumentParser, uses: str) -> None:
    """Add `--classifier`, whose help says what it is used for."""
    help = f"image classifier (folder or Hub id): {uses}"
    parser.add_argument("--classifier", type=home_expanded, default=None, help=help)


# --- which flags have an effect ---


def shared_effects(args: argparse.Namespace) -> Effects:
    """Return when the flags of `add_shared_arguments` have an effect."""
    return {
        **study_effects(args),
        "purifier_pipelines": (purified_by_pipeline(args), "a purifier that uses a pipeline"),
        "clip_model": (not set(CLIP_METRICS).isdisjoint(args.metrics), "a CLIP similarity among --metrics"),
    }


def study_effects(args: argparse.Namespace) -> Effects:
    """Return when the flags of `add_study_arguments` have an effect."""
    names = listed(args.dataset_name)
    data_set = not set(names) <= set(NEED_NO_DOWNLOAD)
    return {
        "split": (bool(names), "--dataset_name"),
        "image_column": (data_set or args.data_dir is not None, "a dataset with columns"),
        "streaming": (data_set or args.data_dir is not None, "a dataset that can be streamed"),
    }


def attack_effects(attacks: Sequence[str], *, checked: bool) -> Effects:
    """Return when the flags of `add_attack_arguments` have an effect.

    Args:
        attacks: names of attacks and presets.
        checked: whether the robustness is checked.
    """
    names, protections = expanded(attacks), protections_of(attacks)
    adversarial = any(name in PROTECTIONS or ITERATED.fullmatch(name) for name in names)
    return {
        "epsilons": (adversarial or NOISE in names or checked, "an attack, noise, or the checks"),
        "threat_models": (adversarial, "an attack on a VAE among --attacks"),
        "target": (any(protection.has_target for protection in protections), "an attack with a target"),
        "max_attack_steps": (bool(protections), "a published protection among --attacks"),
        **check_effects(checked),
    }


def check_effects(checked: bool) -> Effects:
    """Return when the flags of `add_check_arguments` have an effect: if the robustness is checked."""
    return {"num_check_images": (checked, "the checks, which --no_checks leaves out")}


def classifier_effects(args: argparse.Namespace, attacks: Sequence[str] = ()) -> Effects:
    """Return when a classifier and Inception's weights have an effect.

    Args:
        args: `metrics`, `classifier` and `purifiers`.
        attacks: names of attacks and presets.
    """
    featured = has_set_metrics(args.metrics) or FEATURE_SIMILARITY in args.metrics
    bounding = uses_glaze(attacks) or any(map(uses_perceptual, args.purifiers or ()))
    return {
        "classifier": (
            featured or "shown" in args.metrics or bounding,
            "shown, FID, rFID, KID, IS or feature-similarity among --metrics, Glaze, or IMPRESS",
        ),
        "inception_weights": (
            featured and args.classifier is None,
            "FID, rFID, KID, IS or feature-similarity among --metrics and no --classifier",
        ),
    }


def has_set_metrics(metrics: Sequence[str]) -> bool:
    """Return whether one of the metrics compares whole sets of images, as FID does."""
    return not set(SET_METRICS).isdisjoint(metrics)


# --- what purifiers and attacks need, by their names and presets ---


def purified_by_pipeline(args: argparse.Namespace) -> bool:
    """Return whether one of `args.purifiers` uses a pipeline, which `--purifier_pipelines` or `--pipeline` can name."""
    return any(map(uses_pipeline, args.purifiers or ()))


def protections_of(attacks: Sequence[str]) -> list[Protection]:
    """Return the published protections among the attacks."""
    return [PROTECTIONS[name] for name in expanded(attacks) if name in PROTECTIONS]


def needs_denoiser(attacks: Sequence[str]) -> bool:
    """Return whether an attack is made on the denoiser of a pipeline."""
    return any(protection.needs_denoiser for protection in protections_of(attacks))


def draws_targets(attacks: Sequence[str]) -> bool:
    """Return whether a pipeline draws the targets of an attack for which no target image is given."""
    return any(protection.drawn_target is not None for protection in protections_of(attacks))


def needs_perceptual(attacks: Sequence[str]) -> bool:
    """Return whether an attack uses LPIPS."""
    return uses_glaze(attacks) or any("-lpips" in name for name in expanded(attacks))


def uses_glaze(attacks: Sequence[str]) -> bool:
    """Return whether an attack is bounded by a perceptual distance."""
    return any(protection.needs_perceptual for protection in protections_of(attacks))


# --- values ---


def listed(value: str | Sequence[str] | None) -> list[str]:
    """Return the values of a flag that takes one or several; an empty list for None."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def folder(text: str) -> Path:
    """Return the path of a folder, which need not exist yet."""
    place = expanded_path(text)
    if exists(place) and not isdir(place):
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return place


def budget(text: str) -> float:
    """Return the budget of an attack in units of a [0,1] image, above 0."""
    epsilon = pixel_distance(text)
    if epsilon == 0:
        raise argparse.ArgumentTypeError("an attack of size 0 changes nothing; --attacks clean measures clean images")
    return epsilon


def share(text: str) -> float:
    """Return a number in (0,1]."""
    value = fraction(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 would change nothing")
    return value
