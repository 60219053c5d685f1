"""Layers in a form of which torch.compile makes fast code; their values and gradients stay the same up to rounding."""

from __future__ import annotations

from typing import TypeVar

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

NETWORK = TypeVar("NETWORK", bound=nn.Module)


class _Doubling(torch.autograd.Function):
    """Nearest-neighbour enlargement by 2 whose gradient is a sum over 2x2 pixels."""

    @staticmethod
    def forward(context: object, images: Tensor) -> Tensor:
        return nn.functional.interpolate(images, scale_factor=2.0, mode="nearest")

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        return 4 * nn.functional.avg_pool2d(gradient, 2)


class Doubled(nn.Module):
    """What diffusers' `Upsample2D` does before its convolution, on `[N,C,h,w]`, in a form that compiles well."""

    def forward(self, images: Tensor) -> Tensor:
        return _Doubling.apply(images)


def with_summed_gradients(decoder: NETWORK) -> NETWORK:
    """Rebuilds a decoder's up-sampling, in place, so that its compiled backward pass does not scatter gradients.

    Of torch's own nearest-neighbour interpolation torch.compile makes a gather, whose gradient adds pixel by pixel to
    indexed places: an eighth of an attack's step on the CPU (benchmarks/RESULTS.md).
    """
    for stage in decoder.modules():
        if isinstance(stage, nn.ModuleList):
            for index, layer in enumerate(stage):
                if isinstance(layer, Upsample2D) and layer.use_conv and layer.interpolate:
                    layer.interpolate = False
                    stage[index] = nn.Sequential(Doubled(), layer)
    return decoder


class ChannelwiseGroupNorm(nn.GroupNorm):
    """The group normalisation of `layer`, sharing its weights, by sums over channels that a product joins to groups.

    In channels-last memory a group is a few numbers in a row. torch.compile for the CPU then finds each number's group by a
    division, and computes one number at a time, the exponentials of SiLU behind it as well. Here each channel has its own
    mean and variance at hand, and the loops run over vectors.
    """

    def __init__(self, layer: nn.GroupNorm) -> None:
        super().__init__(layer.num_groups, layer.num_channels, layer.eps, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        size = layer.num_channels // layer.num_groups
        average = torch.eye(layer.num_groups).kron(torch.full((size, size), 1 / size))
        self.register_buffer("average", average.to(layer.weight), persistent=False)
        """`[C,C]`: takes a value per channel to its mean over the channel's group."""

    def forward(self, features: Tensor) -> Tensor:
        """`[N,C,...]`, of any precision; computed in float32, as autocast would."""
        with torch.autocast(features.device.type, enabled=False):
            values = features.float().flatten(2)
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
