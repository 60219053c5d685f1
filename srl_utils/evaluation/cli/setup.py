"""Set an evaluation up: load what the flags name, and leave out what does not fit together."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from diffusers import DiffusionPipeline
from torch import Tensor

from srl_utils.command_line import message_of
from srl_utils.errors import UserError, errors_about
from srl_utils.evaluation.catalogue import AttackResources, made_on_images_alone, select
from srl_utils.evaluation.cli.arguments import CLIP_METRICS, draws_targets, needs_denoiser, needs_perceptual, uses_glaze
from srl_utils.evaluation.cli.loading import (
    load_codecs,
    load_images,
    load_target,
    vae_sources,
)
from srl_utils.evaluation.defences import defences
from srl_utils.evaluation.perturbations import CLEAN, Perturbation
from srl_utils.evaluation.tasks.base import Metrics
from srl_utils.images.listing import few
from srl_utils.launching import check_launch, launched_accelerator, launched_precision, note_on_compiling
from srl_utils.metrics.features import (
    FEATURE_SIMILARITY,
    SET_METRICS,
    ImageClassifier,
    classifier_distance,
    load_clip_similarity,
    load_inception_features,
)
from srl_utils.metrics.losses import (
    LPIPS_METRICS,
    ImageDistance,
    PerceptualDistance,
    load_perceptual_distance,
)
from srl_utils.pipelines import robust_vae
from srl_utils.pipelines.loading import (
    as_image_to_image,
    load_pipeline,
    load_purifier_pipelines,
    purifying_pipeline,
)
from srl_utils.purifiers import PurifierResources, check_purifier, purifier_of, uses_perceptual, uses_pipeline
from srl_utils.vae.codec import Codec
from srl_utils.vae.families import family_of
from srl_utils.vae.files import first_line
from srl_utils.vae.loading import HALF_PRECISION
from srl_utils.vae.networks import check_frames
from srl_utils.vae.places import described, parse_place

LONGEST_WAIT = timedelta(days=1)
"""How long a process waits for the others, whose last attack may take hours."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What an evaluation works with."""

    accelerator: Accelerator
    codecs: Sequence[Codec]
    """The VAEs, the baseline first."""
    images: Tensor
    """All images, `[n,3,R,R]` in [-1,1], or clips, `[n,3,T,R,R]`, on the CPU."""
    captions: Sequence[str]
    names: Sequence[str]
    """Path or row of each image."""
    pipeline: DiffusionPipeline | None
    origins: Mapping[str, str]
    """Where VAEs and pipeline were loaded from, for the report's settings."""
    notes: list[str]
    """What a reader of the report must know; later steps add notes."""

    @property
    def num_frames(self) -> int:
        """Return the frames of a clip; 1 for images."""
        return self.images.shape[2] if self.images.ndim == 5 else 1

    def only(self, numbers: Sequence[int]) -> Setup:
        """Return the setup with the images of these numbers alone."""
        captions, names = ([texts[number] for number in numbers] for texts in (self.captions, self.names))
        return replace(self, images=self.images[list(numbers)], captions=captions, names=names)


def prepare(args: argparse.Namespace) -> Setup:
    """Load images, VAEs and the pipeline.

    VAEs that do not suit the resolution are left out with a note.

    Raises:
        UserError: if something cannot be loaded, or if no VAE is left to compare with the baseline.
    """
    (setup,) = prepare_each([args])
    return setup


def prepare_each(data_sets: Sequence[argparse.Namespace]) -> list[Setup]:
    """Load VAEs and the pipeline once, and the images of each data set; errors are those of `prepare`.

    Args:
        data_sets: the flags with each data set; the others are the same in all.
    """
    check_launch(os.environ)
    args = data_sets[0]
    sources = vae_sources(args.baseline, args.vae)
    for name in getattr(args, "purifiers", None) or ():
        check_purifier(name, sources)  # again, with the names of the VAEs, which may hold a +
    notes = note_on_compiling(os.environ)
    own_notes: list[list[str]] = [[] for _ in data_sets]
    loaded = [load_images(own, told) for own, told in zip(data_sets, own_notes, strict=True)]
    accelerator = launched_accelerator(
        os.environ,
        precision=args.mixed_precision or launched_precision(os.environ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    dtype = HALF_PRECISION.get(accelerator.mixed_precision)
    codecs = load_codecs(sources, device=accelerator.device, dtype=dtype)
    origins = {f"VAE {name}": described(source, "config.json") for name, source in sources.items()}
    codecs = suitable(codecs, lambda codec: check_fit(codec, loaded[0].images), notes)
    pipeline = None
    if args.pipeline is not None:
        with errors_about("pipeline"):
            place = parse_place(args.pipeline)
        pipeline = load_pipeline(place, dtype).to(accelerator.device)
        origins["pipeline"] = described(place, "model_index.json")
    return [
        Setup(
            accelerator=accelerator, codecs=codecs, images=own.images, captions=own.captions, names=own.names,
            pipeline=pipeline, origins=origins, notes=[*notes, *told],
        )
        for own, told in zip(loaded, own_notes, strict=True)
    ]  # fmt: skip


# --- which VAEs fit ---


def suitable(codecs: Sequence[Codec], check: Callable[[Codec], None], notes: list[str]) -> list[Codec]:
    """Return the VAEs that pass `check`.

    Args:
        codecs: the VAEs, the baseline first.
        check: raises a UserError for a VAE that does not fit.
        notes: gets a note for each VAE that fails.

    Raises:
        UserError: if the baseline fails, or all other VAEs do.
    """
    check(codecs[0])
    passed, reasons = [codecs[0]], []
    for codec in codecs[1:]:
        try:
            check(codec)
            passed.append(codec)
        except UserError as error:
            reasons.append(f"{codec.name} was left out: {message_of(error)}")
    if len(passed) == 1 and len(codecs) > 1:
        raise UserError("; ".join(reasons))
    notes.extend(reasons)
    return passed


@torch.no_grad()
def check_fit(codec: Codec, images: Tensor) -> None:
    """Reconstruct the first of `images`, to find a VAE that does not work before hours of attacks.

    Raises:
        UserError: if the VAE does not take the resolution or the number of frames, returns another one, or returns values
            that are not finite.
    """
    sample = images[:1].to(codec.device)
    if sample.ndim == 5:
        check_frames(sample.shape[2], dict(codec.vae.config) | {"_class_name": family_of(codec.vae).kind.__name__})
    try:
        reconstruction = codec.reconstruct(sample)
    except RuntimeError as error:  # the image is too small for a layer
        raise UserError(f"--resolution {sample.shape[-1]} does not suit {codec.name}: {first_line(error)}") from None
    if reconstruction.shape != sample.shape:
        raise UserError(
            f"--resolution {sample.shape[-1]} does not suit {codec.name}, which returns {reconstruction.shape[-1]} "
            "px; take a multiple of its down-sampling factor"
        )
    if not reconstruction.isfinite().all():
        raise UserError(
            f"{codec.name} returns values that are not finite, even for a clean image; check its weights, or "
            "try --mixed_precision no or bf16"
        )


def exchangeable(setup: Setup) -> Setup:
    """Return `setup` with only those VAEs that can replace the pipeline's own; note each of the others.

    Raises:
        UserError: if the baseline cannot replace it, or if no other VAE can.
    """

    def check(codec: Codec) -> None:
        try:
            with robust_vae(setup.pipeline, codec.vae):
                pass
        except UserError as error:
            raise UserError(f"--pipeline cannot work with {codec.name}: {error}") from None

    return replace(setup, codecs=suitable(setup.codecs, check, setup.notes))


@torch.no_grad()
def find_incompatible(
    pipeline: DiffusionPipeline, codecs: Sequence[Codec], images: Tensor, notes: list[str]
) -> frozenset[str]:
    """Return the names of the VAEs whose latents do not fit the pipeline's denoiser.

    Compare the channels of the latents with those of the UNet's output: the input of UNets for editing has more.

    Args:
        pipeline: may have no UNet; then all VAEs fit.
        codecs: the VAEs, the baseline first.
        images: `[n,3,H,W]` in [-1,1]; the first one is encoded.
        notes: gets a note for each VAE that does not fit.

    Raises:
        UserError: if the baseline does not fit.
    """
    unet = pipeline.components.get("unet")
    if unet is None:
        return frozenset()
    wanted = unet.config.out_channels
    channels = {codec.name: codec.encode(images[:1].to(codec.device)).shape[1] for codec in codecs}
    incompatible = [name for name, number in channels.items() if number != wanted]
    for name in incompatible:
        fault = f"--pipeline makes latents of {wanted} channels, and those of {name} have {channels[name]}"
        if name == codecs[0].name:
            raise UserError(fault)
        notes.append(f"attacks on the denoiser were not made on {name}: {fault}")
    return frozenset(incompatible)


def defended(setup: Setup, args: argparse.Namespace, classifier: ImageClassifier | None) -> Setup:
    """Return `setup` with each VAE also behind each purifier; one that is given twice counts once.

    Args:
        setup: its notes are extended.
        args: `purifiers` and `purifier_pipelines`.
        classifier: measures what looks alike where LPIPS has no weights.

    Raises:
        UserError: if a purifier lacks what it needs.
    """
    names = args.purifiers or ()
    perceptual = None
    if any(map(uses_perceptual, names)):
        perceptual = perceptual_bound(setup, try_lpips(setup), classifier, "IMPRESS")
    resources = PurifierResources(
        vaes={codec.name: codec for codec in setup.codecs},
        pipelines=purifying_pipelines(setup, args) if any(map(uses_pipeline, names)) else (),
        perceptual=perceptual,
    )
    found = [purifier_of(name, resources) for name in names]
    named = {purifier.name: purifier for purifier in found}  # `resize-.5` is `resize-0.5`, too
    return replace(setup, codecs=defences(setup.codecs, list(named.values())))


def purifying_pipelines(setup: Setup, args: argparse.Namespace) -> list[DiffusionPipeline]:
    """Load the pipelines of purifiers; the last one is the evaluation's own, if it has one.

    Raises:
        UserError: if one cannot be loaded.
    """
    dtype = HALF_PRECISION.get(setup.accelerator.mixed_precision)
    loaded = load_purifier_pipelines(args.purifier_pipelines or (), device=setup.accelerator.device, dtype=dtype)
    return loaded if setup.pipeline is None else [*loaded, purifying_pipeline(setup.pipeline)]


# --- captions ---


def check_captions(setup: Setup, needed_by: str) -> None:
    """Raise a UserError if an image has no caption; the message says what needs them."""
    if not all(setup.captions):
        raise UserError(f"{needed_by} needs a caption for every image; name their column: --caption_column")


def quoted(texts: Sequence[str]) -> str:
    """Return the first few texts, each in quotes and cut to 60 characters."""
    return few([f"'{text if len(text) <= 60 else f'{text[:57]}...'}'" for text in texts])


# --- metrics ---


def build_metrics(
    args: argparse.Namespace, setup: Setup, classifier: ImageClassifier | None = None, *, n: int | None = None
) -> Metrics:
    """Load the networks that `args.metrics` needs.

    Metrics whose weights are missing, or that need more images, are left out with a note.

    Args:
        args: `metrics`, `inception_weights` and `clip_model`.
        setup: its notes are extended.
        classifier: replaces Inception for FID, KID and Inception Score.
        n: number of images that are measured; by default all that were loaded.
    """
    count = len(setup.images) if n is None else n
    loaders: dict[str, tuple[Sequence[str], Callable[[], Any]]] = {
        **{name: ((name,), partial(load_perceptual_distance, trunk)) for name, trunk in LPIPS_METRICS.items()},
        "features": (
            (*SET_METRICS, FEATURE_SIMILARITY),
            lambda: classifier or load_inception_features(args.inception_weights),
        ),
        "clip": (CLIP_METRICS, lambda: load_clip_similarity(args.clip_model)),
    }
    names = [name for name in dict.fromkeys(args.metrics) if has_enough_images(name, count, setup.notes)]
    networks: dict[str, Any] = {}
    for network, (served, load) in loaders.items():
        if wanted := [name for name in names if name in served]:
            try:
                networks[network] = load()
            except UserError as error:
                setup.notes.append(f"{', '.join(wanted)} left out: {message_of(error)}")
                names = [name for name in names if name not in served]
    perceptual = [networks.pop(name).to(setup.accelerator.device) for name in LPIPS_METRICS if name in networks]
    return Metrics(names=names, perceptual=perceptual, **networks)


def has_enough_images(metric: str, num_images: int, notes: list[str]) -> bool:
    """Return whether the metric can be computed on so many images; if not, add a note."""
    least = SET_METRICS[metric].least if metric in SET_METRICS else 1
    if num_images < least:
        notes.append(f"{metric} was left out: it needs at least {least} images, and there are {num_images}")
    return num_images >= least


# --- attacks, and what they need ---


def chosen_perturbations(
    args: argparse.Namespace, setup: Setup, classifier: ImageClassifier | None = None
) -> list[Perturbation]:
    """Return each of `args.attacks` at each of `args.epsilons`; note those that lack something.

    With purifiers, clean images are always among them: they tell what purifying costs.

    Args:
        args: the flags of `add_attack_arguments` and `purifiers`.
        setup: its notes are extended.
        classifier: bounds Glaze where LPIPS has no weights.

    Raises:
        UserError: if a name is unknown, or if no attack can be made.
    """
    selection = select(args.attacks, args.epsilons, build_attack_resources(args, setup, classifier))
    setup.notes.extend(selection.notes)
    unasked = [CLEAN] if args.purifiers and CLEAN not in selection.perturbations else []
    return [*unasked, *selection.perturbations]


def build_attack_resources(
    args: argparse.Namespace, setup: Setup, classifier: ImageClassifier | None = None
) -> AttackResources:
    """Load what the attacks need: a target image, LPIPS, an image-to-image pipeline.

    Args:
        args: `attacks`, `target`, `resolution` and `max_attack_steps`.
        setup: gets a note for each missing thing.
        classifier: bounds Glaze where LPIPS has no weights.
    """
    attacks = [name for name in args.attacks if setup.num_frames == 1 or not made_on_images_alone(name)]
    target = None
    if args.target is not None:
        target = load_target(args.target, args.resolution, num_frames=setup.num_frames).to(setup.accelerator.device)
    perceptual = try_lpips(setup) if needs_perceptual(attacks) else None
    target_pipeline = try_image_to_image(setup) if target is None and draws_targets(attacks) else None
    incompatible: frozenset[str] = frozenset()
    if setup.pipeline is not None and needs_denoiser(attacks):
        incompatible = find_incompatible(setup.pipeline, setup.codecs, setup.images, setup.notes)
    continuous = frozenset(codec.name for codec in setup.codecs if codec.codebook is None)
    return AttackResources(
        clips=setup.num_frames > 1, continuous=continuous, has_tokens=setup.codecs[0].name not in continuous,
        pipeline=setup.pipeline, incompatible=incompatible, target_pipeline=target_pipeline, perceptual=perceptual,
        bound=perceptual_bound(setup, perceptual, classifier, "Glaze") if uses_glaze(attacks) else None, target=target,
        max_steps=args.max_attack_steps,
    )  # fmt: skip


def try_lpips(setup: Setup) -> PerceptualDistance | None:
    """Return LPIPS on VGG for attacks; if its weights are missing, add a note and return None."""
    try:
        return load_perceptual_distance("vgg").to(setup.accelerator.device)
    except UserError as error:
        setup.notes.append(message_of(error))
        return None


def perceptual_bound(
    setup: Setup, perceptual: PerceptualDistance | None, classifier: ImageClassifier | None, bounded: str
) -> ImageDistance | None:
    """Return what bounds Glaze or IMPRESS: LPIPS, or the classifier's features, of which a note tells; None without either."""
    if perceptual is not None or classifier is None:
        return perceptual
    try:
        bound = classifier_distance(classifier).to(setup.accelerator.device)
    except UserError as error:
        setup.notes.append(message_of(error))
        return None
    setup.notes.append(f"{bounded} is bounded by {bound.name}, not by LPIPS: its strength is not that of the paper")
    return bound


def try_image_to_image(setup: Setup) -> DiffusionPipeline | None:
    """Return the pipeline as one that starts from images; if it cannot, add a note and return None."""
    try:
        return None if setup.pipeline is None else as_image_to_image(setup.pipeline)
    except UserError as error:
        setup.notes.append(message_of(error))
        return None
