"""Rebuild layers so that they compute faster; their values and gradients stay the same up to rounding."""

from __future__ import annotations

from typing import TypeVar

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from srl_utils.vae.precision import full_precision

NETWORK = TypeVar("NETWORK", bound=nn.Module)


def with_merged_upsampling(network: NETWORK) -> NETWORK:
    """Merge diffusers' up-sampling and the convolution after it into one layer, in place; for frozen weights.

    An image enlarged by 2 holds every pixel four times, so a 3x3 convolution multiplies equal pixels several times.
    Adding up the weights that meet the same pixel gives a transposed convolution of the small image: 16 products
    instead of 36, and no enlarged image in memory.
    """
    for stage in network.modules():
        if isinstance(stage, nn.ModuleList):
            for index, layer in enumerate(stage):
                if isinstance(layer, Upsample2D) and _can_merge(layer):
                    stage[index] = merged(layer.conv)
    return network


def _can_merge(layer: Upsample2D) -> bool:
    """Return whether the layer is just an enlargement by 2 and a 3x3 convolution."""
    if not (layer.interpolate and layer.use_conv and layer.norm is None and layer.name == "conv"):
        return False
    return layer.conv.kernel_size == (3, 3) and layer.conv.padding == (1, 1)


def merged(convolution: nn.Conv2d) -> nn.ConvTranspose2d:
    """Return nearest-neighbour enlargement by 2 and a 3x3 convolution as one layer.

    Args:
        convolution: maps `[N,C,2h,2w]` to `[N,O,2h,2w]`.

    Returns:
        A transposed convolution that maps `[N,C,h,w]` to `[N,O,2h,2w]`.
    """
    twin = nn.ConvTranspose2d(
        convolution.in_channels, convolution.out_channels, 4, stride=2, padding=1, bias=convolution.bias is not None,
        device=convolution.weight.device, dtype=convolution.weight.dtype,
    )  # fmt: skip
    with torch.no_grad():
        # A transposed convolution has rotated kernels, and its input channels come first.
        kernels = convolution.weight.flip(2, 3).transpose(0, 1)
        twin.weight.copy_(4 * nn.functional.avg_pool2d(kernels, 2, stride=1, padding=1))
        if twin.bias is not None and convolution.bias is not None:
            twin.bias.copy_(convolution.bias)
    return twin.to(memory_format=torch.channels_last).requires_grad_(False)


class ChannelwiseGroupNorm(nn.GroupNorm):
    """Group normalisation that sums each channel, then combines the channels of a group by a matrix product.

    It shares the weights of `layer`. In channels-last memory a group is a few numbers in a row, and torch.compile for
    the CPU computes them one at a time, together with the SiLU that follows. With a mean and a variance for each
    channel the loops run over vectors.
    """

    average: Tensor
    """`[C,C]`: maps a value per channel to the mean over the channel's group."""

    def __init__(self, layer: nn.GroupNorm) -> None:
        super().__init__(layer.num_groups, layer.num_channels, layer.eps, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        size = layer.num_channels // layer.num_groups
        average = torch.eye(layer.num_groups).kron(torch.full((size, size), 1 / size))
        self.register_buffer("average", average.to(layer.weight), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Normalise features `[N,C,...]` of any precision; computes in `full_precision`, as autocast would."""
        with torch.autocast(features.device.type, enabled=False):
            values = full_precision(features).flatten(2)
            mean = values.mean(dim=2) @ self.average
            # The gradient through this mean is 0, as squared deviations are least at the mean.
            variance = (values - mean.detach()[..., None]).square().mean(dim=2) @ self.average
            scale = self.weight * torch.rsqrt(variance + self.eps)
            shift = self.bias - mean * scale
            return (values * scale[..., None] + shift[..., None]).view(features.shape).to(features.dtype)


def with_channelwise_normalisation(network: NETWORK) -> NETWORK:
    """Rebuild the group normalisations of a network, in place; the names of weights stay the same."""
    for module in list(network.modules()):
        for name, layer in module.named_children():
            if type(layer) is nn.GroupNorm:
                setattr(module, name, ChannelwiseGroupNorm(layer))
    return network


def with_compilable_layers(network: NETWORK) -> NETWORK:
    """Rebuild, in place, the layers that torch.compile turns into slow code on the network's device.

    On the CPU these are the group normalisations. Other devices were not measured, so nothing is rebuilt there.
    """
    on_cpu = next(network.parameters()).device.type == "cpu"
    return with_channelwise_normalisation(network) if on_cpu else network
