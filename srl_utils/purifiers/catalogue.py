"""Names of purifiers, and the purifier that each name stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from diffusers import DiffusionPipeline

from srl_utils.errors import UserError
from srl_utils.metrics.losses import ImageDistance
from srl_utils.purifiers.autoencoding import IMPRESS, impress, vae_loop
from srl_utils.purifiers.base import SEPARATOR, Autoencoder, Purifier, chain
from srl_utils.purifiers.diffusing import (
    diffpure,
    gridpure,
    image_to_image,
    is_unconditional,
    is_upscaler,
    noisy_upscaling,
    starts_from_images,
)
from srl_utils.purifiers.filters import adverse_cleaner, jpeg_file, noise, resizing, webp_file

ADVERSE_CLEANER, LOOP = "adverse-cleaner", "vae-loop"
GRIDPURE = "gridpure"


class ByPipeline(NamedTuple):
    """A purifier that a pipeline of diffusers computes."""

    what: str
    """What its number is."""
    fits: Callable[[DiffusionPipeline], bool]
    needed: str
    """The pipeline, in words."""
    build: Callable[[DiffusionPipeline, float], Purifier]
    low: float
    high: float


NUMBERED: Mapping[str, tuple[str, Callable[[float], Purifier], float, float]] = {
    "jpeg": ("QUALITY", lambda quality: jpeg_file(round(quality)), 1, 95),
    "webp": ("QUALITY", lambda quality: webp_file(round(quality)), 0, 100),
    "resize": ("SCALE", resizing, 0.01, 1),
    "noise": ("SIGMA", noise, 0, 1),
}
"""By name: what the number is, the purifier, and the smallest and the largest number."""
BY_PIPELINE: Mapping[str, ByPipeline] = {
    "img2img": ByPipeline("STRENGTH", starts_from_images, "an image-to-image pipeline", image_to_image, 0.02, 1),
    "noisy-upscaling": ByPipeline("SIGMA", is_upscaler, "an upscaling pipeline", noisy_upscaling, 0, 1),
    "diffpure": ByPipeline(
        "TIMESTEP", is_unconditional, "a pipeline of an unconditional model of pixels",
        lambda pipeline, timestep: diffpure(pipeline, round(timestep)), 1, 1000,
    ),
}  # fmt: skip
WITH_NUMBER = re.compile(rf"(?:{'|'.join((*NUMBERED, *BY_PIPELINE))})-(?:\d+\.?\d*|\.\d+)")


@dataclass(frozen=True, kw_only=True)
class PurifierResources:
    """What some purifiers need."""

    vaes: Mapping[str, Autoencoder] = field(default_factory=dict)
    """VAEs by name; the first one is the original."""
    pipelines: Sequence[DiffusionPipeline] = ()
    """Pipelines of diffusers; each purifier takes the first that fits it."""
    perceptual: ImageDistance | None = None
    """LPIPS on VGG, or what takes its place."""


def known_purifiers() -> list[str]:
    """Return the names of purifiers, with their parameters in capitals."""
    numbered = [f"{name}-{what}" for name, (what, *_) in NUMBERED.items()]
    by_pipeline = [f"{name}-{each.what}" for name, each in BY_PIPELINE.items()]
    return [*numbered, ADVERSE_CLEANER, f"{LOOP}[-NAME]", *IMPRESS, *by_pipeline, GRIDPURE]


def check_purifier(text: str) -> None:
    """Raise a UserError unless `text` is the name of a purifier or of a chain; whether it lacks something is not checked."""
    for name in _parts(text):
        if WITH_NUMBER.fullmatch(name):
            _number(name)
        elif name not in (ADVERSE_CLEANER, LOOP, GRIDPURE, *IMPRESS) and not name.startswith(f"{LOOP}-"):
            choice = ", ".join(known_purifiers())
            raise UserError(f"no purifier '{name}'; choose from {choice}", parameter="purifiers")


def uses_perceptual(text: str) -> bool:
    """Return whether a purifier or chain uses a perceptual distance."""
    return any(name in IMPRESS for name in _parts(text))


def uses_vae(text: str) -> bool:
    """Return whether a purifier or chain uses a VAE."""
    return any(name in IMPRESS or name.startswith(LOOP) for name in _parts(text))


def uses_pipeline(text: str) -> bool:
    """Return whether a purifier or chain uses a pipeline of diffusers."""
    return any(name == GRIDPURE or _kind(name) in BY_PIPELINE for name in _parts(text))


def purifier_of(text: str, resources: PurifierResources = PurifierResources()) -> Purifier:
    """Return the purifier of a name, or of several joined by `+`, of which the first is applied first.

    Args:
        text: such as `resize-0.5+jpeg-75`.
        resources: what some purifiers need.

    Raises:
        UserError: if a name is unknown, a number is out of its range, or a purifier lacks what it needs.
    """
    check_purifier(text)
    return chain([_single(name, resources) for name in _parts(text)])


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(SEPARATOR)]


def _single(name: str, resources: PurifierResources) -> Purifier:
    if WITH_NUMBER.fullmatch(name):
        return _numbered(name, resources)
    if name == ADVERSE_CLEANER:
        return adverse_cleaner()
    if name == GRIDPURE:
        return gridpure(_pipeline(name, BY_PIPELINE["diffpure"], resources))
    if not resources.vaes:
        raise UserError(f"{name} needs a VAE", parameter="purifiers")
    original = next(iter(resources.vaes))
    if name in IMPRESS:
        if resources.perceptual is None:
            raise UserError(f"{name} needs LPIPS, whose weights are missing", parameter="purifiers")
        return impress(resources.vaes[original], resources.perceptual, IMPRESS[name], name)
    wanted = name.removeprefix(LOOP).removeprefix("-") or original
    if wanted not in resources.vaes:
        choice = ", ".join(resources.vaes)
        raise UserError(f"{name}: there is no VAE {wanted}; choose from {choice}", parameter="purifiers")
    return vae_loop(resources.vaes[wanted], name)


def _numbered(name: str, resources: PurifierResources) -> Purifier:
    kind, number = _kind(name), _number(name)
    if kind in NUMBERED:
        return NUMBERED[kind][1](number)
    each = BY_PIPELINE[kind]
    return each.build(_pipeline(name, each, resources), number)


def _kind(name: str) -> str:
    """Return the name without its number."""
    return name.rpartition("-")[0]


def _number(name: str) -> float:
    """Return the number at the end of a name.

    Raises:
        UserError: if it is out of its range.
    """
    kind, number = _kind(name), float(name.rpartition("-")[2])
    each = BY_PIPELINE.get(kind)
    what, low, high = (each.what, each.low, each.high) if each else (NUMBERED[kind][0], *NUMBERED[kind][2:])
    if not low <= number <= high:
        raise UserError(f"{name}: {what.lower()} must be {low:g} to {high:g}", parameter="purifiers")
    return number


def _pipeline(name: str, each: ByPipeline, resources: PurifierResources) -> DiffusionPipeline:
    """Return the first pipeline that fits a purifier.

    Raises:
        UserError: if there is none.
    """
    for pipeline in resources.pipelines:
        if each.fits(pipeline):
            return pipeline
    raise UserError(f"{name} needs {each.needed}; give `purifier_pipelines`", parameter="purifiers")
