"""Discrete latents: the codes of its codebook that an autoencoder reads in an image.

The latents of such an autoencoder, as `Codec.encode` gives them, are features; its decoder replaces each by the nearest
code. The number of that code is the token that a model of tokens sees.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import ModelMixin
from torch import Tensor

from srl_utils.vae.families import find_family


class Codebook(NamedTuple):
    """The codes of an autoencoder, `[K,D]`."""

    codes: Tensor

    def tokens(self, features: Tensor) -> Tensor:
        """Return the number of the nearest code of features `[N,D,h,w]`: `[N,h,w]`, whole numbers."""
        return self.distances(features).argmin(dim=-1)

    def distances(self, features: Tensor) -> Tensor:
        """Return the Euclidean distance of features `[N,D,h,w]` from each code, `[N,h,w,K]`."""
        count, _, height, width = features.shape
        rows = features.permute(0, 2, 3, 1).flatten(0, 2)
        return torch.cdist(rows, self.codes.to(rows)).view(count, height, width, -1)

    def flips(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Return the share of an image's tokens that are not `tokens` `[N,h,w]`, `[N]`."""
        return (self.tokens(features) != tokens).flatten(1).float().mean(dim=1)

    def straight_through_flips(self, features: Tensor, tokens: Tensor, temperature: Tensor) -> Tensor:
        """Return `flips` with a gradient: that of the share expected if tokens were drawn by their distance.

        A token is drawn with a probability proportional to exp(-distance^2 / temperature), as in the straight-through
        estimator of a categorical choice (Bengio et al., arXiv 1308.3432; Jang et al., ICLR 2017).

        Args:
            features: `[N,D,h,w]`.
            tokens: `[N,h,w]`.
            temperature: in squared units of the features, as a scalar tensor.
        """
        probabilities = (-self.distances(features).square() / temperature).softmax(dim=-1)
        kept = probabilities.gather(-1, tokens[..., None]).flatten(1).mean(dim=1)
        return self.flips(features.detach(), tokens) - (kept - kept.detach())

    def error(self, features: Tensor) -> Tensor:
        """Return the mean squared distance of features `[N,D,h,w]` from their nearest codes, a scalar above 0."""
        nearest = self.distances(features).amin(dim=-1)
        return nearest.square().mean().clamp_min(torch.finfo(nearest.dtype).tiny)


def codebook_of(vae: ModelMixin) -> Codebook | None:
    """Return the codebook of a VAE of any class in `FAMILIES`; None if its latents are continuous."""
    family = find_family(vae)
    if family is None or family.quantizer is None:
        return None
    return Codebook(getattr(vae, family.quantizer).embedding.weight.detach())
