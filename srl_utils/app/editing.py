"""Edit an image, its protected version, and the protected version through a robust VAE, with the same noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from srl_utils.app.attacking import SEED, attack_of, perturbed
from srl_utils.attacks.draws import image_generators
from srl_utils.errors import UserError
from srl_utils.evaluation.metering import Meter
from srl_utils.evaluation.tasks.base import denoiser_of
from srl_utils.evaluation.tasks.editing import Edit, build_edits, check_steps
from srl_utils.metrics.pixels import psnr
from srl_utils.vae.codec import Codec

PROTECTION = "PhotoGuard"
LONGEST_PROMPT = 300
"""Characters."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a visitor asks for.

    Attributes:
        prompt: of the edit.
        strength: of image-to-image, in (0,1].
        inference_steps: denoising steps at full strength.
        guidance: scale of classifier-free guidance.
        epsilon: budget of the protection, in units of a [0,1] image.
        protection_steps: steps of the protection.
    """

    prompt: str
    strength: float
    inference_steps: int
    guidance: float
    epsilon: float
    protection_steps: int


@dataclass(frozen=True)
class Edits:
    """A protected image and three edits, each `[1,3,R,R]` in [-1,1]."""

    protected: Tensor
    of_clean: Tensor
    of_protected: Tensor
    through_robust: Tensor

    def psnr(self, edit: Tensor) -> float:
        """Return the PSNR in dB of an edit to the edit of the clean image."""
        return psnr(edit, self.of_clean).item()


def edit_of(pipeline: DiffusionPipeline, wanted: Request) -> Edit:
    """Return the edit that the pipeline makes.

    Raises:
        UserError: if the prompt is empty or too long, if the pipeline cannot edit, or if the strength is too low for one
            step.
    """
    if not wanted.prompt.strip():
        raise UserError("write a prompt first")
    if len(wanted.prompt) > LONGEST_PROMPT:
        raise UserError(f"the prompt has {len(wanted.prompt)} characters; it may have {LONGEST_PROMPT}")
    edits = build_edits(
        pipeline,
        strengths=[wanted.strength],
        num_inference_steps=wanted.inference_steps,
        guidance_scale=wanted.guidance,
    )
    name, edit = next(iter(edits.items()))
    check_steps({name: edit})
    return edit


@torch.no_grad()
def protect_and_edit(clean: Tensor, edit: Edit, original: Codec, robust: Codec, wanted: Request, bar: tqdm) -> Edits:
    """Protect an image on the original VAE, and edit it.

    Args:
        clean: `[1,3,R,R]` in [-1,1].
        edit: of `edit_of`.
        original: the VAE that belongs to the pipeline.
        robust: the VAE that takes its place for the last edit.
        wanted: what the visitor asks for.
        bar: shows the progress.

    Raises:
        UserError: if a VAE does not fit the pipeline.
    """
    protection = attack_of(PROTECTION, epsilon=wanted.epsilon, steps=wanted.protection_steps)
    bar.total = max(round(protection.passes + 3 * edit.passes), 1)
    meter = Meter(bar)
    clean = clean.to(original.device)
    with torch.enable_grad():
        protected = perturbed(clean, original, protection, meter)

    def edited(image: Tensor, codec: Codec, title: str) -> Tensor:
        with meter.stage(title, edit.passes), meter.watching([codec], denoiser_of(edit.pipeline)):
            return edit(codec, image, [wanted.prompt], image_generators(SEED, [0]))

    return Edits(
        protected,
        edited(clean, original, "edit of the image"),
        edited(protected, original, "edit of the protected image"),
        edited(protected, robust, f"the same through {robust.name}"),
    )
