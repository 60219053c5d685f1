"""One SRL-VAE step (arXiv 2504.17219) as a reader of the paper would write it: plain, in float32, with no care for speed.

It imports nothing of this project, so that it can be held against `srl_utils.training.step`: for its results by a test, for its
time by `benchmarks/train_step.py`.
"""

from __future__ import annotations

import copy

import lpips
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor


class TextbookStep:
    """Trains the encoder of `vae`, in place.

    Args:
        vae: in float32.
        perceptual: LPIPS as its package computes it, or None.
        epsilon, step_size: of the attack, for images in [-1,1].
        num_steps: of the attack.
        lpips_weight, originality_weight: lambda and alpha of the paper.
        learning_rate: of AdamW.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        perceptual: lpips.LPIPS | None = None,
        *,
        epsilon: float = 2 * 8 / 255,
        step_size: float = 2 * 0.02,
        num_steps: int = 10,
        lpips_weight: float = 1.0,
        originality_weight: float = 0.01,
        learning_rate: float = 1e-5,
    ) -> None:
        self.vae, self.original, self.perceptual = vae, copy.deepcopy(vae), perceptual
        self.epsilon, self.step_size, self.num_steps = epsilon, step_size, num_steps
        self.lpips_weight, self.originality_weight = lpips_weight, originality_weight
        parts = [part for part in (vae.encoder, vae.quant_conv) if part is not None]
        self.parameters = [parameter for part in parts for parameter in part.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate)

    def __call__(self, clean: Tensor, start: Tensor) -> Tensor:
        """One update on images `[N,3,H,W]` in [-1,1]; `start` is where the attack begins. Returns the loss."""
        adversarial = self.attack(clean, start)
        robust = self.reconstruction_loss(adversarial, clean)
        posterior = self.vae.encode(clean).latent_dist
        with torch.no_grad():
            reference = self.original.encode(clean).latent_dist
        originality = F.mse_loss(posterior.mean, reference.mean) + F.mse_loss(posterior.var, reference.var)
        loss = robust + self.originality_weight * originality
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.detach()

    def attack(self, clean: Tensor, start: Tensor) -> Tensor:
        adversarial = start
        for _ in range(self.num_steps):
            adversarial = adversarial.detach().requires_grad_(True)
            self.reconstruction_loss(adversarial, clean).backward()
            adversarial = adversarial + self.step_size * adversarial.grad.sign()
            adversarial = torch.min(torch.max(adversarial, clean - self.epsilon), clean + self.epsilon).clamp(-1, 1)
        return adversarial.detach()

    def reconstruction_loss(self, images: Tensor, clean: Tensor) -> Tensor:
        reconstruction = self.vae.decode(self.vae.encode(images).latent_dist.mean).sample
        loss = F.mse_loss(reconstruction, clean)
        if self.perceptual is not None:
            loss = loss + self.lpips_weight * self.perceptual(reconstruction, clean).mean()
        return loss
