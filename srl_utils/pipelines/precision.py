"""Reconstruct images without overflow in half precision."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from srl_utils.errors import UserError
from srl_utils.vae.families import family_of
from srl_utils.vae.files import check_parameters
from srl_utils.vae.latents import looks_at
from srl_utils.vae.networks import LatentDecoder, LatentEncoder, downsampling_factor, split_moments

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)
PROBE_SIDE = 8  # latent pixels


def reconstruct(images: Tensor, vae: ModelMixin, *, tiled: bool = False) -> Tensor:
    """Encode and decode images by the posterior's mean.

    The VAE computes in its own dtype; an fp16 VAE with `force_upcast` computes in float32. If half precision gives
    values of an image that are not finite, a float32 copy computes that image again. `vae` never changes, so threads
    may share it.

    Args:
        images: `[N,3,H,W]` in [-1,1]; sides are multiples of the down-sampling factor.
        vae: of a class in `FAMILIES`; it may be offloaded.
        tiled: process the images in the VAE's overlapping tiles.

    Returns:
        `[N,3,H,W]` float32, about in [-1,1], on the device where `vae` computes.

    Raises:
        UserError: if float32 does not give finite values either.
    """
    device = execution_device(vae)
    half = vae.dtype in HALF or torch.is_autocast_enabled(device.type)
    if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
        finite = torch.zeros(len(images), dtype=torch.bool)
        outcome = torch.empty(images.shape, device=device)
    else:
        outcome, finite = _attempt(images, vae, tiled)
        if half and not finite.all():
            logger.warning("the VAE overflows in half precision; computed in float32: %d images", int((~finite).sum()))
    if half and not finite.all():
        again = (~finite).nonzero().flatten()
        with torch.autocast(device.type, enabled=False):
            outcome[again.to(device)], finite[again] = _attempt(
                images[again.to(images.device)], frozen_in_float32(vae), tiled
            )
    if not finite.all():
        raise _not_finite(vae)
    return outcome


def execution_device(vae: ModelMixin) -> torch.device:
    """Return the device on which `vae` computes; an offloading pipeline keeps its weights elsewhere in between."""
    # accelerate has no public query for the hooks of a module.
    hooks = (getattr(module, "_hf_hook", None) for module in vae.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((torch.device(device) for device in devices if device is not None), vae.device)


def frozen_in_float32(vae: ModelMixin) -> ModelMixin:
    """Return a frozen twin in float32; it shares the weights that are in float32 already, and the offload hooks."""
    hooks = (getattr(module, "_hf_hook", None) for module in vae.modules())  # they lead to the rest of a pipeline
    shared: dict[int, Any] = {id(hook): hook for hook in hooks if hook is not None}
    weights = {id(weight): nn.Parameter(weight.detach().float(), requires_grad=False) for weight in vae.parameters()}
    return copy.deepcopy(vae, shared | weights).float()


def fit_for(pipe: DiffusionPipeline, vae: ModelMixin) -> ModelMixin:
    """Return `vae`, or a copy with `force_upcast` if it overflows in half precision and `pipe` obeys that setting.

    A random image is encoded and decoded to find out.

    Raises:
        UserError: if `vae` overflows and `pipe` would not compute it in float32.
    """
    if vae.dtype not in HALF or _upcasts(pipe, vae) or _bears_half(vae):
        return vae
    upcast = copy.deepcopy(vae)
    upcast.register_to_config(force_upcast=True)
    if not _upcasts(pipe, upcast):
        raise UserError(
            f"this VAE returns values that are not finite in {_name(vae.dtype)}, in which the {type(pipe).__name__} "
            "computes; load the pipeline with torch_dtype=torch.float32 (of fp16, bfloat16 may do)"
        )
    return upcast


def _attempt(images: Tensor, vae: ModelMixin, tiled: bool) -> tuple[Tensor, Tensor]:
    """Return reconstructions in float32 and, on the CPU, whether each reconstruction and its latent are finite."""
    view = copy.copy(vae)  # shares the modules of `vae`, but not its tiling
    view.use_tiling = getattr(vae, "use_tiling", False) or (tiled and family_of(vae).tiling)
    with torch.no_grad():
        latents = split_moments(LatentEncoder(view)(images.to(execution_device(vae), vae.dtype))).mean
        outcome = LatentDecoder(view)(latents.to(vae.dtype))
    finite = latents.isfinite().flatten(1).all(dim=1) & outcome.isfinite().flatten(1).all(dim=1)
    return outcome.float(), finite.cpu()


def _not_finite(vae: ModelMixin) -> UserError:
    name = vae.config.get("_name_or_path") or type(vae).__name__
    try:
        if vae.device.type != "meta":  # offloaded weights cannot be checked here
            check_parameters(vae, name)
    except UserError as error:
        return error
    return UserError(f"the VAE '{name}' returns values that are not finite, in float32 too; use another one")


@torch.no_grad()
def _bears_half(vae: ModelMixin) -> bool:
    side = PROBE_SIDE * downsampling_factor(vae)
    noise = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return bool(_attempt(noise, vae, tiled=False)[1].all())


def _upcasts(pipe: DiffusionPipeline, vae: ModelMixin) -> bool:
    """Return whether `pipe` computes `vae` in float32.

    Only pipelines of the SDXL family obey `force_upcast`, and only in fp16.
    """
    if vae.dtype != torch.float16 or not vae.config.get("force_upcast"):
        return False
    return looks_at(pipe.__class__, "force_upcast")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
