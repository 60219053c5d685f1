"""Poisoned fine-tuning: images that look like one concept and have the latents of another teach a model the wrong thing.

Source: Shan et al., "Nightshade: Prompt-Specific Poisoning Attacks on Text-to-Image Generative Models" (arXiv
2310.13828); for a style instead of an object, "Glaze" (arXiv 2302.04222).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from srl_utils.attacks.draws import image_generators
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
    """A captioned data set, divided for the poisoning of one concept by another."""

    poisonable: Sequence[int]
    """Numbers of training images whose captions name the concept."""
    others: Sequence[int]
    """Numbers of the training images that stay as they are."""
    targets: Sequence[int]
    """For each poisonable image, the number of one whose caption names the other concept."""
    held_out: Sequence[int]
    """Numbers of images of the concept that nothing is trained on: their captions are what is generated afterwards."""


def divide(captions: Sequence[str], *, concept: str, target: str, num_poisons: int, num_held_out: int) -> Concepts:
    """The last images of the concept are held out, the first ones may be poisoned.

    Raises:
        UserError: if there are too few images of either.
    """
    named, aims = _naming(captions, concept, without=target), _naming(captions, target, without=concept)
    needed = num_poisons + num_held_out
    if len(named) < needed or not aims:
        raise UserError(
            f"{len(named)} captions name '{concept}' and {len(aims)} '{target}'; {num_poisons} poisons and {num_held_out} held-out "
            f"images need {needed} and 1; give more images (--num_images) or other concepts"
        )
    poisonable, held_out = named[:num_poisons], named[len(named) - num_held_out :]
    others = [number for number in range(len(captions)) if number not in {*poisonable, *held_out}]
    targets = [aims[place % len(aims)] for place in range(num_poisons)]
    return Concepts(poisonable=poisonable, others=others, targets=targets, held_out=held_out)


def _naming(captions: Sequence[str], word: str, *, without: str) -> list[int]:
    return [
        number for number, caption in enumerate(captions) if word in (words := caption.split()) and without not in words
    ]


def poisonings(protection: str, epsilon: float, amounts: Sequence[int], *, passes: float = 0) -> list[Perturbation]:
    """One for each number of poisons. What is shown stays as it is: the data that the model learns from do not.

    `passes` is what the poisons of one source cost for each image that is shown; all numbers of poisons share them.
    """
    poisoned = sum(amount > 0 for amount in amounts)

    def untouched(codec: Codec, clean: Tensor, generators: object) -> Tensor:
        return clean

    return [
        Perturbation(
            name=amount_name(protection, amount),
            objective=AS_PUBLISHED if amount else None,
            epsilon=epsilon if amount else 0.0,
            apply=untouched,
            passes=passes / poisoned if amount else 0,
        )
        for amount in amounts
    ]


def amount_name(protection: str, amount: int) -> str:
    return f"{protection}-{amount}"


@dataclass(frozen=True, kw_only=True)
class Poisoning:
    """The task of still generating a concept after fine-tuning on images of which some are poisoned.

    The VAE under judgement encodes what is learnt from; the poisons are made on the cell's source.
    """

    metrics: Metrics
    text_to_image: Edit
    images: Tensor
    """All of the data set, `[n,3,H,W]` in [-1,1], on the CPU."""
    captions: Sequence[str]
    concepts: Concepts
    poison: Callable[[Tensor], Perturbation]
    """Targets `[N,3,H,W]` to what makes as many images head for them."""
    amounts: Mapping[str, int]
    """Number of poisons by the name of a cell's perturbation."""
    finetuning: FinetuningConfig
    judge: ImageClassifier | None
    folder: Path
    """Keeps poisons and fine-tuned models."""
    batch_size: int
    seed: int
    variants: Sequence[str] = ("",)

    @property
    def passes(self) -> float:
        """The fine-tuning, forth and back, and the generation with every fine-tuned model."""
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
        values = prompt_measures(self.metrics, self.judge, outcome, self._prompts(numbers))
        return values | self.metrics.compare(outcome, self.reference(codec, numbers, variant).to(outcome.device))

    def _prompts(self, numbers: Sequence[int]) -> list[str]:
        return [self.captions[self.concepts.held_out[number]] for number in numbers]

    def _finetuned(self, cell: Cell, codec: Codec) -> UNet2DConditionModel:
        """Kept on disk; a process that needs a model which another one is making waits for it."""
        amount = self.amounts[cell.perturbation.name]
        source = cell.source.digest if amount else "none"
        path = self.folder / "models" / f"{codec.digest}-{amount}-{source}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                unet = self._finetune(cell.source, codec, amount)
                write_atomically(path, partial(save_file, {k: v.contiguous() for k, v in unet.state_dict().items()}))
                return unet
        unet = copy.deepcopy(self.text_to_image.pipeline.unet)
        unet.load_state_dict(load_file(path))
        return unet

    def _finetune(self, source: Codec, codec: Codec, amount: int) -> UNet2DConditionModel:
        poisoned = self._poisons(source)[:amount] if amount else self.images[:0]
        numbers = [*self.concepts.poisonable, *self.concepts.others]
        images = torch.cat([poisoned, self.images[numbers[amount:]]])
        with torch.no_grad():
            latents = torch.cat([self._scaled(codec, batch) for batch in images.split(self.batch_size)])
        with torch.enable_grad():
            return finetune(
                self.text_to_image.pipeline,
                latents,
                [self.captions[number] for number in numbers],
                self.finetuning,
                seed=self.seed,
            )

    def _scaled(self, codec: Codec, images: Tensor) -> Tensor:
        """Latents of images as the model sees them."""
        return codec.scale(codec.encode(images.to(codec.device)), self.text_to_image.pipeline)

    def _poisons(self, source: Codec) -> Tensor:
        """All poisonable images, `[n,3,H,W]` on the CPU, each made once on `source`."""
        places = range(len(self.concepts.poisonable))
        return torch.cat(
            [
                self._poison_batch(source, places[start : start + self.batch_size])
                for start in range(0, len(places), self.batch_size)
            ]
        )

    def _poison_batch(self, source: Codec, places: Sequence[int]) -> Tensor:
        path = self.folder / "poisons" / source.digest / f"{places[0]:06d}-{len(places)}.safetensors"
        return kept_images(path, partial(self._make_poisons, source, places))

    def _make_poisons(self, source: Codec, places: Sequence[int]) -> Tensor:
        clean, targets = (
            self.images[[numbers[place] for place in places]].to(source.device)
            for numbers in (self.concepts.poisonable, self.concepts.targets)
        )
        return self.poison(targets).apply(source, clean, image_generators(self.seed, places))
