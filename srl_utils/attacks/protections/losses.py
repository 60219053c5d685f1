"""The losses of published protections, with the sources of their settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import functional as transforms

from srl_utils.attacks.draws import draw_normal
from srl_utils.attacks.gradient import Objective, value_and_gradient
from srl_utils.attacks.protections.masks import widened_mask
from srl_utils.attacks.protections.victim import ProtectedBatch
from srl_utils.images.pixels import PIXEL_MIN, by_frame
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

    return averaged([distance] * repetitions)


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
    """Return the denoiser's training loss, `[N]`, at a new timestep and noise in each call: AdvDM, Mist, Anti-DreamBooth.

    AdvDM: Liang et al., "Adversarial Example Does Good" (arXiv 2302.04578); its own settings are UNCONFIRMED. The
    settings here are those of xavihart/Diff-Protect, code/diff_mist.py and configs/attack/base.yaml. That code
    maximises the loss or minimises it ("minus", arXiv 2311.12832), and has a prompt for each folder, by default
    "a photo".

    Mist's semantic loss: arXiv 2305.12683, mist-project/mist, mist_v3.py, prompt "a painting".

    Anti-DreamBooth's FSMG: Le et al., "Anti-DreamBooth: Protecting Users from Personalized Text-to-Image Synthesis"
    (arXiv 2303.15433), VinAIResearch/Anti-DreamBooth, attacks/fsmg.py and scripts/attack_with_fsmg.sh. The authors attack
    a denoiser that DreamBooth has trained on other images of the person for 1000 steps; pass its pipeline to do the same.
    `SurrogateLoss` is their ASPL, which trains the denoiser between the steps of the attack.
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


EDIT_STEPS = 4
"""Steps of the sampler whose first prediction DiffusionGuard attacks."""


def first_prediction(batch: ProtectedBatch) -> Objective:
    """Return DiffusionGuard's loss, `[N]`: the Euclidean length of the noise predicted at an edit's first timestep.

    Source: Choi et al., "DiffusionGuard: A Robust Defense Against Malicious Diffusion-based Image Editing" (arXiv
    2410.05694), choi403/DiffusionGuard, attacks/attack_diffusionguard.py, attacks/common.py, utils/mask_generation.py and
    config/diffusionguard.yaml: the first of 4 timesteps, with new noise in each call.

    The authors attack a model for inpainting, whose UNet takes pure noise beside the mask and the latents of the image
    with a hole, and shrink the contour of what is kept at random in each call, so that the protection holds for other
    masks. A denoiser that inpaints is attacked in this way, with `widened_mask`: the authors move the points of a drawn
    mask's contour; here the central square is widened. A text-to-image model takes no mask and sees the image through its
    noised latents alone, so the whole image is attacked.
    """
    denoiser = batch.denoiser
    denoiser.scheduler.set_timesteps(EDIT_STEPS)
    first = denoiser.scheduler.timesteps[:1]
    predict = _inpainted_noise if denoiser.inpaints else _denoised_noise
    return lambda images: predict(batch, images, first.to(images.device).expand(len(images))).flatten(1).norm(dim=1)


def _denoised_noise(batch: ProtectedBatch, images: Tensor, timesteps: Tensor) -> Tensor:
    """Return the noise `[N,C,h,w]` that a text-to-image model predicts in the noised latents of images."""
    latents = batch.sample_scaled(images)
    noised = batch.denoiser.add_noise(latents, draw_normal(batch.generators, like=latents), timesteps)
    return batch.denoiser.predict_noise(noised, timesteps)


def _inpainted_noise(batch: ProtectedBatch, images: Tensor, timesteps: Tensor) -> Tensor:
    """Return the noise `[N,C,h,w]` that a model for inpainting predicts in pure noise, around which it sees the images."""
    mask = widened_mask(images, batch.generators)
    latents = batch.sample_scaled(images * (1 - mask))
    beside = torch.cat([functional.interpolate(mask, latents.shape[2:]), latents], dim=1)
    return batch.denoiser.predict_noise(draw_normal(batch.generators, like=latents), timesteps, beside=beside)


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


def as_it_is(images: Tensor) -> Tensor:
    """Return the images."""
    return images


def smoothed(images: Tensor) -> Tensor:
    """Return images `[N,3,H,W]` after EditShield's Gaussian blur: 5 pixels wide, of standard deviation 1.5."""
    return transforms.gaussian_blur(images, [5, 5], [1.5, 1.5])


def turned(images: Tensor) -> Tensor:
    """Return images `[N,3,H,W]` in [-1,1] after EditShield's rotation by 5 degrees, with black corners."""
    return transforms.rotate(images, 5, fill=[PIXEL_MIN] * images.shape[1])


def transformed_distance(batch: ProtectedBatch) -> Objective:
    """Return EditShield's loss, `[N]`: the mean squared distance of transformed images' latents from the clean image's.

    It is the mean over the image itself, blurred and rotated. Latents are raw and sampled, the clean image's once.

    Source: Chen et al., "EditShield: Protecting Unauthorized Image Editing by Instruction-guided Diffusion Models" (arXiv
    2311.12066), Allen-piexl/Editshield, EOT_Center.py, EOT_Gaussion.py, EOT_Resize.py (the rotation) and Functions.py. The
    centre crop of EOT_Center.py leaves its square images as they are, as the image itself does here.

    Budget and step size are those that the code defines without using them: it takes 30 steps of Adam at 0.001, without a
    bound, with 0.1 times the mean squared change of the pixels as a penalty. Each of its files has one transformation, and
    compares noised latents as well. The paper averages over transformations: which ones, and its budget, are UNCONFIRMED.
    """
    with torch.no_grad():
        goal = batch.sample(batch.clean)

    def seen_through(transform: Callable[[Tensor], Tensor]) -> Objective:
        return lambda images: mean_squared_error(batch.sample(by_frame(transform, images)), goal)

    return averaged([seen_through(transform) for transform in (as_it_is, smoothed, turned)])


def latent_energy(batch: ProtectedBatch) -> Objective:
    """Return the loss that BlurGuard adds its blur to, `[N]`: the mean square of sampled latents, scaled for the denoiser.

    Source: jsu-kim/BlurGuard, BlurGuard/code/attacks.py; see `blurring`.
    """
    return lambda images: batch.sample_scaled(images).square().flatten(1).mean(dim=1)


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


def averaged(objectives: Sequence[Objective]) -> Objective:
    """Return the mean of objectives, each called once in its turn, keeping one call's graph in memory at a time."""

    def mean(images: Tensor) -> Tensor:
        calls = [value_and_gradient(objective, images) for objective in objectives]
        value, gradient = (torch.stack(part).mean(dim=0) for part in zip(*calls, strict=True))
        return with_gradient(value, images, gradient / images[0].numel())

    return mean
