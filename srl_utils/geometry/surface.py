"""Loss surfaces: the error over a plane of images or of weights, and how sharply it bends.

Source of the filter-normalised directions: Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018
(arXiv 1712.09913), section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import grad, jvp

from srl_utils.attacks.gradient import Objective, per_image
from srl_utils.geometry.derivatives import differentiable_attention

Weights = Mapping[str, Tensor]
"""Parameters of a network by name."""


@torch.no_grad()
def surface(error: Callable[[float, float], Tensor], points: int) -> Tensor:
    """Return the error over a square grid, `[N,points,points]`.

    Args:
        error: returns the error of each image, `[N]`, at a place (a, b) of the plane.
        points: of the grid along each side. Entry `[i,j]` belongs to a = `places(points)[j]` and b = `places(points)[i]`,
            so that a runs to the right in a picture.
    """
    grid = places(points).tolist()
    return torch.stack([torch.stack([error(a, b) for a in grid], dim=-1) for b in grid], dim=-2)


def places(points: int) -> Tensor:
    """Return the places of a grid's points along a side, from -1 to 1, `[points]`."""
    return torch.linspace(-1, 1, points)


def raised_area(errors: Tensor, clean: Tensor, *, decibels: float = 1.0) -> Tensor:
    """Return the share of a surface where the error exceeds that of the clean image by more than `decibels`, `[N]`.

    Args:
        errors: squared errors of the grid's points, `[N,P,P]`.
        clean: squared error in the middle of the plane, `[N]`.
        decibels: height above the clean error.
    """
    limit = per_image(clean, errors) * 10 ** (decibels / 10)
    return (errors > limit).flatten(1).float().mean(dim=1)


def mean_curvature(error: Objective, start: Tensor, direction: Tensor, *, points: int) -> Tensor:
    """Return the mean size of the second derivative of t -> error(start + t * direction) for t in [0,1], `[N]`.

    It is 0 if the error grows evenly. Each second derivative is d'Hd, from a Hessian-vector product: the forward derivative of the gradient.

    Args:
        error: returns one value per image, `[N]`; value i may depend on image i only.
        start: `[N,...]`, where t is 0.
        direction: `[N,...]`, from the start to where t is 1.
        points: number of places t, in the middles of as many equal parts of [0,1].
    """
    gradient = grad(lambda images: error(images).sum())
    total = torch.zeros(len(start), device=start.device)
    with differentiable_attention():
        for number in range(points):
            place = start + (number + 0.5) / points * direction
            product = jvp(gradient, (place,), (direction,))[1]
            total += (product * direction).flatten(1).sum(dim=1).abs()
    return total / points


def filter_normalised(weights: Weights, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw a random direction in which each filter is as long as the filter of the weights (Li et al. 2018).

    Vectors, such as biases and the scales of normalisations, are not moved.

    Args:
        weights: the network's parameters; the first dimension of a tensor counts its filters.
        generator: of the CPU. Networks with parameters of the same shapes get the same draws.
    """
    return {name: _as_long_as(weight, generator) for name, weight in weights.items()}


def _as_long_as(weight: Tensor, generator: torch.Generator) -> Tensor:
    if weight.ndim < 2:
        return torch.zeros_like(weight)
    drawn = torch.randn(weight.shape, generator=generator).to(weight)
    lengths = [per_image(tensor.flatten(1).norm(dim=1), weight) for tensor in (weight, drawn)]
    return drawn * lengths[0] / lengths[1]


def moved(weights: Weights, first: Weights, second: Weights, a: float, b: float) -> dict[str, Tensor]:
    """Return the weights moved by a times the first direction and b times the second one."""
    return {name: weight + a * first[name] + b * second[name] for name, weight in weights.items()}
