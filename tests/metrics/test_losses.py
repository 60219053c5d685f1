from __future__ import annotations

from urllib.error import URLError

import lpips
import numpy as np
import pytest
import torch
import torchvision

from srl_utils.attacks.gradient import value_and_gradient
from srl_utils.errors import UserError
from srl_utils.metrics.losses import (
    LPIPS_TRUNKS,
    PerceptualDistance,
    ReconstructionLoss,
    load_perceptual_distance,
    mean_squared_error,
    originality_loss,
)
from srl_utils.vae.networks import LatentEncoder, frozen_copy, split_moments

# The two normalisations differ by about 1e-10 / |features|^2, which is far below float32 for features of order 1
# as a random trunk has them; what is left is the rounding of sums over 512 channels.
LPIPS_TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="module")
def perceptual(random_lpips) -> PerceptualDistance:
    return PerceptualDistance(random_lpips)


def featureless() -> torch.Tensor:
    """An image that LPIPS shifts to 0 everywhere: a trunk without biases answers with 0 in every layer."""
    return lpips.ScalingLayer().shift.expand(1, 3, 32, 32).clone()


def test_lpips_equals_the_package(perceptual, random_lpips, images) -> None:
    """Oracle: the lpips package on the same weights, value and gradient with respect to the first image."""
    ours, theirs = (images(3, 32).requires_grad_(True) for _ in range(2))
    target = images(3, 32, seed=1)
    value = perceptual.distance(ours, perceptual.features(target))
    expected = random_lpips(theirs, target).flatten()
    torch.testing.assert_close(value, expected, **LPIPS_TOLERANCE)
    value.sum().backward()
    expected.sum().backward()
    # A gradient of many cancelling terms, relative to its largest entries.
    scale = theirs.grad.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-3 * scale)


def test_lpips_is_a_distance(perceptual, images) -> None:
    """Oracle: identity (exactly 0), symmetry (float32 rounding) and growth with the perturbation."""
    first, second = images(2, 32), images(2, 32, seed=1)
    assert torch.equal(perceptual.distance(first, perceptual.features(first)), torch.zeros(2))
    there = perceptual.distance(first, perceptual.features(second))
    back = perceptual.distance(second, perceptual.features(first))
    torch.testing.assert_close(there, back, **LPIPS_TOLERANCE)
    nearer = perceptual.distance(first + 0.1 * (second - first), perceptual.features(first))
    assert (nearer > 0).all() and (nearer < there).all()


@pytest.mark.parametrize("case", ["different", "identical", "no features", "no features on both sides"])
def test_gradient_reaches_the_reconstruction_and_is_finite(case, perceptual, images) -> None:
    """Oracle: specification. At all-zero features the package's own normalisation has a NaN gradient."""
    reconstruction = (featureless() if "no features" in case else images(1, 32)).requires_grad_(True)
    same = case in ("identical", "no features on both sides")
    target = reconstruction.detach().clone() if same else images(1, 32, seed=1)
    if "no features" in case:
        assert all((layer == 0).all() for layer in perceptual.features(reconstruction))
    loss = ReconstructionLoss(perceptual, weight=1.0)
    terms = loss.terms(reconstruction, loss.target(target))
    (gradient,) = torch.autograd.grad(terms.lpips.sum(), reconstruction)
    assert gradient.isfinite().all()
    assert (gradient.abs().max() > 0) == (case == "different")
    assert (terms.lpips.item() == 0) == same


def test_frozen_network_gets_no_gradient(perceptual, images) -> None:
    """Oracle: specification; the package leaves its linear layers trainable and its dropout to the caller."""
    reconstruction = images(1, 32).requires_grad_(True)
    perceptual.distance(reconstruction, perceptual.features(images(1, 32, seed=1))).sum().backward()
    parameters = list(perceptual.parameters())
    assert parameters and reconstruction.grad is not None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in parameters)
    assert not any(module.training for module in perceptual.network.modules())


def test_target_features_are_computed_once(perceptual, random_lpips, images) -> None:
    """Oracle: counted forward passes of the trunk (one for the target, one per distance), and the package's values."""
    loss = ReconstructionLoss(perceptual, weight=1.0)
    clean, passes = images(2, 32), []
    hook = random_lpips.net.register_forward_hook(lambda *_: passes.append(1))
    try:
        target = loss.target(clean)
        values = [loss.terms(images(2, 32, seed=seed), target).lpips for seed in (1, 2)]
    finally:
        hook.remove()
    assert len(passes) == 3
    assert not any(layer.requires_grad for layer in target.features)
    for seed, value in zip((1, 2), values, strict=True):
        expected = random_lpips(images(2, 32, seed=seed), clean).flatten()
        torch.testing.assert_close(value, expected, **LPIPS_TOLERANCE)


def test_loss_stays_in_float32_under_autocast(perceptual, images) -> None:
    """Oracle: the same loss without autocast, exactly; the images come in as bfloat16 as a decoder may leave them."""
    loss = ReconstructionLoss(perceptual, weight=0.7)
    reconstruction, clean = images(2, 32).bfloat16(), images(2, 32, seed=1)
    expected = loss(reconstruction, loss.target(clean))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(reconstruction, loss.target(clean))
        lowered = torch.nn.functional.conv2d(clean, torch.ones(1, 3, 1, 1))
    assert lowered.dtype == torch.bfloat16, "autocast is meant to be at work here"
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)


def test_a_twin_in_half_precision_points_the_same_way(perceptual, images) -> None:
    """Oracle: the float32 distance and its gradient, to bfloat16's 8 bits; only the trunk is held in it, and the original
    stays as it was.
    """
    twin = perceptual.in_precision(torch.bfloat16)
    features = perceptual.features(images(2, 32, seed=1))
    value, gradient = value_and_gradient(lambda shown: twin.distance(shown, features), images(2, 32))
    expected, wanted = value_and_gradient(lambda shown: perceptual.distance(shown, features), images(2, 32))
    assert value.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0.01, atol=0)
    assert not torch.equal(gradient, wanted)
    assert torch.nn.functional.cosine_similarity(gradient.flatten(1), wanted.flatten(1)).min() > 0.98
    assert {weight.dtype for weight in twin.network.net.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in [*twin.network.lins.parameters(), *perceptual.parameters()]} == {torch.float32}


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_loss_is_the_weighted_sum(weight, perceptual, images) -> None:
    """Oracle: closed form from the terms, which are not weighted; exact up to one rounding."""
    loss = ReconstructionLoss(perceptual, weight=weight)
    reconstruction, target = images(2, 32), loss.target(images(2, 32, seed=1))
    terms = loss.terms(reconstruction, target)
    assert loss(reconstruction, target).shape == (2,)
    torch.testing.assert_close(loss(reconstruction, target), terms.mse + weight * terms.lpips)


def test_without_perceptual_term_nothing_is_loaded(images, monkeypatch) -> None:
    """Oracle: closed form, the loss is the MSE alone, with no network to build, hold or feed."""
    monkeypatch.setattr(lpips, "LPIPS", lambda *_, **__: pytest.fail("a network was built"))
    loss = ReconstructionLoss(weight=0.0)
    target = loss.target(images(2, seed=1))
    assert target.features == [] and not list(loss.parameters())
    assert torch.equal(loss(images(2), target), mean_squared_error(images(2), images(2, seed=1)))
    assert torch.equal(loss.terms(images(2), target).lpips, torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_squared_error_is_per_image_and_in_float32(dtype, images) -> None:
    """Oracle: numpy in float64 on the same values; tolerance is the float32 rounding of a mean of 768 terms."""
    first, second = images(3).to(dtype), images(3, seed=1).to(dtype)
    value = mean_squared_error(first, second)
    expected = np.square(first.double().numpy() - second.double().numpy()).mean(axis=(1, 2, 3))
    assert value.dtype == torch.float32
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-5)


def test_originality_is_0_before_the_first_step(either_tiny_vae, images) -> None:
    """Oracle: closed form, the encoder has not left its frozen copy; exactly 0."""
    encoder = LatentEncoder(either_tiny_vae)
    moments, reference = (split_moments(module(images(2))) for module in (encoder, frozen_copy(encoder)))
    assert torch.equal(originality_loss(*moments, *reference), torch.zeros(2))


@pytest.mark.parametrize("scale", [1.0, 0.18215])
def test_originality_equals_a_hand_computation(scale) -> None:
    """Oracle: numpy in float64: moments of scaled latents, mean error and variance error, mean over elements."""
    rng = np.random.default_rng(0)
    mean, reference_mean = rng.normal(size=(2, 3, 4, 5, 5))
    variance, reference_variance = rng.uniform(0.1, 2, size=(2, 3, 4, 5, 5))
    expected = [
        np.mean((scale * mean[i] - scale * reference_mean[i]) ** 2)
        + np.mean((scale**2 * variance[i] - scale**2 * reference_variance[i]) ** 2)
        for i in range(3)
    ]
    arguments = [torch.from_numpy(array).float() for array in (mean, variance, reference_mean, reference_variance)]
    # float32 sums of 100 terms.
    np.testing.assert_allclose(originality_loss(*arguments, scale=scale).numpy(), expected, rtol=1e-5)


def test_originality_gradient_is_that_of_the_formula(images) -> None:
    """Oracle: closed form, 2 (mean - reference) / n and 2 (variance - reference) / n; float32 rounding."""
    mean, variance = images(1).requires_grad_(True), images(1, seed=1).requires_grad_(True)
    originality_loss(mean, variance, torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)).sum().backward()
    torch.testing.assert_close(mean.grad, 2 * mean.detach() / mean.numel())
    torch.testing.assert_close(variance.grad, 2 * variance.detach() / variance.numel())


def test_trunk_that_cannot_be_had_is_explained(monkeypatch) -> None:
    """Oracle: specification, one line that names the file to put in place and the way without it."""

    def unreachable(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(lpips, "LPIPS", unreachable)
    with pytest.raises(UserError) as caught:
        load_perceptual_distance("alex")
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in ("alex", "no route to host", LPIPS_TRUNKS["alex"], "`lpips_weight` 0"))


@pytest.mark.parametrize(
    ("net", "weights"),
    [
        ("vgg", torchvision.models.VGG16_Weights),
        ("alex", torchvision.models.AlexNet_Weights),
        ("squeeze", torchvision.models.SqueezeNet1_1_Weights),
    ],
)
def test_trunk_files_are_those_of_torchvision(net, weights) -> None:
    """Oracle: torchvision's own addresses of the weights that lpips loads."""
    assert weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1] == LPIPS_TRUNKS[net]
