"""Purifiers that add noise and take it away again by a diffusion model of diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
from torch import Tensor
from torchvision.transforms.functional import resize as resized

from srl_utils.attacks.corruptions import gaussian_noise
from srl_utils.attacks.draws import Generators, draw_normal
from srl_utils.errors import UserError
from srl_utils.images.pixels import to_model_range, to_unit_range
from srl_utils.purifiers.base import DENOISER, Purifier

Change = Callable[[Tensor, Generators | None], Tensor]
"""Images `[N,3,H,W]` in [-1,1] and a generator for each to as many images."""
STEPS = 50
"""Denoising steps at full strength of image-to-image, and of the upscaler."""
UPSCALER_NOISE = 320
"""Noise level of which the upscaler is told: that of noisy upscaling."""


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Settings of GrIDPure.

    Attributes:
        rounds: how often the image is purified.
        timestep: up to which noise is added in each round, and taken away in as many steps.
        kept: share of the image that a round leaves as it is.
        stride: of the crops, as a share of the model's own side.
    """

    rounds: int = 20
    timestep: int = 10
    kept: float = 0.1
    stride: float = 0.5


def image_to_image(pipeline: DiffusionPipeline, strength: float) -> Purifier:
    """Return image-to-image without a prompt and without guidance, in the pipeline's own autoencoder.

    Args:
        pipeline: of diffusers, for image-to-image.
        strength: of the noise, in (0,1].

    Raises:
        UserError: if the strength is too low for one of the `STEPS`.
    """
    if int(STEPS * strength) == 0:
        raise UserError(f"img2img-{strength:g} takes none of the {STEPS} steps; give {1 / STEPS:g} at least")

    def edit(images: Tensor, generators: Generators | None) -> Tensor:
        output = pipeline(
            prompt=[""] * len(images), image=to_unit_range(images).clamp(0, 1), strength=strength, guidance_scale=1.0,
            num_inference_steps=STEPS, generator=_listed(generators), output_type="pt",
        )  # fmt: skip
        return to_model_range(output.images.float())

    return _without_gradient(f"img2img-{strength:g}", pipeline, edit, calls=STEPS * strength)


def noisy_upscaling(pipeline: DiffusionPipeline, sigma: float) -> Purifier:
    """Return noisy upscaling: noise, an upscaler of four times the sides, and the old size again.

    Source: Hönig et al., "Adversarial Perturbations Cannot Reliably Protect Artists From Generative AI" (arXiv 2406.12027).

    Args:
        pipeline: such as Stable Diffusion's x4 upscaler.
        sigma: standard deviation of the noise, in units of a [0,1] image; the authors' is 0.1.
    """

    def upscale(images: Tensor, generators: Generators | None) -> Tensor:
        noisy = gaussian_noise(images, sigma, generators=generators)
        output = pipeline(
            prompt=[""] * len(images), image=to_unit_range(noisy), noise_level=UPSCALER_NOISE, guidance_scale=1.0,
            num_inference_steps=STEPS, generator=_listed(generators), output_type="pt",
        )  # fmt: skip
        return resized(to_model_range(output.images.float()), list(images.shape[2:]), antialias=True)

    return _without_gradient(f"noisy-upscaling-{sigma:g}", pipeline, upscale, calls=16 * STEPS)


def diffpure(pipeline: DiffusionPipeline, timestep: int) -> Purifier:
    """Return DiffPure: noise up to a time step of a diffusion model of pixels, and the model's way back.

    Source: Nie et al., "Diffusion Models for Adversarial Purification", ICML 2022. The images should have the model's size.

    Args:
        pipeline: with an unconditional UNet of RGB images, such as `DDPMPipeline`.
        timestep: of 1,000; for protections, 100 was used.
    """

    def purify(images: Tensor, generators: Generators | None) -> Tensor:
        return noised_and_denoised(pipeline, images, timestep, generators)

    return _without_gradient(f"diffpure-{timestep}", pipeline, purify, calls=timestep)


def gridpure(pipeline: DiffusionPipeline, config: GridConfig = GridConfig()) -> Purifier:
    """Return GrIDPure: DiffPure of overlapping crops with little noise, many times over.

    Source: Zhao et al., "Can Protective Perturbation Safeguard Personal Data from Being Exploited by Stable Diffusion?",
    CVPR 2024, and the authors' code. Images smaller than the model's size are one crop.

    Args:
        pipeline: with an unconditional UNet of RGB images.
        config: the authors' by default.
    """
    side = pipeline.unet.config.sample_size

    def purify(images: Tensor, generators: Generators | None) -> Tensor:
        for _ in range(config.rounds):
            total, counts = torch.zeros_like(images), torch.zeros_like(images[:, :1])
            for rows, columns in crops(images.shape[2:], side, max(1, int(side * config.stride))):
                crop = images[..., rows, columns]
                total[..., rows, columns] += noised_and_denoised(pipeline, crop, config.timestep, generators)
                counts[..., rows, columns] += 1
            images = config.kept * images + (1 - config.kept) * total / counts
        return images

    return _without_gradient("gridpure", pipeline, purify, calls=config.rounds * config.timestep)


def noised_and_denoised(
    pipeline: DiffusionPipeline, images: Tensor, timestep: int, generators: Generators | None
) -> Tensor:
    """Return images `[N,3,H,W]` after noise up to `timestep` and the model's way back, step by step.

    The denoiser computes in its own dtype, the steps in float32.
    """
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    steps = torch.full((len(images),), timestep - 1)
    current = scheduler.add_noise(images, draw_normal(generators, like=images), steps)
    for step in range(timestep - 1, -1, -1):
        predicted = pipeline.unet(current.to(pipeline.unet.dtype), step).sample.float()
        current = scheduler.step(predicted, step, current, generator=_listed(generators)).prev_sample
    return current


def crops(sides: Sequence[int], side: int, stride: int) -> Iterator[tuple[slice, slice]]:
    """Yield rows and columns of the crops of `side` x `side` that cover an image, each `stride` after the one before."""
    for row in _starts(sides[0], side, stride):
        for column in _starts(sides[1], side, stride):
            yield slice(row, row + side), slice(column, column + side)


def _starts(length: int, side: int, stride: int) -> list[int]:
    """Return where the crops begin along one side; the last one ends with the image."""
    last = max(length - side, 0)
    return [*range(0, last, stride), last]


def sides_of(pipeline: DiffusionPipeline) -> int:
    """Return the number of which sides of an image have to be multiples."""
    unet = pipeline.components.get("unet")
    halvings = 0 if unet is None else len(unet.config.block_out_channels) - 1
    return getattr(pipeline, "vae_scale_factor", 1) * 2 ** max(halvings, 1)  # transformers take patches of 2


def is_unconditional(pipeline: DiffusionPipeline) -> bool:
    """Return whether a pipeline denoises RGB images without a condition, as DiffPure needs it."""
    unet = pipeline.components.get("unet")
    return isinstance(unet, UNet2DModel) and unet.config.in_channels == 3


def starts_from_images(pipeline: DiffusionPipeline) -> bool:
    """Return whether a pipeline changes a given image as far as its strength says."""
    arguments = inspect.signature(pipeline.__call__).parameters
    return {"image", "strength"} <= arguments.keys() and "mask_image" not in arguments


def is_upscaler(pipeline: DiffusionPipeline) -> bool:
    """Return whether a pipeline upscales noisy images, as that of Stable Diffusion does."""
    return "Upscale" in type(pipeline).__name__


def _listed(generators: Generators | None) -> list[torch.Generator] | None:
    """Return generators as diffusers takes them."""
    return None if generators is None else list(generators)


def _without_gradient(name: str, pipeline: DiffusionPipeline, change: Change, *, calls: float) -> Purifier:
    """Return a purifier without a gradient whose images have sides that the pipeline takes.

    Args:
        name: of the purifier.
        pipeline: computes on its own device.
        change: of images on that device.
        calls: of the denoiser for one image.
    """

    def apply(images: Tensor, generators: Generators | None) -> Tensor:
        height, width = images.shape[2:]
        factor = sides_of(pipeline)
        padded = F.pad(images, (0, -width % factor, 0, -height % factor), mode="replicate")
        with torch.no_grad():
            changed = change(padded.detach().to(pipeline.device), generators)
        return changed[..., :height, :width].to(images)

    return Purifier(name=name, apply=apply, differentiable=False, random=True, passes=DENOISER * calls)
