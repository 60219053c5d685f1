from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from test_protections import fixed_latents
from torch import Tensor

from miniature.scenes import draw_scene
from srl_utils.attacks.draws import draw_normal
from srl_utils.attacks.gradient import Budget
from srl_utils.attacks.protections import PROTECTIONS, BlurGuardConfig, ProtectedBatch, Victim, protect
from srl_utils.attacks.protections.blurring import blurred, blurred_attack, fitted_sigma, ring_spectrum
from srl_utils.images.pixels import from_pil

LEVELS = Budget(epsilon=16 / 255)


def whole_kernel(side: int, sigma: Tensor) -> Tensor:
    """The Gaussian in two dimensions, `[side,side]` with an odd side, summing to 1."""
    squares = torch.arange(-(side // 2), side // 2 + 1).square()
    kernel = torch.exp(-(squares[:, None] + squares) / (2 * sigma**2))
    return kernel / kernel.sum()


def as_released(changes: Tensor, sigma: Tensor) -> Tensor:
    """One image blurred as the release does it: a square kernel of 33 pixels on mirrored borders."""
    mirrored = torch.nn.ReflectionPad2d(16)(changes)
    return torch.nn.functional.conv2d(mirrored, whole_kernel(33, sigma).expand(3, 1, -1, -1), groups=3)


@pytest.mark.parametrize(("height", "width"), [(40, 24), (9, 12)])
def test_blur_is_scipys(height, width) -> None:
    """Oracle: scipy with mirrored borders, a sigma for each image, up to 16 pixels and no further than the image's sides."""
    changes, sigmas = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1)), [0.7, 4.0]
    expected = changes.numpy()
    for axis, side in ((2, height), (3, width)):
        rows = [
            gaussian_filter(image, sigma, mode="mirror", radius=min(16, side - 1), axes=axis - 1)
            for image, sigma in zip(expected, sigmas, strict=True)
        ]
        expected = np.stack(rows)
    result = blurred(changes, torch.tensor(sigmas))
    torch.testing.assert_close(result, torch.from_numpy(expected), rtol=0, atol=1e-6)
    clips = blurred(torch.stack([changes, 2 * changes], dim=2), torch.tensor(sigmas))
    torch.testing.assert_close(clips, torch.stack([result, 2 * result], dim=2))


def test_rings_surround_the_middle_of_the_transform(images) -> None:
    """Oracle: numpy, ring by ring; together they hold all of the power, which Parseval's theorem gives."""
    pixels = images(2, 12)
    power = (np.abs(np.fft.fft2(pixels.double().numpy() / 2 + 0.5)) ** 2).sum(axis=1)
    down, across = np.indices((12, 12)) - 5.5
    rings = np.round(np.hypot(down, across))
    expected = np.stack([power[:, rings == ring].sum(axis=1) for ring in range(9)], axis=1)
    spectrum = ring_spectrum(pixels)
    torch.testing.assert_close(spectrum.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
    total = 144 * (pixels / 2 + 0.5).square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(spectrum.sum(dim=1), total, rtol=1e-5, atol=0)


def test_blur_is_fitted_by_adam_to_the_spectrum(images, generators) -> None:
    """Oracle: the release's loop by hand for one image in a batch of two: 50 steps of Adam at 0.06 on log sigma, for the
    largest difference of the spectra's decimal logarithms, with clipped normal noise, weighted by 10."""
    clean, drawn = images(2, 24), generators(7)
    log_sigma, radius = torch.zeros((), requires_grad=True), 2 * 16 / 255
    optimizer = torch.optim.Adam([log_sigma], lr=0.06)
    for _ in range(50):
        noise = draw_normal(drawn, like=clean[1:]).clamp(-radius, radius)
        change = as_released(noise, log_sigma.exp()).clamp(-radius, radius)
        noised = (clean[1:] + change).clamp(-1, 1)
        gap = (ring_spectrum(clean[1:]).log10() - ring_spectrum(noised).log10()).abs().max()
        optimizer.zero_grad()
        (10 * gap).backward()
        optimizer.step()
    fitted = fitted_sigma(clean, LEVELS, generators(3, 7))
    assert fitted.shape == (2,) and not fitted.requires_grad
    torch.testing.assert_close(fitted[1], log_sigma.detach().exp(), rtol=1e-3, atol=0)
    assert abs(fitted[1] - 1) > 0.1


def test_fitted_blur_hides_noise_in_the_spectrum(generators) -> None:
    """Oracle: specification; with other noise than it was fitted to, the gap of drawn scenes is less than half of what the
    first blur, by 1 pixel, leaves."""
    clean = torch.stack([from_pil(draw_scene(5, index).image) for index in range(2)])
    noise = draw_normal(generators(8, 9), like=clean).clamp(-LEVELS.radius, LEVELS.radius)

    def gap(sigma: Tensor) -> Tensor:
        noised = LEVELS.project(clean + blurred(noise, sigma), clean)
        return (ring_spectrum(noised) / ring_spectrum(clean)).log10().abs().amax(dim=1)

    assert (gap(fitted_sigma(clean, LEVELS, generators(1, 2))) < 0.5 * gap(torch.ones(2))).all()


def test_steps_are_those_of_the_release(images, generators) -> None:
    """Oracle: the release's loop by hand for the mean square of latents three times the image: gradients of length 1
    through the blur and both clips, times 2 (1 - 0.99 i / 52) for i = 50 and 51 of 52 steps, downwards."""
    clean, radius = images(1, 24), 2 * 16 / 255
    victim = Victim(encode=fixed_latents(3.0, 0.0), decode=torch.nn.Identity(), scale=torch.nn.Identity())
    sigma, change = fitted_sigma(clean, LEVELS, generators(4))[0], torch.zeros_like(clean)

    def shown(change: Tensor) -> Tensor:
        return (clean + as_released(change, sigma).clamp(-radius, radius)).clamp(-1, 1)

    for number in (50, 51):
        change.requires_grad_(True)
        (gradient,) = torch.autograd.grad((3 * shown(change)).square().mean(), change)
        change = (change - 2 * (1 - 0.99 * number / 52) * gradient / gradient.norm()).detach()
    protected = protect(PROTECTIONS["blurguard"], victim, clean, generators=generators(4), num_steps=2)
    torch.testing.assert_close(protected, shown(change), rtol=0, atol=1e-5)


@pytest.mark.parametrize("epsilon", [None, 3 / 255])
def test_budget_is_kept_and_the_change_smooth(epsilon, images, generators) -> None:
    """Oracle: specification, the authors' budget or the one given, and [-1,1]; PhotoGuard's change of the same size has
    larger steps from pixel to pixel."""
    victim = Victim(encode=fixed_latents(3.0, 0.0), decode=torch.nn.Identity(), scale=torch.nn.Identity())
    clean, radius = images(2, 24), 2 * (epsilon or 16 / 255)
    changes = []
    for name in ("blurguard", "photoguard-encoder"):
        arguments = {"generators": generators(1, 2), "num_steps": 20, "epsilon": radius / 2}
        protected = protect(PROTECTIONS[name], victim, clean, **arguments)
        assert protected.min() >= -1 and protected.max() <= 1 and not protected.requires_grad
        changes.append(protected - clean)
        assert (changes[-1].abs().amax(dim=(1, 2, 3)) <= radius + 1.2e-7).all()
    slopes = [change.diff().square().mean() / change.square().mean() for change in changes]
    assert slopes[0] < 0.5 * slopes[1]
    assert PROTECTIONS["blurguard"].scalable and PROTECTIONS["blurguard"].pulls_latents


@pytest.mark.parametrize("name", ["editshield", "posterior-collapse-plus", "mist-textural"])
def test_other_protections_take_its_configuration(name, images, generators) -> None:
    """Oracle: `blurred_attack` itself on the protection's own loss; exact."""
    victim = Victim(encode=fixed_latents(3.0, 0.1), decode=torch.nn.Identity(), scale=torch.nn.Identity())
    clean, config = images(1, 24), BlurGuardConfig(num_steps=2)
    protection = PROTECTIONS[name]
    protected = protect(replace(protection, config=config), victim, clean, generators=generators(1))
    batch_of = {"victim": victim, "clean": clean, "generators": generators(1)}
    target = None if protection.default_target is None else protection.default_target(24, 24)
    loss = protection.loss(ProtectedBatch(target=target, **batch_of))
    sign = -1 if protection.minimise else 1
    expected = blurred_attack(lambda pixels: sign * loss(pixels), clean, config, generators=batch_of["generators"])
    assert torch.equal(protected, expected)
    assert not torch.equal(protected, clean)


@pytest.mark.parametrize("change", [{"num_steps": -1}, {"epsilon": -0.1}])
def test_settings_are_checked(change) -> None:
    """Oracle: specification; a ValueError that names the setting."""
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be at least 0"):
        BlurGuardConfig(**change)
