"""Protected images from clean ones, by any of the published protections."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from srl_utils.attacks.denoiser import Denoiser
from srl_utils.attacks.draws import Generators, draw_uniform
from srl_utils.attacks.gradient import Objective, negated, pgd, value_and_gradient
from srl_utils.attacks.protections.blurring import BlurGuardConfig, blurred_attack
from srl_utils.attacks.protections.presets import Config, GlazeConfig, Protection
from srl_utils.attacks.protections.victim import ProtectedBatch, Victim
from srl_utils.errors import UserError
from srl_utils.images.pixels import PIXEL_MAX, PIXEL_MIN, check_images, to_model_units


def protect(
    protection: Protection,
    victim: Victim,
    clean: Tensor,
    *,
    generators: Generators | None = None,
    epsilon: float | None = None,
    num_steps: int | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """Return the images protected, as their owner would publish them.

    Args:
        protection: one of `PROTECTIONS`.
        victim: the networks that the protection attacks. Freeze their parameters to save memory.
        clean: `[N,3,H,W]` float in [-1,1]; protections that need neither denoiser nor LPIPS take clips `[N,3,T,H,W]` too.
            To a `joint` protection, they are all images of one concept.
        generators: one CPU generator per image, so that an image's draws do not depend on its batch. None draws from
            PyTorch's global generator.
        epsilon: a budget in place of the authors', in the same measure: L-infinity or Euclidean length in units of a
            [0,1] image, or LPIPS. The step size changes in proportion.
        num_steps: a number of steps in place of the authors'.
        target: the image to imitate, `[1,3,H,W]`, or one per image, in [-1,1]. Protections without a target ignore it.

    Returns:
        `[N,3,H,W]`, detached, in [-1,1]. With 0 steps or an epsilon of 0, `clean` itself.

    Raises:
        UserError: a ValueError, if the protection needs a denoiser, LPIPS or a target that is missing, if it cannot attack
            a denoiser that inpaints, or if the target does not have the images' size.
        ValueError: if `clean` or `target` are not images in [-1,1], or if the number of generators is not the number of
            images.
    """
    check_images(clean, clips=True)
    clean = clean.detach()
    _check_needs(protection, victim, target)
    goal = target_of(protection, clean, target)
    batch = ProtectedBatch(victim=victim, clean=clean, target=goal, generators=generators)
    loss, config = protection.loss(batch), _adjusted(protection.config, epsilon, num_steps)
    if isinstance(config, GlazeConfig):
        return _descend(loss, batch, config)
    objective = negated(loss) if protection.minimise else loss
    if isinstance(config, BlurGuardConfig):
        return blurred_attack(objective, clean, config, generators=generators)
    return pgd(objective, clean, config, generators=generators)


def _check_needs(protection: Protection, victim: Victim, target: Tensor | None) -> None:
    if protection.needs_denoiser:
        _check_denoiser(protection, victim.denoiser)
    if protection.needs_perceptual and victim.perceptual is None:
        raise UserError(f"{protection.name} needs LPIPS; load_perceptual_distance('vgg') loads it")
    if protection.needs_target and target is None:
        drawn = protection.drawn_target and f", or let {protection.drawn_target.__name__} draw one"
        raise UserError(f"{protection.name} needs a target image; pass one as target{drawn or ''}")


def _check_denoiser(protection: Protection, denoiser: Denoiser | None) -> None:
    if denoiser is None:
        made = f"Denoiser.from_pipeline(pipe, {protection.prompt!r})"
        raise UserError(f"{protection.name} needs a denoiser; {made} makes one from a Stable Diffusion pipeline")
    if denoiser.inpaints and not protection.inpainting:
        raise UserError(f"{protection.name} attacks text-to-image models, and this denoiser inpaints")


def target_of(protection: Protection, clean: Tensor, given: Tensor | None) -> Tensor | None:
    """Return one target for each of the clean images, or None for a protection without a target.

    Args:
        protection: one of `PROTECTIONS`.
        clean: `[N,3,H,W]`, or clips `[N,3,T,H,W]`, in [-1,1].
        given: the target, `[1,3,H,W]`, or one per image; None stands for the protection's default. For clips, an image is
            the target of every frame.

    Raises:
        UserError: a ValueError, if the target does not have the images' size.
    """
    if not protection.has_target:
        return None
    target = given
    if target is None:
        assert protection.default_target is not None  # or else `_check_needs` has refused it
        target = protection.default_target(*clean.shape[-2:])
    check_images(target, clips=True)
    if clean.ndim == 5 and target.ndim == 4:
        target = target.unsqueeze(2)  # for every frame
    if target.shape[-2:] != clean.shape[-2:] or target.ndim != clean.ndim or len(target) not in (1, len(clean)):
        raise UserError(
            f"target of shape {tuple(target.shape)} does not fit images of shape {tuple(clean.shape)}; "
            "pass one target, or one per image, of the images' size"
        )
    return target.to(clean).expand_as(clean)


def _adjusted(config: Config, epsilon: float | None, num_steps: int | None) -> Config:
    if epsilon is not None:
        config = replace(config, epsilon=epsilon, step_size=config.step_size * epsilon / config.epsilon)
    return config if num_steps is None else replace(config, num_steps=num_steps)


def _descend(loss: Objective, batch: ProtectedBatch, config: GlazeConfig) -> Tensor:
    """Minimise loss + penalty * max(LPIPS - epsilon, 0) by Adam from a random start, as the source of `style_distance`.

    As there, pixels beyond the range are clipped before the loss sees them, and get the clipped pixel's gradient.
    """
    clean = batch.clean
    if config.num_steps == 0 or config.epsilon == 0:
        return clean
    perceptual = batch.perceptual
    with torch.no_grad():
        features = perceptual.features(clean)

    def penalised(images: Tensor) -> Tensor:
        excess = torch.relu(perceptual.distance(images, features) - config.epsilon)
        return loss(images) + config.penalty * excess

    change = draw_uniform(batch.generators, like=clean) * config.epsilon
    optimizer = torch.optim.Adam([change], lr=to_model_units(config.step_size))
    for _ in range(config.num_steps):
        _, change.grad = value_and_gradient(penalised, (clean + change).clamp(PIXEL_MIN, PIXEL_MAX))
        change.grad /= clean[0].numel()  # Adam's own epsilon is meant for gradients of this scale
        optimizer.step()
    return (clean + change).clamp(PIXEL_MIN, PIXEL_MAX)
