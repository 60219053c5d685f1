"""A small RegNet that classifies the colour and shape of a scene's object.

Its features give the Fréchet distance of scenes, as Inception's do for photographs. Its answer tells whether an image
shows its prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import RegNetConfig, RegNetForImageClassification, ViTImageProcessor
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from miniature.contrastive import HALVES
from miniature.scene_set import LABELS, NO_LABEL, SIZE, SceneSet
from miniature.training import Settings, train
from srl_utils.attacks.draws import image_generators
from srl_utils.evaluation.tasks.finetuning import draw_numbers
from srl_utils.images.pixels import to_unit_range


def build_classifier() -> RegNetForImageClassification:
    """Return the classifier with random weights."""
    labels = dict(enumerate(LABELS))
    # Small objects have a few pixels, so the first stage does not reduce the resolution.
    config = RegNetConfig(
        embedding_size=32, hidden_sizes=[48, 96, 192], depths=[1, 2, 2], groups_width=16, downsample_in_first_stage=False,
        id2label=labels, label2id={label: number for number, label in labels.items()},
    )  # fmt: skip
    return RegNetForImageClassification(config)


def build_image_processor() -> ViTImageProcessor:
    """Return the processor that resizes and normalises the classifier's images."""
    return ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=HALVES, image_std=HALVES)


def train_classifier(scenes: SceneSet, vae: AutoencoderKL, settings: Settings) -> RegNetForImageClassification:
    """Train the classifier on scenes of one object. Training resumes from the state in `settings.work_dir`."""
    torch.manual_seed(settings.seed)
    network = build_classifier().to(settings.device, memory_format=torch.channels_last)
    vae = vae.to(settings.device, memory_format=torch.channels_last)
    loss = partial(
        cross_entropy,
        predict=settings.compiled(RegNetForImageClassification.forward),
        reconstructions=Reconstructions(scenes, settings.compiled(partial(reconstructed, vae)), settings.device),
        scenes=scenes, single=(scenes.labels != NO_LABEL).nonzero().flatten(), settings=settings,
    )  # fmt: skip
    trained = train(network, loss, "classifier.pt", settings)
    return trained.to(memory_format=torch.contiguous_format)  # safetensors takes no other format


def cross_entropy(
    network: RegNetForImageClassification,
    step: int,
    *,
    predict: Callable[..., ImageClassifierOutputWithNoAttention],
    reconstructions: Reconstructions,
    scenes: SceneSet,
    single: Tensor,
    settings: Settings,
) -> Tensor:
    """Return the cross entropy on a step's scenes, mirrored at random, half of them reconstructed by the VAE.

    Reconstructions look like the images of the diffusion model.
    """
    numbers = single[draw_numbers(settings.seed, step, batch_size=settings.batch_size, out_of=len(single))]
    seen, drawn = numbers.chunk(2)
    pixels = torch.cat([reconstructions.pixels(seen), scenes.pixels(drawn)])
    pixels = mirrored(pixels, image_generators(settings.seed, [step])[0])
    logits = predict(network, pixel_values=pixels.to(network.device, memory_format=torch.channels_last)).logits
    return F.cross_entropy(logits.float(), scenes.labels[numbers].to(network.device), label_smoothing=0.05)


class Reconstructions:
    """Scenes as an autoencoder returns them, in 8 bits like the scenes. Each is computed once."""

    def __init__(self, scenes: SceneSet, reconstruct: Callable[[Tensor], Tensor], device: str) -> None:
        """Keep room for all scenes.

        Args:
            scenes: the scenes.
            reconstruct: maps images `[n,3,H,W]` in [-1,1] to reconstructions.
            device: on which it computes.
        """
        self.scenes, self.reconstruct, self.device = scenes, reconstruct, device
        self.done = torch.zeros(len(scenes.captions), dtype=torch.bool)
        self.returned = replace(scenes, images=torch.empty_like(scenes.images))

    @torch.no_grad()
    def pixels(self, numbers: Tensor) -> Tensor:
        """Return the reconstructions of the scenes with these numbers `[n]`, as `[n,3,H,W]` in [-1,1]."""
        missing = numbers[~self.done[numbers]]
        if len(missing):
            images = self.scenes.pixels(missing).to(self.device, memory_format=torch.channels_last)
            returned = to_unit_range(self.reconstruct(images).float().clamp(-1, 1))
            self.returned.images[missing] = (255 * returned).round().to("cpu", torch.uint8)
            self.done[missing] = True
        return self.returned.pixels(numbers)


def mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image `[N,3,H,W]` with a probability of one half."""
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(chosen, images.flip(3), images)


def reconstructed(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Return the reconstructions `[N,3,H,W]` of images."""
    return vae.decode(vae.encode(images).latent_dist.mean).sample
