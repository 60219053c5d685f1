"""The transformations of the objective `equivariance`."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from srl_utils.attacks.draws import image_generators
from srl_utils.images.pixels import frames_of
from srl_utils.training.similarities import Similarity, draw_similarities, mean_area, members

DRAWN = draw_similarities(image_generators(0, range(4000)), 32)


def test_draws_are_those_of_the_authors() -> None:
    """Oracle: the choices in the authors' code for latents of 32: 1/2 for a transformation, scales of 8/32 to 31/32, and
    one to three quarter turns, each as often as the others (4,000 draws, five standard deviations)."""
    assert Counter(each == Similarity() for each in DRAWN)[True] == pytest.approx(2000, abs=160)
    transformed = [each for each in DRAWN if each != Similarity()]
    scales, turns = (Counter(getattr(each, name) for each in transformed) for name in ("scale", "quarter_turns"))
    assert set(scales) == {Fraction(side, 32) for side in range(8, 32)}
    assert set(turns) == {1, 2, 3}
    assert all(count == pytest.approx(len(transformed) / 24, abs=45) for count in scales.values())
    assert all(count == pytest.approx(len(transformed) / 3, abs=110) for count in turns.values())


def test_an_image_s_draw_does_not_depend_on_its_batch() -> None:
    """Oracle: the draw of each image alone."""
    alone = [draw_similarities(image_generators(0, [number]), 32) for number in range(40)]
    assert [each for (each,) in alone] == DRAWN[:40]


@pytest.mark.parametrize("turns", [0, 1, 3])
@pytest.mark.parametrize("shape", [(2, 4, 32, 32), (2, 3, 256, 256), (2, 3, 5, 64, 64)])
def test_transforming_is_what_the_authors_call(shape: tuple[int, ...], turns: int) -> None:
    """Oracle: `F.interpolate` with a scale factor and `torch.rot90`, as in the authors' code, frame by frame."""
    squares = torch.rand(shape)
    ours = Similarity(Fraction(11, 32), turns)(squares)
    scaled = F.interpolate(frames_of(squares), scale_factor=11 / 32, mode="bilinear", align_corners=False)
    torch.testing.assert_close(frames_of(ours), torch.rot90(scaled, turns, (-1, -2)))
    assert ours.shape[:-2] == squares.shape[:-2] and ours.shape[-1] == shape[-1] * 11 // 32


def test_the_identity_changes_no_bit() -> None:
    """Oracle: the images themselves."""
    squares = torch.rand(2, 3, 8, 8)
    assert torch.equal(Similarity()(squares), squares)


def test_mean_area() -> None:
    """Oracle: the mean of the draws, within five standard deviations."""
    assert mean_area(32) == pytest.approx(sum(float(each.scale) ** 2 for each in DRAWN) / len(DRAWN), abs=0.03)


def test_latents_of_a_single_pixel_keep_their_size() -> None:
    """Oracle: specification, nothing is smaller."""
    assert {each.scale for each in draw_similarities(image_generators(0, range(20)), 1)} == {1}
    assert mean_area(1) == 1


def test_members() -> None:
    """Oracle: the images by hand."""
    small = Similarity(Fraction(1, 2), 1)
    assert members([small, Similarity(), small]) == {small: [0, 2], Similarity(): [1]}
