"""A small RegNet that names the colour and shape of a scene's object.

Its features serve for the Fréchet distance of scenes as Inception's do for photographs, and its answer as the judge of
whether an image shows what it was asked for.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import RegNetConfig, RegNetForImageClassification, ViTImageProcessor

from miniature.contrastive import HALVES
from miniature.scene_set import LABELS, NO_LABEL, SIZE, SceneSet
from miniature.training import Training, draw_numbers


def build_classifier() -> RegNetForImageClassification:
    labels = dict(enumerate(LABELS))
    # Small objects are a few pixels: the first stage keeps half the resolution.
    config = RegNetConfig(
        embedding_size=32, hidden_sizes=[48, 96, 192], depths=[1, 2, 2], groups_width=16, downsample_in_first_stage=False,
        id2label=labels, label2id={label: number for number, label in labels.items()},
    )  # fmt: skip
    return RegNetForImageClassification(config)


def build_image_processor() -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=HALVES, image_std=HALVES)


def train_classifier(
    scenes: SceneSet,
    vae: AutoencoderKL,
    *,
    work_dir: Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: str,
    torch_compile: bool,
) -> RegNetForImageClassification:
    """Trains on the scenes of one object; what was trained before in `work_dir` is gone on with."""
    torch.manual_seed(seed)
    network = build_classifier().to(device, memory_format=torch.channels_last)
    single = (scenes.labels != NO_LABEL).nonzero().flatten()
    vae = vae.to(device, memory_format=torch.channels_last)
    predict, reconstruct = RegNetForImageClassification.forward, partial(reconstructed, vae)
    if torch_compile:
        predict, reconstruct = torch.compile(predict), torch.compile(reconstruct)
    loss = partial(
        cross_entropy, predict=predict, reconstruct=reconstruct, scenes=scenes, single=single, batch_size=batch_size, seed=seed
    )
    trained = Training(network, loss, work_dir / "classifier.pt", steps, learning_rate).run()
    return trained.to(memory_format=torch.contiguous_format)


def cross_entropy(
    network: nn.Module, step: int, *, predict, reconstruct, scenes: SceneSet, single: Tensor, batch_size: int, seed: int
) -> Tensor:
    """Of mirrored scenes, half of them as the VAE returns them: so the diffusion model's images will look."""
    numbers = single[draw_numbers(seed, step, batch_size=batch_size, out_of=len(single))]
    device = network.device
    pixels = mirrored(scenes.pixels(numbers), torch.Generator().manual_seed(seed * 1_000_003 + step))
    pixels = pixels.to(device, memory_format=torch.channels_last)
    seen, drawn = pixels.chunk(2)
    with torch.no_grad():
        pixels = torch.cat([reconstruct(seen).float(), drawn])
    logits = predict(network, pixel_values=pixels).logits
    return F.cross_entropy(logits.float(), scenes.labels[numbers].to(device), label_smoothing=0.05)


def mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of them."""
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(chosen, images.flip(3), images)


def reconstructed(vae: AutoencoderKL, images: Tensor) -> Tensor:
    return vae.decode(vae.encode(images).latent_dist.mean).sample
