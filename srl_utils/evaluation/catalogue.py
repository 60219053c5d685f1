"""The attacks of the command line: names and presets, and how a name becomes what is done to the images."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from diffusers import DiffusionPipeline
from torch import Tensor

from srl_utils.attacks.corruptions import CORRUPTIONS, Corruption
from srl_utils.attacks.denoiser import Denoiser
from srl_utils.attacks.draws import Generators
from srl_utils.attacks.gradient import APGDConfig, apgd
from srl_utils.attacks.protections import PROTECTIONS, Protection, Victim, protect
from srl_utils.attacks.random_search import SquareConfig, square_attack
from srl_utils.errors import UserError
from srl_utils.evaluation.perturbations import (
    AS_PUBLISHED,
    CLEAN,
    MSE,
    Perturbation,
    noise,
    on_reconstruction,
    reconstruction_attack,
    settling_pgd,
)
from srl_utils.metrics.losses import PerceptualDistance, ReconstructionLoss
from srl_utils.vae.codec import Codec
from srl_utils.vae.networks import frozen

ITERATED = re.compile(r"(?!square-\d+x)(pgd|apgd|square)-([1-9]\d*)(?:x([1-9]\d*))?(-lpips)?")
SEVERE = re.compile(r"([a-z-]+?)-([1-5])")
NOISE = "noise"
PRESETS: dict[str, tuple[str, ...]] = {
    "quick": ("clean", NOISE, "jpeg-3", "pgd-10"),
    "paper": (
        "clean", NOISE, "pgd-10", "photoguard-encoder", "photoguard-diffusion", "mist-textural", "mist-semantic",
        "mist-fused", "glaze", "nightshade",
    ),
    "strong": (
        "clean", NOISE, "salt-and-pepper-1", "gaussian-blur-1", "jpeg-3", "webp-3", "resize-2", "pgd-10", "pgd-50x2",
        "apgd-100", "square-1000", "photoguard-encoder", "photoguard-encoder-grey", "mist-textural", "pid",
        "nightshade",
    ),
}  # fmt: skip
"""`quick` for a first look, `paper` the attacks that the SRL-VAE paper names, `strong` the ones it does not."""


@dataclass(frozen=True, kw_only=True)
class Supplies:
    """What some attacks need beyond the VAE."""

    pipeline: DiffusionPipeline | None = None
    """Whose denoiser is attacked; each protection tells it its authors' prompt."""
    strangers: frozenset[str] = frozenset()
    """Names of the VAEs whose latents are not those of its denoiser."""
    painter: DiffusionPipeline | None = None
    """Image-to-image, draws the targets of protections whose authors have them drawn."""
    perceptual: PerceptualDistance | None = None
    """LPIPS as the attacks see it; what the report measures is another one."""
    target: Tensor | None = None
    """`[1,3,H,W]` in [-1,1], what targeted protections make images look like instead of their default."""
    max_steps: int | None = None
    """Shortens the published protections, which run for hundreds of steps."""


@dataclass
class Selection:
    """The perturbations that a command line asks for, and which of them are left out for want of something."""

    perturbations: list[Perturbation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def known_names() -> list[str]:
    return [
        "clean", NOISE, *PRESETS, "pgd-STEPS[xRESTARTS][-lpips]", "apgd-STEPS[xRESTARTS][-lpips]",
        "square-QUERIES[-lpips]", *(f"{name}[-SEVERITY]" for name in CORRUPTIONS), *PROTECTIONS,
    ]  # fmt: skip


def expanded(names: Sequence[str]) -> list[str]:
    """The attacks' names with those of the presets in their place, none twice."""
    return list(dict.fromkeys(part for name in names for part in PRESETS.get(name, (name,))))


def select(names: Sequence[str], epsilons: Sequence[float], supplies: Supplies) -> Selection:
    """Every attack with a budget at every one of `epsilons`, in the order of `names`, none twice.

    Raises:
        UserError: if a name is not known, or if none of the attacks can be made.
    """
    chosen = expanded(names)
    selection = Selection()
    found: dict[tuple[str, float], Perturbation] = {}
    for name in chosen:
        missing = _missing(name, supplies)
        if missing:
            selection.notes.append(f"{name} was left out: {missing}")
            continue
        for perturbation in _expand(name, epsilons, supplies):
            found.setdefault((perturbation.name, perturbation.epsilon), perturbation)
    if not found:
        raise UserError(f"no attack is left; {'; '.join(selection.notes)}")
    selection.perturbations = list(found.values())
    return selection


def _missing(name: str, supplies: Supplies) -> str | None:
    protection = PROTECTIONS.get(name)
    if protection and protection.needs_denoiser and supplies.pipeline is None:
        return "it needs a diffusion pipeline, --pipeline"
    if protection and protection.needs_target and supplies.target is None:
        if protection.drawn_target is None:
            return "it needs an image to make others look like, --target"
        if supplies.painter is None:
            return "it needs an image to make others look like, --target, or a text-to-image pipeline that draws it, --pipeline"
    if supplies.perceptual is None and (name.endswith("-lpips") or (protection and protection.needs_perceptual)):
        return "it needs LPIPS, whose weights could not be had"
    return None


def _expand(name: str, epsilons: Sequence[float], supplies: Supplies) -> Iterator[Perturbation]:
    if name == "clean":
        yield CLEAN
    elif name == NOISE:
        yield from map(noise, epsilons)
    elif match := ITERATED.fullmatch(name):
        yield from (_iterated(name, match, epsilon, supplies) for epsilon in epsilons)
    elif name in CORRUPTIONS:
        corruption = CORRUPTIONS[name]
        yield from (_corrupted(corruption, severity + 1) for severity in range(len(corruption.severities)))
    elif (match := SEVERE.fullmatch(name)) and match[1] in CORRUPTIONS:
        yield _corrupted(CORRUPTIONS[match[1]], int(match[2]))
    elif name in PROTECTIONS:
        protection = PROTECTIONS[name]
        budgets = epsilons if protection.scalable else [None]
        yield from (_protected(protection, epsilon, supplies) for epsilon in budgets)
    else:
        raise UserError(f"--attacks {name} is not known; there are {', '.join(known_names())}")


def _iterated(name: str, match: re.Match[str], epsilon: float, supplies: Supplies) -> Perturbation:
    kind, count, restarts = match[1], int(match[2]), int(match[3] or 1)
    loss = ReconstructionLoss(supplies.perceptual, weight=1.0) if match[4] else MSE
    if kind == "pgd":
        return reconstruction_attack(settling_pgd(epsilon, count, restarts), loss, name=name)
    attack: Callable[..., Tensor]
    if kind == "apgd":
        attack = partial(apgd, config=APGDConfig(epsilon=epsilon, num_steps=count, num_restarts=restarts))
    else:
        attack = partial(square_attack, config=SquareConfig(epsilon=epsilon, num_queries=count))
    return on_reconstruction(
        name,
        lambda objective, clean, generators: attack(objective, clean, generators=generators),
        epsilon=epsilon,
        passes=count if kind == "square" else 2 * count * restarts,
        loss=loss,
    )


def _corrupted(corruption: Corruption, severity: int) -> Perturbation:
    def apply(codec: Codec, clean: Tensor, generators: Generators) -> Tensor:
        return corruption.apply(clean, severity, generators)

    return Perturbation(name=f"{corruption.name}-{severity}", apply=apply)


def _protected(protection: Protection, epsilon: float | None, supplies: Supplies) -> Perturbation:
    """With the authors' budget where `epsilon` is None: one that is no L-infinity one is not told in the results."""
    steps = min(protection.num_steps, supplies.max_steps or protection.num_steps)
    denoiser = None if protection.prompt is None else Denoiser.from_pipeline(supplies.pipeline, protection.prompt)

    def apply(codec: Codec, clean: Tensor, generators: Generators) -> Tensor:
        victim = Victim.of(codec, supplies.pipeline, denoiser=denoiser, perceptual=supplies.perceptual)
        target = _target(protection, supplies, clean, generators)
        with frozen(codec.encoder):
            return protect(
                protection, victim, clean, generators=generators, epsilon=epsilon, num_steps=steps, target=target
            )

    return Perturbation(
        name=protection.name, objective=AS_PUBLISHED, epsilon=epsilon or 0.0, apply=apply,
        passes=steps * protection.passes_per_step,
        impossible_on=supplies.strangers if protection.needs_denoiser else frozenset(),
    )  # fmt: skip


def _target(protection: Protection, supplies: Supplies, clean: Tensor, generators: Generators) -> Tensor | None:
    """The given one, or what the pipeline draws; None for the protection's default."""
    if not protection.has_target:
        return None
    if supplies.target is None and protection.drawn_target is not None:
        return protection.drawn_target(supplies.painter, clean, generators=generators)
    return supplies.target
