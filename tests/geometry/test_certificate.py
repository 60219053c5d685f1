"""The certificate by center smoothing."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch
from helpers.center_smoothing import quantile
from torch import Tensor

from srl_utils.geometry.certificate import CenterSmoothing


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_constant_map_is_certified_not_to_move() -> None:
    """Oracle: closed form."""
    smoothing = CenterSmoothing(sigma=1.0, samples=200)
    point = torch.zeros(1, 3)
    center = smoothing.center(torch.zeros_like, point, generator())
    assert center is not None and not center.any()
    assert smoothing.bounds(torch.zeros_like, point, center, [0.0, 0.5], generator()) == [0.0, 0.0]
    assert smoothing.confidence == 0.99


def test_bound_of_a_linear_map_is_the_one_computed_by_hand() -> None:
    """Oracle: the paper's formula with the true distribution, whose q-quantile of |c sigma z| is c sigma Phi^-1((1 + q) / 2)."""
    slope, sigma, samples, radius = 3.0, 0.5, 40_000, 0.2
    smoothing = CenterSmoothing(sigma=sigma, samples=samples, batch_size=samples)
    point = torch.tensor([[2.0]])
    found = smoothing.bounds(lambda x: slope * x, point, slope * point, [radius], generator())
    share = quantile(samples, radius / sigma)
    assert found[0] == pytest.approx(3 * slope * sigma * NormalDist().inv_cdf((1 + share) / 2), rel=0.02)


def test_bounds_grow_with_the_radius_until_there_are_none() -> None:
    """Oracle: monotony; no quantile exceeds 1."""
    smoothing = CenterSmoothing(sigma=1.0, samples=300)
    found = smoothing.bounds(lambda x: x, torch.zeros(1, 4), torch.zeros(1, 4), [0.0, 0.3, 0.6, 9.0], generator())
    assert found[0] <= found[1] <= found[2] and found[3] is None


@pytest.mark.parametrize("radius", [0.2, 0.6])
def test_no_move_within_the_radius_breaks_the_bound(radius: float) -> None:
    """Oracle: counting over 20 points of a jumping map; both moves from each stay within its bound, unless one abstains.
    Some exceed a tenth of it.
    """

    def jumping(x: Tensor) -> Tensor:
        return torch.cat([x.sign() * (1 + x.square()), x.square()], dim=1)

    smoothing = CenterSmoothing(sigma=1.0, samples=300)
    draws = generator()
    tried = broken = beyond_a_tenth = 0
    for place in torch.linspace(-2, 2, 20):
        point = place.view(1, 1)
        center = smoothing.center(jumping, point, draws)
        if center is None:
            continue
        (bound,) = smoothing.bounds(jumping, point, center, [radius], draws)
        for move in (-radius, radius):
            moved = smoothing.center(jumping, point + move, draws)
            if moved is not None:
                tried += 1
                distance = (moved - center).norm().item()
                broken += distance > bound
                beyond_a_tenth += distance > bound / 10
    assert tried >= 30 and broken == 0 and beyond_a_tenth > 0


def test_smoothing_abstains_where_no_ball_holds_half_of_the_outputs() -> None:
    """Oracle: a map whose new outputs are all far from earlier ones."""
    calls = iter(range(10**6))

    def restless(x: Tensor) -> Tensor:
        return x * 0 + 1000.0 * next(calls)

    assert CenterSmoothing(sigma=1.0, samples=200).center(restless, torch.zeros(1, 1), generator()) is None


def test_wrong_settings_are_refused() -> None:
    """Oracle: specification."""
    with pytest.raises(ValueError, match="sigma must be positive, got 0"):
        CenterSmoothing(sigma=0)
    with pytest.raises(ValueError, match="at least 100 samples, got 99"):
        CenterSmoothing(sigma=1, samples=99)
