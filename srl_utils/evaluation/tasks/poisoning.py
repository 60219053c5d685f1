"""Poisoned fine-tuning: a model learns a wrong concept from images whose latents are those of another concept.

Source: Shan et al., "Nightshade: Prompt-Specific Poisoning Attacks on Text-to-Image Generative Models" (arXiv
2310.13828); for a style instead of an object, "Glaze" (arXiv 2302.04222).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from srl_utils.errors import UserError
from srl_utils.evaluation.perturbations import AS_PUBLISHED, CLEAN, Perturbation
from srl_utils.evaluation.tasks.base import Cell, Metrics, denoiser_of
from srl_utils.evaluation.tasks.editing import prompt_measures
from srl_utils.evaluation.tasks.learning import Learner, Lesson
from srl_utils.images.captions import names
from srl_utils.metrics.features import ImageClassifier
from srl_utils.vae.codec import Codec


@dataclass(frozen=True, kw_only=True)
class Concepts:
    """A captioned dataset, divided for poisoning one concept with another. Images are given by their numbers."""

    poisonable: Sequence[int]
    """Training images whose captions name the concept."""
    others: Sequence[int]
    """Training images that stay clean; their captions do not name the concept."""
    targets: Sequence[int]
    """For each poisonable image, the image of the other concept whose caption is most like its own."""
    held_out: Sequence[int]
    """Images of the concept that are not trained on; images are generated from their captions."""


def divide(captions: Sequence[str], *, concept: str, target: str, num_poisons: int, num_held_out: int) -> Concepts:
    """Divide a dataset: hold out the last images of the concept, and make the first ones poisonable.

    What is left of the concept is not used: in the fine-tuning all images of the concept are poisons, and the model knows
    the concept from its own training.

    Args:
        captions: one for each image.
        concept: word of the captions whose images are poisoned.
        target: word of the captions whose images the poisons imitate.
        num_poisons: number of poisonable images.
        num_held_out: number of images that are not trained on.

    Raises:
        UserError: if there are too few images of a concept.
    """
    named, aims = _naming(captions, concept, without=target), _naming(captions, target, without=concept)
    poisonable = named[:num_poisons]
    needed = num_poisons + num_held_out
    if len(named) < needed or not aims:
        raise UserError(
            f"{len(named)} captions name '{concept}' and {len(aims)} '{target}'; {num_poisons} poisons and {num_held_out} held-out "
            f"images need {needed} and 1; give more images or other concepts"
        )
    held_out = named[len(named) - num_held_out :]
    others = [number for number, caption in enumerate(captions) if not names(caption, concept)]
    targets = _most_similar(captions, poisonable, aims)
    return Concepts(poisonable=poisonable, others=others, targets=targets, held_out=held_out)


def _most_similar(captions: Sequence[str], numbers: Sequence[int], aims: Sequence[int]) -> list[int]:
    """Return for each of `numbers` the one of `aims` that has most words in common with it, of equals the least used.

    The latents of similar scenes are close, so that a poison can go further towards its target.
    """
    words = {number: set(re.findall(r"\w+", captions[number].lower())) for number in {*numbers, *aims}}
    uses: Counter[int] = Counter()
    chosen = []
    for number in numbers:
        common = {aim: len(words[number] & words[aim]) / len(words[number] | words[aim]) for aim in aims}
        best = max(aims, key=lambda aim: (common[aim], -uses[aim]))
        uses[best] += 1
        chosen.append(best)
    return chosen


def _naming(captions: Sequence[str], word: str, *, without: str) -> list[int]:
    return [number for number, caption in enumerate(captions) if names(caption, word) and not names(caption, without)]


@dataclass(frozen=True, kw_only=True)
class Poison:
    """A way to give training images the latents of their targets: a protection, or a control without an attack.

    The control interpolates the latents themselves, so it says how far an attack has to go. All the way, the model
    learns the targets with wrong captions.
    """

    name: str
    attack: Callable[[Tensor], Perturbation] | None = None
    """Targets `[N,3,H,W]` in [-1,1] to the perturbation that makes as many images imitate them; None for the control."""
    epsilon: float = 0.0
    """Budget of the attack in units of a [0,1] image; 0 if it is in another measure."""
    passes: float = 0.0
    """Cost of one poison, in passes through encoder and decoder."""
    share: float = 0.0
    """Share of the way to the targets' latents that the control goes, from 0 to 1."""


class Dose(NamedTuple):
    """How many training images are poisoned, and how."""

    poison: Poison
    amount: int

    @property
    def name(self) -> str:
        """Return how results name it, such as `nightshade-50`."""
        return f"{self.poison.name}-{self.amount}" if self.amount else self.poison.name


NO_DOSE = Dose(Poison(name="no poison"), 0)


def doses(poisons: Sequence[Poison], amounts: Sequence[int]) -> list[Dose]:
    """Return each number of each poison, smaller ones first; the amount 0 is the same for all and comes once."""
    none = [NO_DOSE] if 0 in amounts else []
    return none + [Dose(poison, amount) for poison in poisons for amount in sorted({*amounts} - {0})]


def poisoning(dose: Dose, *, passes: float = 0) -> Perturbation:
    """Return the perturbation that stands for poisoned training images; it changes no input.

    Args:
        dose: how many training images are poisoned, and how.
        passes: its share of the cost of the poisons, for one generated image.
    """

    objective = AS_PUBLISHED if dose.poison.attack else None
    return replace(CLEAN, name=dose.name, objective=objective, epsilon=dose.poison.epsilon, passes=passes)


@dataclass(frozen=True, kw_only=True)
class Poisoning:
    """The task of generating a concept after fine-tuning on images, some of them poisoned.

    The evaluated VAE encodes the training images; the poisons are made on the cell's source.
    """

    metrics: Metrics
    learner: Learner
    images: Tensor
    """All images of the dataset, `[n,3,H,W]` in [-1,1], on the CPU."""
    captions: Sequence[str]
    concepts: Concepts
    doses: Mapping[str, Dose]
    """By the name of the perturbation."""
    classifier: ImageClassifier | None
    variants: Sequence[str] = ("",)

    @property
    def passes(self) -> float:
        """Return the cost of fine-tuning and generation for one image, in passes through encoder and decoder."""
        return self.learner.passes / len(self.concepts.held_out) + self.learner.text_to_image.passes

    @property
    def denoiser(self) -> nn.Module | None:
        return denoiser_of(self.learner.text_to_image.pipeline)

    def attempt(self, cell: Cell, codec: Codec, shown: Tensor, numbers: Sequence[int], variant: str) -> Tensor:
        dose = self.doses[cell.perturbation.name]
        unet = self.learner.finetuned(cell, codec, dose.name, lambda: self._lesson(cell, codec, dose))
        return self.learner.generate(codec, shown, self._prompts(numbers), numbers, unet)

    def reference(self, codec: Codec, numbers: Sequence[int], variant: str) -> Tensor:
        return self.images[[self.concepts.held_out[number] for number in numbers]]

    def measure(
        self, cell: Cell, codec: Codec, outcome: Tensor, numbers: Sequence[int], variant: str
    ) -> dict[str, Tensor]:
        values = prompt_measures(self.metrics, self.classifier, outcome, self._prompts(numbers))
        return values | self.metrics.compare(outcome, self.reference(codec, numbers, variant).to(outcome.device))

    def _prompts(self, numbers: Sequence[int]) -> list[str]:
        return [self.captions[self.concepts.held_out[number]] for number in numbers]

    def _lesson(self, cell: Cell, codec: Codec, dose: Dose) -> Lesson:
        """Return latents of `codec`, some of them of poisons made on the cell's source, and their captions."""
        numbers = [*self.concepts.poisonable[: dose.amount], *self.concepts.others]
        latents = self.learner.latents(codec, self.images[self.concepts.others])
        if dose.amount:
            latents = torch.cat([self._poisoned_latents(cell.source, codec, dose), latents])
        return Lesson(latents, [self.captions[number] for number in numbers])

    def _poisoned_latents(self, source: Codec, codec: Codec, dose: Dose) -> Tensor:
        """Return the raw latents of poisoned images: of poisons made on `source`, or interpolated ones."""
        poison, amount = dose
        if poison.attack is not None:
            return self.learner.latents(codec, self._poisons(source, poison)[:amount])
        own, others = (
            self.learner.latents(codec, self.images[numbers[:amount]])
            for numbers in (self.concepts.poisonable, self.concepts.targets)
        )
        return own.lerp(others, poison.share)

    def _poisons(self, source: Codec, poison: Poison) -> Tensor:
        """Return all poisons made on `source`, `[n,3,H,W]` in [-1,1] on the CPU; each is made once."""

        def towards(places: Sequence[int]) -> Perturbation:
            targets = self.images[[self.concepts.targets[place] for place in places]]
            assert poison.attack is not None  # or else nothing has to be made
            return poison.attack(targets.to(source.device))

        clean = self.images[self.concepts.poisonable]
        return self.learner.perturbed(f"poisons/{poison.name}", source, clean, towards)
