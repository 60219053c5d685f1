from __future__ import annotations

import pytest
import torch

from srl_utils.attacks.corruptions import gaussian_noise

SIGMA = 8 / 255


def test_noise_has_the_asked_deviation(generators) -> None:
    """Oracle: closed form, on mid-gray nothing is clipped (16 sigma away) and the deviation is 2 sigma in [-1,1]."""
    clean = torch.zeros(4, 3, 64, 64)
    noise = gaussian_noise(clean, SIGMA, generators=generators(0, 1, 2, 3))
    count = noise.numel()
    # Four standard errors: sigma / sqrt(2n) of a deviation, sigma / sqrt(n) of a mean.
    assert noise.std().item() == pytest.approx(2 * SIGMA, abs=4 * 2 * SIGMA / (2 * count) ** 0.5)
    assert noise.mean().item() == pytest.approx(0, abs=4 * 2 * SIGMA / count**0.5)


def test_noise_is_clipped_to_the_range(generators) -> None:
    """Oracle: closed form, on white half of the noise is clipped: those pixels stay exactly 1, the others lie below."""
    noisy = gaussian_noise(torch.ones(1, 3, 64, 64), SIGMA, generators=generators(0))
    share = (noisy == 1).float().mean().item()
    assert noisy.max() == 1
    # Four standard errors of a share of 1/2 among 12288 pixels.
    assert share == pytest.approx(0.5, abs=4 * 0.5 / noisy.numel() ** 0.5)


def test_noise_of_an_image_depends_on_its_generator_alone(images, generators) -> None:
    """Oracle: invariance, the batch equals the concatenated singles, exactly; other generators give other noise."""
    clean = images(3)
    batch = gaussian_noise(clean, SIGMA, generators=generators(5, 6, 7))
    singles = [gaussian_noise(clean[i : i + 1], SIGMA, generators=generators(5 + i)) for i in range(3)]
    assert torch.equal(batch, torch.cat(singles))
    assert not torch.equal(batch[:1], gaussian_noise(clean[:1], SIGMA, generators=generators(6)))


def test_no_noise_is_the_identity(images, generators) -> None:
    """Oracle: closed form, deviation 0."""
    assert torch.equal(gaussian_noise(images(2), 0.0, generators=generators(0, 1)), images(2))
