"""Names of purifiers, and the purifier that each name stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
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
GRIDPURE, NOISE = "gridpure", "noise"


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
    NOISE: ("SIGMA", noise, 0, 1),
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


def check_purifier(text: str, vaes: Collection[str] = ()) -> None:
    """Raise a UserError unless `text` is the name of a purifier or of a chain; whether it lacks something is not checked.

    Args:
        text: the name.
        vaes: names of the VAEs, as far as they are known.
    """
    for name in _parts(text, vaes):
        if not _is_known(name):
            choice = ", ".join(known_purifiers())
            raise UserError(f"no purifier '{name}'; choose from {choice}", parameter="purifiers")
        if WITH_NUMBER.fullmatch(name):
            _number(name)


def uses_noise(text: str) -> bool:
    """Return whether a purifier or chain draws random numbers."""
    drawing = any(name in IMPRESS or _kind(name) == NOISE for name in _parts(text))
    return drawing or uses_pipeline(text)


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
        text: such as `resize-0.5+jpeg-75`. The name of a VAE may hold a `+` too: the longest that fits is taken.
        resources: what some purifiers need.

    Raises:
        UserError: if a name is unknown, a number is out of its range, or a purifier lacks what it needs.
    """
    check_purifier(text, resources.vaes)
    return chain([_single(name, resources) for name in _parts(text, resources.vaes)])


def _parts(text: str, vaes: Collection[str] = ()) -> list[str]:
    """Return the names in a chain, in which `vae-loop-a+b+jpeg-75` may be of a VAE called `a+b`.

    The longest of the names in `vaes` is taken; where none fits, all that comes before the next purifier's name.
    """
    pieces, parts = [piece.strip() for piece in text.split(SEPARATOR)], []
    while pieces:
        length = _length_of_first(pieces, vaes)
        parts.append(SEPARATOR.join(pieces[:length]))
        pieces = pieces[length:]
    return parts


def _length_of_first(pieces: Sequence[str], vaes: Collection[str]) -> int:
    """Return how many pieces the first name of a chain has; only that of a loop can have several."""
    if not pieces[0].startswith(f"{LOOP}-"):
        return 1
    loops = {f"{LOOP}-{name}" for name in vaes}
    fitting = (length for length in range(len(pieces), 0, -1) if SEPARATOR.join(pieces[:length]) in loops)
    following = (length for length in range(1, len(pieces)) if _is_known(pieces[length]))
    return next(fitting, None) or next(following, len(pieces))


def _is_known(name: str) -> bool:
    """Return whether this is the name of a single purifier."""
    fixed = (ADVERSE_CLEANER, LOOP, GRIDPURE, *IMPRESS)
    return name in fixed or name.startswith(f"{LOOP}-") or WITH_NUMBER.fullmatch(name) is not None


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
