"""One SRL-VAE step (arXiv 2504.17219) as the paper describes it, in float32 and not optimised for speed.

It imports nothing from this project. A test compares its results with those of `srl_utils.training.step`, and
`benchmarks/train_step.py` compares the times.
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
        vae: the VAE, in float32.
        perceptual: LPIPS of the package `lpips`, or None.
        epsilon: budget of the attack, for images in [-1,1].
        step_size: step of the attack, for images in [-1,1].
        num_steps: steps of the attack.
        lpips_weight: lambda of the paper.
        originality_weight: alpha of the paper.
        learning_rate: AdamW's.
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
        """Make one update on images `[N,3,H,W]` in [-1,1], with an attack from `start`; return the loss."""
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
        """Return the attacked images `[N,3,H,W]`."""
        adversarial = start
        for _ in range(self.num_steps):
            adversarial = adversarial.detach().requires_grad_(True)
            self.reconstruction_loss(adversarial, clean).backward()
            adversarial = adversarial + self.step_size * adversarial.grad.sign()
            adversarial = torch.min(torch.max(adversarial, clean - self.epsilon), clean + self.epsilon).clamp(-1, 1)
        return adversarial.detach()

    def reconstruction_loss(self, images: Tensor, clean: Tensor) -> Tensor:
        """Return the loss of the reconstructions of `images` against `clean`, a mean over the batch."""
        reconstruction = self.vae.decode(self.vae.encode(images).latent_dist.mean).sample
        loss = F.mse_loss(reconstruction, clean)
        if self.perceptual is not None:
            loss = loss + self.lpips_weight * self.perceptual(reconstruction, clean).mean()
        return loss
