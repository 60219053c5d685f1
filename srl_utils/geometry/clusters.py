"""Clusters of latents: what stays near what under an attack, as numbers and as a map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from srl_utils.errors import UserError

LARGEST_PERPLEXITY = 30.0
"""Perplexity of the map, unless there are too few images for it."""
FEWEST_FOR_MAP = 10
"""A map of fewer images shows nothing."""


def median_distance(latents: Tensor) -> float:
    """Return the median Euclidean distance between two different ones of the latents `[n,...]`.

    If all are equal, return their length.
    """
    rows = _rows(latents)
    distances = torch.pdist(rows)
    different = distances[distances > 0]
    return (different if len(different) else rows.norm(dim=1)).median().item()


def own_is_nearest(moved: Tensor, clean: Tensor) -> Tensor:
    """Return for each moved latent `[n,...]` whether none of the clean ones `[n,...]` is nearer than its own, `[n]` bool."""
    # Matrix products would round the distances of equal latents apart.
    distances = torch.cdist(_rows(moved), _rows(clean), compute_mode="donot_use_mm_for_euclid_dist")
    return distances.diagonal() <= distances.amin(dim=1)


def label_silhouette(moved: Tensor, clean: Tensor, labels: Sequence[str]) -> Tensor:
    """Return the silhouette of each moved latent among the clean latents of all other images, `[n]`.

    It is (b - a) / max(a, b): a is the mean distance from the latents of its own label, b that from the nearest other
    label. It is 1 among its like, and below 0 nearer to another label. Of clean latents, it is the silhouette of
    Rousseeuw (1987). An image alone in its label has 0.

    Args:
        moved: latents of the images, clean or attacked, `[n,...]`.
        clean: latents of the same images, clean.
        labels: of the images, at least two different ones.
    """
    names = list(dict.fromkeys(labels))
    member = torch.tensor([[label == name for name in names] for label in labels], device=clean.device).double()
    distances = torch.cdist(_rows(moved), _rows(clean))
    distances.fill_diagonal_(0)  # an image is not compared with itself
    return _silhouette(distances @ member, member, others=member.sum(dim=0) - member)


def image_silhouette(*versions: Tensor) -> Tensor:
    """Return the mean silhouette of the versions of each image, if each image's versions are a cluster, `[n]`.

    Args:
        versions: latents of the n images, `[n,...]` each: clean, noisy, attacked.
    """
    count = len(versions[0])
    rows = torch.cat([_rows(latents) for latents in versions])
    member = torch.eye(count, dtype=rows.dtype, device=rows.device).repeat(len(versions), 1)
    silhouettes = _silhouette(torch.cdist(rows, rows) @ member, member, others=len(versions) - member)
    return silhouettes.view(len(versions), count).mean(dim=0)


def _silhouette(sums: Tensor, member: Tensor, *, others: Tensor) -> Tensor:
    """Return silhouettes `[m]`.

    Args:
        sums: of the distances of each point from the members of each cluster, `[m,k]`.
        member: 1 for a point's own cluster, else 0, `[m,k]`.
        others: members of each cluster except the point itself, `[m,k]`.
    """
    means = sums / others.clamp_min(1)
    own = (means * member).sum(dim=1)
    nearest = means.masked_fill(member.bool(), torch.inf).amin(dim=1)
    alone = (others * member).sum(dim=1) == 0
    size = torch.maximum(own, nearest)
    return torch.where(alone | (size == 0), 0.0, (nearest - own) / size.clamp_min(torch.finfo(size.dtype).tiny))


class LatentMap(NamedTuple):
    """Places of latents in two dimensions."""

    clean: Tensor
    """`[n,2]`."""
    others: list[Tensor]
    """Places of further latents, `[n,2]` each."""
    trustworthiness: float
    """Share of the map's neighbourhoods that is true to the latents, up to 1 (Venna and Kaski 2001)."""


def latent_map(clean: Tensor, others: Sequence[Tensor], *, seed: int) -> LatentMap:
    """Return a t-SNE map fitted to the clean latents, in which the others are placed afterwards.

    The clean latents' places do not depend on the others, so a distance in the map is not a result of the attack's own
    fit. Source: Poličar et al., "Embedding to Reference t-SNE Space", 2019 (`transform` of openTSNE).

    Args:
        clean: `[n,...]`.
        others: further latents, `[m,...]` each.
        seed: of the optimisation.

    Raises:
        UserError: if openTSNE is not installed, or if there are fewer than `FEWEST_FOR_MAP` latents.
    """
    if len(clean) < FEWEST_FOR_MAP:
        raise UserError(f"a map needs at least {FEWEST_FOR_MAP} images, and there are {len(clean)}")
    try:
        from openTSNE import TSNE
        from sklearn.manifold import trustworthiness  # openTSNE needs scikit-learn
    except ImportError:
        raise UserError("a map needs openTSNE; pip install openTSNE") from None
    rows = _rows(clean).cpu().numpy()
    perplexity = min(LARGEST_PERPLEXITY, (len(rows) - 1) / 3)
    fitted = TSNE(perplexity=perplexity, initialization="pca", neighbors="exact", random_state=seed, n_jobs=1).fit(rows)
    placed = [fitted.transform(_rows(latents).cpu().numpy(), perplexity=min(5.0, perplexity)) for latents in others]
    share = trustworthiness(rows, fitted, n_neighbors=min(5, (len(rows) - 1) // 2))
    return LatentMap(torch.tensor(fitted), [torch.tensor(each) for each in placed], float(share))


def _rows(latents: Tensor) -> Tensor:
    """Return latents `[n,...]` as rows of float64."""
    return latents.flatten(1).double()
