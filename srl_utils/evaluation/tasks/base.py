"""What a VAE is judged by: a task does something with the images that it is shown, and measures the outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from srl_utils.evaluation.perturbations import (
    CLEAN,
    Perturbation,
)
from srl_utils.images.pixels import format_pixel_distance
from srl_utils.metrics.features import ClipSimilarity, Features
from srl_utils.metrics.losses import PerceptualDistance
from srl_utils.metrics.pixels import latent_drift, psnr, ssim
from srl_utils.vae.codec import Codec


def drift(codec: Codec, reference: Codec, clean: Tensor) -> dict[str, Tensor]:
    """How far the latents of clean images have left those of `reference`, `[N]`; nothing where they have other shapes."""
    latents, others = codec.encode(clean), reference.encode(clean)
    return {"drift": latent_drift(latents, others)} if latents.shape == others.shape else {}


DRIFT = "drift"


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What is measured, and the networks that some of it needs."""

    names: Sequence[str]
    perceptual: Sequence[PerceptualDistance] = ()
    features: Features | None = None
    """For distances between sets of images."""
    clip: ClipSimilarity | None = None

    def compare(self, images: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """Of those that hold `[N,3,H,W]` against as many others, `[N]` each."""
        values = {"psnr": psnr(images, reference), "ssim": ssim(images, reference)}
        for distance in self.perceptual:
            values[distance.name] = distance.distance(images, distance.features(reference))
        if self.clip is not None:
            values["clip"] = self.clip.image_image(images, reference)
        return self.wanted(values)

    def wanted(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in values.items() if name in self.names}


@dataclass(frozen=True)
class Cell:
    """One perturbation, made on one VAE, shown to the VAEs that this tells something about."""

    perturbation: Perturbation
    source: Codec
    judged: tuple[Codec, ...]
    threat_models: dict[str, tuple[str, ...]]
    """Under which threat models the results of each VAE count."""

    @property
    def title(self) -> str:
        epsilon = self.perturbation.epsilon
        budget = f" {format_pixel_distance(epsilon)}" if epsilon else ""
        made_on = f" on {self.source.name}" if self.perturbation.adversarial else ""
        return f"{self.perturbation.name}{budget}{made_on}"


def denoiser_of(pipeline: DiffusionPipeline | None) -> nn.Module | None:
    """The pipeline's UNet or transformer, where it has one."""
    components = {} if pipeline is None else pipeline.components
    return components.get("unet") or components.get("transformer")


class Task(Protocol):
    """What is done with the images that a VAE is shown, and what the outcome is worth."""

    @property
    def metrics(self) -> Metrics:
        """Return what is measured."""

    @property
    def variants(self) -> Sequence[str]:
        """Return the ways in which it is done; `""` where there is only one."""

    @property
    def passes(self) -> float:
        """Return what all variants cost for one image and VAE, in passes through encoder and decoder."""

    @property
    def denoiser(self) -> nn.Module | None:
        """Return the denoiser of the pipeline that tasks or attacks use; a progress bar counts its steps."""

    def attempt(self, cell: Cell, codec: Codec, shown: Tensor, numbers: Sequence[int], variant: str) -> Tensor:
        """What `codec` makes of the images `[N,3,H,W]` of these numbers, as many images."""

    def reference(self, codec: Codec, numbers: Sequence[int], variant: str) -> Tensor:
        """What outcomes of `codec` are held against, `[N,3,H,W]` on the CPU; sets of them, against the baseline's."""

    def measure(
        self, cell: Cell, codec: Codec, outcome: Tensor, numbers: Sequence[int], variant: str
    ) -> dict[str, Tensor]:
        """`[N]` for each metric of single images."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """The task of a VAE alone: to return what it is shown, as it was before anything was done to it."""

    metrics: Metrics
    baseline: Codec
    """From whose latents drift is measured."""
    images: Tensor
    denoiser: nn.Module | None = None
    variants: Sequence[str] = ("",)
    passes: float = 1

    def attempt(self, cell: Cell, codec: Codec, shown: Tensor, numbers: Sequence[int], variant: str) -> Tensor:
        return codec.reconstruct(shown)

    def reference(self, codec: Codec, numbers: Sequence[int], variant: str) -> Tensor:
        return self.images[list(numbers)]

    def measure(
        self, cell: Cell, codec: Codec, outcome: Tensor, numbers: Sequence[int], variant: str
    ) -> dict[str, Tensor]:
        clean = self.reference(codec, numbers, variant).to(outcome.device)
        values = self.metrics.compare(outcome, clean)
        if cell.perturbation.name == CLEAN.name and DRIFT in self.metrics.names:
            values |= drift(codec, self.baseline, clean)
        return values

    @torch.no_grad()
    def note_incomparable(self, codecs: Sequence[Codec], notes: list[str]) -> None:
        """Adds a note for each of `codecs` whose drift is wanted, and has no value for its latents' shape."""
        if DRIFT not in self.metrics.names:
            return
        shapes = {codec.name: tuple(codec.encode(self.images[:1].to(codec.device)).shape[1:]) for codec in codecs}
        own = shapes[self.baseline.name]
        for name, shape in shapes.items():
            if shape != own:
                notes.append(
                    f"{DRIFT} of {name} was left out: its latents have the shape {_times(shape)}, those of "
                    f"{self.baseline.name} {_times(own)}"
                )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
