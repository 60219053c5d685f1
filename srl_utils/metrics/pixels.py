"""Image metrics, one value per image, and the interval around their mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from srl_utils.images.pixels import to_unit_range

MAX_PSNR = 100.0
"""In dB; identical images would have no finite value, and so their mean with others neither."""
SSIM_WINDOW = 11


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, `[N]`, of `[N,3,H,W]` images in [-1,1] (clipped) and their target.

    At most `MAX_PSNR`.
    """
    ratio = peak_signal_noise_ratio(_unit(images), _unit(target), data_range=1.0, reduction="none", dim=(1, 2, 3))
    return ratio.clamp(max=MAX_PSNR)


def ssim(images: Tensor, target: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, Gaussian window 11, sigma 1.5), `[N]`; arguments as `psnr`.

    Averaged over the windows that lie within the image, as in the paper and in scikit-image; torchmetrics'
    own mean includes windows over a mirrored border.
    """
    _, similarities = structural_similarity_index_measure(
        _unit(images), _unit(target), data_range=1.0, sigma=1.5, reduction="none", return_full_image=True
    )
    border = SSIM_WINDOW // 2
    return similarities[..., border:-border, border:-border].flatten(1).mean(dim=1)


def latent_drift(latents: Tensor, reference_latents: Tensor) -> Tensor:
    """|z - z0|^2 / |z0|^2, `[N]`, of `[N,C,h,w]` latents: how far they left those a diffusion model knows."""
    difference = (latents - reference_latents).square().flatten(1).sum(dim=1)
    return difference / reference_latents.square().flatten(1).sum(dim=1)


def bootstrap_interval(values: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95% percentile-bootstrap interval of the mean of `values`, one value per image."""
    sample = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(sample), size=(resamples, len(sample)))
    low, high = np.quantile(sample[picks].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def _unit(images: Tensor) -> Tensor:
    return to_unit_range(images.detach().to(torch.float32)).clamp(0, 1)
