"""Local Lipschitz constants, paths and re-encoding."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from srl_utils.attacks.draws import image_generators
from srl_utils.geometry.interpolation import path
from srl_utils.geometry.reencoding import reencoded
from srl_utils.geometry.smoothness import local_lipschitz
from srl_utils.vae.codec import Codec


def matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def constants(function, images: Tensor, norm: str, *, num_steps: int = 100) -> Tensor:
    generators = image_generators(0, range(len(images)))
    return local_lipschitz(function, images, norm, generators=generators, num_steps=num_steps)


def test_linear_map_has_its_largest_singular_value() -> None:
    """Oracle: closed form, at any image."""
    weights = matrix(5, 8)
    found = constants(lambda x: x @ weights.T, torch.randn(3, 8), "l2")
    assert torch.allclose(found, torch.linalg.matrix_norm(weights, 2).expand(3), rtol=1e-4)


def test_local_constant_is_that_of_the_place() -> None:
    """Oracle: closed form; x^2 changes by 2|x| times the largest coordinate."""
    images = torch.tensor([[1.0, 3.0], [0.5, -0.2]])
    assert torch.allclose(constants(torch.square, images, "l2"), torch.tensor([6.0, 1.0]), rtol=1e-4)


def test_sign_steps_find_the_worst_signs() -> None:
    """Oracle: closed form for a diagonal map and for one output; all sign vectors, which none exceeds, for any other."""
    images, scale = torch.zeros(4, 6), torch.arange(1.0, 7)
    assert torch.allclose(constants(lambda x: scale * x, images, "linf"), scale.norm().expand(4))
    assert torch.allclose(constants(lambda x: x @ scale[:, None], images, "linf"), scale.sum().expand(4))
    weights = matrix(4, 6)
    worst = max((weights @ torch.tensor(signs)).norm().item() for signs in product((-1.0, 1.0), repeat=6))
    found = constants(lambda x: x @ weights.T, torch.zeros(20, 6), "linf")
    assert found.max().item() == pytest.approx(worst, rel=1e-5)
    assert found.min().item() >= 0.7 * worst


def test_more_steps_never_find_less(tiny_vae, images) -> None:
    """Oracle: the method's monotony, and the change of a real VAE's latents along random directions."""
    codec, pictures = Codec.of(tiny_vae.requires_grad_(False), "tiny"), images(2)
    few, many = (constants(codec.encode, pictures, "l2", num_steps=steps) for steps in (1, 8))
    assert (many >= few * (1 - 1e-5)).all()
    step = 1e-2 * F.normalize(torch.randn(2, pictures[0].numel()), dim=1).view_as(pictures)
    moved = (codec.encode(pictures + step) - codec.encode(pictures)).flatten(1).norm(dim=1) / 1e-2
    assert (moved <= many * 1.02).all()


# --- paths ---


def test_path_of_a_linear_map_is_straight_and_even() -> None:
    """Oracle: closed form."""
    weights = matrix(5, 8)
    found = path(lambda x: x @ weights.T, torch.randn(3, 8), torch.randn(3, 8), num_steps=7)
    assert torch.allclose(found.length, torch.ones(3), atol=1e-4)
    assert torch.allclose(found.worst_jump, torch.ones(3), atol=1e-4)


def test_path_around_a_circle_and_over_a_step() -> None:
    """Oracle: closed form; half a circle is pi/2 diameters long, and a step of a staircase is all of its path."""
    start, end = torch.zeros(1, 1), torch.ones(1, 1)

    def circle(x: Tensor) -> Tensor:
        return torch.cat([(torch.pi * x).cos(), (torch.pi * x).sin()], dim=1)

    assert path(circle, start, end, num_steps=200).length.item() == pytest.approx(torch.pi / 2, rel=1e-3)
    assert path(lambda x: (x > 0.55).float(), start, end, num_steps=10).worst_jump.item() == pytest.approx(10)
    still = path(circle, start, start, num_steps=10)
    assert still.length.item() == still.worst_jump.item() == 1


# --- re-encoding ---


def test_idempotent_reconstruction_changes_nothing_twice(images) -> None:
    """Oracle: closed form; a projection, here on grey images, is done after one pass."""
    grey = dict(reencoded(lambda x: x.mean(dim=1, keepdim=True).expand_as(x), images(2), (1, 2, 5)))
    assert list(grey) == [1, 2, 5] and torch.allclose(grey[1], grey[5], atol=1e-6)


def test_passes_are_counted_and_clipped() -> None:
    """Oracle: closed form; images that grow by 0.3 a pass, until they are white."""
    found = dict(reencoded(lambda x: x + 0.3, torch.zeros(1, 3, 2, 2), (1, 2, 5)))
    assert [each.mean().item() for each in found.values()] == pytest.approx([0.3, 0.6, 1.0])
