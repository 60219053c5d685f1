"""Edits of protected images by a diffusion pipeline, which protections prevent and a robust VAE may restore.

Sources: Meng et al., "SDEdit" (arXiv 2108.01073), for image-to-image; Brooks et al., "InstructPix2Pix" (arXiv
2211.09800); comparing the edit of a protected image with that of the clean one follows PhotoGuard (Salman et al.,
arXiv 2302.06588).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, StableDiffusionInstructPix2PixPipeline
from torch import Tensor, nn

from srl_utils.attacks.draws import Generators, draw_normal, image_generators, purifying_generators
from srl_utils.attacks.protections.masks import central_mask
from srl_utils.errors import UserError
from srl_utils.evaluation.metering import DENOISER
from srl_utils.evaluation.perturbations import CLEAN
from srl_utils.evaluation.tasks.base import Cell, Metrics, denoiser_of
from srl_utils.files import kept_images
from srl_utils.images.pixels import to_model_range, to_unit_range
from srl_utils.metrics.features import ImageClassifier
from srl_utils.pipelines import robust_vae
from srl_utils.pipelines.loading import as_image_to_image
from srl_utils.vae.codec import Codec

INPAINTING, INSTRUCTION = "inpainting", "instruction"


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One way to edit images with a pipeline."""

    pipeline: DiffusionPipeline
    arguments: Callable[[Codec, Tensor, Generators], dict[str, Any]]
    """VAE, images `[N,3,H,W]` in [0,1] and a generator for each image to further arguments of the pipeline's call."""
    settings: Mapping[str, Any]
    takes_image: bool = True
    """Whether the images are edited; text-to-image takes their size alone."""

    @property
    def passes(self) -> float:
        """Return the estimated cost of one image, in passes through encoder and decoder.

        With guidance, a step runs the denoiser twice.
        """
        return 2 * DENOISER * self.settings["num_inference_steps"] * self.settings.get("strength", 1.0)

    def __call__(self, codec: Codec, images: Tensor, prompts: Sequence[str], generators: Generators) -> Tensor:
        """Return edited images, `[N,3,H,W]` in [-1,1], float32.

        Args:
            codec: its VAE replaces the pipeline's own; its purifier, if it has one, comes first.
            images: `[N,3,H,W]` in [-1,1].
            prompts: one for each image.
            generators: one for each image.
        """
        seen = codec.purified(images) if self.takes_image else images
        shown = to_unit_range(seen).clamp(0, 1)
        with robust_vae(self.pipeline, codec.vae):
            arguments = {**_size(self.pipeline, shown), **self.arguments(codec, shown, generators), **self.settings}
            output = self.pipeline(prompt=list(prompts), generator=generators, output_type="pt", **arguments)
        return to_model_range(output.images.float())


def build_edits(
    pipeline: DiffusionPipeline, *, strengths: Sequence[float], num_inference_steps: int, guidance_scale: float
) -> dict[str, Edit]:
    """Return the edits that a pipeline can make, by name.

    A pipeline for instructions or for inpainting makes one edit; a text-to-image pipeline makes image-to-image at each
    strength, and inpainting.

    Args:
        pipeline: of diffusers.
        strengths: of image-to-image, in (0,1].
        num_inference_steps: denoising steps at full strength.
        guidance_scale: of classifier-free guidance.

    Raises:
        UserError: if the pipeline cannot edit images.
    """
    settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    if isinstance(pipeline, StableDiffusionInstructPix2PixPipeline):
        return {INSTRUCTION: Edit(pipeline=pipeline, arguments=_image, settings=settings)}
    full = {**settings, "strength": 1.0}
    if "Inpaint" in type(pipeline).__name__:
        return {INPAINTING: Edit(pipeline=pipeline, arguments=_image_and_mask, settings=full)}
    image_to_image = as_image_to_image(pipeline)
    edits = {
        f"img2img-{strength:g}": Edit(
            pipeline=image_to_image, arguments=_image, settings={**settings, "strength": strength}
        )
        for strength in strengths
    }
    return edits | {
        INPAINTING: Edit(pipeline=image_to_image, arguments=partial(_image_and_blending, image_to_image), settings=full)
    }


def check_steps(edits: Mapping[str, Edit]) -> None:
    """Raise a UserError if an edit has no denoising step at its strength."""
    for name, edit in edits.items():
        steps = edit.settings["num_inference_steps"]
        if int(steps * edit.settings.get("strength", 1.0)) == 0:
            raise UserError(f"{name} takes none of the {steps} steps; give more", parameter="num_inference_steps")


def _image(codec: Codec, shown: Tensor, generators: Generators) -> dict[str, Any]:
    return {"image": shown}


def _image_and_mask(codec: Codec, shown: Tensor, generators: Generators) -> dict[str, Any]:
    return {"image": shown, "mask_image": central_mask(shown)}


def _image_and_blending(
    pipeline: DiffusionPipeline, codec: Codec, shown: Tensor, generators: Generators
) -> dict[str, Any]:
    """Return arguments for inpainting with a model that was not trained for it.

    After each step, the latents around the hole are reset to those of the image, with the noise that the next step
    expects (Avrahami et al., "Blended Latent Diffusion", arXiv 2206.02779). diffusers' own inpainting does the same,
    but for latents of 4 channels only.
    """
    latents = codec.scale(codec.bare.encode(to_model_range(shown)), pipeline)
    hole = F.interpolate(central_mask(shown), latents.shape[2:]).expand_as(latents)
    # Draw from copies of the generators, so that the pipeline draws the same noise as without a hole.
    noise = draw_normal([_copied(generator) for generator in generators], like=latents)

    def set_back(pipe: DiffusionPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        following, drawn = pipe.scheduler.timesteps[step + 1 : step + 2], tensors["latents"]
        around = _noised(pipe, latents, noise, following.expand(len(latents))) if len(following) else latents
        around, inside = (_laid_out(each, like=drawn) for each in (around, hole))
        return {"latents": torch.where(inside > 0, drawn, around.to(drawn.dtype))}

    return {"image": shown, "callback_on_step_end": set_back}


def _noised(pipe: DiffusionPipeline, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Add the noise of `timesteps` `[N]` to latents `[N,C,h,w]`, for diffusion or for flow matching."""
    scheduler = pipe.scheduler
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(latents, noise, timesteps)
    return scheduler.scale_noise(latents, timesteps, noise)


def _laid_out(latents: Tensor, *, like: Tensor) -> Tensor:
    """Return latents `[N,C,h,w]` in the layout of `like`: the same, or Flux's tokens of 2x2 latents, `[N,hw/4,4C]`."""
    return latents if like.ndim == 4 else F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def _size(pipe: DiffusionPipeline, shown: Tensor) -> dict[str, int]:
    """Return height and width if the pipeline takes them; it would otherwise choose its own."""
    sides = dict(zip(("height", "width"), shown.shape[2:], strict=True))
    return {name: side for name, side in sides.items() if name in signature(pipe.__call__).parameters}


def _copied(generator: torch.Generator) -> torch.Generator:
    return torch.Generator().set_state(generator.get_state())


@dataclass(frozen=True, kw_only=True)
class Editing:
    """The task of editing a protected image like the clean one, with the same VAE and the same noise.

    Edits of clean images are compared with those by the baseline, and so are sets of edits.
    """

    metrics: Metrics
    baseline: Codec
    edits: Mapping[str, Edit]
    images: Tensor
    """Clean images, `[n,3,H,W]` in [-1,1], on the CPU."""
    prompts: Sequence[str]
    """One for each image."""
    classifier: ImageClassifier | None
    """Tells whether an image shows what its prompt asks for."""
    folder: Path
    """Keeps the edits of clean images."""
    seed: int

    @property
    def variants(self) -> Sequence[str]:
        return tuple(self.edits)

    @property
    def passes(self) -> float:
        return sum(edit.passes for edit in self.edits.values())

    @property
    def denoiser(self) -> nn.Module | None:
        return denoiser_of(next(iter(self.edits.values())).pipeline)

    def attempt(self, cell: Cell, codec: Codec, shown: Tensor, numbers: Sequence[int], variant: str) -> Tensor:
        return self._edit(codec, shown, numbers, variant)

    def reference(self, codec: Codec, numbers: Sequence[int], variant: str) -> Tensor:
        """Return the edits of the clean images by the VAE alone: a purifier that destroys all images is no good defence."""
        return torch.cat([self._clean_edit(codec.bare, number, variant) for number in numbers])

    def measure(
        self, cell: Cell, codec: Codec, outcome: Tensor, numbers: Sequence[int], variant: str
    ) -> dict[str, Tensor]:
        prompts = [self.prompts[number] for number in numbers]
        values = prompt_measures(self.metrics, self.classifier, outcome, prompts)
        if cell.perturbation.name != CLEAN.name:
            return values | self._compare(outcome, self.reference(codec, numbers, variant))
        if codec is self.baseline:
            return values  # the reference itself
        return values | self._compare(outcome, self.reference(self.baseline, numbers, variant))

    def _edit(self, codec: Codec, shown: Tensor, numbers: Sequence[int], variant: str) -> Tensor:
        prompts = [self.prompts[number] for number in numbers]
        return self.edits[variant](codec, shown, prompts, image_generators(self.seed, numbers))

    def _compare(self, outcome: Tensor, reference: Tensor) -> dict[str, Tensor]:
        return self.metrics.compare(outcome, reference.to(outcome.device))

    def _clean_edit(self, codec: Codec, number: int, variant: str) -> Tensor:
        """Return the edit of one clean image, `[1,3,H,W]` in [-1,1], from its file; batches may change between runs."""
        path = self.folder / codec.digest / variant / f"{number:06d}.safetensors"
        clean = self.images[number : number + 1]
        with codec.drawing(purifying_generators(self.seed, [number])):
            return kept_images(path, lambda: self._edit(codec, clean.to(codec.device), [number], variant))


def prompt_measures(
    metrics: Metrics, classifier: ImageClassifier | None, images: Tensor, prompts: Sequence[str]
) -> dict[str, Tensor]:
    """Return how well images show their prompts: `clip-text` and `shown`, if they are wanted, `[N]` each.

    Args:
        metrics: the metrics to measure.
        classifier: computes `shown`; None leaves it out.
        images: `[N,3,H,W]` in [-1,1].
        prompts: one for each image.
    """
    values = {}
    if metrics.clip is not None:
        values["clip-text"] = metrics.clip.image_text(images, prompts)
    if classifier is not None:
        values["shown"] = classifier.shown(images, prompts)
    return metrics.wanted(values)


def replace_words(text: str, replacements: Mapping[str, str]) -> str:
    """Replace each word of `text` that is a key by its value, all at once, so that two words can be swapped.

    Punctuation around a word is kept: "red," becomes "blue,".
    """
    return " ".join(_replaced(word, replacements) for word in text.split())


def _replaced(word: str, replacements: Mapping[str, str]) -> str:
    if word in replacements:
        return replacements[word]
    return re.sub(
        r"^(\W*)(.*?)(\W*)$", lambda found: f"{found[1]}{replacements.get(found[2], found[2])}{found[3]}", word
    )
