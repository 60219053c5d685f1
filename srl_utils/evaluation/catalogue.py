"""Names and presets of attacks, and the perturbation that each name stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from srl_utils.attacks.corruptions import CORRUPTIONS, Corruption, severity_of
from srl_utils.attacks.denoiser import Denoiser, inpaints, takes_latents_alone
from srl_utils.attacks.draws import Generators
from srl_utils.attacks.gradient import APGDConfig, Objective, apgd, pgd
from srl_utils.attacks.protections import PROTECTIONS, Protection, Victim, protect, target_of
from srl_utils.attacks.random_search import SquareConfig, square_attack
from srl_utils.errors import UserError
from srl_utils.evaluation.perturbations import (
    AS_PUBLISHED,
    CLEAN,
    LATENTS,
    MSE,
    TOKENS,
    Aim,
    Perturbation,
    at_reconstructions,
    attack_on,
    noise,
    on_first_frame,
    settling_pgd,
)
from srl_utils.metrics.losses import ImageDistance, PerceptualDistance, ReconstructionLoss
from srl_utils.vae.codec import Codec
from srl_utils.vae.networks import frozen

ITERATED = re.compile(
    r"(?!square-\d+x)(pgd|apgd|square)-([1-9]\d*)(?:x([1-9]\d*))?(?:-(lpips|latents|tokens))?(-first)?"
)
ITERATIONS = ("pgd-STEPS[xRESTARTS]", "apgd-STEPS[xRESTARTS]", "square-QUERIES")
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
    "corruptions": ("clean", *CORRUPTIONS),
}  # fmt: skip
"""Attacks by preset: `quick` for a first look, `paper` for those of the SRL-VAE paper, `strong` for stronger ones,
`corruptions` for every corruption at every severity."""


@dataclass(frozen=True, kw_only=True)
class AttackResources:
    """What some attacks need beyond the VAE."""

    pipeline: DiffusionPipeline | None = None
    """Has the denoiser that is attacked; each protection uses the prompt of its authors."""
    incompatible: frozenset[str] = frozenset()
    """Names of the VAEs whose latents do not fit the denoiser."""
    target_pipeline: DiffusionPipeline | None = None
    """Image-to-image pipeline that draws the targets of some protections, as their authors do."""
    perceptual: PerceptualDistance | None = None
    """LPIPS for attacks; the report measures LPIPS with another network."""
    bound: ImageDistance | None = None
    """Bounds Glaze: LPIPS, or a classifier's features where LPIPS has no weights."""
    target: Tensor | None = None
    """Image that targeted protections imitate instead of their default target, `[1,3,H,W]` in [-1,1]."""
    continuous: frozenset[str] = frozenset()
    """Names of the VAEs without tokens."""
    has_tokens: bool = False
    """Whether the baseline has tokens."""
    clips: bool = False
    """Whether clips are attacked, and not images."""
    max_steps: int | None = None
    """Limits the steps of the published protections, which take hundreds."""


@dataclass
class Selection:
    """The chosen perturbations, and notes on attacks that were left out because something they need is missing."""

    perturbations: list[Perturbation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def known_names() -> list[str]:
    """Return the names of presets and attacks, with their parameters in capitals."""
    return [
        "clean", NOISE, *PRESETS, *(f"{name}[-lpips|-latents|-tokens][-first]" for name in ITERATIONS),
        *(f"{name}[-SEVERITY]" for name in CORRUPTIONS), *PROTECTIONS,
    ]  # fmt: skip


def expanded(names: Sequence[str]) -> list[str]:
    """Replace each preset by the names of its attacks; return each name once."""
    return list(dict.fromkeys(part for name in names for part in PRESETS.get(name, (name,))))


def select(attacks: Sequence[str], epsilons: Sequence[float], resources: AttackResources) -> Selection:
    """Return each attack at each budget, once, in the order of their names.

    Args:
        attacks: names of attacks and presets.
        epsilons: budgets in units of a [0,1] image; attacks without a budget are made once.
        resources: what some attacks need; those that lack something are left out with a note.

    Raises:
        UserError: if a name is unknown, or if no attack can be made.
    """
    chosen = expanded(attacks)
    selection = Selection()
    found: dict[tuple[str, float], Perturbation] = {}
    for name in chosen:
        missing = _missing(name, resources)
        if missing:
            selection.notes.append(f"{name} was left out: {missing}")
            continue
        for perturbation in _expand(name, epsilons, resources):
            found.setdefault((perturbation.name, perturbation.epsilon), perturbation)
    if not found:
        raise UserError(f"no attack is left; {'; '.join(selection.notes)}")
    selection.perturbations = list(found.values())
    return selection


def made_on_images_alone(name: str) -> bool:
    """Return whether an attack has nothing to do with clips."""
    protection = PROTECTIONS.get(name)
    return protection is not None and (protection.needs_denoiser or protection.needs_perceptual)


def _missing(name: str, resources: AttackResources) -> str | None:
    protection = PROTECTIONS.get(name)
    if resources.clips and made_on_images_alone(name):
        return "it is made on images, and not on clips"
    if protection and protection.needs_denoiser and resources.pipeline is None:
        return "it needs a diffusion pipeline; give `pipeline`"
    if protection and protection.needs_denoiser and not _fits(protection, resources.pipeline):
        return "it attacks text-to-image models; give one as `pipeline`"
    if protection and protection.needs_target and resources.target is None:
        if protection.drawn_target is None:
            return f"it needs {'a clip' if resources.clips else 'an image'} to imitate; give `target`"
        if resources.target_pipeline is None:
            return "it needs an image to imitate, or a text-to-image pipeline to draw one; give `target` or `pipeline`"
    if "-lpips" in name and resources.perceptual is None:
        return "it needs LPIPS, whose weights are missing"
    if name.endswith("-first") and not resources.clips:
        return "only clips have a first frame; give `num_frames`"
    if "-tokens" in name and not resources.has_tokens:
        return "it needs a baseline with discrete latents"
    if protection and protection.needs_perceptual and resources.bound is None:
        return "it needs LPIPS, whose weights are missing, or a `classifier` in its place"
    return None


def _fits(protection: Protection, pipeline: DiffusionPipeline) -> bool:
    """Return whether the protection's loss gives the denoiser what it takes beside latents."""
    return takes_latents_alone(pipeline) or (protection.inpainting and inpaints(pipeline.unet))


def _expand(name: str, epsilons: Sequence[float], resources: AttackResources) -> Iterator[Perturbation]:
    if name == "clean":
        yield CLEAN
    elif name == NOISE:
        yield from map(noise, epsilons)
    elif match := ITERATED.fullmatch(name):
        yield from (_iterated(name, match, epsilon, resources) for epsilon in epsilons)
    elif name in CORRUPTIONS:
        corruption = CORRUPTIONS[name]
        yield from (_corrupted(corruption, severity + 1) for severity in range(len(corruption.severities)))
    elif severe := severity_of(name):
        yield _corrupted(CORRUPTIONS[severe[0]], severe[1])
    elif name in PROTECTIONS:
        protection = PROTECTIONS[name]
        budgets = epsilons if protection.scalable else [None]
        yield from (_protected(protection, epsilon, resources) for epsilon in budgets)
    else:
        raise UserError(f"{name} is not known; choose from {', '.join(known_names())}", parameter="attacks")


def _iterated(name: str, match: re.Match[str], epsilon: float, resources: AttackResources) -> Perturbation:
    kind, count, restarts = match[1], int(match[2]), int(match[3] or 1)
    aim = _aim(match[4], resources)
    search: Callable[..., Tensor] = {
        "pgd": partial(pgd, config=settling_pgd(epsilon, count, restarts)),
        "apgd": partial(apgd, config=APGDConfig(epsilon=epsilon, num_steps=count, num_restarts=restarts)),
        "square": partial(square_attack, config=SquareConfig(epsilon=epsilon, num_queries=count)),
    }[kind]

    def attack(objective: Objective, clean: Tensor, generators: Generators) -> Tensor:
        return search(objective, clean, generators=generators)

    made = attack_on(
        aim,
        name,
        on_first_frame(attack) if match[5] else attack,
        epsilon=epsilon,
        calls=count if kind == "square" else 2 * count * restarts,
    )
    return replace(made, impossible_on=resources.continuous if aim is TOKENS else frozenset())


def _aim(suffix: str | None, resources: AttackResources) -> Aim:
    """Return what an attack whose name ends with `suffix` maximises."""
    if suffix == "lpips":
        return at_reconstructions(ReconstructionLoss(resources.perceptual, weight=1.0))
    return {"latents": LATENTS, "tokens": TOKENS, None: MSE}[suffix]


def _corrupted(corruption: Corruption, severity: int) -> Perturbation:
    def apply(codec: Codec, clean: Tensor, generators: Generators) -> Tensor:
        return corruption.apply(clean, severity, generators)

    return Perturbation(name=f"{corruption.name}-{severity}", apply=apply)


def _protected(protection: Protection, epsilon: float | None, resources: AttackResources) -> Perturbation:
    """Return the protection at budget `epsilon`, or at its authors' budget if that is None.

    The results record the budget of L-infinity protections only.
    """
    steps = min(protection.num_steps, resources.max_steps or protection.num_steps)
    denoiser = None if protection.prompt is None else Denoiser.from_pipeline(resources.pipeline, protection.prompt)

    def apply(codec: Codec, clean: Tensor, generators: Generators) -> Tensor:
        victim = Victim.of(codec, resources.pipeline, denoiser=denoiser, perceptual=resources.bound)
        target = _target(protection, resources, clean, generators)
        with frozen(codec.encoder):
            return protect(
                protection, victim, clean, generators=generators, epsilon=epsilon, num_steps=steps, target=target
            )

    def goal(codec: Codec, clean: Tensor, generators: Generators) -> Tensor:
        target = target_of(protection, clean, _target(protection, resources, clean, generators))
        latents = codec.encode(clean if target is None else target)
        return torch.zeros_like(latents) if target is None else latents

    return Perturbation(
        name=protection.name, objective=AS_PUBLISHED, epsilon=epsilon or 0.0, apply=apply,
        goal=goal if protection.pulls_latents else None,
        passes=steps * protection.passes_per_step,
        impossible_on=resources.incompatible if protection.needs_denoiser else frozenset(),
        joint=protection.joint,
    )  # fmt: skip


def _target(protection: Protection, resources: AttackResources, clean: Tensor, generators: Generators) -> Tensor | None:
    """Return the given target, or one that the pipeline draws; None stands for the protection's default."""
    if not protection.has_target:
        return None
    if resources.target is None and protection.drawn_target is not None:
        return protection.drawn_target(resources.target_pipeline, clean, generators=generators)
    return resources.target
