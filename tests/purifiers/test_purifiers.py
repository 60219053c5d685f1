"""Purifiers: what each does to an image, chains, names, and what an attacker can differentiate."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from helpers.runs import build_tiny_vae, draw_images
from PIL import Image
from torch import Tensor, nn

from srl_utils.attacks.draws import image_generators
from srl_utils.errors import UserError
from srl_utils.images.pixels import from_pil, to_pil
from srl_utils.metrics.losses import FeatureDistance
from srl_utils.metrics.pixels import psnr
from srl_utils.purifiers import PurifierResources, known_purifiers, purifier_of
from srl_utils.purifiers.autoencoding import ImpressConfig, consistent
from srl_utils.purifiers.filters import bilateral, clean_adversely, guided
from srl_utils.vae.codec import Codec

IMAGES = draw_images(3, 24)


class Pixels(nn.Module):
    """Features that are the pixels themselves."""

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images]


FEATURES = FeatureDistance(Pixels(), "pixels")


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.of(build_tiny_vae().eval().requires_grad_(False), "original")


@pytest.fixture
def resources(codec: Codec) -> PurifierResources:
    robust = Codec.of(build_tiny_vae(seed=1).eval().requires_grad_(False), "robust")
    return PurifierResources(vaes={"original": codec, "robust": robust}, perceptual=FEATURES)


def test_a_jpeg_is_that_of_pillow() -> None:
    """Oracle: Pillow."""
    file = io.BytesIO()
    to_pil(IMAGES[0]).save(file, "JPEG", quality=75)
    torch.testing.assert_close(purifier_of("jpeg-75")(IMAGES)[0], from_pil(Image.open(file)))


def test_chains_apply_the_first_name_first() -> None:
    """Oracle: the two purifiers one after the other; the other order gives another image."""
    small, file = purifier_of("resize-0.5"), purifier_of("jpeg-30")
    chained = purifier_of("resize-0.5 + jpeg-30")
    assert chained.name == "resize-0.5+jpeg-30"
    assert torch.equal(chained(IMAGES), file(small(IMAGES)))
    assert not torch.equal(chained(IMAGES), purifier_of("jpeg-30+resize-0.5")(IMAGES))


@pytest.mark.parametrize("name", ["jpeg-75", "webp-75", "resize-0.5", "noise-0.05", "adverse-cleaner", "vae-loop"])
def test_an_image_does_not_depend_on_its_batch(name: str, resources: PurifierResources) -> None:
    """Oracle: invariance: each image alone; the range; and that something was changed."""
    purifier = purifier_of(name, resources)
    together = purifier(IMAGES, image_generators(0, range(3)))
    alone = torch.cat([purifier(IMAGES[i : i + 1], image_generators(0, [i])) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert together.abs().max() <= 1 and not torch.equal(together, IMAGES)


@pytest.mark.parametrize("name", ["jpeg-75", "webp-75", "resize-0.5", "noise-0.05", "adverse-cleaner", "vae-loop"])
def test_gradients_pass(name: str, resources: PurifierResources) -> None:
    """Oracle: specification: what claims to be differentiable moves every image; a file passes gradients unchanged."""
    purifier, images = purifier_of(name, resources), (0.9 * IMAGES).requires_grad_()
    weights = torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((purifier(images, image_generators(0, range(3))) * weights).sum(), images)
    assert purifier.differentiable and gradient.flatten(1).norm(dim=1).min() > 0
    if name in ("jpeg-75", "webp-75"):
        inside = purifier(images.detach()).abs() < 1
        assert torch.equal(gradient[inside], weights[inside])


def test_noise_has_its_deviation() -> None:
    """Oracle: closed form, of grey images: 0.1 of a [0,1] image is 0.2 here; two draws differ."""
    grey = torch.zeros(2, 3, 64, 64)
    noisy = purifier_of("noise-0.1")(grey, image_generators(0, range(2)))
    assert noisy.std().item() == pytest.approx(0.2, rel=0.02)
    assert not torch.equal(noisy[0], noisy[1])


def windows(image: np.ndarray, radius: int, mode: str) -> np.ndarray:
    """Every pixel's square window: `[H,W,size,size,C]`."""
    padded = np.pad(image, [(radius, radius)] * 2 + [(0, 0)], mode=mode)
    side = 2 * radius + 1
    return np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(0, 1)).transpose(0, 1, 3, 4, 2)


def levels(image: Tensor) -> np.ndarray:
    return ((image.double() + 1) * 127.5).permute(1, 2, 0).numpy()


def test_the_bilateral_filter_is_its_definition() -> None:
    """Oracle: the definition (Tomasi and Manduchi, ICCV 1998), pixel by pixel in NumPy."""
    image, sigma, radius = levels(IMAGES[0]), 8.0, 2
    around = windows(image, radius, "reflect")
    rows, columns = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    square = rows**2 + columns**2
    colours = np.abs(around - image[:, :, None, None]).sum(axis=-1)
    weights = np.exp(-(square + colours**2) / (2 * sigma**2)) * (square <= radius**2)
    expected = (weights[..., None] * around).sum(axis=(2, 3)) / weights.sum(axis=(2, 3))[..., None]
    shown = torch.from_numpy(image).permute(2, 0, 1)[None]
    found = bilateral(shown, reach=radius, colour_sigma=sigma, space_sigma=sigma)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_the_guided_filter_is_a_ridge_regression() -> None:
    """Oracle: NumPy's least squares in each window, and the mean of the windows' predictions for each pixel."""
    guide, image, radius, epsilon = levels(IMAGES[0]), levels(IMAGES[1])[..., :1], 2, 16.0
    count = (2 * radius + 1) ** 2
    around, wanted = windows(guide, radius, "symmetric"), windows(image, radius, "symmetric")
    coefficients = np.empty((*guide.shape[:2], 4))
    for place in np.ndindex(*guide.shape[:2]):
        inputs, outputs = around[place].reshape(count, 3), wanted[place].reshape(count)
        centred = np.vstack([inputs - inputs.mean(axis=0), np.sqrt(count * epsilon) * np.eye(3)])
        slopes = np.linalg.lstsq(centred, np.append(outputs - outputs.mean(), np.zeros(3)), rcond=None)[0]
        coefficients[place] = [*slopes, outputs.mean() - slopes @ inputs.mean(axis=0)]
    averaged = windows(coefficients, radius, "symmetric").mean(axis=(2, 3))
    expected = (averaged[..., :3] * guide).sum(axis=-1) + averaged[..., 3]
    given = [torch.from_numpy(each).permute(2, 0, 1)[None] for each in (guide, image)]
    np.testing.assert_allclose(guided(*given, radius=radius, epsilon=epsilon)[0, 0].numpy(), expected, atol=1e-6)


def test_adverse_cleaner_removes_noise_and_keeps_edges() -> None:
    """Oracle: an image of two halves: it comes nearer to it, the edge stays, and a clean one is nearly unchanged."""
    clean = torch.full((1, 3, 32, 32), -0.5)
    clean[..., 16:] = 0.5
    noisy = clean + 8 / 127.5 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).sign()
    cleaned = clean_adversely(noisy)
    assert psnr(cleaned, clean).item() > psnr(noisy, clean).item() + 6
    assert (cleaned[..., 16] - cleaned[..., 15]).min() > 0.8
    torch.testing.assert_close(clean_adversely(clean), clean, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ["jpeg-75", "webp-75", "resize-0.5", "noise-0.05", "adverse-cleaner"])
def test_the_smallest_images(name: str) -> None:
    """Oracle: specification: no image is too small; a grey one stays nearly grey."""
    for height, width in ((1, 1), (3, 40)):
        purified = purifier_of(name)(torch.full((1, 3, height, width), 0.2), image_generators(0, [0]))
        assert purified.shape == (1, 3, height, width) and (purified - 0.2).abs().max() < 0.5


def test_impress_finds_a_consistent_image_nearby(codec: Codec) -> None:
    """Oracle: what it minimises: the image is reconstructed better than before, and looks nearly like the given one."""
    config = ImpressConfig(num_steps=60, learning_rate=0.02, weight=1.0, noise=0.05)
    found = consistent(IMAGES, image_generators(0, range(3)), codec, FEATURES, config)
    error = ((codec.reconstruct(each) - each).square().mean().item() for each in (found, IMAGES))
    assert next(error) < 0.5 * next(error)
    near = FEATURES.distance(found, FEATURES.features(IMAGES))
    unbound = consistent(
        IMAGES, image_generators(0, range(3)), codec, FEATURES, ImpressConfig(**{**vars(config), "weight": 0.0})
    )
    assert (near < FEATURES.distance(unbound, FEATURES.features(IMAGES))).all()


def test_impress_does_not_depend_on_the_batch(codec: Codec) -> None:
    """Oracle: invariance: an image alone; Adam turns the rounding of tiny gradients into up to a step's length."""
    config = ImpressConfig(num_steps=5, learning_rate=0.02, weight=1.0, noise=0.05)
    together = consistent(IMAGES, image_generators(0, range(3)), codec, FEATURES, config)
    alone = consistent(IMAGES[1:2], image_generators(0, [1]), codec, FEATURES, config)
    assert (together[1:2] - alone).abs().quantile(0.99) < 1e-4


def test_loops_are_named_by_their_vae(resources: PurifierResources) -> None:
    """Oracle: the two VAEs' own reconstructions."""
    for name, vae in (("vae-loop", "original"), ("vae-loop-robust", "robust")):
        expected = resources.vaes[vae].reconstruct(IMAGES).clamp(-1, 1)
        assert torch.equal(purifier_of(name, resources)(IMAGES), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jpg-75", "no purifier 'jpg-75'; choose from jpeg-QUALITY"),
        ("jpeg-200", "jpeg-200: quality must be 1 to 95"),
        ("resize-0", "resize-0: scale must be 0.01 to 1"),
        ("resize-0.5+", "no purifier ''"),
        ("vae-loop-strong", "there is no VAE strong; choose from original, robust"),
    ],
)
def test_wrong_names_are_told(name: str, message: str, resources: PurifierResources) -> None:
    """Oracle: specification: one line that says what to choose."""
    with pytest.raises(UserError, match=message):
        purifier_of(name, resources)


@pytest.mark.parametrize(("name", "lacks"), [("vae-loop", "a VAE"), ("impress", "a VAE")])
def test_what_is_lacking_is_told(name: str, lacks: str) -> None:
    """Oracle: specification."""
    with pytest.raises(UserError, match=f"{name} needs {lacks}"):
        purifier_of(name)
    assert any(known.startswith(name) for known in known_purifiers())
