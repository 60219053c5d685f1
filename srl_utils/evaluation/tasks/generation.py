"""Generation: does an unchanged diffusion model still work with the latents of a new encoder?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from srl_utils.attacks.denoiser import Denoiser, encode_prompts, takes_latents_alone
from srl_utils.attacks.draws import Generators, image_generators
from srl_utils.errors import UserError
from srl_utils.evaluation.tasks.base import Cell, Metrics, denoiser_of
from srl_utils.evaluation.tasks.editing import Edit, prompt_measures
from srl_utils.images.pixels import PIXEL_MAX, PIXEL_MIN
from srl_utils.metrics.features import ImageClassifier
from srl_utils.vae.codec import Codec

TEXT_TO_IMAGE, RECONSTRUCTED = "text-to-image", "reconstructed"
LOSS_DRAWS = 8
"""The denoiser's loss is a mean over so many draws of timestep and noise, the same for all VAEs."""


def build_text_to_image(
    pipeline: DiffusionPipeline, side: int, *, num_inference_steps: int, guidance_scale: float
) -> Edit:
    """Return text-to-image as an edit that ignores its input images.

    Args:
        pipeline: a text-to-image pipeline.
        side: of the generated images, pixels.
        num_inference_steps: denoising steps.
        guidance_scale: of classifier-free guidance.

    Raises:
        UserError: if the pipeline needs more than a prompt.
    """
    if not takes_latents_alone(pipeline):
        raise UserError(f"a {type(pipeline).__name__} makes no images from text alone; give a text-to-image pipeline")
    settings = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "height": side,
        "width": side,
    }
    return Edit(pipeline=pipeline, arguments=_nothing, settings=settings, takes_image=False)


def _nothing(codec: Codec, shown: Tensor, generators: Generators) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The task of working with a diffusion model that was trained on the baseline's latents.

    Variants: images generated from captions, which use the decoder only; reconstructions, with the denoiser's loss on
    the latents; and images that are encoded, noised and denoised, at several strengths.
    """

    metrics: Metrics
    baseline: Codec
    text_to_image: Edit
    denoised: Mapping[str, Edit]
    images: Tensor
    """`[n,3,H,W]` in [-1,1], on the CPU."""
    captions: Sequence[str]
    classifier: ImageClassifier | None
    seed: int
    _expected: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False)
    """The baseline's generated images of the last batch, by image numbers; those of all VAEs are compared with them."""

    @property
    def variants(self) -> Sequence[str]:
        return (TEXT_TO_IMAGE, RECONSTRUCTED, *self.denoised)

    @property
    def passes(self) -> float:
        # Text-to-image counts twice: the baseline generates images to compare with.
        return 2 * self.text_to_image.passes + 1 + sum(edit.passes for edit in self.denoised.values())

    @property
    def denoiser(self) -> nn.Module | None:
        return denoiser_of(self.text_to_image.pipeline)

    def attempt(self, cell: Cell, codec: Codec, shown: Tensor, numbers: Sequence[int], variant: str) -> Tensor:
        if variant == RECONSTRUCTED:
            return codec.reconstruct(shown)
        edit = self.text_to_image if variant == TEXT_TO_IMAGE else self.denoised[variant]
        return edit(codec, shown, self._captions(numbers), image_generators(self.seed, numbers))

    def reference(self, codec: Codec, numbers: Sequence[int], variant: str) -> Tensor:
        return self.images[list(numbers)]

    def measure(
        self, cell: Cell, codec: Codec, outcome: Tensor, numbers: Sequence[int], variant: str
    ) -> dict[str, Tensor]:
        values = prompt_measures(self.metrics, self.classifier, outcome, self._captions(numbers))
        real = self.reference(codec, numbers, variant).to(outcome.device)
        if variant == TEXT_TO_IMAGE:
            return values | self._difference(cell, outcome, real, numbers)
        if variant == RECONSTRUCTED and "denoising-loss" in self.metrics.names:
            values["denoising-loss"] = self._denoising_loss(codec, real, numbers)
        return values | self.metrics.compare(outcome, real)

    def _difference(self, cell: Cell, outcome: Tensor, real: Tensor, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Return the largest difference from the baseline's image of the same caption, `[N]`, if it is wanted."""
        if "difference" not in self.metrics.names:
            return {}
        batch = tuple(numbers)
        if batch not in self._expected:
            self._expected.clear()
            self._expected[batch] = self.attempt(cell, self.baseline, real, numbers, TEXT_TO_IMAGE)
        return {"difference": largest_difference(outcome, self._expected[batch])}

    def _denoising_loss(self, codec: Codec, images: Tensor, numbers: Sequence[int]) -> Tensor:
        """Return the denoiser's mean loss on the latents of each image, `[N]`."""
        pipeline = self.text_to_image.pipeline
        denoiser = Denoiser.from_pipeline(pipeline, encode_prompts(pipeline, self._captions(numbers)))
        latents, generators = codec.scale(codec.encode(images), pipeline), image_generators(self.seed, numbers)
        return torch.stack([denoiser.loss(latents, generators) for _ in range(LOSS_DRAWS)]).mean(dim=0)

    def _captions(self, numbers: Sequence[int]) -> list[str]:
        return [self.captions[number] for number in numbers]


def largest_difference(images: Tensor, others: Tensor) -> Tensor:
    """Return the largest difference of any pixel after clipping, `[N]`, in units of a [0,1] image."""
    clipped = [each.clamp(PIXEL_MIN, PIXEL_MAX) for each in (images, others)]
    return (clipped[0] - clipped[1]).abs().flatten(1).amax(dim=1) / (PIXEL_MAX - PIXEL_MIN)
