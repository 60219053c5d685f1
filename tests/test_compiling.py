"""Layers rebuilt for torch.compile against those they replace."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from srl_utils.autoencoders import LatentDecoder, frozen_copy
from srl_utils.compiling import ChannelwiseGroupNorm, with_channelwise_normalisation, with_summed_gradients


def values_and_gradients(layer: nn.Module, inputs: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
    """The layer's values, and the gradients of a fixed weighing of them."""
    values = layer(inputs)
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    return [values, *torch.autograd.grad((values * weights).sum(), wanted)]


def test_summed_gradients_are_the_same(tiny_vae) -> None:
    """Oracle: diffusers' own up-sampling, values to the bit and gradients to rounding."""
    decoder = LatentDecoder(tiny_vae)
    rebuilt = with_summed_gradients(frozen_copy(decoder))
    assert any(type(module).__name__ == "Doubled" for module in rebuilt.modules())
    assert not any(type(module).__name__ == "Doubled" for module in decoder.modules())
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    expected, value = decoder(latents), rebuilt(latents)
    assert torch.equal(value, expected)
    weights = torch.randn_like(value)
    (gradient,), (expected_gradient,) = (torch.autograd.grad((output * weights).sum(), latents) for output in (value, expected))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 12, 5, 7), (3, 12, 35)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_channelwise_normalisation_is_group_normalisation(shape: tuple[int, ...], offset: float) -> None:
    """Oracle: torch's layer in float64, values and gradients; far from 0 float32 keeps five digits of the deviations."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.GroupNorm(4, 12, eps=1e-6)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, mean=1.0, generator=generator)
    inputs = (torch.randn(shape, generator=generator) + offset).requires_grad_(True)
    rebuilt, exact = ChannelwiseGroupNorm(layer), copy.deepcopy(layer).double()
    exact_inputs = inputs.detach().double().requires_grad_(True)
    ours = values_and_gradients(rebuilt, inputs, [inputs, layer.weight, layer.bias])
    expected = values_and_gradients(exact, exact_inputs, [exact_inputs, exact.weight, exact.bias])
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-5 * (1 + offset))


def test_normalisation_keeps_precision_and_layout() -> None:
    """Oracle: specification; bf16 in channels-last memory goes in and comes out, within half a unit of its last place."""
    inputs = torch.randn(2, 12, 8, 8).bfloat16().to(memory_format=torch.channels_last)
    layer = nn.GroupNorm(4, 12)
    values = ChannelwiseGroupNorm(layer)(inputs)
    assert values.dtype == torch.bfloat16
    assert values.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(values, layer(inputs.float()).bfloat16(), rtol=2**-7, atol=1e-6)


def test_a_rebuilt_vae_keeps_its_weights_and_their_names(tiny_vae: AutoencoderKL) -> None:
    """Oracle: the VAE before, with attention as without: the same entries, the same memory, the same values to rounding."""
    before, images = tiny_vae.state_dict(), torch.rand(1, 3, 16, 16) * 2 - 1
    expected = tiny_vae(images).sample
    assert with_channelwise_normalisation(tiny_vae) is tiny_vae
    assert not any(type(layer) is nn.GroupNorm for layer in tiny_vae.modules())
    after = tiny_vae.state_dict()
    assert list(after) == list(before)
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    torch.testing.assert_close(tiny_vae(images).sample, expected, rtol=1e-4, atol=1e-5)
