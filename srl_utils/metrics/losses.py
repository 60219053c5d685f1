"""Compute the terms of the SRL-VAE objective (arXiv 2504.17219), one value per image; the caller averages."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import lpips
import torch
from torch import Tensor, nn

from srl_utils.errors import MissingFile, UnusableFile
from srl_utils.images.pixels import frames_of, over_frames
from srl_utils.vae.precision import full_precision

WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # read by torch
LPIPS_TRUNKS = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
"""File names of torchvision's weights."""
LPIPS_LEAST_SIDES = {"vgg": 16, "alex": 31, "squeeze": 17}
"""Side in pixels of the smallest images that each trunk takes."""
LPIPS_METRICS = {f"lpips-{trunk}": trunk for trunk in LPIPS_TRUNKS}
"""Trunks by the name that the metric has in results."""
EPSILON = 1e-10
"""Added to the squared length of features before they are normalised."""


class Target(NamedTuple):
    """The clean images or clips that a reconstruction is compared with, and their frames' perceptual features, if any."""

    images: Tensor
    features: list[Tensor]

    def part(self, start: int, stop: int) -> Target:
        """Return the target of the images or clips from `start` to before `stop`."""
        frames = len(frames_of(self.images[:1]))
        return Target(self.images[start:stop], [layer[start * frames : stop * frames] for layer in self.features])


class ReconstructionTerms(NamedTuple):
    """Squared error and perceptual distance per image, each `[N]`; the distance is not yet weighted."""

    mse: Tensor
    lpips: Tensor


class ReconstructionLoss(nn.Module):
    """MSE(reconstruction, clean) + weight * LPIPS(reconstruction, clean): the inner and the outer objective.

    The MSE is over images in [-1,1]. LPIPS runs in `full_precision`, and its gradient reaches the reconstruction.

    Args:
        perceptual: LPIPS; None leaves it out.
        weight: of LPIPS.
    """

    def __init__(self, perceptual: PerceptualDistance | None = None, *, weight: float = 0.0) -> None:
        super().__init__()
        self.perceptual = perceptual
        self.weight = weight

    @property
    def name(self) -> str:
        """Return the formula as results name it, such as `mse + lpips-vgg`."""
        if self.perceptual is None:
            return "mse"
        factor = "" if self.weight == 1 else f"{self.weight:g} "
        return f"mse + {factor}{self.perceptual.name}"

    @torch.no_grad()
    def target(self, clean: Tensor) -> Target:
        """Return the target of clean images or clips; its features are computed once for all steps of an attack."""
        return Target(clean, self.perceptual.features(frames_of(clean)) if self.perceptual else [])

    def terms(self, reconstruction: Tensor, target: Target) -> ReconstructionTerms:
        """Return the terms of the loss, not yet weighted."""
        mse = mean_squared_error(reconstruction, target.images)
        if self.perceptual is None:
            return ReconstructionTerms(mse, torch.zeros_like(mse))
        distances = self.perceptual.distance(frames_of(reconstruction), target.features)
        return ReconstructionTerms(mse, over_frames(distances, len(reconstruction)))

    def forward(self, reconstruction: Tensor, target: Target) -> Tensor:
        """Return the loss `[N]`, which the attack maximises and the training minimises."""
        terms = self.terms(reconstruction, target)
        return terms.mse + self.weight * terms.lpips


class ImageDistance(Protocol):
    """How different images look, on the features of a network."""

    @property
    def name(self) -> str:
        """Return what is computed, in a few words."""

    def features(self, images: Tensor) -> list[Tensor]:
        """Return features of images `[N,3,H,W]` in [-1,1], one tensor per layer."""

    def distance(self, images: Tensor, target_features: Sequence[Tensor]) -> Tensor:
        """Return the distance `[N]` of images `[N,3,H,W]` in [-1,1] from those with these features; it has a gradient."""


class PerceptualDistance(nn.Module):
    """LPIPS (Zhang et al., CVPR 2018) on the `lpips` package's frozen weights, with reusable target features.

    The package normalises features by `x / (|x| + eps)`, whose gradient is NaN where all channels are zero;
    here eps stands inside the square root, which changes the value by less than 1e-4.
    """

    def __init__(self, network: lpips.LPIPS) -> None:
        super().__init__()
        # The lpips package leaves its linear weights trainable.
        self.network = network.requires_grad_(False).eval()
        self.dtype = next(self.network.net.parameters()).dtype

    @property
    def name(self) -> str:
        """Return the metric's name with its trunk, such as `lpips-vgg`."""
        return f"lpips-{self.network.pnet_type}"

    def in_precision(self, dtype: torch.dtype) -> PerceptualDistance:
        """Return a twin whose convolutions run in `dtype`; later operations stay in float32.

        It is for attacks, which take a gradient's sign. Features of the original may be its targets.
        """
        twin = copy.deepcopy(self)
        twin.network.net.to(dtype)
        twin.dtype = dtype
        return twin

    def features(self, images: Tensor) -> list[Tensor]:
        """Return channel-normalised features of images `[N,3,H,W]` in [-1,1], one tensor per layer."""
        with torch.autocast(images.device.type, enabled=False):
            activations = self.network.net(self.network.scaling_layer(full_precision(images)).to(self.dtype))
            return [_normalised(full_precision(layer)) for layer in activations]

    def compile_features(self) -> None:
        """Compile the trunk for one size of images."""
        self.__dict__["features"] = torch.compile(self.features, dynamic=False)

    def distance(self, images: Tensor, target_features: Sequence[Tensor]) -> Tensor:
        """Return the LPIPS `[N]` between images `[N,3,H,W]` in [-1,1] and the target with these features."""
        with torch.autocast(images.device.type, enabled=False):
            layers = zip(self.network.lins, self.features(images), target_features, strict=True)
            return sum(weigh((own - fixed).square()).mean(dim=(1, 2, 3)) for weigh, own, fixed in layers)


class FeatureDistance(nn.Module):
    """The distance of a network's channel-normalised features: LPIPS without fitted weights.

    Each layer contributes the squared distance of its normalised features, averaged over positions; the layers are
    averaged. It is 0 for equal images and at most 4; at most 2, if no feature is negative. Zhang et al. (CVPR 2018) find
    that the features of a classifier compare images nearly as well without fitted weights.

    Args:
        layers: maps images `[N,3,H,W]` in [-1,1] to feature maps `[N,C,h,w]`, one per layer.
        name: what is computed, in a few words.
    """

    def __init__(self, layers: nn.Module, name: str) -> None:
        super().__init__()
        self.layers, self.name = layers, name

    def features(self, images: Tensor) -> list[Tensor]:
        """Return channel-normalised features of images `[N,3,H,W]` in [-1,1], one tensor per layer."""
        with torch.autocast(images.device.type, enabled=False):
            return [_normalised(layer) for layer in self.layers(full_precision(images))]

    def distance(self, images: Tensor, target_features: Sequence[Tensor]) -> Tensor:
        """Return the distance `[N]` between images `[N,3,H,W]` in [-1,1] and the target with these features."""
        pairs = zip(self.features(images), target_features, strict=True)
        return torch.stack([(own - fixed).square().sum(dim=1).mean(dim=(1, 2)) for own, fixed in pairs]).mean(dim=0)


def _normalised(features: Tensor) -> Tensor:
    """Return features `[N,C,H,W]` scaled to length 1 over the channels."""
    return features * torch.rsqrt(features.square().sum(dim=1, keepdim=True) + EPSILON)


def load_perceptual_distance(net: str) -> PerceptualDistance:
    """Load LPIPS with the trunk `net` (vgg, alex or squeeze); torchvision downloads weights that are not cached.

    Raises:
        MissingFile: a FileNotFoundError, if the weights are missing and cannot be downloaded.
        UnusableFile: an OSError, if their file is damaged.
    """
    try:
        with warnings.catch_warnings(), _nothing_but_tensors():
            # lpips 0.1.4 calls torchvision by a name that torchvision deprecates.
            warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
            return PerceptualDistance(lpips.LPIPS(net=net, verbose=False))
    except pickle.UnpicklingError:  # torch's message would advise to trust the file
        kind, reason = UnusableFile, "its file holds something other than weights"
    except (OSError, RuntimeError) as error:  # no network; a file that is cut short
        kind, reason = MissingFile if isinstance(error, OSError) else UnusableFile, str(error).splitlines()[0]
    raise kind(
        f"cannot load the LPIPS trunk '{net}' ({reason}); put an intact {LPIPS_TRUNKS[net]} into "
        "$TORCH_HOME/hub/checkpoints, or do without LPIPS (`lpips_weight` 0 in a training)"
    )


@contextmanager
def _nothing_but_tensors() -> Iterator[None]:
    """Make torch.load refuse everything but tensors within the context.

    torchvision asks it to unpickle anything, which can run code.
    """
    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        del os.environ[WEIGHTS_ONLY]
        if before is not None:
            os.environ[WEIGHTS_ONLY] = before


def mean_squared_error(images: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error over all values of an image or clip, `[N]`, of `[N,...]` in [-1,1]."""
    return (full_precision(images) - full_precision(target)).square().flatten(1).mean(dim=1)


def originality_loss(
    mean: Tensor, variance: Tensor, reference_mean: Tensor, reference_variance: Tensor, *, scale: float | Tensor = 1.0
) -> Tensor:
    """Return how far the posterior of the clean images has moved from the original encoder's, `[N]`.

    This is L_orig of the paper, |mean - reference_mean|^2 + |variance - reference_variance|^2, averaged over the
    elements of the moments `[N,C,h,w]`.

    Args:
        mean: of the posterior.
        variance: of the posterior.
        reference_mean: of the original encoder's posterior.
        reference_variance: of the original encoder's posterior.
        scale: multiplies the latents, and its square the variances: 1 for raw latents, `LatentScale.factor_for` (a
            number or a tensor that suits them) for the denoiser's latents.
    """
    mean_error = (scale * (mean - reference_mean)).square()
    variance_error = (scale**2 * (variance - reference_variance)).square()
    return mean_error.flatten(1).mean(dim=1) + variance_error.flatten(1).mean(dim=1)
