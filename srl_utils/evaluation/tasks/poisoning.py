"""Poisoned fine-tuning: a model learns a wrong concept from images whose latents are those of another concept.

Source: Shan et al., "Nightshade: Prompt-Specific Poisoning Attacks on Text-to-Image Generative Models" (arXiv
2310.13828); for a style instead of an object, "Glaze" (arXiv 2302.04222).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from srl_utils.attacks.draws import image_generators, purifying_generators
from srl_utils.errors import UserError
from srl_utils.evaluation.metering import DENOISER
from srl_utils.evaluation.perturbations import AS_PUBLISHED, Perturbation
from srl_utils.evaluation.tasks.base import Cell, Metrics, denoiser_of
from srl_utils.evaluation.tasks.editing import Edit, prompt_measures
from srl_utils.evaluation.tasks.finetuning import FinetuningConfig, finetune
from srl_utils.files import kept_images, write_atomically
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
    others = [number for number, caption in enumerate(captions) if concept not in caption.split()]
    targets = _most_similar(captions, poisonable, aims)
    return Concepts(poisonable=poisonable, others=others, targets=targets, held_out=held_out)


def _most_similar(captions: Sequence[str], numbers: Sequence[int], aims: Sequence[int]) -> list[int]:
    """Return for each of `numbers` the one of `aims` that has most words in common with it, of equals the least used.

    The latents of similar scenes are close, so that a poison can go further towards its target.
    """
    words = {number: set(captions[number].split()) for number in {*numbers, *aims}}
    uses: Counter[int] = Counter()
    chosen = []
    for number in numbers:
        common = {aim: len(words[number] & words[aim]) / len(words[number] | words[aim]) for aim in aims}
        best = max(aims, key=lambda aim: (common[aim], -uses[aim]))
        uses[best] += 1
        chosen.append(best)
    return chosen


def _naming(captions: Sequence[str], word: str, *, without: str) -> list[int]:
    return [
        number for number, caption in enumerate(captions) if word in (words := caption.split()) and without not in words
    ]


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

    def untouched(codec: Codec, clean: Tensor, generators: object) -> Tensor:
        return clean

    return Perturbation(
        name=dose.name,
        objective=AS_PUBLISHED if dose.poison.attack else None,
        epsilon=dose.poison.epsilon,
        apply=untouched,
        passes=passes,
    )


@dataclass(frozen=True, kw_only=True)
class Poisoning:
    """The task of generating a concept after fine-tuning on images, some of them poisoned.

    The evaluated VAE encodes the training images; the poisons are made on the cell's source.
    """

    metrics: Metrics
    text_to_image: Edit
    images: Tensor
    """All images of the dataset, `[n,3,H,W]` in [-1,1], on the CPU."""
    captions: Sequence[str]
    concepts: Concepts
    doses: Mapping[str, Dose]
    """By the name of the perturbation."""
    finetuning: FinetuningConfig
    classifier: ImageClassifier | None
    folder: Path
    """Keeps poisons and fine-tuned models."""
    batch_size: int
    seed: int
    variants: Sequence[str] = ("",)

    @property
    def passes(self) -> float:
        """Return the cost of fine-tuning and generation for one image, in passes through encoder and decoder."""
        learning = 2 * DENOISER * self.finetuning.num_steps * self.finetuning.batch_size / len(self.concepts.held_out)
        return learning + self.text_to_image.passes

    @property
    def denoiser(self) -> nn.Module | None:
        return denoiser_of(self.text_to_image.pipeline)

    def attempt(self, cell: Cell, codec: Codec, shown: Tensor, numbers: Sequence[int], variant: str) -> Tensor:
        pipeline = self.text_to_image.pipeline
        original = pipeline.unet
        pipeline.register_modules(unet=self._finetuned(cell, codec))
        try:
            return self.text_to_image(codec, shown, self._prompts(numbers), image_generators(self.seed, numbers))
        finally:
            pipeline.register_modules(unet=original)

    def reference(self, codec: Codec, numbers: Sequence[int], variant: str) -> Tensor:
        return self.images[[self.concepts.held_out[number] for number in numbers]]

    def measure(
        self, cell: Cell, codec: Codec, outcome: Tensor, numbers: Sequence[int], variant: str
    ) -> dict[str, Tensor]:
        values = prompt_measures(self.metrics, self.classifier, outcome, self._prompts(numbers))
        return values | self.metrics.compare(outcome, self.reference(codec, numbers, variant).to(outcome.device))

    def _prompts(self, numbers: Sequence[int]) -> list[str]:
        return [self.captions[self.concepts.held_out[number]] for number in numbers]

    def _finetuned(self, cell: Cell, codec: Codec) -> UNet2DConditionModel:
        """Return the fine-tuned model, read from the disk if it exists; wait while another process makes it."""
        dose = self.doses[cell.perturbation.name]
        made_on = f"-on-{cell.source.digest}" if cell.perturbation.adversarial else ""
        path = self.folder / "models" / f"{codec.digest}-{dose.name}{made_on}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                unet = self._finetune(cell.source, codec, dose)
                write_atomically(path, partial(save_file, {k: v.contiguous() for k, v in unet.state_dict().items()}))
                return unet
        unet = copy.deepcopy(self.text_to_image.pipeline.unet)
        unet.load_state_dict(load_file(path))
        return unet

    def _finetune(self, source: Codec, codec: Codec, dose: Dose) -> UNet2DConditionModel:
        """Return the model after fine-tuning on latents of `codec`, some of them of poisons made on `source`."""
        numbers = [*self.concepts.poisonable[: dose.amount], *self.concepts.others]
        with torch.no_grad():
            clean = self._latents(codec, self.images[self.concepts.others])
            latents = torch.cat([self._poisoned_latents(source, codec, dose), clean]) if dose.amount else clean
            latents = codec.scale(latents, self.text_to_image.pipeline)
        with torch.enable_grad():
            return finetune(
                self.text_to_image.pipeline,
                latents,
                [self.captions[number] for number in numbers],
                self.finetuning,
                seed=self.seed,
            )

    def _latents(self, codec: Codec, images: Tensor) -> Tensor:
        """Return the raw latents of images, which are on the CPU and encoded in batches."""
        latents = []
        for part in torch.arange(len(images)).split(self.batch_size):
            with codec.drawing(purifying_generators(self.seed, part.tolist())):
                latents.append(codec.encode(images[part].to(codec.device)))
        return torch.cat(latents)

    def _poisoned_latents(self, source: Codec, codec: Codec, dose: Dose) -> Tensor:
        """Return the raw latents of poisoned images: of poisons made on `source`, or interpolated ones."""
        poison, amount = dose
        if poison.attack is not None:
            return self._latents(codec, self._poisons(source, poison)[:amount])
        own, others = (
            self._latents(codec, self.images[numbers[:amount]])
            for numbers in (self.concepts.poisonable, self.concepts.targets)
        )
        return own.lerp(others, poison.share)

    def _poisons(self, source: Codec, poison: Poison) -> Tensor:
        """Return all poisons made on `source`, `[n,3,H,W]` in [-1,1] on the CPU; each is made once."""
        places = range(len(self.concepts.poisonable))
        return torch.cat(
            [
                self._poison_batch(source, poison, places[start : start + self.batch_size])
                for start in range(0, len(places), self.batch_size)
            ]
        )

    def _poison_batch(self, source: Codec, poison: Poison, places: Sequence[int]) -> Tensor:
        name = f"{places[0]:06d}-{len(places)}.safetensors"
        path = self.folder / "poisons" / poison.name / source.digest / name
        return kept_images(path, partial(self._make_poisons, source, poison, places))

    def _make_poisons(self, source: Codec, poison: Poison, places: Sequence[int]) -> Tensor:
        clean, targets = (
            self.images[[numbers[place] for place in places]].to(source.device)
            for numbers in (self.concepts.poisonable, self.concepts.targets)
        )
        assert poison.attack is not None  # or else nothing has to be made
        with source.drawing(purifying_generators(self.seed, places, attacked=True)):
            return poison.attack(targets).apply(source, clean, image_generators(self.seed, places))
