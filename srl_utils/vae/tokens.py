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
        """Return the number of the nearest code of features `[N,D,h,w]`: `[N,h,w]`, whole numbers; of clips `[N,t,h,w]`."""
        return torch.stack([self.distances(each).argmin(dim=-1) for each in features])

    def distances(self, features: Tensor) -> Tensor:
        """Return the Euclidean distance of the features of one image, `[D,h,w]`, from each code, `[h,w,K]`.

        A large codebook makes this large, so images come one by one.
        """
        rows = features.movedim(0, -1)
        return torch.cdist(rows.flatten(0, -2), self.codes.to(rows)).unflatten(0, rows.shape[:-1])

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
            temperature: `[N]`, in squared units of the features.
        """
        kept = torch.stack([self._kept(*each) for each in zip(features, tokens, temperature, strict=True)])
        return self.flips(features.detach(), tokens) - (kept - kept.detach())

    def _kept(self, features: Tensor, tokens: Tensor, temperature: Tensor) -> Tensor:
        """Return the expected share of an image's tokens that stay `tokens` `[h,w]`, a scalar."""
        probabilities = (-self.distances(features).square() / temperature).softmax(dim=-1)
        return probabilities.gather(-1, tokens[..., None]).mean()

    def error(self, features: Tensor) -> Tensor:
        """Return the mean squared distance of each image's features `[N,D,h,w]` from their nearest codes, `[N]`, above 0."""
        errors = torch.stack([self.distances(each).amin(dim=-1).square().mean() for each in features])
        return errors.clamp_min(torch.finfo(errors.dtype).tiny)


def codebook_of(vae: ModelMixin) -> Codebook | None:
    """Return the codebook of a VAE of any class in `FAMILIES`; None if its latents are continuous."""
    family = find_family(vae)
    if family is None or family.quantizer is None:
        return None
    return Codebook(getattr(vae, family.quantizer).embedding.weight.detach())
