"""Layers rebuilt to be faster, against those they replace."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from srl_utils.vae.layers import (
    ChannelwiseGroupNorm,
    merged,
    with_channelwise_normalisation,
    with_compilable_layers,
    with_merged_upsampling,
)
from srl_utils.vae.networks import LatentDecoder, frozen_copy


def values_and_gradients(layer: nn.Module, inputs: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
    """The layer's values, and the gradients of a fixed weighing of them."""
    values = layer(inputs)
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    return [values, *torch.autograd.grad((values * weights).sum(), wanted)]


@pytest.mark.parametrize("bias", [True, False])
def test_a_merged_convolution_is_one_of_the_enlarged_image(bias: bool) -> None:
    """Oracle: torch's enlargement and convolution in float64, values and gradients, on sides that are odd and not alike."""
    convolution = nn.Conv2d(3, 5, 3, padding=1, bias=bias).double()
    inputs = torch.randn(2, 3, 5, 4, dtype=torch.double, requires_grad=True)
    plain = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest"), convolution)
    ours, expected = (values_and_gradients(layer, inputs, [inputs]) for layer in (merged(convolution), plain))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_decoder_with_merged_upsampling_is_the_same(tiny_vae: AutoencoderKL) -> None:
    """Oracle: diffusers' own decoder, which stays as it was, values and gradients to rounding; nothing enlarges any more."""
    decoder = LatentDecoder(tiny_vae)
    rebuilt = frozen_copy(decoder, with_merged_upsampling)
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    for one, other in zip(
        *(values_and_gradients(part, latents, [latents]) for part in (rebuilt, decoder)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(layer, Upsample2D) for layer in rebuilt.modules())
    assert (
        sum(isinstance(layer, Upsample2D) for layer in decoder.modules()) == len(tiny_vae.config.block_out_channels) - 1
    )
    assert not any(parameter.requires_grad for parameter in rebuilt.parameters())


def test_weights_are_merged_before_they_are_rounded(tiny_vae: AutoencoderKL) -> None:
    """Oracle: the decoder in float32, from which merged bf16 weights may be no farther than those of the plain decoder."""
    plain = LatentDecoder(tiny_vae, autocast_dtype=torch.bfloat16)
    rebuilt = frozen_copy(plain, with_merged_upsampling)
    merged_weights = [layer.weight for layer in rebuilt.modules() if isinstance(layer, nn.ConvTranspose2d)]
    assert {weight.dtype for weight in merged_weights} == {torch.bfloat16}
    latents = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = LatentDecoder(tiny_vae)(latents)
    errors = [(decoder(latents) - exact).square().mean().sqrt().item() for decoder in (rebuilt, frozen_copy(plain))]
    assert 0 < errors[0] < 1.2 * errors[1]


def test_other_upsampling_stays() -> None:
    """Oracle: specification; a convolution of another size, a normalisation or none at all are not merged."""
    kinds = [
        Upsample2D(4, use_conv=True, kernel_size=5, padding=2),
        Upsample2D(4, use_conv=True, norm_type="rms_norm", eps=1e-6, elementwise_affine=True),
        Upsample2D(4),
        Upsample2D(4, use_conv_transpose=True),
        Upsample2D(4, use_conv=True, interpolate=False),
    ]
    network = with_merged_upsampling(nn.ModuleDict({"stages": nn.ModuleList(kinds)}))
    assert list(network["stages"]) == kinds


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


@pytest.mark.parametrize(("device", "rebuilt"), [("cpu", True), ("meta", False)])
def test_layers_are_rebuilt_for_the_cpu_s_compiler_alone(device: str, rebuilt: bool) -> None:
    """Oracle: specification."""
    network = with_compilable_layers(nn.Sequential(nn.GroupNorm(2, 4)).to(device))
    assert isinstance(network[0], ChannelwiseGroupNorm) == rebuilt
