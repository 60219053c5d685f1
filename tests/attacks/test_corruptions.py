from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.color import hsv2rgb, rgb2hsv
from skimage.filters import gaussian
from torch import Tensor

from miniature.scenes import draw_scene
from srl_utils.attacks.corruptions import (
    CORRUPTIONS,
    Corruption,
    brightness,
    contrast,
    gaussian_blur,
    gaussian_noise,
    jpeg,
    pixelate,
    resize,
    salt_and_pepper,
    severity_of,
    speckle_noise,
    webp,
)
from srl_utils.images.pixels import from_pil

SIGMA = 8 / 255
# Transcribed from ImageNet-C's make_imagenet_c.py; WebP has JPEG's qualities and resize the scales of pixelate.
PUBLISHED = {
    "gaussian-noise": (gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "salt-and-pepper": (salt_and_pepper, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "gaussian-blur": (gaussian_blur, (1, 2, 3, 4, 6)),
    "jpeg": (jpeg, (25, 18, 15, 10, 7)),
    "webp": (webp, (25, 18, 15, 10, 7)),
    "resize": (resize, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "speckle-noise": (speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6)),
    "pixelate": (pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
}
EVERY = pytest.mark.parametrize("corruption", CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
SEVERITIES = range(1, 6)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Three scenes `[3,3,48,64]`, wider than high so that a mix-up of the sides shows."""
    return torch.stack([from_pil(draw_scene(77, i).image) for i in range(3)])[:, :, :48]


def to_array(image: Tensor) -> np.ndarray:
    """`[3,H,W]` in [-1,1] as `[H,W,3]` bytes."""
    return np.rint((image.numpy().transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)


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


@pytest.mark.parametrize("function", [gaussian_noise, salt_and_pepper])
@pytest.mark.parametrize("seeds", [(), (0,), (0, 1, 2)])
def test_noise_needs_a_generator_per_image(function, seeds, images, generators) -> None:
    """Oracle: specification; one generator for two images would give both the same noise."""
    with pytest.raises(ValueError, match="one generator per image"):
        function(images(2), 0.1, generators=generators(*seeds))


@pytest.mark.parametrize("share", [0.03, 0.27, 1.0])
def test_salt_and_pepper_hit_the_asked_share(share, images, generators) -> None:
    """Oracle: closed form, within four standard errors: a share of the values changes, half of it to -1 and half to 1,
    the rest not at all; channels are hit independently, all three of a pixel with a chance of share^3."""
    clean = images(2, 64, limit=0.9)
    noisy = salt_and_pepper(clean, share, generators=generators(0, 1))
    changed = noisy != clean
    count = changed.numel()

    def near(part: Tensor, expected: float, number: int) -> bool:
        return abs(part.float().mean().item() - expected) <= 4 * (expected * (1 - expected) / number) ** 0.5

    assert torch.equal(changed, noisy.abs() == 1)
    assert near(changed, share, count)
    assert near(noisy == 1, share / 2, count) and near(noisy == -1, share / 2, count)
    assert near(changed.all(dim=1), share**3, count // 3)


def test_no_salt_and_pepper_is_the_identity(images, generators) -> None:
    """Oracle: closed form, a share of 0."""
    assert torch.equal(salt_and_pepper(images(2), 0.0, generators=generators(0, 1)), images(2))


@pytest.mark.parametrize("sigma", [0.5, 1, 2, 3, 4, 6])
def test_blur_is_that_of_skimage(sigma, pictures) -> None:
    """Oracle: `skimage.filters.gaussian`, which ImageNet-C uses, for images narrower than the kernel too.

    Float32 sums of up to 49 terms, twice.
    """
    for size in [(48, 64), (16, 9)]:
        clean = pictures[:, :, : size[0], : size[1]]
        expected = [gaussian(image, sigma=sigma, mode="nearest", channel_axis=0) for image in clean.numpy()]
        torch.testing.assert_close(gaussian_blur(clean, sigma), torch.tensor(np.stack(expected)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("function", "file_format"), [(jpeg, "JPEG"), (webp, "WEBP")])
@pytest.mark.parametrize("quality", [7, 25, 90])
def test_files_are_those_of_pillow(function, file_format, quality, pictures) -> None:
    """Oracle: Pillow on the images' bytes, which NumPy rounds; exact."""
    for image, found in zip(pictures, function(pictures, quality), strict=True):
        file = io.BytesIO()
        Image.fromarray(to_array(image)).save(file, file_format, quality=quality)
        assert np.array_equal(to_array(found), np.asarray(Image.open(file)))


@pytest.mark.parametrize("scale", [1.0, 0.6, 0.5, 0.3, 0.01])
def test_resize_is_that_of_pillow(scale, pictures) -> None:
    """Oracle: Pillow's bilinear filter on float planes, sides rounded down to at least one pixel."""
    height, width = pictures.shape[2:]
    small = (max(int(width * scale), 1), max(int(height * scale), 1))
    planes = [
        Image.fromarray(plane)
        .resize(small, Image.Resampling.BILINEAR)
        .resize((width, height), Image.Resampling.BILINEAR)
        for plane in pictures.flatten(0, 1).numpy()
    ]
    expected = torch.tensor(np.stack([np.asarray(plane) for plane in planes])).view_as(pictures)
    torch.testing.assert_close(resize(pictures, scale), expected, rtol=0, atol=1e-5)


def test_pixelate_is_that_of_pillow(pictures) -> None:
    """Oracle: Pillow as ImageNet-C calls it, on 8-bit images."""
    for picture, found in zip(pictures, pixelate(pictures, 0.3), strict=True):
        image = Image.fromarray(to_array(picture))
        small = image.resize((int(64 * 0.3), int(48 * 0.3)), Image.Resampling.BOX)
        assert np.array_equal(to_array(found), small.resize((64, 48), Image.Resampling.BOX))


@pytest.mark.parametrize("added", [0.1, 0.5])
def test_brightness_is_that_of_skimage(added, pictures) -> None:
    """Oracle: scikit-image's HSV, as ImageNet-C calls it; with black, grey and white pixels."""
    pictures = pictures.clone()
    for column, value in enumerate((-1.0, 0.2, 1.0)):
        pictures[..., column] = value
    for picture, found in zip(pictures, brightness(pictures, added), strict=True):
        hsv = rgb2hsv((picture.numpy().transpose(1, 2, 0).astype(np.float64) + 1) / 2)
        hsv[..., 2] = np.clip(hsv[..., 2] + added, 0, 1)
        np.testing.assert_allclose((found.numpy().transpose(1, 2, 0) + 1) / 2, hsv2rgb(hsv), atol=1e-5)


def test_contrast_keeps_the_mean_and_scales_the_deviation(pictures) -> None:
    """Oracle: closed form, for each channel; nothing is clipped by a factor below 1."""
    found = contrast(pictures, 0.3)
    torch.testing.assert_close(found.mean((2, 3)), pictures.mean((2, 3)), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.std((2, 3)), 0.3 * pictures.std((2, 3)), rtol=1e-4, atol=1e-5)


def test_speckle_grows_with_the_value(generators) -> None:
    """Oracle: closed form; at a value of 0.5 in [0,1], the deviation is half of sigma, and in [-1,1] sigma. Black stays."""
    noise = speckle_noise(torch.zeros(1, 3, 128, 128), 0.1, generators=generators(0))
    assert noise.std().item() == pytest.approx(0.1, abs=4 * 0.1 / (2 * noise.numel()) ** 0.5)
    black = -torch.ones(1, 3, 8, 8)
    assert torch.equal(speckle_noise(black, 0.6, generators=generators(0)), black)


def test_names_tell_corruption_and_severity() -> None:
    """Oracle: specification."""
    assert severity_of("gaussian-blur-5") == ("gaussian-blur", 5)
    assert [severity_of(name) for name in ("jpeg", "jpeg-6", "pgd-3", "clean", "gaussian-noise")] == [None] * 5


def test_severities_are_the_published_ones(pictures, generators) -> None:
    """Oracle: the table above, transcribed from ImageNet-C; exact."""
    assert CORRUPTIONS.keys() == PUBLISHED.keys()
    for name, (function, strengths) in PUBLISHED.items():
        for severity, strength in zip(SEVERITIES, strengths, strict=True):
            given = {"generators": generators(0, 1, 2)} if CORRUPTIONS[name].draws else {}
            expected = function(pictures, strength, **given)
            assert torch.equal(CORRUPTIONS[name].apply(pictures, severity, generators(0, 1, 2)), expected)


@EVERY
def test_corrupted_images_are_images(corruption: Corruption, images, generators) -> None:
    """Oracle: specification, shape, dtype and range stay, also for noise and for black and white; the input too."""
    for clean in [images(2, 32), images(2, 32).sign(), torch.ones(2, 3, 20, 31), images(2, 32).double()]:
        before = clean.clone()
        for severity in SEVERITIES:
            corrupted = corruption.apply(clean, severity, generators(0, 1))
            assert corrupted.shape == clean.shape and corrupted.dtype == clean.dtype
            assert corrupted.min() >= -1 and corrupted.max() <= 1
        assert torch.equal(clean, before)


@EVERY
def test_error_grows_with_severity(corruption: Corruption, pictures, generators) -> None:
    """Oracle: monotony of the mean squared error over three scenes, and it is an error from the start.

    Their sides are no multiples of any block of `pixelate`, whose error is smaller where blocks are whole pixels.
    """
    pictures = pictures[:, :, :47, :61]
    errors = [
        (corruption.apply(pictures, severity, generators(0, 1, 2)) - pictures).square().mean().item()
        for severity in SEVERITIES
    ]
    assert errors == sorted(errors) and len(set(errors)) == 5 and errors[0] > 0


@EVERY
def test_batch_equals_concatenated_singles(corruption: Corruption, pictures, generators) -> None:
    """Oracle: invariance: within one rounding, for filters may sum in another order in a batch."""
    batch = corruption.apply(pictures, 3, generators(5, 6, 7))
    singles = [corruption.apply(pictures[i : i + 1], 3, generators(5 + i)) for i in range(3)]
    torch.testing.assert_close(batch, torch.cat(singles), rtol=0, atol=2e-6)


@EVERY
def test_generators_matter_to_random_corruptions_alone(corruption: Corruption, pictures, generators) -> None:
    """Oracle: specification, `draws` says which those are; without generators they draw from PyTorch's global one."""
    first, other = (corruption.apply(pictures[:1], 1, generators(seed)) for seed in (0, 1))
    assert torch.equal(first, other) != corruption.draws
    torch.manual_seed(0)
    assert torch.equal(corruption.apply(pictures[:1], 1), first)


@pytest.mark.parametrize("severity", [0, 6, -1, 1.5])
@EVERY
def test_other_severities_are_refused(corruption: Corruption, severity, pictures, generators) -> None:
    """Oracle: specification; -1 and 0 would be read from the list's end."""
    with pytest.raises(ValueError, match="severity must be 1 to 5, got"):
        corruption.apply(pictures, severity, generators(0, 1, 2))
