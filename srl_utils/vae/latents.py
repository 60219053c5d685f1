"""Scale a VAE's raw latents for a diffusion model, as the VAE's configuration or its buffers say.

The formulas are those of diffusers' pipelines: `prepare_latents` encodes by `scale`, and `unscale` precedes the
decoder.

| configuration | pipeline | to the denoiser |
|---|---|---|
| `scaling_factor` | Stable Diffusion 1, 2, XL; SVD; LDM; Hunyuan | `latents * scaling_factor` |
| and `shift_factor` | Stable Diffusion 3, Flux | `(latents - shift_factor) * scaling_factor` |
| and both `latents_mean` and `latents_std` | Playground 2.5 (XL) | `(latents - mean) * scaling_factor / std` |
| these two alone | Wan, Qwen-Image, Mochi | `(latents - mean) / std` |
| and `invert_scale_latents` | CogVideoX 1.5, the image of image-to-video | `latents / scaling_factor` |
| buffers `latents_mean` and `latents_std` | LTX, LTX-2 | `(latents - mean) * scaling_factor / std` |
| buffers `bn.running_mean` and `bn.running_var` | Flux 2 | of 2x2 patches, `(latents - mean) / sqrt(var + eps)` |

A pipeline ignores the entries of the other rows; Stable Diffusion 1 and 2 use `scaling_factor` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from inspect import getsource
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, DiffusionPipeline, ModelMixin
from torch import Tensor

IGNORED_BY_SOME = ("shift_factor", "latents_mean", "latents_std")


@dataclass(frozen=True, eq=False)
class LatentScale:
    """The map `(latents - shift) * factor` from raw latents `[N,C,(t,)h,w]` to those of the denoiser, and back.

    A denoiser that sees patches of p x p latents has its own shift and factor for each place in a patch. Latents keep
    their raw layout here, since distances do not depend on it.
    """

    shift: float | Tensor = 0.0
    """In raw units; a tensor has a value per channel, `[C]`, or per channel and place in a patch, `[C*p*p]`."""
    factor: float | Tensor = 1.0
    """Never 0; a tensor is as in `shift`."""
    patch: int = 1
    """Side p of the patches."""

    @classmethod
    def of(cls, vae: ModelMixin, pipe: DiffusionPipeline | None = None) -> LatentScale:
        """Return the scale of a VAE of any class.

        Args:
            vae: the VAE.
            pipe: a pipeline; entries of the configuration that it ignores are left out.
        """
        if isinstance(vae, AutoencoderKLFlux2):
            deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
            return cls(vae.bn.running_mean.clone(), 1 / deviation, vae.config.patch_size[0])
        statistics = dict(vae.named_buffers(recurse=False))
        if "latents_mean" in statistics:
            return cls(statistics["latents_mean"].clone(), vae.config.scaling_factor / statistics["latents_std"])
        if (
            pipe is not None
            and vae.config.get("invert_scale_latents")
            and looks_at(pipe.__class__, "invert_scale_latents")
        ):
            return cls(factor=1 / vae.config.scaling_factor)
        return cls.configured(vae.config, pipe)

    @classmethod
    def configured(cls, config: Mapping[str, Any], pipe: DiffusionPipeline | None = None) -> LatentScale:
        """Return the scale that a configuration describes.

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
        return cls(torch.tensor(mean), factor / torch.tensor(deviation))

    def scale(self, latents: Tensor) -> Tensor:
        """Return raw latents as the denoiser sees them, in the same shape, dtype and device."""
        return (latents - self._spread(self.shift, latents)) * self.factor_for(latents)

    def unscale(self, latents: Tensor) -> Tensor:
        """Return the denoiser's latents as the decoder takes them: the inverse of `scale`."""
        return latents / self.factor_for(latents) + self._spread(self.shift, latents)

    def factor_for(self, latents: Tensor) -> float | Tensor:
        """Return the factor of each raw latent, as a number or a tensor that suits the shape, dtype and device of `latents`."""
        return self._spread(self.factor, latents)

    def on(self, device: torch.device) -> LatentScale:
        """Return the same scale with its tensors on `device`."""
        shift, factor = (each.to(device) if isinstance(each, Tensor) else each for each in (self.shift, self.factor))
        return replace(self, shift=shift, factor=factor)

    def _spread(self, value: float | Tensor, latents: Tensor) -> float | Tensor:
        if not isinstance(value, Tensor):
            return value
        value = value.to(latents).view(-1, *[1] * (latents.ndim - 2))
        if self.patch == 1:
            return value
        height, width = (side // self.patch for side in latents.shape[-2:])
        return F.pixel_shuffle(value.expand(-1, height, width), self.patch)


RAW = LatentScale()
"""Latents as the encoder gives them."""


@cache
def looks_at(pipeline: type[DiffusionPipeline], entry: str) -> bool:
    """Return whether a pipeline's code in diffusers looks at this entry of the VAE's configuration."""
    classes = (kind for kind in pipeline.__mro__ if kind.__module__.startswith("diffusers."))
    return any(f"config.{entry}" in getsource(kind) for kind in classes)
