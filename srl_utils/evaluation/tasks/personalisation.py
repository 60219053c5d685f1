"""Personalisation: a model learns one concept from a few protected images of it, and then generates it.

Sources: Ruiz et al., "DreamBooth" (arXiv 2208.12242), for the fine-tuning with one prompt for all images; Van Le et al.,
"Anti-DreamBooth" (arXiv 2303.15433), for the protocol with protected images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from srl_utils.evaluation.perturbations import CLEAN, Perturbation
from srl_utils.evaluation.tasks.base import Cell, Metrics, denoiser_of
from srl_utils.evaluation.tasks.editing import prompt_measures
from srl_utils.evaluation.tasks.learning import Learner, Lesson
from srl_utils.metrics.features import FEATURE_SIMILARITY, ImageClassifier, mean_similarity
from srl_utils.vae.codec import Codec

NOT_FINETUNED = replace(CLEAN, name="not fine-tuned")
"""Stands for the model as it was; no image is learnt."""


def learnt_with(perturbation: Perturbation, *, passes: float) -> Perturbation:
    """Return the perturbation that stands for changed training images in the results; it changes no input.

    Args:
        perturbation: what is done to the training images.
        passes: its share of their cost, for one generated image.
    """
    return replace(perturbation, apply=CLEAN.apply, goal=None, passes=passes, joint=False)


@dataclass(frozen=True, kw_only=True)
class Personalisation:
    """The task of generating a concept after fine-tuning on a few images of it, as a VAE encodes them.

    The images are protected on the cell's source, and the evaluated VAE encodes them. Generated images are compared with
    clean images of the concept.
    """

    metrics: Metrics
    learner: Learner
    images: Tensor
    """Clean images to protect and to learn, `[n,3,H,W]` in [-1,1], on the CPU."""
    references: Tensor
    """Clean images to compare with, `[m,3,H,W]` in [-1,1], on the CPU."""
    prompt: str
    """Caption of all images, from which the model then generates."""
    description: str
    """Text that generated images should show, for `clip-text` and `shown`."""
    protections: Mapping[tuple[str, float], Perturbation]
    """What is done to the images, by name and budget of the perturbation that stands for it."""
    classifier: ImageClassifier | None
    num_generated: int
    variants: Sequence[str] = ("",)

    @property
    def passes(self) -> float:
        """Return the cost of fine-tuning and generation for one image, in passes through encoder and decoder."""
        return self.learner.passes / self.num_generated + self.learner.text_to_image.passes

    @property
    def denoiser(self) -> nn.Module | None:
        return denoiser_of(self.learner.text_to_image.pipeline)

    def attempt(self, cell: Cell, codec: Codec, shown: Tensor, numbers: Sequence[int], variant: str) -> Tensor:
        prompts = [self.prompt] * len(numbers)
        if cell.perturbation == NOT_FINETUNED:
            return self.learner.generate(codec, shown, prompts, numbers)
        name, epsilon = cell.perturbation.name, cell.perturbation.epsilon
        unet = self.learner.finetuned(cell, codec, f"{name}-{epsilon!r}", lambda: self._lesson(cell, codec))
        return self.learner.generate(codec, shown, prompts, numbers, unet)

    def reference(self, codec: Codec, numbers: Sequence[int], variant: str) -> Tensor:
        return self.references[[number % len(self.references) for number in numbers]]

    def measure(
        self, cell: Cell, codec: Codec, outcome: Tensor, numbers: Sequence[int], variant: str
    ) -> dict[str, Tensor]:
        values = prompt_measures(self.metrics, self.classifier, outcome, [self.description] * len(numbers))
        for name, embed in self._embeddings.items():
            values[name] = mean_similarity(embed(outcome), self._embedded_references[name].to(outcome.device))
        return self.metrics.wanted(values)

    def _lesson(self, cell: Cell, codec: Codec) -> Lesson:
        """Return the latents of protected images, all with the same caption."""
        name, epsilon = cell.perturbation.name, cell.perturbation.epsilon
        protection = self.protections[name, epsilon]
        shown = self.learner.perturbed(
            f"protected/{name}-{epsilon!r}", cell.source, self.images, lambda _: protection, joint=protection.joint
        )
        return Lesson(self.learner.latents(codec, shown), [self.prompt] * len(shown))

    @property
    def _embeddings(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Return what embeds images for each wanted similarity, by metric."""
        found: dict[str, Callable[[Tensor], Tensor]] = {}
        clip, features = self.metrics.clip, self.metrics.features
        if clip is not None:
            found["clip"] = clip.embed_images
        if features is not None:
            found[FEATURE_SIMILARITY] = lambda images: features.features(images)["pool"]
        return {name: embed for name, embed in found.items() if name in self.metrics.names}

    @cached_property
    def _embedded_references(self) -> dict[str, Tensor]:
        parts, device = self.references.split(self.learner.batch_size), self.learner.text_to_image.pipeline.device
        return {name: torch.cat([embed(part.to(device)) for part in parts]) for name, embed in self._embeddings.items()}
