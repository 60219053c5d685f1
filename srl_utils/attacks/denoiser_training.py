"""Train a diffusion model's UNet, as the training scripts of diffusers do."""

from __future__ import annotations

import copy

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from srl_utils.attacks.denoiser import Denoiser
from srl_utils.attacks.draws import Generators

LARGEST_GRADIENT = 1.0


def float32_copy(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return a copy of `unet` in float32, in which the small updates of a fine-tuning are not rounded away."""
    return in_dtype(copy.deepcopy(unet), torch.float32)


def in_dtype(unet: UNet2DConditionModel, dtype: torch.dtype) -> UNet2DConditionModel:
    """Return `unet` in `dtype`; do not cast without need, as diffusers warns of every cast."""
    return unet if unet.dtype == dtype else unet.to(dtype)


def training_step(
    denoiser: Denoiser, optimizer: torch.optim.Optimizer, latents: Tensor, generators: Generators | None
) -> None:
    """Take a step down the denoiser's training loss, averaged over the latents.

    Args:
        denoiser: its UNet's weights that require gradients are trained, with a gradient of length 1 at most.
        optimizer: of these weights, whose gradients must be empty.
        latents: `[N,C,h,w]` at the UNet's scale, without a graph.
        generators: one CPU generator per image for timestep and noise, or None; see `Denoiser`.
    """
    denoiser.loss(latents, generators).mean().backward()
    torch.nn.utils.clip_grad_norm_(denoiser.unet.parameters(), LARGEST_GRADIENT)
    optimizer.step()
    optimizer.zero_grad()
