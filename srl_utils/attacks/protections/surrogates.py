"""Attacks on a denoiser that learns the images while they are attacked."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from srl_utils.attacks.denoiser import Denoiser
from srl_utils.attacks.denoiser_training import float32_copy, training_step
from srl_utils.attacks.protections.victim import ProtectedBatch

STEPS_PER_ROUND = 6
TRAINING_STEPS = 3
LEARNING_RATE = 5e-7


class SurrogateLoss:
    """The loss of Anti-DreamBooth's ASPL, `[N]`: the training loss of a denoiser that learns between steps of the attack.

    Each call is a step of the attack. Every `STEPS_PER_ROUND` of them make a round: a copy of the model, the surrogate,
    learns the clean images and is attacked, and then the model learns the images as they are protected so far. Timesteps
    and noise are new in each step. The surrogate learns all images of the batch, so the protection is a joint one.

    Source: Le et al., "Anti-DreamBooth: Protecting Users from Personalized Text-to-Image Synthesis" (arXiv 2303.15433,
    algorithm 1), VinAIResearch/Anti-DreamBooth, attacks/aspl.py and scripts/attack_with_aspl.sh: 50 rounds of 3 steps of
    training, 6 of the attack and 3 of training, each training with a new AdamW.

    Four things differ from the authors' code. The surrogate learns the batch's own clean images; theirs learns other
    images of the person. The UNet alone is trained; they train the text encoder too. A training step takes all images
    of the batch; theirs takes one, and an image of the class for prior preservation. The copies are in float32; theirs
    are in bfloat16, where a step of 5e-7 does not change weights above 1.3e-4.
    """

    def __init__(self, batch: ProtectedBatch) -> None:
        self.batch = batch
        self.model = self.surrogate = batch.denoiser
        self.calls = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Return the surrogate's training loss `[N]` of images `[N,3,H,W]`; train first if a round begins."""
        if self.calls % STEPS_PER_ROUND == 0:
            self._begin_round(images.detach())
        self.calls += 1
        return self.surrogate.loss(self.batch.sample_scaled(images), self.batch.generators)

    def _begin_round(self, protected: Tensor) -> None:
        if self.calls > 0:
            self.model = self._taught(self.model, protected)
        self.surrogate = self._taught(self.model, self.batch.clean)

    @torch.enable_grad()
    def _taught(self, denoiser: Denoiser, images: Tensor) -> Denoiser:
        """Return a copy of the denoiser that has learnt images `[N,3,H,W]`."""
        unet = float32_copy(denoiser.unet).requires_grad_(True)
        learner = replace(denoiser, unet=unet)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE)
        for _ in range(TRAINING_STEPS):
            with torch.no_grad():
                latents = self.batch.sample_scaled(images)
            training_step(learner, optimizer, latents, self.batch.generators)
        unet.requires_grad_(False)
        return learner
