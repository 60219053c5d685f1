"""Names of purifiers, and the purifier that each name stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from srl_utils.errors import UserError
from srl_utils.metrics.losses import ImageDistance
from srl_utils.purifiers.autoencoding import IMPRESS, impress, vae_loop
from srl_utils.purifiers.base import SEPARATOR, Purifier, chain
from srl_utils.purifiers.filters import adverse_cleaner, jpeg_file, noise, resizing, webp_file
from srl_utils.vae.codec import Codec

LOOP = "vae-loop"
NUMBERED: Mapping[str, tuple[str, Callable[[float], Purifier], float, float]] = {
    "jpeg": ("QUALITY", lambda quality: jpeg_file(round(quality)), 1, 95),
    "webp": ("QUALITY", lambda quality: webp_file(round(quality)), 0, 100),
    "resize": ("SCALE", resizing, 0.01, 1),
    "noise": ("SIGMA", noise, 0, 1),
}
"""By name: what the number is, the purifier, and the smallest and the largest number."""
WITH_NUMBER = re.compile(rf"({'|'.join(NUMBERED)})-(\d+\.?\d*|\.\d+)")


@dataclass(frozen=True, kw_only=True)
class PurifierResources:
    """What some purifiers need."""

    codecs: Mapping[str, Codec] = field(default_factory=dict)
    """VAEs by name; the first one is the original."""
    perceptual: ImageDistance | None = None
    """LPIPS on VGG, or what takes its place."""


def known_purifiers() -> list[str]:
    """Return the names of purifiers, with their parameters in capitals."""
    numbered = [f"{name}-{what}" for name, (what, *_) in NUMBERED.items()]
    return [*numbered, "adverse-cleaner", f"{LOOP}[-NAME]", *IMPRESS]


def purifier_of(text: str, resources: PurifierResources = PurifierResources()) -> Purifier:  # immutable
    """Return the purifier of a name, or of several joined by `+`, of which the first is applied first.

    Args:
        text: such as `resize-0.5+jpeg-75`.
        resources: what some purifiers need.

    Raises:
        UserError: if a name is unknown, a number is out of its range, or a purifier lacks what it needs.
    """
    return chain([_single(part.strip(), resources) for part in text.split(SEPARATOR)])


def _single(name: str, resources: PurifierResources) -> Purifier:
    if match := WITH_NUMBER.fullmatch(name):
        what, build, low, high = NUMBERED[match[1]]
        number = float(match[2])
        if not low <= number <= high:
            raise UserError(f"{name}: {what.lower()} must be {low:g} to {high:g}", parameter="purifiers")
        return build(number)
    if name == "adverse-cleaner":
        return adverse_cleaner()
    if name == LOOP or name.startswith(f"{LOOP}-"):
        return _loop(name, resources)
    if name in IMPRESS:
        return _impress(name, resources)
    raise UserError(f"no purifier {name!r}; choose from {', '.join(known_purifiers())}", parameter="purifiers")


def _loop(name: str, resources: PurifierResources) -> Purifier:
    if not resources.codecs:
        raise UserError(f"{name} needs a VAE", parameter="purifiers")
    wanted = name.removeprefix(LOOP).removeprefix("-") or next(iter(resources.codecs))
    if wanted not in resources.codecs:
        raise UserError(
            f"{name}: there is no VAE {wanted}; choose from {', '.join(resources.codecs)}", parameter="purifiers"
        )
    return vae_loop(resources.codecs[wanted], name)


def _impress(name: str, resources: PurifierResources) -> Purifier:
    if not resources.codecs:
        raise UserError(f"{name} needs a VAE", parameter="purifiers")
    if resources.perceptual is None:
        raise UserError(f"{name} needs LPIPS, whose weights are missing", parameter="purifiers")
    return impress(next(iter(resources.codecs.values())), resources.perceptual, IMPRESS[name], name)
