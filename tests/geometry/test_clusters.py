"""Clusters of latents."""

from __future__ import annotations

import sys

import pytest
import torch

from srl_utils.errors import UserError
from srl_utils.geometry.clusters import (
    image_silhouette,
    label_silhouette,
    latent_map,
    median_distance,
    own_is_nearest,
)


def latents(count: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 2, 3, 3, generator=torch.Generator().manual_seed(seed))


def test_silhouettes_are_those_of_scikit_learn() -> None:
    """Oracle: `sklearn.metrics.silhouette_samples`, by labels, and with each image's versions as a cluster."""
    metrics = pytest.importorskip("sklearn.metrics")
    clean, noisy = latents(12), latents(12) + 0.5 * latents(12, seed=1)
    labels = [*"aabbbccccca", "alone"]
    expected = torch.tensor(metrics.silhouette_samples(clean.flatten(1).double().numpy(), labels))
    assert torch.allclose(label_silhouette(clean, clean, labels), expected, atol=1e-9)
    rows = torch.cat([clean, noisy]).flatten(1).double().numpy()
    each = torch.tensor(metrics.silhouette_samples(rows, [*range(12)] * 2))
    assert torch.allclose(image_silhouette(clean, noisy), each.view(2, 12).mean(dim=0), atol=1e-9)


def test_a_latent_that_moved_to_another_label_has_a_negative_silhouette() -> None:
    """Oracle: closed form; four points on a line, of which the first moved among the others."""
    clean = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    moved = torch.tensor([[10.0], [1.0], [10.0], [11.0]])
    found = label_silhouette(moved, clean, [*"aabb"])
    assert found[0].item() == pytest.approx((0.5 - 9) / 9)
    assert found[1].item() == pytest.approx((9.5 - 1) / 9.5)


def test_nearest_latent_is_counted() -> None:
    """Oracle: counting; the first latent moved onto the second one's place."""
    clean = torch.tensor([[0.0], [1.0], [2.0]])
    assert own_is_nearest(torch.tensor([[0.9], [1.1], [9.0]]), clean).tolist() == [False, True, True]
    twice = latents(40).repeat(2, 1, 1, 1)
    assert own_is_nearest(twice + 1e-3, twice).all()  # an equal image is not nearer


def test_median_distance_of_points_on_a_line() -> None:
    """Oracle: closed form; and the length where there is no distance."""
    assert median_distance(torch.tensor([[0.0], [1.0], [10.0]])) == 9
    assert median_distance(torch.tensor([[3.0, 4.0]])) == 5
    assert (
        median_distance(torch.tensor([[0.0], [0.0], [0.0], [2.0]])) == 2
    )  # equal images say nothing of the usual distance


def test_map_keeps_groups_apart_and_places_others_in_them() -> None:
    """Oracle: three far groups; each placed latent is nearest to its own group. Trustworthiness is scikit-learn's."""
    pytest.importorskip("openTSNE")
    manifold = pytest.importorskip("sklearn.manifold")
    groups = 30 * torch.eye(3).repeat(6, 1)
    clean = groups + torch.randn(18, 3, generator=torch.Generator().manual_seed(0))
    moved = groups + torch.randn(18, 3, generator=torch.Generator().manual_seed(1))
    found = latent_map(clean, [moved], seed=0)
    nearest = torch.cdist(found.others[0], found.clean).argmin(dim=1)
    assert (nearest % 3 == torch.arange(18) % 3).all()
    expected = manifold.trustworthiness(clean.double().numpy(), found.clean.numpy(), n_neighbors=5)
    assert found.trustworthiness == pytest.approx(expected)
    assert torch.equal(found.clean, latent_map(clean, [moved], seed=0).clean)


def test_map_without_its_package_or_images_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: specification; one line that says what is missing."""
    with pytest.raises(UserError, match="at least 10 images, and there are 9"):
        latent_map(latents(9), [], seed=0)
    monkeypatch.setitem(sys.modules, "openTSNE", None)
    with pytest.raises(UserError, match="pip install openTSNE"):
        latent_map(latents(10), [], seed=0)
