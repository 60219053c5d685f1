"""Published perturbations that keep diffusion models from using an image, with their authors' settings.

    protected = protect(PROTECTIONS["mist-textural"], victim, clean, generators=generators)

Authors write budgets and steps for images in [-1,1] or in [0,1]; here all are in units of a [0,1] image. Settings are
those of the code that each loss's docstring names, and as far as a paper's own could not be confirmed it says so.
Rounding a protected image to 8 bits may add up to half a level to its perturbation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from srl_utils.attacks.denoiser import Denoiser
from srl_utils.attacks.draws import Generators, draw_normal, draw_uniform
from srl_utils.attacks.gradient import Objective, PGDConfig, negated, pgd, value_and_gradient
from srl_utils.errors import UserError
from srl_utils.images.pixels import (
    PIXEL_MAX,
    PIXEL_MIN,
    check_images,
    from_pil,
    to_model_range,
    to_model_units,
    to_unit_range,
)
from srl_utils.metrics.losses import PerceptualDistance, mean_squared_error
from srl_utils.vae.networks import Moments


@dataclass(frozen=True, kw_only=True)
class Victim:
    """What a protection works on; images are `[N,3,H,W]` in [-1,1]."""

    encode: Callable[[Tensor], Moments]
    """Images to the posterior of their raw latents."""
    decode: Callable[[Tensor], Tensor]
    """Raw latents `[N,C,h,w]` to images."""
    scale: Callable[[Tensor], Tensor]
    """Raw latents to those that the denoiser knows: times a factor and plus a shift, for each value or channel."""
    denoiser: Denoiser | None = None
    perceptual: PerceptualDistance | None = None
    """LPIPS; Glaze's bound is one of its VGG version."""

    def unscale(self, latents: Tensor) -> Tensor:
        """The inverse of `scale`."""
        shift = self.scale(torch.zeros_like(latents))
        factor = self.scale(torch.ones_like(latents)) - shift
        return (latents - shift) / factor


@dataclass(frozen=True, kw_only=True)
class Task:
    """A batch to be protected, and what its losses are made of."""

    victim: Victim
    clean: Tensor
    target: Tensor | None
    """As many images as `clean`, or None for a protection without a target."""
    generators: Generators

    @torch.no_grad()
    def target_posterior(self) -> Moments:
        """Of the target, which stays the same through all steps."""
        return self.victim.encode(self.target)

    def draw(self, posterior: Moments) -> Tensor:
        """Raw latents `[N,C,h,w]`."""
        return posterior.latent(draw_normal(self.generators, like=posterior.mean))

    def sample(self, images: Tensor) -> Tensor:
        """The same, drawn from the posterior of `images`."""
        return self.draw(self.victim.encode(images))

    def sample_scaled(self, images: Tensor) -> Tensor:
        """The same at the denoiser's scale."""
        return self.victim.scale(self.sample(images))


@dataclass(frozen=True, kw_only=True)
class GlazeConfig:
    """Adam on the perturbation, with a soft bound on the perceptual distance and none on pixels."""

    epsilon: float = 0.05
    """LPIPS up to which a change is free. Also the start's largest change, between images in [-1,1]."""
    step_size: float = 0.01 / 2
    """Adam's learning rate, in units of a [0,1] image."""
    num_steps: int = 500
    penalty: float = 30.0
    """Of the LPIPS beyond `epsilon`."""


@dataclass(frozen=True, kw_only=True)
class Protection:
    """One published perturbation with its authors' settings."""

    name: str
    source: str
    loss: Callable[[Task], Objective]
    minimise: bool
    """The loss, rather than maximise it."""
    config: PGDConfig | GlazeConfig
    prompt: str | None = None
    """The authors' for the denoiser; None for a protection without one."""
    default_target: Callable[[int, int], Tensor] | None = None
    """Height and width to the image `[1,3,H,W]` that it heads for unless it is given one."""
    needs_target: bool = False
    drawn_target: Callable[..., Tensor] | None = None
    """What draws the authors' targets: see `style_transfer`. A pipeline is needed, and so they are not the default."""
    passes_per_step: float = 0.6
    """What a step costs in passes through encoder and decoder, about; by default the encoder forth and back."""

    @property
    def needs_denoiser(self) -> bool:
        return self.prompt is not None

    @property
    def needs_perceptual(self) -> bool:
        return isinstance(self.config, GlazeConfig)

    @property
    def has_target(self) -> bool:
        return self.needs_target or self.default_target is not None

    @property
    def scalable(self) -> bool:
        """Whether the budget is an L-infinity one, which means the same for all protections."""
        return isinstance(self.config, PGDConfig) and self.config.norm == "linf"

    @property
    def epsilon(self) -> float:
        return self.config.epsilon

    @property
    def num_steps(self) -> int:
        return self.config.num_steps


def protect(
    protection: Protection,
    victim: Victim,
    clean: Tensor,
    *,
    generators: Generators,
    epsilon: float | None = None,
    num_steps: int | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """The images as their owner would publish them.

    Args:
        protection: one of `PROTECTIONS`.
        victim: the networks that the protection looks into. Whoever wants to save memory freezes their parameters.
        clean: `[N,3,H,W]` float in [-1,1].
        generators: one CPU generator per image; what is drawn for an image does not depend on its batch.
        epsilon: a budget instead of the authors', in the preset's own measure (L-infinity or Euclidean length in
            units of a [0,1] image, or LPIPS). The step size changes in proportion.
        num_steps: instead of the authors' number.
        target: `[1,3,H,W]`, or one per image, in [-1,1]; only protections that have a target look at it.

    Returns:
        `[N,3,H,W]`, detached, in [-1,1]. With 0 steps or an epsilon of 0, `clean` itself.

    Raises:
        UserError: a ValueError, if the protection needs a denoiser, LPIPS or a target that is missing, or if a target does not
            have the images' size.
        ValueError: if `clean` or `target` are no images in [-1,1], or without one generator per image.
    """
    check_images(clean)
    clean = clean.detach()
    _check_needs(protection, victim, target)
    task = Task(victim=victim, clean=clean, target=_target_of(protection, clean, target), generators=generators)
    loss, config = protection.loss(task), _adjusted(protection.config, epsilon, num_steps)
    if isinstance(config, GlazeConfig):
        return _descend(loss, task, config)
    return pgd(negated(loss) if protection.minimise else loss, clean, config, generators=generators)


def _check_needs(protection: Protection, victim: Victim, target: Tensor | None) -> None:
    if protection.needs_denoiser and victim.denoiser is None:
        made = f"Denoiser.from_pipeline(pipe, {protection.prompt!r})"
        raise UserError(f"{protection.name} needs a denoiser; {made} takes it from a Stable Diffusion pipeline")
    if protection.needs_perceptual and victim.perceptual is None:
        raise UserError(f"{protection.name} needs LPIPS; load_perceptual_distance('vgg') loads it")
    if protection.needs_target and target is None:
        raise UserError(f"{protection.name} needs a target image; anchor_image or style_transfer draw one")


def _target_of(protection: Protection, clean: Tensor, given: Tensor | None) -> Tensor | None:
    """The target for each of the clean images, where the protection has one."""
    if not protection.has_target:
        return None
    target = protection.default_target(*clean.shape[2:]) if given is None else given
    check_images(target)
    if target.shape[2:] != clean.shape[2:] or len(target) not in (1, len(clean)):
        raise UserError(f"a target {tuple(target.shape)} does not go with images {tuple(clean.shape)}")
    return target.to(clean).expand_as(clean)


def _adjusted(config: PGDConfig | GlazeConfig, epsilon: float | None, num_steps: int | None) -> PGDConfig | GlazeConfig:
    if epsilon is not None:
        config = replace(config, epsilon=epsilon, step_size=config.step_size * epsilon / config.epsilon)
    return config if num_steps is None else replace(config, num_steps=num_steps)


def _descend(loss: Objective, task: Task, config: GlazeConfig) -> Tensor:
    """Adam on loss + penalty * max(LPIPS - epsilon, 0), from a random start: the code that `style_distance` names.

    As there, pixels beyond the range are clipped before the loss sees them, and get the clipped pixel's gradient.
    """
    clean, perceptual = task.clean, task.victim.perceptual
    if config.num_steps == 0 or config.epsilon == 0:
        return clean
    with torch.no_grad():
        features = perceptual.features(clean)

    def penalised(images: Tensor) -> Tensor:
        excess = torch.relu(perceptual.distance(images, features) - config.epsilon)
        return loss(images) + config.penalty * excess

    change = draw_uniform(task.generators, like=clean) * config.epsilon
    optimizer = torch.optim.Adam([change], lr=to_model_units(config.step_size))
    for _ in range(config.num_steps):
        _, change.grad = value_and_gradient(penalised, (clean + change).clamp(PIXEL_MIN, PIXEL_MAX))
        change.grad /= clean[0].numel()  # the scale that Adam's own epsilon is meant for
        optimizer.step()
    return (clean + change).clamp(PIXEL_MIN, PIXEL_MAX)


def latent_distance(task: Task) -> Objective:
    """PhotoGuard's encoder attack and Nightshade: |mean(x) - mean(target)|, or |mean(x)|, Euclidean, raw, `[N]`.

    PhotoGuard (Salman et al., "Raising the Cost of Malicious AI-Powered Image Editing", arXiv 2302.06588),
    MadryLab/photoguard: notebooks/demo_simple_attack_img2img.ipynb heads for latents of 0, demo/app.py for the picture
    of a grey area, whose exact grey is UNCONFIRMED; ours is the middle of the range. That the paper's table has 16/255,
    steps of 2/255 and 200 of them is UNCONFIRMED.

    Nightshade (Shan et al., arXiv 2310.13828), Shawn-Shan/nightshade-release: opt.py and gen_poison.py. The paper's
    bound of 0.07 LPIPS and its optimizer are UNCONFIRMED; the release has an L-infinity bound.
    """
    goal = 0.0 if task.target is None else task.target_posterior().mean
    return lambda images: (task.victim.encode(images).mean - goal).flatten(1).norm(dim=1)


EDIT = {"num_steps": 4, "strength": 0.5, "guidance_scale": 7.5, "eta": 1.0}


def edit_distance(task: Task, *, repetitions: int) -> Objective:
    """PhotoGuard's diffusion attack: |edit(x) - target| `[N]`, Euclidean, through four steps of denoising.

    MadryLab/photoguard, notebooks/demo_complex_attack_inpainting.ipynb: 4 steps, guidance 7.5, eta 1, gradients
    averaged over `repetitions` draws, the target 0 everywhere. An L2 bound of 16 is meant for 512 pixels squared; the
    L-infinity settings are commented out there. It attacks an inpainting model, which is shown the image in each step.
    The models that `Denoiser` takes see it only through the latents they start from; so the edit here is
    image-to-image at strength 0.5, the authors' in notebooks/demo_simple_attack_img2img.ipynb. That change is ours.
    """
    victim = task.victim

    def distance(images: Tensor) -> Tensor:
        edited = victim.denoiser.edit(task.sample_scaled(images), task.generators, **EDIT)
        return (victim.decode(victim.unscale(edited)) - task.target).flatten(1).norm(dim=1)

    return averaged(distance, repetitions)


def textural(task: Task) -> Objective:
    """Mist's textural loss: squared distance `[N]`, summed, of sampled latents x from those of the target.

    Liang and Wu, "Mist: Towards Improved Adversarial Examples for Diffusion Models" (arXiv 2305.12683),
    mist-project/mist: mist_v3.py and Masked_PGD.py. The target is drawn by `mist_pattern` and not the authors' picture.
    """
    posterior = task.target_posterior()

    def loss(images: Tensor) -> Tensor:
        goal = task.victim.scale(task.draw(posterior))
        return (task.sample_scaled(images) - goal).square().flatten(1).sum(dim=1)

    return loss


def diffusion_loss(task: Task) -> Objective:
    """AdvDM and Mist's semantic loss: the denoiser's training loss `[N]`, a new timestep and noise in each step.

    AdvDM (Liang et al., "Adversarial Example Does Good", arXiv 2302.04578): its own settings are UNCONFIRMED. Ours are
    those of xavihart/Diff-Protect, code/diff_mist.py and configs/attack/base.yaml, where both signs are to be had and
    prompts go by folder, "a photo" being the default. Mist: mist_v3.py, prompt "a painting".
    """
    return lambda images: task.victim.denoiser.loss(task.sample_scaled(images), task.generators)


FUSION_RATE = 1e4


def fused(task: Task) -> Objective:
    """Mist's default, textural loss - 10^4 * semantic loss `[N]`: mist_v3.py, whose rate is 10^(argument + 3).

    The code numbers this mode 2. Its README and its code disagree on which of the other two is 0 and which 1.
    """
    near, denoised = textural(task), diffusion_loss(task)
    return lambda images: near(images) - FUSION_RATE * denoised(images)


def score_distillation(task: Task) -> Objective:
    """SDS: the mean square of predicted less added noise `[N]`, whose gradient skips the UNet.

    Xue et al., "Toward effective protection against diffusion based mimicry through score distillation" (arXiv
    2311.12832), xavihart/Diff-Protect, code/attacks.py: the latents' gradient is taken to be the predicted noise less
    the added, for a uniform timestep and without a weight. The authors' default is to minimise.
    """

    def loss(images: Tensor) -> Tensor:
        latents = task.sample_scaled(images)
        error = task.victim.denoiser.score_error(latents.detach(), task.generators)
        return with_gradient(error.square().flatten(1).mean(dim=1), latents, error)

    return loss


def moment_distance(task: Task) -> Objective:
    """PID: mean squared change of the posterior's means plus that of its log-variances `[N]`, raw.

    Li et al., "PID: Prompt-Independent Data Protection Against Latent Diffusion Models" (arXiv 2406.15305),
    PKU-ML/Diffusion-PID-Protection: PID.py, attack type `add-log`, and PID.sh.
    """
    with torch.no_grad():
        clean = task.victim.encode(task.clean)

    def loss(images: Tensor) -> Tensor:
        moments = task.victim.encode(images)
        in_variance = mean_squared_error(moments.variance.log(), clean.variance.log())
        return mean_squared_error(moments.mean, clean.mean) + in_variance

    return loss


def style_distance(task: Task) -> Objective:
    """Glaze: mean squared distance `[N]` of raw sampled latents from those of the image in another style.

    Shan et al., "Glaze: Protecting Artists from Style Mimicry by Text-to-Image Models" (arXiv 2302.04222), is closed:
    confirmed are the style-transferred target and the LPIPS bound of 0.05; the paper's optimizer, weight and steps are
    UNCONFIRMED. Settings are those of a re-implementation that thanks Glaze's authors for reviewing it,
    AAAAAAsuka/Impress: glaze.py, README and scripts/new/test_all.sh (500 steps of 0.01 for images in [-1,1], weight 30;
    glaze_origin.py's argument parser says 0.001). Its bound is a soft one: images do change visibly.
    """
    posterior = task.target_posterior()

    def loss(images: Tensor) -> Tensor:
        goal = task.draw(posterior)
        return mean_squared_error(task.sample(images), goal)

    return loss


def with_gradient(value: Tensor, at: Tensor, gradient: Tensor) -> Tensor:
    """`value` `[N]`, with `gradient` as its derivative by `at`, both `[N,C,H,W]`."""
    return value.detach() + ((at - at.detach()) * gradient).flatten(1).sum(dim=1)


def averaged(objective: Objective, repetitions: int) -> Objective:
    """The mean of so many calls of an objective that draws; only one call's graph is held at a time."""

    def mean(images: Tensor) -> Tensor:
        calls = [value_and_gradient(objective, images) for _ in range(repetitions)]
        value, gradient = (torch.stack(part).mean(dim=0) for part in zip(*calls, strict=True))
        return with_gradient(value, images, gradient / images[0].numel())

    return mean


def grey(height: int, width: int) -> Tensor:
    """The middle of the range, `[1,3,H,W]`."""
    return torch.full((1, 3, height, width), (PIXEL_MIN + PIXEL_MAX) / 2)


PATTERN_SIDE = 1440  # pixels, with 3 columns and 8 rows as in the authors' picture
CELL_WIDTH, CELL_HEIGHT = PATTERN_SIDE // 3, PATTERN_SIDE // 8
# The word VEIL in a cell of 16 by 6.
STROKES = (
    ((1, 1), (2.5, 5), (4, 1)),
    ((8, 1), (5.5, 1), (5.5, 5), (8, 5)),
    ((5.5, 3), (7.5, 3)),
    ((9.75, 1), (9.75, 5)),
    ((12, 1), (12, 5), (14.5, 5)),
)


def mist_pattern(height: int, width: int) -> Tensor:
    """A target of our own in the manner of Mist's, `[1,3,H,W]` in [-1,1]: a white word on black, over and over."""
    unit = CELL_WIDTH / 16
    picture = Image.new("RGB", (PATTERN_SIDE, PATTERN_SIDE))
    pen = ImageDraw.Draw(picture)
    for left in range(0, PATTERN_SIDE, CELL_WIDTH):
        for top in range(0, PATTERN_SIDE, CELL_HEIGHT):
            for stroke in STROKES:
                points = [(left + unit * x, top + unit * y) for x, y in stroke]
                pen.line(points, fill="white", width=round(0.8 * unit), joint="curve")
    return from_pil(picture.resize((width, height), Image.Resampling.BICUBIC)).unsqueeze(0)


def anchor_image(pipe: DiffusionPipeline, concept: str, height: int, width: int, *, num_steps: int = 50) -> Tensor:
    """Nightshade's target: a picture of the concept that a poisoned image is to be taken for.

    Shawn-Shan/nightshade-release, opt.py: "A photo of a {concept}", seed 123, guidance 7.5, 50 steps, with Stable
    Diffusion 2.1 at 512 pixels squared.

    Args:
        pipe: any text-to-image pipeline.
        concept: such as "cat".
        height, width: of the picture, which are to be those of the images.
        num_steps: of the sampler.

    Returns:
        `[1,3,H,W]` in [-1,1].
    """
    seeded = torch.Generator().manual_seed(123)
    prompt = f"A photo of a {concept}"
    return _run(pipe, prompt=prompt, height=height, width=width, num_inference_steps=num_steps, generator=seeded)


def style_transfer(
    pipe: DiffusionPipeline,
    images: Tensor,
    style: str = "Cubism by Picasso",
    *,
    generators: Generators,
    num_steps: int = 50,
) -> Tensor:
    """Glaze's target: the same images in another style.

    AAAAAAsuka/Impress, trainset_style_trans_all.py: prompt "{style} style", strength 0.5, guidance 7.5, 50 steps,
    with Stable Diffusion 2.1 (style_transfer.py has a strength of 0.4).

    Args:
        pipe: any image-to-image pipeline.
        images: `[N,3,H,W]` in [-1,1].
        style: as the prompt names it.
        generators: one CPU generator per image.
        num_steps: of the sampler at full strength.

    Returns:
        `[N,3,H,W]` in [-1,1].
    """
    return _run(
        pipe,
        prompt=[f"{style} style"] * len(images),
        image=to_unit_range(images),
        strength=0.5,
        num_inference_steps=num_steps,
        generator=list(generators),
    ).to(images)


def _run(pipe: DiffusionPipeline, **inputs: Any) -> Tensor:
    return to_model_range(pipe(**inputs, guidance_scale=7.5, output_type="pt").images.float())


# Diff-Protect's and Mist's, both through advertorch, which starts at random.
SIXTEEN_LEVELS = PGDConfig(epsilon=16 / 255, step_size=1 / 255, num_steps=100)

PROTECTIONS: dict[str, Protection] = {
    protection.name: protection
    for protection in (
        Protection(
            name="photoguard-encoder",
            source="arXiv 2302.06588; MadryLab/photoguard, notebooks/demo_simple_attack_img2img.ipynb",
            loss=latent_distance,
            minimise=True,
            config=PGDConfig(epsilon=0.06 / 2, step_size=0.02 / 2, num_steps=1000, schedule="linear"),
        ),
        Protection(
            name="photoguard-encoder-grey",
            source="arXiv 2302.06588; MadryLab/photoguard, demo/app.py",
            loss=latent_distance,
            minimise=True,
            config=PGDConfig(epsilon=0.12 / 2, step_size=0.01 / 2, num_steps=200, schedule="linear"),
            default_target=grey,
        ),
        Protection(
            name="photoguard-diffusion",
            source="arXiv 2302.06588; MadryLab/photoguard, notebooks/demo_complex_attack_inpainting.ipynb",
            loss=partial(edit_distance, repetitions=10),
            minimise=True,
            config=PGDConfig(epsilon=16 / 2, norm="l2", step_size=1 / 2, num_steps=200, random_start=False),
            passes_per_step=50,
            prompt="",
            default_target=grey,
        ),
        Protection(
            name="photoguard-diffusion-linf",
            source="arXiv 2302.06588; MadryLab/photoguard, notebooks/demo_complex_attack_inpainting.ipynb",
            loss=partial(edit_distance, repetitions=5),
            minimise=True,
            config=PGDConfig(epsilon=0.1 / 2, step_size=0.006 / 2, num_steps=200, random_start=False),
            passes_per_step=25,
            prompt="",
            default_target=grey,
        ),
        Protection(
            name="mist-textural",
            source="arXiv 2305.12683; mist-project/mist, mist_v3.py",
            loss=textural,
            minimise=True,
            config=SIXTEEN_LEVELS,
            default_target=mist_pattern,
        ),
        Protection(
            name="mist-semantic",
            source="arXiv 2305.12683; mist-project/mist, mist_v3.py",
            loss=diffusion_loss,
            minimise=False,
            config=SIXTEEN_LEVELS,
            passes_per_step=1,
            prompt="a painting",
        ),
        Protection(
            name="mist-fused",
            source="arXiv 2305.12683; mist-project/mist, mist_v3.py",
            loss=fused,
            minimise=True,
            config=SIXTEEN_LEVELS,
            passes_per_step=1.6,
            prompt="a painting",
            default_target=mist_pattern,
        ),
        Protection(
            name="advdm",
            source="arXiv 2302.04578, settings UNCONFIRMED; xavihart/Diff-Protect, code/diff_mist.py",
            loss=diffusion_loss,
            minimise=False,
            config=SIXTEEN_LEVELS,
            passes_per_step=1,
            prompt="a photo",
        ),
        Protection(
            name="advdm-minus",
            source="arXiv 2311.12832; xavihart/Diff-Protect, code/diff_mist.py",
            loss=diffusion_loss,
            minimise=True,
            config=SIXTEEN_LEVELS,
            passes_per_step=1,
            prompt="a photo",
        ),
        Protection(
            name="sds",
            source="arXiv 2311.12832; xavihart/Diff-Protect, code/attacks.py",
            loss=score_distillation,
            minimise=False,
            config=replace(SIXTEEN_LEVELS, random_start=False),
            passes_per_step=0.8,
            prompt="a photo",
        ),
        Protection(
            name="sds-minus",
            source="arXiv 2311.12832; xavihart/Diff-Protect, code/attacks.py",
            loss=score_distillation,
            minimise=True,
            config=replace(SIXTEEN_LEVELS, random_start=False),
            passes_per_step=0.8,
            prompt="a photo",
        ),
        Protection(
            name="pid",
            source="arXiv 2406.15305; PKU-ML/Diffusion-PID-Protection, PID.py and PID.sh",
            loss=moment_distance,
            minimise=False,
            config=PGDConfig(epsilon=12.75 / 255, step_size=1 / 255, num_steps=1000),
        ),
        Protection(
            name="nightshade",
            source="arXiv 2310.13828; Shawn-Shan/nightshade-release, opt.py and gen_poison.py",
            loss=latent_distance,
            minimise=True,
            config=PGDConfig(epsilon=0.04, step_size=0.04, num_steps=500, random_start=False, schedule="linear"),
            needs_target=True,
        ),
        Protection(
            name="glaze",
            source="arXiv 2302.04222, optimizer UNCONFIRMED; AAAAAAsuka/Impress, glaze.py and README",
            loss=style_distance,
            minimise=True,
            config=GlazeConfig(),
            needs_target=True,
            drawn_target=style_transfer,
        ),
    )
}
