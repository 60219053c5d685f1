"""Tasks: what is done with perturbed images by means of a VAE, and how the outcome is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from srl_utils.evaluation.motion import FLIPS
from srl_utils.evaluation.perturbations import CLEAN, Perturbation
from srl_utils.images.pixels import format_pixel_distance, frames_of, over_frames
from srl_utils.metrics.clips import FLICKER, WARPING, flicker, warping_error
from srl_utils.metrics.features import ClipSimilarity, Features
from srl_utils.metrics.losses import PerceptualDistance
from srl_utils.metrics.pixels import latent_drift, psnr, ssim
from srl_utils.vae.codec import Codec

DRIFT = "drift"


def drift(codec: Codec, reference: Codec, clean: Tensor) -> dict[str, Tensor]:
    """Return how clean images' latents differ from those of `reference`, `[N]` each.

    These are their relative drift and, if the two VAEs share a codebook, the share of tokens that differ. Return no value
    if the latents have different shapes.
    """
    latents, others = codec.encode(clean), reference.encode(clean)
    if latents.shape != others.shape:
        return {}
    values = {DRIFT: latent_drift(latents, others)}
    codebook, other_codebook = codec.codebook, reference.codebook
    if codebook is not None and other_codebook is not None and torch.equal(codebook.codes, other_codebook.codes):
        values[FLIPS] = codebook.flips(latents, codebook.tokens(others))
    return values


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The metrics to measure, and the networks that some of them need."""

    names: Sequence[str]
    perceptual: Sequence[PerceptualDistance] = ()
    features: Features | None = None
    """Network for FID, rFID, KID and Inception Score."""
    clip: ClipSimilarity | None = None

    def compare(self, images: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """Return the wanted metrics that compare two images, `[N]` each.

        Args:
            images: `[N,3,H,W]` in [-1,1], or clips `[N,3,T,H,W]`: their values are means over the frames, and of the
                metrics of clips.
            reference: as many in [-1,1].
        """
        values = {"psnr": psnr(images, reference), "ssim": ssim(images, reference)}
        frames, wanted = frames_of(images), frames_of(reference)
        for distance in self.perceptual:
            values[distance.name] = over_frames(distance.distance(frames, distance.features(wanted)), len(images))
        if images.ndim == 5:
            steadiness = {WARPING: warping_error, FLICKER: flicker}
            values |= {name: metric(images, reference) for name, metric in steadiness.items() if name in self.names}
        if self.clip is not None:
            values["clip"] = over_frames(self.clip.image_image(frames, wanted), len(images))
        return self.wanted(values)

    def wanted(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the values whose metrics are among `names`."""
        return {name: value for name, value in values.items() if name in self.names}


@dataclass(frozen=True)
class Cell:
    """One perturbation, the VAE on which it is made, and the VAEs that are evaluated under it."""

    perturbation: Perturbation
    source: Codec
    judged: tuple[Codec, ...]
    threat_models: dict[str, tuple[str, ...]]
    """Threat models of each VAE's results, by its name."""

    @property
    def title(self) -> str:
        """Return the perturbation, its budget, and the VAE on which it is made."""
        epsilon = self.perturbation.epsilon
        budget = f" {format_pixel_distance(epsilon)}" if epsilon else ""
        made_on = f" on {self.source.name}" if self.perturbation.adversarial else ""
        return f"{self.perturbation.name}{budget}{made_on}"


def denoiser_of(pipeline: DiffusionPipeline | None) -> nn.Module | None:
    """Return the pipeline's UNet or transformer; None if it has neither."""
    components = {} if pipeline is None else pipeline.components
    return components.get("unet") or components.get("transformer")


class Task(Protocol):
    """What is done with perturbed images by means of a VAE, and how the outcome is measured."""

    @property
    def metrics(self) -> Metrics:
        """Return the metrics to measure."""

    @property
    def variants(self) -> Sequence[str]:
        """Return the names of the ways in which the task is done; `""` if there is only one."""

    @property
    def passes(self) -> float:
        """Return the cost of all variants for one image and VAE, in passes through encoder and decoder."""

    @property
    def denoiser(self) -> nn.Module | None:
        """Return the denoiser that the task or an attack uses; its steps move the progress bar."""

    def attempt(self, cell: Cell, codec: Codec, shown: Tensor, numbers: Sequence[int], variant: str) -> Tensor:
        """Return the outcome of one variant, `[N,3,H,W]` in [-1,1].

        Args:
            cell: the perturbation, and the VAE on which it is made.
            codec: the evaluated VAE.
            shown: perturbed images, `[N,3,H,W]` in [-1,1].
            numbers: of the images.
            variant: one of `variants`.
        """

    def reference(self, codec: Codec, numbers: Sequence[int], variant: str) -> Tensor:
        """Return the images to compare outcomes of `codec` with, `[N,3,H,W]` in [-1,1] on the CPU.

        Metrics of whole sets, such as FID, compare with the references of the baseline.
        """

    def measure(
        self, cell: Cell, codec: Codec, outcome: Tensor, numbers: Sequence[int], variant: str
    ) -> dict[str, Tensor]:
        """Return each metric that has one value per image, `[N]`; arguments as in `attempt`."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """The task of a VAE alone: to reconstruct the clean image from the perturbed one."""

    metrics: Metrics
    baseline: Codec
    """Drift is measured from its latents."""
    images: Tensor
    """Clean images, `[n,3,H,W]` in [-1,1], on the CPU."""
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
        if cell.perturbation.name == CLEAN.name and not {DRIFT, FLIPS}.isdisjoint(self.metrics.names):
            values |= self.metrics.wanted(drift(codec, self.baseline, clean))
        return values

    @torch.no_grad()
    def note_incomparable(self, codecs: Sequence[Codec], notes: list[str]) -> None:
        """Add a note for each VAE whose drift cannot be measured because its latents have another shape."""
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
