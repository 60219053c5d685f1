"""The losses of published protections, with the sources of their settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srl_utils.attacks.gradient import Objective, value_and_gradient
from srl_utils.attacks.protections.victim import ProtectedBatch
from srl_utils.metrics.losses import mean_squared_error


def latent_distance(batch: ProtectedBatch) -> Objective:
    """Return the loss of PhotoGuard's encoder attack, Nightshade and UVCG, `[N]`: |mean(x) - mean(target)|.

    This is the Euclidean distance of the posteriors' raw means. Without a target it is |mean(x)|.

    PhotoGuard: Salman et al., "Raising the Cost of Malicious AI-Powered Image Editing" (arXiv 2302.06588),
    MadryLab/photoguard. notebooks/demo_simple_attack_img2img.ipynb has latents of 0 as its target, demo/app.py a grey
    image. Its exact grey is UNCONFIRMED; here it is the middle of the range. The paper's table is said to have 16/255,
    steps of 2/255 and 200 steps: UNCONFIRMED.

    Nightshade: Shan et al. (arXiv 2310.13828), Shawn-Shan/nightshade-release, opt.py and gen_poison.py. The paper's
    bound of 0.07 LPIPS and its optimizer are UNCONFIRMED; the release has an L-infinity bound.

    UVCG: Li et al., "UVCG: Leveraging Temporal Consistency for Universal Video Protection" (arXiv 2411.17746). It pulls a
    clip's latents to those of another clip by PGD. Its budget and steps are UNCONFIRMED; here they are Mist's. The authors
    attack frame by frame and start from the perturbation of the frame before; here all frames change together.
    """
    goal = 0.0 if batch.target is None else batch.target_posterior().mean
    return lambda images: (batch.victim.encode(images).mean - goal).flatten(1).norm(dim=1)


EDIT: dict[str, Any] = {"num_steps": 4, "strength": 0.5, "guidance_scale": 7.5, "eta": 1.0}
"""PhotoGuard's edit, as arguments of `Denoiser.edit`."""


def edit_distance(batch: ProtectedBatch, *, repetitions: int) -> Objective:
    """Return PhotoGuard's diffusion attack, `[N]`: |edit(x) - target|, Euclidean, through four denoising steps.

    Source: MadryLab/photoguard, notebooks/demo_complex_attack_inpainting.ipynb: 4 steps, guidance 7.5, eta 1, gradients
    averaged over `repetitions` draws, a target of 0 everywhere. Its L2 bound of 16 is meant for 512 pixels squared; its
    L-infinity settings are commented out.

    The edit differs from the authors': they attack an inpainting model, which takes the image in each step. The models
    of `Denoiser` see the image only through their first latents, so the edit here is image-to-image at strength 0.5,
    the authors' value in notebooks/demo_simple_attack_img2img.ipynb.
    """
    victim = batch.victim

    def distance(images: Tensor) -> Tensor:
        edited = batch.denoiser.edit(batch.sample_scaled(images), batch.generators, **EDIT)
        return (victim.decode(victim.unscale(edited)) - batch.needed_target).flatten(1).norm(dim=1)

    return averaged(distance, repetitions)


def textural(batch: ProtectedBatch) -> Objective:
    """Return Mist's textural loss, `[N]`: the summed squared distance of sampled latents from the target's.

    Source: Liang and Wu, "Mist: Towards Improved Adversarial Examples for Diffusion Models" (arXiv 2305.12683),
    mist-project/mist, mist_v3.py and Masked_PGD.py. `mist_pattern` draws the target, in place of the authors' image.
    """
    posterior = batch.target_posterior()

    def loss(images: Tensor) -> Tensor:
        goal = batch.victim.scale(batch.draw(posterior))
        return (batch.sample_scaled(images) - goal).square().flatten(1).sum(dim=1)

    return loss


def diffusion_loss(batch: ProtectedBatch) -> Objective:
    """Return the denoiser's training loss, `[N]`, at a new timestep and noise in each call: AdvDM, Mist's semantic loss.

    AdvDM: Liang et al., "Adversarial Example Does Good" (arXiv 2302.04578); its own settings are UNCONFIRMED. The
    settings here are those of xavihart/Diff-Protect, code/diff_mist.py and configs/attack/base.yaml. That code
    maximises the loss or minimises it ("minus", arXiv 2311.12832), and has a prompt for each folder, by default
    "a photo".

    Mist: arXiv 2305.12683, mist-project/mist, mist_v3.py, prompt "a painting".
    """
    return lambda images: batch.denoiser.loss(batch.sample_scaled(images), batch.generators)


FUSION_RATE = 1e4
"""Weight of Mist's semantic loss in the fused one: 10^(argument + 3) in mist_v3.py."""


def fused(batch: ProtectedBatch) -> Objective:
    """Return Mist's default loss, `[N]`: the textural loss minus 10^4 times the semantic loss.

    Source: mist-project/mist, mist_v3.py, mode 2. Its README and its code number the other two modes differently.
    """
    near, denoised = textural(batch), diffusion_loss(batch)
    return lambda images: near(images) - FUSION_RATE * denoised(images)


def score_distillation(batch: ProtectedBatch) -> Objective:
    """Return the SDS loss, `[N]`: the mean square of the predicted minus the added noise. Its gradient skips the UNet.

    Source: Xue et al., "Toward effective protection against diffusion based mimicry through score distillation" (arXiv
    2311.12832), xavihart/Diff-Protect, code/attacks.py. The gradient at the latents is the predicted minus the added
    noise, at a uniform timestep, without a weight. The authors minimise by default.
    """

    def loss(images: Tensor) -> Tensor:
        latents = batch.sample_scaled(images)
        error = batch.denoiser.score_error(latents.detach(), batch.generators)
        return with_gradient(error.square().flatten(1).mean(dim=1), latents, error)

    return loss


def moment_distance(batch: ProtectedBatch) -> Objective:
    """Return PID's loss, `[N]`: the mean squared change of the raw means plus that of the log-variances.

    Source: Li et al., "PID: Prompt-Independent Data Protection Against Latent Diffusion Models" (arXiv 2406.15305),
    PKU-ML/Diffusion-PID-Protection, PID.py (attack type `add-log`) and PID.sh.
    """
    with torch.no_grad():
        clean = batch.victim.encode(batch.clean)

    def loss(images: Tensor) -> Tensor:
        moments = batch.victim.encode(images)
        in_variance = mean_squared_error(moments.variance.log(), clean.variance.log())
        return mean_squared_error(moments.mean, clean.mean) + in_variance

    return loss


def posterior_divergence(batch: ProtectedBatch, *, variance: float) -> Objective:
    """Return the loss of the posterior collapse attack, `[N]`: KL(posterior || N(0, v I)), v = `variance`, mean of values.

    Source: Guo et al., "A Gray-Box Attack Against Latent Diffusion Model-Based Image Editing by Posterior Collapse" (IEEE
    TIFS 2025), ZhongliangGuo/PosteriorCollapseAttack, README.md, loss.py, main.py and vae_attack.py. The authors maximise
    for v = 1 (PCA+), to keep an edit from changing the image, and minimise for v = 1e-8 (PCA-), to spoil it.

    The authors sum over the values and leave out the constant ln v. The divergence here is multiplied by v. Neither changes
    a step, and the gradients stay within half precision.
    """

    def loss(images: Tensor) -> Tensor:
        posterior = batch.victim.encode(images)
        spread = posterior.variance - variance * (1 + (posterior.variance / variance).log())
        return (posterior.mean.square() + spread).flatten(1).mean(dim=1) / 2

    return loss


def style_distance(batch: ProtectedBatch) -> Objective:
    """Return Glaze's loss, `[N]`: the mean squared distance of raw sampled latents from those of the image restyled.

    Source: Shan et al., "Glaze: Protecting Artists from Style Mimicry by Text-to-Image Models" (arXiv 2302.04222), whose
    code is not public. Confirmed are the style-transferred target and the LPIPS bound of 0.05. The paper's optimizer,
    weight and steps are UNCONFIRMED. The settings here are those of a re-implementation that thanks Glaze's authors for
    a review, AAAAAAsuka/Impress: glaze.py, README and scripts/new/test_all.sh (500 steps of 0.01 for images in [-1,1],
    weight 30; the argument parser of glaze_origin.py says 0.001). Its bound is soft, so images change visibly.
    """
    posterior = batch.target_posterior()

    def loss(images: Tensor) -> Tensor:
        goal = batch.draw(posterior)
        return mean_squared_error(batch.sample(images), goal)

    return loss


def with_gradient(value: Tensor, at: Tensor, gradient: Tensor) -> Tensor:
    """Return `value` `[N]` with `gradient` as its derivative by `at`, both `[N,C,H,W]`."""
    return value.detach() + ((at - at.detach()) * gradient).flatten(1).sum(dim=1)


def averaged(objective: Objective, repetitions: int) -> Objective:
    """Return the mean of `repetitions` calls of a random objective, keeping one call's graph in memory at a time."""

    def mean(images: Tensor) -> Tensor:
        calls = [value_and_gradient(objective, images) for _ in range(repetitions)]
        value, gradient = (torch.stack(part).mean(dim=0) for part in zip(*calls, strict=True))
        return with_gradient(value, images, gradient / images[0].numel())

    return mean
