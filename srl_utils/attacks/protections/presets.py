"""The published protections, each with its authors' settings. The losses' docstrings name the sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from srl_utils.attacks.gradient import Objective, PGDConfig
from srl_utils.attacks.protections.blurring import BlurGuardConfig
from srl_utils.attacks.protections.losses import (
    diffusion_loss,
    edit_distance,
    first_prediction,
    fused,
    latent_distance,
    latent_energy,
    moment_distance,
    posterior_divergence,
    score_distillation,
    style_distance,
    textural,
    transformed_distance,
)
from srl_utils.attacks.protections.surrogates import STEPS_PER_ROUND, SurrogateLoss
from srl_utils.attacks.protections.targets import grey, mist_pattern, style_transfer
from srl_utils.attacks.protections.victim import ProtectedBatch


@dataclass(frozen=True, kw_only=True)
class GlazeConfig:
    """Glaze's optimization: Adam on the perturbation, with a soft bound on LPIPS and none on pixels.

    Attributes:
        epsilon: LPIPS up to which a change costs nothing. Also the largest change of the random start, between images
            in [-1,1].
        step_size: Adam's learning rate, in units of a [0,1] image.
        num_steps: Adam's steps.
        penalty: weight of the LPIPS above `epsilon`.
    """

    epsilon: float = 0.05
    step_size: float = 0.01 / 2
    num_steps: int = 500
    penalty: float = 30.0


Config = PGDConfig | BlurGuardConfig | GlazeConfig
"""Budget and steps of a protection."""


@dataclass(frozen=True, kw_only=True)
class Protection:
    """One published protection with its authors' settings.

    Attributes:
        name: its name in `PROTECTIONS` and in the results.
        loss: makes the objective of a batch.
        minimise: minimise the objective instead of maximising it.
        config: budget and steps; another kind of them exchanges the search, as `BlurGuardConfig` does.
        prompt: the authors' prompt for the denoiser; None if the protection needs no denoiser.
        default_target: maps height and width to the image `[1,3,H,W]` that is imitated unless another is given.
        needs_target: whether a target must be given.
        drawn_target: draws the authors' targets with an image-to-image pipeline, as `style_transfer` does.
        inpainting: whether the loss also fits a denoiser that inpaints.
        joint: whether images of one call are protected as one set, so that an image's result depends on the others.
        passes_per_step: approximate cost of a step, in passes through encoder and decoder. The default is a forward and
            a backward pass of the encoder.
    """

    name: str
    loss: Callable[[ProtectedBatch], Objective]
    minimise: bool
    config: Config
    prompt: str | None = None
    default_target: Callable[[int, int], Tensor] | None = None
    needs_target: bool = False
    drawn_target: Callable[..., Tensor] | None = None
    inpainting: bool = False
    joint: bool = False
    passes_per_step: float = 0.6

    @property
    def needs_denoiser(self) -> bool:
        """Whether the victim must have a denoiser."""
        return self.prompt is not None

    @property
    def needs_perceptual(self) -> bool:
        """Whether the victim must have a perceptual distance."""
        return isinstance(self.config, GlazeConfig)

    @property
    def has_target(self) -> bool:
        """Whether the protection imitates an image."""
        return self.needs_target or self.default_target is not None

    @property
    def pulls_latents(self) -> bool:
        """Whether it moves latents towards those of its target; without a target, towards 0."""
        loss = self.loss.func if isinstance(self.loss, partial) else self.loss
        pulling = (latent_distance, textural, fused, style_distance, posterior_divergence, latent_energy)
        return self.minimise and loss in pulling

    @property
    def scalable(self) -> bool:
        """Whether the budget is an L-infinity one, which means the same for all protections."""
        return not isinstance(self.config, GlazeConfig) and self.config.norm == "linf"

    @property
    def num_steps(self) -> int:
        """The authors' number of steps."""
        return self.config.num_steps


# Start at the clean image.
POSTERIOR_COLLAPSE = PGDConfig(epsilon=16 / 255, step_size=2 / 255, num_steps=40, random_start=False)
# Settings of Diff-Protect and Mist. Both call advertorch, which starts at random.
SIXTEEN_LEVELS = PGDConfig(epsilon=16 / 255, step_size=1 / 255, num_steps=100)
ANTI_DREAMBOOTH = PGDConfig(epsilon=0.05 / 2, step_size=0.005 / 2, num_steps=100, random_start=False)

PROTECTIONS: dict[str, Protection] = {
    protection.name: protection
    for protection in (
        Protection(
            name="photoguard-encoder",
            loss=latent_distance,
            minimise=True,
            config=PGDConfig(epsilon=0.06 / 2, step_size=0.02 / 2, num_steps=1000, schedule="linear"),
        ),
        Protection(
            name="photoguard-encoder-grey",
            loss=latent_distance,
            minimise=True,
            config=PGDConfig(epsilon=0.12 / 2, step_size=0.01 / 2, num_steps=200, schedule="linear"),
            default_target=grey,
        ),
        Protection(
            name="photoguard-diffusion",
            loss=partial(edit_distance, repetitions=10),
            minimise=True,
            config=PGDConfig(epsilon=16 / 2, norm="l2", step_size=1 / 2, num_steps=200, random_start=False),
            passes_per_step=50,
            prompt="",
            default_target=grey,
        ),
        Protection(
            name="photoguard-diffusion-linf",
            loss=partial(edit_distance, repetitions=5),
            minimise=True,
            config=PGDConfig(epsilon=0.1 / 2, step_size=0.006 / 2, num_steps=200, random_start=False),
            passes_per_step=25,
            prompt="",
            default_target=grey,
        ),
        Protection(
            name="mist-textural",
            loss=textural,
            minimise=True,
            config=SIXTEEN_LEVELS,
            default_target=mist_pattern,
        ),
        Protection(
            name="mist-semantic",
            loss=diffusion_loss,
            minimise=False,
            config=SIXTEEN_LEVELS,
            passes_per_step=1,
            prompt="a painting",
        ),
        Protection(
            name="mist-fused",
            loss=fused,
            minimise=True,
            config=SIXTEEN_LEVELS,
            passes_per_step=1.6,
            prompt="a painting",
            default_target=mist_pattern,
        ),
        Protection(
            name="advdm",
            loss=diffusion_loss,
            minimise=False,
            config=SIXTEEN_LEVELS,
            passes_per_step=1,
            prompt="a photo",
        ),
        Protection(
            name="advdm-minus",
            loss=diffusion_loss,
            minimise=True,
            config=SIXTEEN_LEVELS,
            passes_per_step=1,
            prompt="a photo",
        ),
        Protection(
            name="anti-dreambooth-fsmg",
            loss=diffusion_loss,
            minimise=False,
            config=ANTI_DREAMBOOTH,
            passes_per_step=1,
            prompt="a photo of sks person",
        ),
        Protection(
            name="anti-dreambooth-aspl",
            loss=SurrogateLoss,
            minimise=False,
            config=replace(ANTI_DREAMBOOTH, num_steps=50 * STEPS_PER_ROUND),
            joint=True,
            passes_per_step=1.7,
            prompt="a photo of sks person",
        ),
        Protection(
            name="diffusionguard",
            loss=first_prediction,
            minimise=False,
            config=PGDConfig(epsilon=16 / 255 / 2, step_size=1 / 255 / 2, num_steps=800, random_start=False),
            inpainting=True,
            passes_per_step=1,
            prompt="",
        ),
        Protection(
            name="sds",
            loss=score_distillation,
            minimise=False,
            config=replace(SIXTEEN_LEVELS, random_start=False),
            passes_per_step=0.8,
            prompt="a photo",
        ),
        Protection(
            name="sds-minus",
            loss=score_distillation,
            minimise=True,
            config=replace(SIXTEEN_LEVELS, random_start=False),
            passes_per_step=0.8,
            prompt="a photo",
        ),
        Protection(
            name="pid",
            loss=moment_distance,
            minimise=False,
            config=PGDConfig(epsilon=12.75 / 255, step_size=1 / 255, num_steps=1000),
        ),
        Protection(
            name="posterior-collapse-plus",
            loss=partial(posterior_divergence, variance=1.0),
            minimise=False,
            config=POSTERIOR_COLLAPSE,
        ),
        Protection(
            name="posterior-collapse-minus",
            loss=partial(posterior_divergence, variance=1e-8),
            minimise=True,
            config=POSTERIOR_COLLAPSE,
        ),
        Protection(
            name="editshield",
            loss=transformed_distance,
            minimise=False,
            config=PGDConfig(epsilon=0.05, step_size=1 / 255, num_steps=30, random_start=False),
            passes_per_step=1.8,
        ),
        Protection(
            name="blurguard",
            loss=latent_energy,
            minimise=True,
            config=BlurGuardConfig(),
        ),
        Protection(
            name="nightshade",
            loss=latent_distance,
            minimise=True,
            config=PGDConfig(epsilon=0.04, step_size=0.04, num_steps=500, random_start=False, schedule="linear"),
            needs_target=True,
        ),
        Protection(
            name="uvcg",
            loss=latent_distance,
            minimise=True,
            config=SIXTEEN_LEVELS,
            needs_target=True,
        ),
        Protection(
            name="glaze",
            loss=style_distance,
            minimise=True,
            config=GlazeConfig(),
            needs_target=True,
            drawn_target=style_transfer,
        ),
    )
}
