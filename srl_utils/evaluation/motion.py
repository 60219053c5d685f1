"""How far a perturbation moves the latents, which is what a protection needs to change what a diffusion model sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from srl_utils.attacks.draws import Generators
from srl_utils.geometry.clusters import median_distance
from srl_utils.vae.codec import Codec
from srl_utils.vae.networks import frozen

TRAVEL, SHARE, FLIPS = "latent-travel", "latent-share", "token-flips"
MOTION_METRICS = (TRAVEL, SHARE, FLIPS)
USE = "codebook-use"
MOST_IMAGES = 64
"""Images whose distances give the unit of `latent-travel`; more would change the median little."""


@torch.no_grad()
def usual_distance(codec: Codec, images: Tensor, batch_size: int) -> float:
    """Return the median Euclidean distance between the latents of two images.

    Of equal images, or of a single one, return the length of the latents.

    Args:
        codec: the VAE.
        images: `[n,3,H,W]` in [-1,1], on the CPU; the first `MOST_IMAGES` are used.
        batch_size: images encoded at a time.
    """
    with frozen(codec.encoder):
        batches = [codec.encode(batch.to(codec.device)) for batch in images[:MOST_IMAGES].split(batch_size)]
    return median_distance(torch.cat(batches))


@torch.no_grad()
def codebook_use(codec: Codec, images: Tensor, batch_size: int) -> float | None:
    """Return the share of the codes that are tokens of an image; None for continuous latents.

    Args:
        codec: the VAE.
        images: `[n,3,H,W]` in [-1,1], on the CPU.
        batch_size: images encoded at a time.
    """
    if codec.codebook is None:
        return None
    with frozen(codec.encoder):
        batches = [codec.codebook.tokens(codec.encode(part.to(codec.device))) for part in images.split(batch_size)]
    return len(torch.cat(batches).unique()) / len(codec.codebook.codes)


def motion(
    codec: Codec,
    clean: Tensor,
    shown: Tensor,
    *,
    wanted: Sequence[str],
    unit: float | None = None,
    goal: Tensor | None = None,
    draws: Callable[[], Generators] | None = None,
) -> dict[str, Tensor]:
    """Return how far perturbed images' latents z' are from those of the clean ones, z, by metric, `[N]` each.

    `latent-travel` is |z' - z| over `unit`. `latent-share` is the share of the way from z to the goal g that was
    gone, 1 - |z' - g| / |z - g|: 1 at the goal, 0 where z' is as far from it as z. `token-flips` is the share of the
    tokens of discrete latents that changed.

    Args:
        codec: the VAE.
        clean: `[N,3,H,W]` in [-1,1], on the VAE's device.
        shown: the perturbed images.
        wanted: names of the metrics; those that lack what they need are left out.
        unit: the distance of two images' latents, of `usual_distance`, for `latent-travel`.
        goal: latents that a targeted attack aims at, `[N,C,h,w]`; None for an attack without a target.
        draws: makes the generators of a purifier in front of the VAE. Clean and perturbed images get the same draws, so that
            what the purifier draws is not taken for a move.
    """
    codebook = codec.codebook
    known = {TRAVEL: unit is not None, SHARE: goal is not None, FLIPS: codebook is not None}
    if not any(known[name] for name in wanted):
        return {}

    def latents(images: Tensor) -> Tensor:
        with nullcontext() if draws is None else codec.drawing(draws()):
            return codec.encode(images)

    before, after = latents(clean), latents(shown)
    values = {}
    if unit is not None:
        values[TRAVEL] = _distance(after, before) / unit
    if goal is not None:
        values[SHARE] = 1 - _distance(after, goal) / _distance(before, goal).clamp_min(torch.finfo(before.dtype).tiny)
    if codebook is not None:
        values[FLIPS] = codebook.flips(after, codebook.tokens(before))
    return {name: value for name, value in values.items() if name in wanted}


def _distance(latents: Tensor, others: Tensor) -> Tensor:
    """Return the Euclidean distance of each latent `[N,C,h,w]` from the other one, `[N]`."""
    return (latents - others).flatten(1).norm(dim=1)
