"""Train low-rank updates of frozen weights: LoRA (Hu et al., arXiv 2106.09685).

A weight W becomes W + B A, and B starts at 0. For a linear layer A is `[r,in]` and B `[out,r]`; for a convolution A is
`[r,in,k,k]` and B `[out,r,1,1]`, as in diffusers and peft. The sum is taken on weights, so that it holds for every layer
that computes with a weight, whatever its class does beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

NETWORK = TypeVar("NETWORK", bound=nn.Module)
WEIGHT = "weight"


class LowRankUpdate(nn.Module):
    """Adds B A to a weight, in its own precision, with or without autocast.

    Args:
        weight: of a linear layer or a convolution; it stays as it is.
        rank: r.
        generator: of the start of A, which is that of peft: uniform, after Kaiming.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        inner, outer = (rank, *weight.shape[1:]), (len(weight), rank, *(1 for _ in weight.shape[2:]))
        down = nn.init.kaiming_uniform_(torch.empty(inner), a=sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(down.to(weight))
        self.lora_B = nn.Parameter(weight.new_zeros(outer))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return weight + (self.lora_B.flatten(1) @ self.lora_A.flatten(1)).view_as(weight)


def add_low_rank_updates(network: nn.Module, rank: int, *, seed: int) -> None:
    """Freeze a network and give its linear layers and convolutions trainable low-rank updates, in place.

    Grouped convolutions get none: a matrix from all inputs to all outputs is not what they multiply by.
    """
    generator = torch.Generator().manual_seed(seed)
    network.requires_grad_(False)
    for layer in list(network.modules()):
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and getattr(layer, "groups", 1) == 1:
            parametrize.register_parametrization(layer, WEIGHT, LowRankUpdate(layer.weight, rank, generator))


def updates_of(network: nn.Module) -> Iterator[tuple[str, nn.Module, LowRankUpdate]]:
    """Yield the name, the layer and the update of each layer that has one."""
    for name, layer in network.named_modules():
        if parametrize.is_parametrized(layer, WEIGHT):
            yield name, layer, layer.parametrizations[WEIGHT][0]


def with_merged_updates(network: NETWORK) -> NETWORK:
    """Replace the updated weights of a network by plain ones of the same values, in place.

    `remove_parametrizations` would change the layer's class, which a copy of a network shares with the original.
    """
    for _, layer, _ in list(updates_of(network)):
        merged = getattr(layer, WEIGHT).detach()
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        layer.weight = nn.Parameter(merged, requires_grad=False)
    return network


def merged_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the state of a network under the names of plain weights, with the updates in them."""
    layers = {name: layer for name, layer, _ in updates_of(network)}
    state = {}
    for key, tensor in network.state_dict().items():
        name, _, part = key.partition(f".parametrizations.{WEIGHT}.")
        if name not in layers:
            state[key] = tensor
        elif part == "original":
            state[f"{name}.{WEIGHT}"] = getattr(layers[name], WEIGHT).detach()
    return state


def updates_state(network: nn.Module) -> dict[str, Tensor]:
    """Return A and B of each layer under the names that diffusers' `load_lora_adapter` reads with `prefix=None`."""
    return {
        f"{name}.{matrix}.weight": tensor
        for name, _, update in updates_of(network)
        for matrix, tensor in update.state_dict().items()
    }


@torch.no_grad()
def load_updates(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set A and B of each layer to those of `updates_state`; the frozen weights stay.

    Raises:
        KeyError: if an update is missing.
        RuntimeError: if one has another rank.
    """
    for name, tensor in updates_state(network).items():
        tensor.copy_(state[name])


@torch.no_grad()
def add_updates(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Add B A to the weights of a network, in place.

    Args:
        network: with plain weights.
        state: of `updates_state`.

    Raises:
        AttributeError, KeyError: if the network lacks a layer or the state a matrix.
        RuntimeError: if a shape does not fit.
    """
    for name in {key.rpartition(".lora_")[0] for key in state}:
        down, up = (state[f"{name}.lora_{matrix}.weight"] for matrix in "AB")
        weight = network.get_parameter(f"{name}.{WEIGHT}")
        weight.add_((up.flatten(1) @ down.flatten(1)).view_as(weight))
