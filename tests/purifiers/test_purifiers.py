"""Purifiers: what each does to an image, chains, names, and what an attacker can differentiate."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.objectives import pixel_distance
from helpers.runs import build_tiny_vae, draw_images
from PIL import Image
from torch import Tensor

from srl_utils.attacks.draws import image_generators
from srl_utils.errors import UserError
from srl_utils.images.pixels import from_pil, to_pil
from srl_utils.metrics.pixels import psnr
from srl_utils.purifiers import PurifierResources, check_purifier, known_purifiers, purifier_of, uses_noise
from srl_utils.purifiers.autoencoding import IMPRESS, ImpressConfig, consistent
from srl_utils.purifiers.filters import bilateral, clean_adversely, guided
from srl_utils.vae.codec import Codec

IMAGES = draw_images(3, 24)
FEATURES = pixel_distance()


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


def test_impress_has_its_authors_numbers() -> None:
    """Oracle: the authors' code, against PhotoGuard and against Glaze."""
    assert {name: vars(config) for name, config in IMPRESS.items()} == {
        "impress": {"num_steps": 1000, "learning_rate": 0.005, "weight": 0.01, "noise": 0.05, "allowed": 0.1},
        "impress-glaze": {"num_steps": 3000, "learning_rate": 0.01, "weight": 0.1, "noise": 0.1, "allowed": 0.1},
    }


class Darkening:
    """An autoencoder whose reconstruction is 0.9 times the image."""

    device = torch.device("cpu")

    def reconstruct(self, images: Tensor) -> Tensor:
        return 0.9 * images


class SquaredDistance:
    """50 times the mean squared difference: noise of deviation 0.05 moves an image by 0.125, if it is not clipped."""

    name = "squared"

    def features(self, images: Tensor) -> list[Tensor]:
        return [images]

    def distance(self, images: Tensor, target_features: Sequence[Tensor]) -> Tensor:
        return 50 * (images - target_features[0]).square().flatten(1).mean(dim=1)


def plain_impress(given: np.ndarray, start: np.ndarray, steps: int) -> np.ndarray:
    """IMPRESS on one image with the networks above: gradients, Adam and the cosine by hand, with the authors' numbers."""
    found, first, second = start, np.zeros_like(start), np.zeros_like(start)
    for step in range(steps):
        gradient = 2 * (0.9 - 1) ** 2 * found / found.size
        if 50 * np.mean((found - given) ** 2) > 0.1:
            gradient = gradient + 0.01 * 50 * 2 * (found - given) / found.size
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        rate = 0.005 * (1 + np.cos(np.pi * step / steps)) / 2
        moments = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        found = found - rate * moments[0] / (np.sqrt(moments[1]) + 1e-8)
    return found


def test_impress_is_its_formula() -> None:
    """Oracle: NumPy, in float64: one image is beyond the distance that costs nothing until it has moved, one never is."""
    given = torch.cat([torch.full((1, 3, 8, 8), 0.3), torch.full((1, 3, 8, 8), 0.98)])
    noise = torch.stack([torch.randn(3, 8, 8, generator=generator) for generator in image_generators(0, range(2))])
    start = (given + 0.05 * noise).clamp(-1, 1)
    distance = SquaredDistance()
    beyond, within = distance.distance(start, [given])
    assert beyond > 0.11 and within < 0.09
    config = replace(IMPRESS["impress"], num_steps=6)
    found = consistent(given, image_generators(0, range(2)), Darkening(), distance, config)
    assert distance.distance(found, [given])[0] < 0.1
    expected = [
        plain_impress(image.double().numpy(), begun.double().numpy(), 6)
        for image, begun in zip(given, start, strict=True)
    ]
    np.testing.assert_allclose(found.numpy(), np.stack(expected), atol=1e-5)


def test_impress_leaves_no_gradients_in_weights_that_are_not_frozen() -> None:
    """Oracle: specification: only the image is optimised."""
    vae = build_tiny_vae()
    config = replace(IMPRESS["impress"], num_steps=2)
    consistent(IMAGES[:1], None, Codec.of(vae, "own"), FEATURES, config)
    assert all(weight.requires_grad and weight.grad is None for weight in vae.parameters())


@pytest.mark.parametrize("name", ["vae-loop", "impress"])
def test_images_are_moved_to_the_vae_and_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the devices that the VAE is shown, whose own is one without values; the result is where the images were."""
    seen = []

    class Elsewhere:
        device = torch.device("meta")

        def reconstruct(self, images: Tensor) -> Tensor:
            seen.append(images.device)
            return torch.zeros(images.shape)

    monkeypatch.setattr(
        "srl_utils.purifiers.autoencoding.consistent", lambda images, generators, vae, *_: vae.reconstruct(images)
    )
    purifier = purifier_of(name, PurifierResources(vaes={"original": Elsewhere()}, perceptual=FEATURES))
    assert purifier(IMAGES).device == IMAGES.device and seen == [Elsewhere.device]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("vae-loop-srl", ["srl"]),
        ("vae-loop-srl+feature", ["srl+feature"]),
        ("vae-loop-srl+feature+jpeg-75", ["srl+feature", "jpeg-75"]),
        ("jpeg-75 + vae-loop-srl+feature", ["jpeg-75", "srl+feature"]),
        ("vae-loop-srl+vae-loop-srl+feature", ["srl", "srl+feature"]),
        ("vae-loop-srl+jpeg-75", ["srl", "jpeg-75"]),
    ],
)
def test_vaes_may_have_a_plus_in_their_names(name: str, steps: list[str], codec: Codec, resources) -> None:
    """Oracle: the steps one after the other; the name is also accepted before the VAEs are known."""
    check_purifier(name)
    vaes = {"original": codec, "srl": codec, "srl+feature": resources.vaes["robust"]}
    expected = IMAGES
    for step in steps:
        expected = vaes[step].reconstruct(expected).clamp(-1, 1) if step in vaes else purifier_of(step)(expected)
    assert torch.equal(purifier_of(name, PurifierResources(vaes=vaes))(IMAGES), expected)


def test_a_wrong_name_after_a_loop_is_told_once_the_vaes_are_known() -> None:
    """Oracle: specification: `robust+jpg-75` could be a VAE, and is none."""
    check_purifier("vae-loop-robust+jpg-75")
    with pytest.raises(UserError, match="no purifier 'jpg-75'"):
        check_purifier("vae-loop-robust+jpg-75", ["original", "robust"])


@pytest.mark.parametrize("name", ["jpeg-75", "webp-75", "resize-0.5", "noise-0.05", "adverse-cleaner", "vae-loop"])
def test_what_draws_noise_is_known(name: str, resources: PurifierResources) -> None:
    """Oracle: the results with two seeds."""
    purifier = purifier_of(name, resources)
    one, other = (purifier(IMAGES, image_generators(seed, range(3))) for seed in (0, 1))
    assert uses_noise(name) != torch.equal(one, other)
    assert uses_noise(f"jpeg-75+{name}") == uses_noise(name)


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
