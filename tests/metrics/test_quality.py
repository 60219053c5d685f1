from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from skimage.metrics import structural_similarity

from srl_utils.images.pixels import to_unit_range
from srl_utils.metrics.pixels import bootstrap_interval, latent_drift, psnr, ssim

SAMPLE = np.random.default_rng(7).gamma(2.0, size=100)


@pytest.mark.parametrize("offset", [0.02, -0.2, 0.5])
def test_psnr_of_a_constant_offset(offset, images) -> None:
    """Oracle: closed form, an offset d in [-1,1] is d/2 in [0,1]: -20 log10(|d|/2) dB; float32 leaves 1e-3 dB."""
    clean = images(3, limit=0.4)
    expected = -20 * math.log10(abs(offset) / 2)
    assert psnr(clean + offset, clean).tolist() == pytest.approx([expected] * 3, abs=1e-3)


def test_psnr_is_per_image() -> None:
    """Oracle: closed form, image i is off by 2 / 10^i in [-1,1]: 20 i dB (float32)."""
    offsets = 2 / 10 ** torch.arange(1.0, 4.0)
    clean = torch.zeros(3, 3, 8, 8)
    assert psnr(clean + offsets[:, None, None, None], clean).tolist() == pytest.approx([20, 40, 60], abs=1e-3)


def test_ssim_equals_skimage(images) -> None:
    """Oracle: skimage in float64 with the settings of Wang et al. 2004.

    Variances are differences of float32 moments of order 1 (1e-7 each) over a constant of 9e-4: a few 1e-4.
    Averaging over the padded border as well, where the window leaves the image, would differ by 5e-3.
    """
    size = 32
    ramp = torch.linspace(-1, 1, size).expand(2, 3, size, size)
    cases = [
        (images(2, size), images(2, size, seed=1)),
        (ramp, (ramp + 0.2 * images(2, size)).clamp(-1, 1)),
        (ramp, -ramp),
        (ramp, ramp),
    ]
    for first, second in cases:
        expected = [
            structural_similarity(
                *(to_unit_range(image).double().numpy() for image in pair),
                channel_axis=0, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
            )
            for pair in zip(first, second, strict=True)
        ]  # fmt: skip
        assert ssim(first, second).tolist() == pytest.approx(expected, abs=5e-4)


def test_ssim_keeps_the_batch_axis_of_one_image(images) -> None:
    """Oracle: closed form, [N] for N = 1 too, and 1 for an image and itself (float32)."""
    value = ssim(images(1), images(1))
    assert value.shape == (1,)
    assert value.item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_values_beyond_the_range_count_as_its_border(metric, images) -> None:
    """Oracle: invariance, a picture cannot show more than white: the metric is that of the clipped images, exactly."""
    wild, clean = images(2, limit=2.0), images(2, seed=1)
    assert torch.equal(metric(wild, clean), metric(wild.clamp(-1, 1), clean))
    assert torch.equal(metric(clean, wild), metric(clean, wild.clamp(-1, 1)))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_metrics_take_half_precision(metric, images) -> None:
    """Oracle: the same values in float32, exactly; the metric itself is never computed in half precision."""
    first, second = images(2).half().requires_grad_(True), images(2, seed=1).half()
    value = metric(first, second)
    assert value.dtype == torch.float32 and not value.requires_grad
    assert torch.equal(value, metric(first.float(), second.float()))


@pytest.mark.parametrize("factor", [1.0, 1.5, 0.0, -1.0])
def test_drift_of_scaled_latents(factor, images) -> None:
    """Oracle: closed form, |c z - z|^2 / |z|^2 = (c - 1)^2, whatever the scale of z; float32 rounding."""
    reference = images(2) * torch.tensor([1.0, 100.0])[:, None, None, None]
    drift = latent_drift(factor * reference, reference)
    assert drift.tolist() == pytest.approx([(factor - 1) ** 2] * 2, rel=1e-5, abs=0)


def test_interval_contains_the_mean_and_is_reproducible() -> None:
    """Oracle: specification; the seed is the only source of chance."""
    low, high = bootstrap_interval(SAMPLE.tolist())
    assert low < SAMPLE.mean() < high
    assert (low, high) == bootstrap_interval(SAMPLE.tolist())
    assert (low, high) != bootstrap_interval(SAMPLE.tolist(), seed=1)


def test_interval_shrinks_with_the_root_of_n() -> None:
    """Oracle: closed form, 16 copies of a sample halve the width twice.

    Each end is a quantile of 2000 resamples, known to about 4% of the half width: 15% for the ratio.
    """
    low, high = bootstrap_interval(SAMPLE.tolist())
    many_low, many_high = bootstrap_interval(SAMPLE.tolist() * 16)
    assert (high - low) / (many_high - many_low) == pytest.approx(4, rel=0.15)


def test_interval_equals_that_of_scipy() -> None:
    """Oracle: scipy's percentile bootstrap; both are seeded.

    A 2.5% quantile of 2000 resamples has a standard error of 1.5% of the width; three of them are allowed.
    """
    expected = scipy.stats.bootstrap(
        (SAMPLE,), np.mean, confidence_level=0.95, method="percentile", n_resamples=10_000, rng=0
    ).confidence_interval
    width = expected.high - expected.low
    low, high = bootstrap_interval(SAMPLE.tolist())
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.045 * width)
    # And the width that theory gives a mean: 2 * 1.96 standard errors.
    assert width == pytest.approx(2 * 1.96 * SAMPLE.std() / 10, rel=0.1)


@pytest.mark.parametrize("values", [[0.3], [0.3] * 5])
def test_interval_of_equal_values_is_that_value(values) -> None:
    """Oracle: closed form, nothing varies; a mean of equal numbers rounds in the last bit."""
    assert bootstrap_interval(values) == pytest.approx((0.3, 0.3), abs=1e-15)
