"""Scale a VAE's raw latents for a diffusion model, as the VAE's configuration says.

The formulas are those of diffusers' pipelines: `prepare_latents` encodes by `scale`, and `unscale` precedes the
decoder.

| configuration | pipeline | to the denoiser |
|---|---|---|
| `scaling_factor` | Stable Diffusion 1, 2, XL; SVD; LDM | `latents * scaling_factor` |
| and `shift_factor` | Stable Diffusion 3, Flux | `(latents - shift_factor) * scaling_factor` |
| and both `latents_mean` and `latents_std` | Playground 2.5 (XL) | `(latents - mean) * scaling_factor / std` |

A pipeline ignores the entries of the other rows; Stable Diffusion 1 and 2 use `scaling_factor` alone. Models that
normalise latents elsewhere (Wan and Qwen without a `scaling_factor`, Flux 2 with a batch norm in the VAE) need their
formula in `LatentScale.of`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from inspect import getsource
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

IGNORED_BY_SOME = ("shift_factor", "latents_mean", "latents_std")


@dataclass(frozen=True, eq=False)
class LatentScale:
    """The map `(latents - shift) * factor` from raw latents `[...,C,h,w]` to those of the denoiser, and back."""

    shift: float | Tensor = 0.0
    """In raw units; a tensor is `[C,1,1]`."""
    factor: float | Tensor = 1.0
    """Never 0; a tensor is `[C,1,1]`."""

    @classmethod
    def of(cls, config: Mapping[str, Any], pipe: DiffusionPipeline | None = None) -> LatentScale:
        """Return the scale that the configuration of a VAE of any class describes.

        As in diffusers, entries that are absent or None change nothing. `latents_mean` and `latents_std` have an effect
        only together, and then replace `shift_factor`.

        Args:
            config: the VAE's configuration.
            pipe: a pipeline; entries of the configuration that it ignores are left out.
        """
        if pipe is not None:
            ignored = {name for name in IGNORED_BY_SOME if not looks_at(pipe.__class__, name)}
            config = {name: value for name, value in config.items() if name not in ignored}
        factor = config.get("scaling_factor") or 1.0
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if mean is None or deviation is None:
            return cls(config.get("shift_factor") or 0.0, factor)
        return cls(_per_channel(mean), factor / _per_channel(deviation))

    def scale(self, latents: Tensor) -> Tensor:
        """Return raw latents as the denoiser sees them, in the same shape, dtype and device."""
        return (latents - _like(self.shift, latents)) * _like(self.factor, latents)

    def unscale(self, latents: Tensor) -> Tensor:
        """Return the denoiser's latents as the decoder takes them: the inverse of `scale`."""
        return latents / _like(self.factor, latents) + _like(self.shift, latents)

    def factor_on(self, device: torch.device) -> float | Tensor:
        """Return `factor`, a tensor moved to `device`."""
        return self.factor.to(device) if isinstance(self.factor, Tensor) else self.factor


@cache
def looks_at(pipeline: type[DiffusionPipeline], entry: str) -> bool:
    """Return whether a pipeline's code in diffusers looks at this entry of the VAE's configuration."""
    classes = (kind for kind in pipeline.__mro__ if kind.__module__.startswith("diffusers."))
    return any(f"config.{entry}" in getsource(kind) for kind in classes)


def _per_channel(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)


def _like(value: float | Tensor, latents: Tensor) -> float | Tensor:
    """Return a tensor in the dtype and on the device of `latents`; a number as it is."""
    return value.to(latents) if isinstance(value, Tensor) else value
