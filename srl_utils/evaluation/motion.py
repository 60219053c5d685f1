"""How far a perturbation moves the latents, which is what a protection needs to change what a diffusion model sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from srl_utils.vae.codec import Codec
from srl_utils.vae.networks import frozen

TRAVEL, SHARE = "latent-travel", "latent-share"
MOTION_METRICS = (TRAVEL, SHARE)
MOST_IMAGES = 64
"""Images whose distances give the unit of `latent-travel`; more would change the median little."""


@torch.no_grad()
def usual_distance(codec: Codec, images: Tensor, batch_size: int) -> float:
    """Return the median distance between the latents of two images, Euclidean; of equal images or a single one, its latents' length.

    Args:
        codec: the VAE.
        images: `[n,3,H,W]` in [-1,1], on the CPU; the first `MOST_IMAGES` are used.
        batch_size: images encoded at a time.
    """
    with frozen(codec.encoder):
        batches = [codec.encode(batch.to(codec.device)) for batch in images[:MOST_IMAGES].split(batch_size)]
    latents = torch.cat(batches).flatten(1).double()
    distances = torch.pdist(latents)
    return (distances if distances.any() else latents.norm(dim=1)).median().item()


def motion(
    codec: Codec, clean: Tensor, shown: Tensor, *, unit: float, wanted: Sequence[str], goal: Tensor | None = None
) -> dict[str, Tensor]:
    """Return how far perturbed images' latents z' are from those of the clean ones, z, by metric, `[N]` each.

    `latent-travel` is |z' - z| over `unit`. `latent-share` is the share of the way from z to the goal g that was
    gone, 1 - |z' - g| / |z - g|: 1 at the goal, 0 where z' is as far from it as z.

    Args:
        codec: the VAE.
        clean: `[N,3,H,W]` in [-1,1], on the VAE's device.
        shown: the perturbed images.
        unit: the distance of two images' latents, of `usual_distance`.
        wanted: names of the metrics.
        goal: latents that a targeted attack aims at, `[N,C,h,w]`; None for an attack without a target.
    """
    if goal is None:
        wanted = [name for name in wanted if name != SHARE]
    if not wanted:
        return {}
    before, after = codec.encode(clean), codec.encode(shown)
    values = {TRAVEL: _distance(after, before) / unit}
    if goal is not None:
        values[SHARE] = 1 - _distance(after, goal) / _distance(before, goal).clamp_min(torch.finfo(before.dtype).tiny)
    return {name: values[name] for name in wanted}


def _distance(latents: Tensor, others: Tensor) -> Tensor:
    """Return the Euclidean distance of each latent `[N,C,h,w]` from the other one, `[N]`."""
    return (latents - others).flatten(1).norm(dim=1)
