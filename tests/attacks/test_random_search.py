from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from helpers.objectives import ROUNDING, Recorded, Scripted, flat, linear, reconstruction_objective, wavy
from torch import Tensor

from miniature.scenes import draw_dead_leaves, draw_scene
from srl_utils.attacks.draws import draw_signs
from srl_utils.attacks.gradient import PGDConfig, pgd
from srl_utils.attacks.random_search import SquareConfig, draw_square, square_attack
from srl_utils.images.pixels import from_pil

EPSILON = 8 / 255
RADIUS = 2 * EPSILON  # between images in [-1,1]
CONFIG = SquareConfig(epsilon=EPSILON, num_queries=30)


def rising(calls: int, *, sign: int = 1) -> Scripted:
    """Every call is better than the last, or worse with a sign of -1, whatever it is asked."""
    return Scripted([sign * call for call in range(calls)], [0.0] * calls)


@pytest.mark.parametrize("place", ["inside", "anywhere", "on the border"])
def test_everything_shown_lies_at_the_border_of_the_ball(place, images, generators) -> None:
    """Oracle: closed form, every value of every image that the objective sees is clean - r or clean + r, clipped."""
    clean = {"inside": images(2, limit=0.5), "anywhere": images(2), "on the border": images(2).sign()}[place]
    objective = Recorded(wavy)
    attacked = square_attack(objective, clean, CONFIG, generators=generators(0, 1))
    low, high = (clean - RADIUS).clamp(min=-1), (clean + RADIUS).clamp(max=1)
    for shown in [*objective.seen, attacked]:
        assert ((shown == low) | (shown == high)).all()
    assert (attacked == low).any() and (attacked == high).any()


@pytest.mark.parametrize("change", [{"epsilon": 0.0}, {"num_queries": 0}])
def test_no_budget_or_no_query_is_the_identity(change, images) -> None:
    """Oracle: closed form, exact."""
    config = SquareConfig(**{"epsilon": EPSILON, "num_queries": 30, **change})
    assert torch.equal(square_attack(wavy, images(2), config), images(2))


def test_start_is_vertical_stripes(generators) -> None:
    """Oracle: closed form. Down a column each channel is constant; of 3 x 64 columns half are +r, within four standard
    errors; images and channels have stripes of their own."""
    clean = torch.zeros(2, 3, 5, 64)
    config = SquareConfig(epsilon=EPSILON, num_queries=1)
    start = square_attack(flat, clean, config, generators=generators(0, 1))
    assert torch.equal(start, start[:, :, :1].expand_as(start))
    share = (start[:, :, 0] > 0).float().mean(dim=(1, 2))
    assert (share - 0.5).abs().max() <= 4 * 0.5 / math.sqrt(3 * 64)
    assert not torch.equal(start[0], start[1]) and not torch.equal(start[:, 0], start[:, 1])


@pytest.mark.parametrize(
    ("queries", "halvings"),
    [
        (range(0, 11), 0), (range(11, 51), 1), (range(51, 201), 2), (range(201, 501), 3), (range(501, 1001), 4),
        (range(1001, 2001), 5), (range(2001, 4001), 6), (range(4001, 6001), 7), (range(6001, 8001), 8),
        (range(8001, 10_000), 9),
    ],
)  # fmt: skip
def test_squares_shrink_as_published(queries, halvings) -> None:
    """Oracle: the paper's table for 10000 queries, for an image of 1024 pixels where the root of a 512th still shows."""
    config = SquareConfig(num_queries=10_000)
    side = round(math.sqrt(0.8 * 1024**2 / 2**halvings))
    assert {config.side_at(query, 1024, 1024) for query in queries} == {side}
    # Fewer queries pass through the same sizes faster.
    assert SquareConfig(num_queries=100).side_at(queries[-1] // 100, 1024, 1024) in {side, round(side * math.sqrt(2))}


@pytest.mark.parametrize(
    ("share", "height", "width", "side"), [(1.0, 8, 8, 8), (1.0, 4, 100, 4), (0.25, 8, 8, 4), (1e-6, 8, 8, 1)]
)
def test_squares_fit_into_the_image(share, height, width, side) -> None:
    """Oracle: closed form, the root of a share of the area, between one pixel and the shorter side."""
    assert SquareConfig(num_queries=10, initial_share=share).side_at(0, height, width) == side


@pytest.mark.parametrize(("height", "width", "side"), [(3, 5, 2), (4, 4, 4), (5, 3, 1)])
def test_every_place_of_a_square_is_as_likely(height, width, side, generators) -> None:
    """Oracle: enumeration of all places; each is drawn, and as often as the others within five standard errors."""
    places = {
        tuple(
            top <= row < top + side and left <= column < left + side for row in range(height) for column in range(width)
        )
        for top in range(height - side + 1)
        for left in range(width - side + 1)
    }
    count = 1000
    drawn = draw_square(side, generators(*range(count)), like=torch.zeros(count, 3, height, width))
    found = [tuple(row) for row in drawn.flatten(1).tolist()]
    share = 1 / len(places)
    error = math.sqrt(share * (1 - share) / count)
    assert set(found) == places
    assert all(found.count(place) / count == pytest.approx(share, abs=5 * error + 1e-9) for place in places)


def test_signs_are_even_and_independent(generators) -> None:
    """Oracle: closed form, means of signs and of products of neighbours are 0 within four standard errors."""
    signs = draw_signs((3, 1, 1000), generators(0, 1), like=torch.zeros(2, 3, 4, 4))
    assert set(signs.unique().tolist()) == {-1.0, 1.0} and signs.shape == (2, 3, 1, 1000)
    for products in [signs, signs[:, :1] * signs[:, 1:], signs[:1] * signs[1:]]:
        assert abs(products.mean()) <= 4 / math.sqrt(products.numel())


def test_each_query_changes_one_square(generators) -> None:
    """Oracle: specification. Where every query is better, one differs from the last in one square of the side that is
    due, which has one colour change; in 300 queries squares reach all four corners."""
    height, width = 12, 10
    config = SquareConfig(epsilon=EPSILON, num_queries=300)
    objective = rising(300)
    square_attack(objective, torch.zeros(1, 3, height, width), config, generators=generators(0))
    touched = torch.zeros(height, width, dtype=torch.bool)
    sizes = set()
    for query, (before, after) in enumerate(pairwise(objective.seen)):
        changed = (before != after)[0].any(dim=0)
        if not changed.any():
            continue
        touched |= changed
        side = config.side_at(query, height, width)
        rows, columns = changed.nonzero().unbind(1)
        assert rows.max() - rows.min() < side and columns.max() - columns.min() < side
        for channel in range(3):
            assert len(after[0, channel][changed].unique()) == 1
        sizes.add(side)
    assert touched[[0, 0, -1, -1], [0, -1, 0, -1]].all()
    assert len(sizes) > 3


def test_only_improvements_are_kept(generators) -> None:
    """Oracle: closed form. Where every query is worse the stripes are returned, where all are equal too, and where
    every one is better the last."""
    clean = torch.zeros(2, 3, 8, 8)
    worse, better = rising(30, sign=-1), rising(30)
    assert torch.equal(square_attack(worse, clean, CONFIG, generators=generators(0, 1)), worse.seen[0])
    assert torch.equal(square_attack(better, clean, CONFIG, generators=generators(0, 1)), better.seen[-1])
    assert torch.equal(square_attack(flat, clean, CONFIG, generators=generators(0, 1)), worse.seen[0])


def test_best_of_all_queries_is_returned_for_each_image(images, generators) -> None:
    """Oracle: the recorded values; there are as many as queries, and the images find their best at different ones."""
    objective = Recorded(wavy)
    attacked = square_attack(objective, images(4), CONFIG, generators=generators(0, 1, 2, 3))
    values = torch.stack(objective.values)
    assert len(values) == CONFIG.num_queries
    assert torch.equal(wavy(attacked), values.amax(dim=0))
    assert len(values.argmax(dim=0).unique()) > 1


def test_maximum_of_a_linear_objective_is_found(images, generators) -> None:
    """Oracle: closed form, clean + r sign(g), exactly. In 4x4 pixels most squares are one pixel, which each of 2000
    queries sets right with a chance of 1 in 16 x 8."""
    clean, weights = images(2, 4, limit=0.5), images(2, 4, seed=1)
    config = SquareConfig(epsilon=EPSILON, num_queries=2000)
    attacked = square_attack(linear(weights), clean, config, generators=generators(0, 1))
    torch.testing.assert_close(attacked, clean + RADIUS * weights.sign(), rtol=0, atol=ROUNDING)


def test_no_gradient_is_needed_or_kept(images, generators) -> None:
    """Oracle: specification. An objective in NumPy has no gradient, and an ordinary one is asked without recording."""
    recording = []

    def through_numpy(batch: Tensor) -> Tensor:
        recording.append(torch.is_grad_enabled())
        return torch.from_numpy(batch.detach().numpy().sum(axis=(1, 2, 3)))

    clean = images(2).requires_grad_(True)
    attacked = square_attack(through_numpy, clean, CONFIG, generators=generators(0, 1))
    assert not any(recording) and not attacked.requires_grad
    assert (attacked.sum(dim=(1, 2, 3)) > clean.sum(dim=(1, 2, 3))).all()
    with pytest.raises(RuntimeError, match="does not require grad"):
        pgd(through_numpy, images(2), PGDConfig(random_start=False))


def test_batch_equals_concatenated_singles(images, generators) -> None:
    """Oracle: invariance, exact for an objective that works pixel by pixel; other generators find other images."""
    clean = images(3)
    batch = square_attack(wavy, clean, CONFIG, generators=generators(4, 5, 6))
    singles = [square_attack(wavy, clean[i : i + 1], CONFIG, generators=generators(4 + i)) for i in range(3)]
    assert torch.equal(batch, torch.cat(singles))
    assert not torch.equal(singles[0], square_attack(wavy, clean[:1], CONFIG, generators=generators(5)))


def test_arguments_are_not_changed(images, generators) -> None:
    """Oracle: invariance."""
    clean = images(2)
    square_attack(wavy, clean, CONFIG, generators=generators(0, 1))
    assert torch.equal(clean, images(2))


@pytest.mark.parametrize("seeds", [(), (0,), (0, 1, 2)])
def test_a_generator_per_image_is_needed(seeds, images, generators) -> None:
    """Oracle: specification."""
    with pytest.raises(ValueError, match="one generator per image"):
        square_attack(wavy, images(2), CONFIG, generators=generators(*seeds))


def test_works_without_generators(images) -> None:
    """Oracle: PyTorch's global generator given for each image; seeded alike the attacks agree, and otherwise differ."""
    results = []
    for seed, given in [(3, None), (3, [torch.default_generator] * 2), (4, None)]:
        torch.manual_seed(seed)
        results.append(square_attack(wavy, images(2), CONFIG, generators=given))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "l2"}, "norm must be 'linf' for the Square attack, got 'l2'"),
        ({"num_queries": -1}, "num_queries must be at least 0, got -1"),
        ({"initial_share": 0.0}, "initial_share must be above 0 and at most 1, got 0.0"),
        ({"initial_share": 1.1}, "initial_share must be above 0 and at most 1, got 1.1"),
        ({"epsilon": -1}, "epsilon must be at least 0, got -1"),
    ],
)
def test_impossible_settings_are_refused(change, message) -> None:
    """Oracle: specification; the message names the parameter and its value."""
    with pytest.raises(ValueError, match=message):
        SquareConfig(**change)


def test_stronger_than_noise_and_weaker_than_gradients(miniature_vae, generators) -> None:
    """Oracle: two bounds (Carlini et al., 2019, section on sanity checks), on the autoencoder and image by image: the
    best of as many random corners of the ball, and PGD, which sees the gradient."""
    pictures = [draw_scene(77, 0).image, draw_dead_leaves(77, 0)]
    clean = torch.stack([from_pil(picture) for picture in pictures])
    objective = reconstruction_objective(miniature_vae, clean)
    queries = 25
    with torch.no_grad():
        sources = generators(2, 3)
        corners = [
            (clean + RADIUS * draw_signs(clean.shape[1:], sources, like=clean)).clamp(-1, 1) for _ in range(queries)
        ]
        noise = torch.stack([objective(corner) for corner in corners]).amax(dim=0)
    squares = square_attack(
        objective, clean, SquareConfig(epsilon=EPSILON, num_queries=queries), generators=generators(0, 1)
    )
    climbed = pgd(objective, clean, PGDConfig(epsilon=EPSILON, step_size=2 / 255, num_steps=5, random_start=False))
    with torch.no_grad():
        assert (noise < objective(squares)).all()
        assert (objective(squares) < objective(climbed)).all()
