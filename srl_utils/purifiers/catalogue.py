"""Names of purifiers, and the purifier that each name stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from srl_utils.errors import UserError
from srl_utils.metrics.losses import ImageDistance
from srl_utils.purifiers.autoencoding import IMPRESS, impress, vae_loop
from srl_utils.purifiers.base import SEPARATOR, Autoencoder, Purifier, chain
from srl_utils.purifiers.filters import adverse_cleaner, jpeg_file, noise, resizing, webp_file

ADVERSE_CLEANER, LOOP = "adverse-cleaner", "vae-loop"
NUMBERED: Mapping[str, tuple[str, Callable[[float], Purifier], float, float]] = {
    "jpeg": ("QUALITY", lambda quality: jpeg_file(round(quality)), 1, 95),
    "webp": ("QUALITY", lambda quality: webp_file(round(quality)), 0, 100),
    "resize": ("SCALE", resizing, 0.01, 1),
    "noise": ("SIGMA", noise, 0, 1),
}
"""By name: what the number is, the purifier, and the smallest and the largest number."""
WITH_NUMBER = re.compile(rf"(?:{'|'.join(NUMBERED)})-(?:\d+\.?\d*|\.\d+)")


@dataclass(frozen=True, kw_only=True)
class PurifierResources:
    """What some purifiers need."""

    vaes: Mapping[str, Autoencoder] = field(default_factory=dict)
    """VAEs by name; the first one is the original."""
    perceptual: ImageDistance | None = None
    """LPIPS on VGG, or what takes its place."""


def known_purifiers() -> list[str]:
    """Return the names of purifiers, with their parameters in capitals."""
    numbered = [f"{name}-{what}" for name, (what, *_) in NUMBERED.items()]
    return [*numbered, ADVERSE_CLEANER, f"{LOOP}[-NAME]", *IMPRESS]


def check_purifier(text: str) -> None:
    """Raise a UserError unless `text` is the name of a purifier or of a chain; whether it lacks something is not checked."""
    for name in _parts(text):
        if WITH_NUMBER.fullmatch(name):
            _numbered(name)
        elif name not in (ADVERSE_CLEANER, LOOP, *IMPRESS) and not name.startswith(f"{LOOP}-"):
            choice = ", ".join(known_purifiers())
            raise UserError(f"no purifier '{name}'; choose from {choice}", parameter="purifiers")


def needs_perceptual(text: str) -> bool:
    """Return whether a purifier or chain uses a perceptual distance."""
    return any(name in IMPRESS for name in _parts(text))


def needs_vae(text: str) -> bool:
    """Return whether a purifier or chain uses a VAE."""
    return any(name in IMPRESS or name.startswith(LOOP) for name in _parts(text))


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
        return _numbered(name)
    if name == ADVERSE_CLEANER:
        return adverse_cleaner()
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


def _numbered(name: str) -> Purifier:
    kind, _, text = name.partition("-")
    what, build, low, high = NUMBERED[kind]
    if not low <= float(text) <= high:
        raise UserError(f"{name}: {what.lower()} must be {low:g} to {high:g}", parameter="purifiers")
    return build(float(text))
