"""Teach a text-to-image model images that a VAE encodes; what was made once is kept on the disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from srl_utils.attacks.draws import image_generators, purifying_generators
from srl_utils.evaluation.metering import DENOISER
from srl_utils.evaluation.perturbations import Perturbation
from srl_utils.evaluation.tasks.base import Cell
from srl_utils.evaluation.tasks.editing import Edit
from srl_utils.evaluation.tasks.finetuning import FinetuningConfig, finetune
from srl_utils.files import kept_images, make_once, save_tensors, write_atomically
from srl_utils.vae.codec import Codec


class Lesson(NamedTuple):
    """What a model is fine-tuned on."""

    latents: Tensor
    """Raw latents, `[N,C,h,w]`."""
    captions: Sequence[str]
    """One for each image."""


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A text-to-image model that is fine-tuned on images and then generates.

    Fine-tuned models and perturbed images are stored, so that they are made once.
    """

    text_to_image: Edit
    finetuning: FinetuningConfig
    folder: Path
    """Keeps perturbed images and fine-tuned models."""
    batch_size: int
    """Images encoded or perturbed at a time."""
    seed: int

    @property
    def passes(self) -> float:
        """Return the cost of one fine-tuning, in passes through encoder and decoder."""
        return 2 * DENOISER * self.finetuning.num_steps * self.finetuning.batch_size

    def generate(
        self,
        codec: Codec,
        shown: Tensor,
        prompts: Sequence[str],
        numbers: Sequence[int],
        unet: UNet2DConditionModel | None = None,
    ) -> Tensor:
        """Return generated images, `[N,3,H,W]` in [-1,1].

        Args:
            codec: decodes the latents.
            shown: images of the size to generate, `[N,3,H,W]`.
            prompts: one for each image.
            numbers: of the images; with the seed, they fix the noise.
            unet: a fine-tuned UNet; None takes the pipeline's own.
        """
        pipeline = self.text_to_image.pipeline
        original = pipeline.unet
        pipeline.register_modules(unet=original if unet is None else unet)
        try:
            return self.text_to_image(codec, shown, prompts, image_generators(self.seed, numbers))
        finally:
            pipeline.register_modules(unet=original)

    def finetuned(self, cell: Cell, codec: Codec, name: str, lesson: Callable[[], Lesson]) -> UNet2DConditionModel:
        """Return the fine-tuned UNet, read from the disk if it exists; wait while another process makes it.

        Args:
            cell: has the VAE on which the images were attacked.
            codec: encodes the images.
            name: of what was done to the images.
            lesson: makes latents and captions; called only if the UNet does not exist yet.
        """
        own = self.text_to_image.pipeline.unet
        made_on = f"-on-{cell.source.digest}" if cell.perturbation.adversarial else ""
        path = self.folder / "models" / f"{codec.digest}-{name}{made_on}"

        def write() -> None:
            taught = self._finetune(codec, lesson)
            write_atomically(path, partial(save_tensors, changed_weights(taught, own)))

        make_once(path, write)
        unet = copy.deepcopy(own)
        unet.load_state_dict(own.state_dict() | load_file(path))
        return unet

    def _finetune(self, codec: Codec, lesson: Callable[[], Lesson]) -> UNet2DConditionModel:
        pipeline = self.text_to_image.pipeline
        with torch.no_grad():
            latents, captions = lesson()
            latents = codec.scale(latents, pipeline)
        with torch.enable_grad():
            return finetune(pipeline, latents, captions, self.finetuning, seed=self.seed)

    def latents(self, codec: Codec, images: Tensor) -> Tensor:
        """Return the raw latents of images `[n,3,H,W]` in [-1,1], which are on the CPU and encoded in batches."""
        latents = []
        for part in torch.arange(len(images)).split(self.batch_size):
            with codec.drawing(purifying_generators(self.seed, part.tolist())):
                latents.append(codec.encode(images[part].to(codec.device)))
        return torch.cat(latents)

    def perturbed(
        self,
        place: str,
        source: Codec,
        images: Tensor,
        perturbation: Callable[[Sequence[int]], Perturbation],
        *,
        joint: bool = False,
    ) -> Tensor:
        """Return perturbed images, `[n,3,H,W]` in [-1,1] on the CPU; each is made once.

        Args:
            place: folder for them, within the learner's own.
            source: the VAE on which they are made.
            images: clean images, `[n,3,H,W]` in [-1,1], on the CPU.
            perturbation: what is done to the images of some numbers.
            joint: whether to perturb all images in one batch, as one set.
        """

        def perturb(numbers: Sequence[int]) -> Tensor:
            clean = images[list(numbers)].to(source.device)
            draws = purifying_generators(self.seed, numbers, attacked=True)
            with torch.enable_grad(), source.drawing(draws):
                return perturbation(numbers).apply(source, clean, image_generators(self.seed, numbers))

        folder = self.folder / place / source.digest
        size = len(images) if joint else self.batch_size
        batches = [part.tolist() for part in torch.arange(len(images)).split(size)]
        return torch.cat(
            [kept_images(folder / f"{part[0]:06d}-{len(part)}.safetensors", partial(perturb, part)) for part in batches]
        )


def changed_weights(network: nn.Module, original: nn.Module) -> dict[str, Tensor]:
    """Return by name the weights that differ from those of `original`: adapters change the attention alone."""
    before = original.state_dict()
    return {
        name: weight.contiguous()
        for name, weight in network.state_dict().items()
        if not torch.equal(weight, before[name])
    }
