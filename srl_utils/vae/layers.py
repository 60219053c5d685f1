"""Layers rebuilt to compute faster; their values and gradients stay the same up to rounding."""

from __future__ import annotations

from typing import TypeVar

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from srl_utils.vae.precision import full_precision

NETWORK = TypeVar("NETWORK", bound=nn.Module)


def with_merged_upsampling(network: NETWORK) -> NETWORK:
    """Rebuilds diffusers' up-sampling, in place, so that its convolution reads each pixel once; for frozen weights.

    An enlarged image shows every pixel four times, and so a 3x3 convolution of it multiplies pixels that are the same. With
    the weights that meet one pixel added up beforehand, it is a transposed convolution of the small image: 16 products
    where there were 36, and nothing enlarged is kept in memory.
    """
    for stage in network.modules():
        if isinstance(stage, nn.ModuleList):
            for index, layer in enumerate(stage):
                if isinstance(layer, Upsample2D) and _can_merge(layer):
                    stage[index] = merged(layer.conv)
    return network


def _can_merge(layer: Upsample2D) -> bool:
    """Whether it is nothing but an enlargement by 2 and a 3x3 convolution."""
    if not (layer.interpolate and layer.use_conv and layer.norm is None and layer.name == "conv"):
        return False
    return layer.conv.kernel_size == (3, 3) and layer.conv.padding == (1, 1)


def merged(convolution: nn.Conv2d) -> nn.ConvTranspose2d:
    """`[N,C,h,w]` to `[N,O,2h,2w]`: nearest-neighbour enlargement by 2, then the 3x3 `convolution` `[N,C,2h,2w]` to `[N,O,2h,2w]`."""
    twin = nn.ConvTranspose2d(
        convolution.in_channels, convolution.out_channels, 4, stride=2, padding=1, bias=convolution.bias is not None,
        device=convolution.weight.device, dtype=convolution.weight.dtype,
    )  # fmt: skip
    with torch.no_grad():
        # Transposed convolutions have their kernels turned round, and the channels that come in first.
        kernels = convolution.weight.flip(2, 3).transpose(0, 1)
        twin.weight.copy_(4 * nn.functional.avg_pool2d(kernels, 2, stride=1, padding=1))
        if twin.bias is not None and convolution.bias is not None:
            twin.bias.copy_(convolution.bias)
    return twin.to(memory_format=torch.channels_last).requires_grad_(False)


class ChannelwiseGroupNorm(nn.GroupNorm):
    """The group normalisation of `layer`, sharing its weights, by sums over channels that a product joins to groups.

    In channels-last memory a group is a few numbers in a row. torch.compile for the CPU then finds each number's group by a
    division, and computes one number at a time, the exponentials of SiLU behind it as well. Here each channel has its own
    mean and variance at hand, and the loops run over vectors.
    """

    average: Tensor
    """`[C,C]`: takes a value per channel to its mean over the channel's group."""

    def __init__(self, layer: nn.GroupNorm) -> None:
        super().__init__(layer.num_groups, layer.num_channels, layer.eps, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        size = layer.num_channels // layer.num_groups
        average = torch.eye(layer.num_groups).kron(torch.full((size, size), 1 / size))
        self.register_buffer("average", average.to(layer.weight), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """`[N,C,...]`, of any precision; computed in `full_precision`, as autocast would."""
        with torch.autocast(features.device.type, enabled=False):
            values = full_precision(features).flatten(2)
            mean = values.mean(dim=2) @ self.average
            # Through this mean no gradient passes: that of squared deviations from a mean is 0.
            variance = (values - mean.detach()[..., None]).square().mean(dim=2) @ self.average
            scale = self.weight * torch.rsqrt(variance + self.eps)
            shift = self.bias - mean * scale
            return (values * scale[..., None] + shift[..., None]).view(features.shape).to(features.dtype)


def with_channelwise_normalisation(network: NETWORK) -> NETWORK:
    """Rebuilds the group normalisations, in place; names of weights stay as they are."""
    for module in list(network.modules()):
        for name, layer in module.named_children():
            if type(layer) is nn.GroupNorm:
                setattr(module, name, ChannelwiseGroupNorm(layer))
    return network


def with_compilable_layers(network: NETWORK) -> NETWORK:
    """Rebuilds, in place, the layers that torch.compile turns into slow code on the device that `network` is on.

    On the CPU that is group normalisation; elsewhere nothing was measured, and nothing is rebuilt.
    """
    on_cpu = next(network.parameters()).device.type == "cpu"
    return with_channelwise_normalisation(network) if on_cpu else network
