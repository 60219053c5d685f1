"""Loss surfaces, their area and their curvature."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from srl_utils.geometry.surface import filter_normalised, mean_curvature, moved, places, raised_area, surface


def test_surface_has_the_first_direction_to_the_right() -> None:
    """Oracle: closed form; the error a + 10 b at the grid's places."""
    found = surface(lambda a, b: torch.tensor([a + 10 * b]), 5)
    grid = places(5)
    assert torch.equal(found, (grid[None, :] + 10 * grid[:, None])[None])
    assert grid.tolist() == [-1, -0.5, 0, 0.5, 1]


def test_area_of_a_bowl_is_what_a_circle_leaves_of_the_square() -> None:
    """Oracle: closed form; 1 + r^2 exceeds 1 dB more than 1 outside a circle of radius sqrt(10^0.1 - 1)."""
    errors = surface(lambda a, b: torch.tensor([1 + a * a + b * b]), 101)
    circle = math.pi * (10**0.1 - 1) / 4
    assert raised_area(errors, torch.ones(1)).item() == pytest.approx(1 - circle, abs=0.01)


def test_area_is_that_of_each_image() -> None:
    """Oracle: closed form; a flat surface is raised nowhere, one of twice the error everywhere."""
    errors = torch.ones(2, 7, 7) * torch.tensor([1.0, 2.0])[:, None, None]
    assert raised_area(errors, torch.ones(2)).tolist() == [0, 1]


def test_curvature_of_a_quadratic_is_that_of_its_matrix() -> None:
    """Oracle: closed form; x'Ax has the second derivative 2 d'Ad along d, whatever the start, here of either sign."""
    torch.manual_seed(0)
    matrix = torch.randn(6, 6)
    start, direction = torch.randn(4, 6), torch.randn(4, 6)
    found = mean_curvature(lambda x: torch.einsum("ni,ij,nj->n", x, matrix, x), start, direction, points=3)
    expected = 2 * torch.einsum("ni,ij,nj->n", direction, matrix, direction)
    assert torch.allclose(found, expected.abs(), rtol=1e-4)


def test_curvature_is_the_change_of_the_slope() -> None:
    """Oracle: the difference of the slopes at both ends, for a convex function of no fixed curvature."""
    start, direction = torch.zeros(1, 3), torch.tensor([[0.3, 0.2, 0.1]])
    found = mean_curvature(lambda x: x.exp().sum(dim=1), start, direction, points=200)
    slopes = [(direction * (start + t * direction).exp()).sum().item() for t in (0, 1)]
    assert found.item() == pytest.approx(slopes[1] - slopes[0], rel=1e-4)


def test_directions_are_as_long_as_the_filters() -> None:
    """Oracle: Li et al. 2018; filter by filter for weights, 0 for vectors, and the same draws for other weights."""
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.GroupNorm(1, 5))
    weights = dict(network.named_parameters())
    direction = filter_normalised(weights, torch.Generator().manual_seed(3))
    lengths = [each["0.weight"].flatten(1).norm(dim=1) for each in (direction, weights)]
    assert torch.allclose(*lengths)
    assert not any(direction[name].any() for name in ("0.bias", "1.weight", "1.bias"))
    doubled = {name: 2 * weight for name, weight in weights.items()}
    again = filter_normalised(doubled, torch.Generator().manual_seed(3))
    assert torch.allclose(again["0.weight"], 2 * direction["0.weight"])


def test_moved_weights_leave_the_network_as_it_was() -> None:
    """Oracle: closed form; a linear network's output is linear in its weights."""
    network, given = nn.Linear(2, 2, bias=False), torch.randn(1, 2)
    own = dict(network.named_parameters())
    first, second = ({"weight": torch.randn(2, 2)} for _ in range(2))
    before = network(given)
    output = functional_call(network, moved(own, first, second, 0.5, -2.0), (given,))
    expected = before + 0.5 * given @ first["weight"].T - 2 * given @ second["weight"].T
    assert torch.allclose(output, expected, atol=1e-6) and torch.equal(network(given), before)
