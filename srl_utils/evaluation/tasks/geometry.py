"""Parts of the geometry evaluation: what is measured of one VAE around a batch of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from srl_utils.attacks.draws import draw_signs, image_generators
from srl_utils.attacks.gradient import APGDConfig, apgd
from srl_utils.evaluation.metering import DECODER, ENCODER
from srl_utils.evaluation.motion import MOST_IMAGES, TRAVEL
from srl_utils.evaluation.perturbations import ADAPTIVE, ANY_ATTACK, CLEAN, NO_THREAT, Perturbation
from srl_utils.evaluation.results import Record, to_records
from srl_utils.geometry import surface
from srl_utils.geometry.certificate import CenterSmoothing
from srl_utils.geometry.clusters import image_silhouette, label_silhouette, median_distance, own_is_nearest
from srl_utils.geometry.interpolation import path
from srl_utils.geometry.reencoding import reencoded
from srl_utils.geometry.smoothness import local_lipschitz
from srl_utils.images.pixels import PIXEL_MAX, PIXEL_MIN, PIXEL_RANGE, to_model_units
from srl_utils.metrics.losses import mean_squared_error
from srl_utils.metrics.pixels import latent_drift, psnr
from srl_utils.vae.codec import Codec
from srl_utils.vae.networks import split_moments

GREY_LEVELS = 255 / PIXEL_RANGE
"""Grey levels of 8 bits in one unit of an image in [-1,1]."""
JVP, HVP = 6.0, 8.0
"""Cost of a forward and a backward derivative, and of a Hessian-vector product, in forward calls."""
CURVATURE, AREA, WEIGHT_AREA = "curvature", "raised-area", "raised-area-weights"
OWN, LABELS, IMAGES, TRUST = "own-nearest", "label-silhouette", "image-silhouette", "trustworthiness"
CERTIFIED, DISTANCE, SMOOTHING_ERROR, HELD = "certified", "certified-distance", "smoothing-error", "certificate-held"
LENGTH, JUMP, REENCODING_DRIFT = "path-length", "worst-jump", "reencoding-drift"


class Found(NamedTuple):
    """What a part measured of a batch."""

    records: list[Record]
    tensors: Mapping[str, Tensor]
    """Kept for figures and for values that need all images; the first dimension counts images."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some images, and the VAE that is looked at."""

    codec: Codec
    numbers: Sequence[int]
    clean: Tensor
    """`[N,3,H,W]` in [-1,1], on the VAE's device, as are the others."""
    following: Tensor
    """For each image the next one of the data, and for the last one the first."""
    attacked: Tensor
    """After the attack on this VAE; the clean images if no part looks at attacked ones."""
    seed: int

    def records(self, done: Perturbation, values: Mapping[str, Tensor]) -> list[Record]:
        """Return a record for each image and metric."""
        threat_model = ADAPTIVE if done.adversarial else NO_THREAT
        return to_records(self.codec.name, done, threat_model, self.numbers, values)

    def error(self, images: Tensor) -> Tensor:
        """Return the squared error of the reconstructions of `images` to the clean ones, in squared grey levels, `[N]`."""
        return GREY_LEVELS**2 * mean_squared_error(self.codec.reconstruct(images), self.clean)


class Part(Protocol):
    """One group of measurements, which is stored by itself."""

    @property
    def name(self) -> str:
        """Return the name of the part on the command line and in the output folder."""

    @property
    def uses_attack(self) -> bool:
        """Return whether it looks at attacked images."""

    def cost(self, numbers: Sequence[int]) -> float:
        """Return the cost of these images, in passes through encoder and decoder."""

    def measure(self, batch: Batch) -> Found:
        """Return the values of a batch."""

    def conclude(self, codec: Codec, tensors: Mapping[str, Tensor]) -> list[Record]:
        """Return the values that need all images, from the tensors of all batches."""


def after(name: str) -> Perturbation:
    """Return how results name something that is done to images and is no attack."""
    return replace(CLEAN, name=name)


class _WithoutConclusion:
    """A part whose values are those of single images."""

    def conclude(self, codec: Codec, tensors: Mapping[str, Tensor]) -> list[Record]:
        return []


@dataclass(frozen=True, kw_only=True)
class Surface(_WithoutConclusion):
    """The error over a plane of images and over one of the encoder's weights.

    Attributes:
        attack: its perturbation is the first direction of the plane of images; the second one has random signs.
        points: of each surface along a side.
        places: at which the curvature is measured.
        weight_range: a surface of weights ends where filters are moved by this share of their length.
    """

    attack: Perturbation
    points: int = 15
    places: int = 5
    weight_range: float = 0.1
    name: str = "surface"
    uses_attack: bool = True

    def cost(self, numbers: Sequence[int]) -> float:
        return len(numbers) * (2 + 2 * self.points**2 + self.places * HVP)

    def measure(self, batch: Batch) -> Found:
        clean, direction = batch.clean, batch.attacked - batch.clean
        signs = draw_signs(clean.shape[1:], image_generators(batch.seed, batch.numbers), like=clean)
        random = to_model_units(self.attack.epsilon) * signs

        def at(a: float, b: float) -> Tensor:
            return batch.error((clean + a * direction + b * random).clamp(PIXEL_MIN, PIXEL_MAX))

        with torch.no_grad():
            images, weights = surface.surface(at, self.points), self._over_weights(batch)
            before, after_attack = (batch.codec.reconstruct(each) for each in (clean, batch.attacked))
        middle = GREY_LEVELS**2 * mean_squared_error(before, clean)
        bend = surface.mean_curvature(batch.error, clean, direction, points=self.places)
        attacked = {"psnr": psnr(after_attack, clean), CURVATURE: bend, AREA: surface.raised_area(images, middle)}
        own = {"psnr": psnr(before, clean), WEIGHT_AREA: surface.raised_area(weights, middle)}
        records = batch.records(CLEAN, own) + batch.records(self.attack, attacked)
        return Found(records, {"images": images, "weights": weights, "clean": middle})

    def _over_weights(self, batch: Batch) -> Tensor:
        """Return the error of clean images over a plane of the encoder's weights, `[N,points,points]`."""
        encoder = batch.codec.encoder
        own = dict(encoder.named_parameters())
        generator = torch.Generator().manual_seed(batch.seed)
        first, second = (surface.filter_normalised(own, generator) for _ in range(2))

        def at(a: float, b: float) -> Tensor:
            weights = surface.moved(own, first, second, self.weight_range * a, self.weight_range * b)
            latents = split_moments(functional_call(encoder, weights, (batch.clean,))).mean
            return GREY_LEVELS**2 * mean_squared_error(batch.codec.decoder(latents), batch.clean)

        return surface.surface(at, self.points)


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """Where the latents of clean, noisy and attacked images are.

    Attributes:
        attack: made on each VAE itself.
        noise: of the attack's size.
        labels: of the images; None if there are none.
    """

    attack: Perturbation
    noise: Perturbation
    labels: Sequence[str] | None
    name: str = "clusters"
    uses_attack: bool = True

    def cost(self, numbers: Sequence[int]) -> float:
        return len(numbers) * 3 * ENCODER

    @torch.no_grad()
    def measure(self, batch: Batch) -> Found:
        noisy = self.noise.apply(batch.codec, batch.clean, image_generators(batch.seed, batch.numbers))
        shown = {"clean": batch.clean, "noisy": noisy, "attacked": batch.attacked}
        return Found([], {name: batch.codec.encode(images) for name, images in shown.items()})

    def conclude(self, codec: Codec, tensors: Mapping[str, Tensor]) -> list[Record]:
        clean = tensors["clean"]
        unit = median_distance(clean[:MOST_IMAGES])
        numbers = range(len(clean))
        records = to_records(codec.name, CLEAN, NO_THREAT, numbers, self._labelled(clean, clean))
        for done, name, threat_model in (
            (self.noise, "noisy", NO_THREAT),
            (self.attack, "attacked", ADAPTIVE),
        ):
            moved = tensors[name]
            values = {
                TRAVEL: (moved - clean).flatten(1).norm(dim=1) / unit,
                OWN: own_is_nearest(moved, clean).float(),
                IMAGES: image_silhouette(clean, moved),
                **self._labelled(moved, clean),
            }
            records += to_records(codec.name, done, threat_model, numbers, values)
        return records

    def _labelled(self, moved: Tensor, clean: Tensor) -> dict[str, Tensor]:
        return {} if self.labels is None else {LABELS: label_silhouette(moved, clean, self.labels)}


@dataclass(frozen=True, kw_only=True)
class Smoothness(_WithoutConclusion):
    """Local Lipschitz constants of the encoder, and of encoder and decoder, at clean images."""

    num_steps: int = 20
    name: str = "smoothness"
    uses_attack: bool = False

    def cost(self, numbers: Sequence[int]) -> float:
        return len(numbers) * 2 * JVP * self.num_steps * (ENCODER + 1)

    def measure(self, batch: Batch) -> Found:
        codec, values = batch.codec, {}
        networks = {"encoder": lambda images: codec.scale(codec.encode(images)), "both": codec.reconstruct}
        for name, network in networks.items():
            measured = partial(
                local_lipschitz, network, batch.clean,
                generators=image_generators(batch.seed, batch.numbers), num_steps=self.num_steps,
            )  # fmt: skip
            with torch.no_grad():
                size = network(batch.clean[:1]).numel()
            # Of the encoder, per unit of a [0,1] image; of both, the unit of the images is on both sides.
            unit = to_model_units(1.0) if name == "encoder" else 1.0
            level = unit / 255 if name == "encoder" else 1.0
            values[f"lipschitz-{name}"] = unit * measured("l2")
            values[f"lipschitz-{name}-linf"] = level * measured("linf") / size**0.5
        return Found(batch.records(CLEAN, values), {})


@dataclass(frozen=True, kw_only=True)
class Certificate(_WithoutConclusion):
    """How far the smoothed reconstruction can move, certified and attacked.

    Attributes:
        smoothing: its sigma is in units of a [-1,1] image.
        num_images: the first images are certified.
        attack_steps: of the attack that tries to break each certificate.
        shares: radii, in units of sigma.
        draws: noise draws in each step of the attack.
    """

    smoothing: CenterSmoothing
    num_images: int
    attack_steps: int
    shares: Sequence[float] = (0.1, 0.25, 0.5, 0.75)
    draws: int = 4
    name: str = "certificate"
    uses_attack: bool = False

    @property
    def radii(self) -> list[float]:
        """Return the radii, between images in [-1,1]."""
        return [share * self.smoothing.sigma for share in self.shares]

    @property
    def amounts(self) -> dict[str, float]:
        """Return the radius between images in [0,1] by the name of the ball in the results."""
        return {ball(radius): radius / PIXEL_RANGE for radius in self.radii}

    def cost(self, numbers: Sequence[int]) -> float:
        each = 5 * self.smoothing.samples + 2 * self.draws * self.attack_steps
        return len(self._certified(numbers)) * each

    def measure(self, batch: Batch) -> Found:
        records: list[Record] = []
        for number, image in zip(self._certified(batch.numbers), batch.clean, strict=False):
            records += self._certify(batch, number, image[None])
        return Found(records, {})

    def _certified(self, numbers: Sequence[int]) -> list[int]:
        """Return those of the numbers whose images are certified, which come first."""
        return [number for number in numbers if number < self.num_images]

    def _certify(self, batch: Batch, number: int, image: Tensor) -> list[Record]:
        """Return the values of one image `[1,3,H,W]`."""
        reconstruct, (generator,) = batch.codec.reconstruct, image_generators(batch.seed, [number])
        record = partial(_record, batch.codec.name, number)
        center = self.smoothing.center(reconstruct, image, generator)
        records = record(after("smoothed"), CERTIFIED, float(center is not None))
        if center is None:
            return records
        with torch.no_grad():
            records += record(after("smoothed"), SMOOTHING_ERROR, _distance(center, reconstruct(image)))
        bounds = self.smoothing.bounds(reconstruct, image, center, self.radii, generator)
        found = [(radius, bound) for radius, bound in zip(self.radii, bounds, strict=True) if bound is not None]
        for radius, bound in found:
            records += record(after(ball(radius)), DISTANCE, bound / PIXEL_RANGE)
        for radius, bound in found[-1:]:
            moved = self._attacked_center(batch, image, center, radius, generator)
            if moved is not None:
                against = replace(
                    CLEAN, name=f"apgd-{self.attack_steps} in {ball(radius)}", objective="smoothed output"
                )
                records += record(against, HELD, float(PIXEL_RANGE * _distance(center, moved) <= bound))
        return records

    def _attacked_center(
        self, batch: Batch, image: Tensor, center: Tensor, radius: float, generator: torch.Generator
    ) -> Tensor | None:
        """Return the smoothed output after an attack on it within the ball; None if the smoothing abstains there."""
        noise = torch.randn((self.draws, *image.shape[1:]), generator=generator).to(image)
        reconstruct = batch.codec.reconstruct

        def objective(images: Tensor) -> Tensor:
            outputs = reconstruct(images + self.smoothing.sigma * noise)
            return mean_squared_error(outputs, center.expand_as(outputs)).mean(dim=0, keepdim=True)

        config = APGDConfig(epsilon=radius / PIXEL_RANGE, norm="l2", num_steps=self.attack_steps)
        attacked = apgd(objective, image, config, generators=[generator])
        return self.smoothing.center(reconstruct, attacked, generator)


def ball(radius: float) -> str:
    """Return the name of an L2 ball in results, from its radius between images in [-1,1]."""
    return f"l2-ball-{radius / PIXEL_RANGE:.3g}"


def _record(vae: str, number: int, done: Perturbation, metric: str, value: float) -> list[Record]:
    return to_records(vae, done, ANY_ATTACK, [number], {metric: torch.tensor([value])})


def _distance(image: Tensor, other: Tensor) -> float:
    """Return the Euclidean distance between two images, in units of a [0,1] image."""
    return (image - other).norm().item() / PIXEL_RANGE


@dataclass(frozen=True, kw_only=True)
class Interpolation(_WithoutConclusion):
    """Paths from each image to the next one: its latents, decoded, and its pixels, encoded."""

    num_steps: int = 16
    name: str = "interpolation"
    uses_attack: bool = False

    def cost(self, numbers: Sequence[int]) -> float:
        return len(numbers) * ((self.num_steps + 1) * (ENCODER + DECODER) + 2 * ENCODER)

    @torch.no_grad()
    def measure(self, batch: Batch) -> Found:
        codec, ends = batch.codec, (batch.clean, batch.following)
        paths = {
            "latents-interpolated": path(codec.decoder, *map(codec.encode, ends), num_steps=self.num_steps),
            "images-interpolated": path(codec.encode, *ends, num_steps=self.num_steps),
        }
        records: list[Record] = []
        for name, found in paths.items():
            records += batch.records(after(name), {LENGTH: found.length, JUMP: found.worst_jump})
        return Found(records, {})


@dataclass(frozen=True, kw_only=True)
class Reencoding(_WithoutConclusion):
    """Images after several passes through the VAE."""

    counts: Sequence[int] = (1, 2, 5, 10)
    name: str = "reencoding"
    uses_attack: bool = False

    @property
    def amounts(self) -> dict[str, float]:
        """Return the number of passes by name in the results."""
        return {_after_passes(count): count for count in self.counts}

    def cost(self, numbers: Sequence[int]) -> float:
        return len(numbers) * (max(self.counts) + ENCODER * (1 + len(self.counts)))

    @torch.no_grad()
    def measure(self, batch: Batch) -> Found:
        records, latents = [], batch.codec.encode(batch.clean)
        for count, images in reencoded(batch.codec.reconstruct, batch.clean, self.counts):
            drift = latent_drift(batch.codec.encode(images), latents)
            records += batch.records(
                after(_after_passes(count)), {"psnr": psnr(images, batch.clean), REENCODING_DRIFT: drift}
            )
        return Found(records, {})


def _after_passes(count: int) -> str:
    return f"reencoded-{count}"
