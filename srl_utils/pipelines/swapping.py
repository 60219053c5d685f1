"""Exchanging the VAE of a diffusers pipeline, or only its encoder, and everything that must survive that."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

from accelerate.hooks import ModelHook
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor

from srl_utils.autoencoders import AutoencoderSource, downsampling_factor, load_autoencoder, read_config
from srl_utils.errors import UserError
from srl_utils.pipelines.precision import fit_for, note_taken_out

STRUCTURE = ("in_channels", "out_channels", "latent_channels")
FACTORS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
# What enable_slicing, enable_tiling and their users set on a VAE.
MEMORY_SETTINGS = ("use_slicing", "use_tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor")
# Architecture that no weight's shape tells of.
SHAPELESS = ("act_fn", "norm_num_groups")
ENCODER_PARTS = ("encoder", "quant_conv")
DECODER_PARTS = ("decoder", "post_quant_conv")


def swap_vae(
    pipe: DiffusionPipeline,
    vae: AutoencoderKL | str | PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    allow_mismatch: bool = False,
) -> AutoencoderKL:
    """Puts `vae` into `pipe` and returns the VAE that was there: `swap_vae(pipe, previous)` undoes it.

    The newcomer takes over device, dtype, slicing and tiling, and the pipeline's offloading is put on again around
    it. A VAE object of the pipeline's dtype is put in as it is; of one with another dtype a converted copy is, so
    that the caller's weights keep their precision. `force_upcast` stays the newcomer's own: it says what its weights
    bear. One that overflows in a half-precision pipeline all the same is put in as a copy with `force_upcast`, or
    refused if the pipeline would not look at that.

    Args:
        pipe: any pipeline with an `AutoencoderKL` as its `.vae`.
        vae: an `AutoencoderKL`, a folder, or a Hub id.
        subfolder, revision, variant: of a folder or Hub id, as in `from_pretrained`.
        allow_mismatch: accept other scaling and shift factors; the newcomer's then hold.

    Raises:
        UserError: if `pipe` has no such VAE, if `vae` cannot be loaded, or if it does not fit: other channels,
            down-sampling, or factors; or if it overflows in the pipeline's precision.
    """
    previous = _vae_of(pipe)
    replacement = resolve_vae(vae, subfolder=subfolder, revision=revision, variant=variant)
    _check_fit(replacement, previous, allow_mismatch)
    with _offload_suspended(pipe):
        pipe.register_modules(vae=fit_for(pipe, _in_place_of(previous, replacement)))
    note_taken_out(previous)
    return previous


@contextmanager
def robust_vae(
    pipe: DiffusionPipeline, vae: AutoencoderKL | str | PathLike[str], **settings: Any
) -> Iterator[AutoencoderKL]:
    """Within, `pipe` uses `vae`; afterwards its own again, also after an exception. Arguments as for `swap_vae`.

    It is the same object again, in the dtype to which the pipeline may have been moved within.
    """
    previous = swap_vae(pipe, vae, **settings)
    try:
        yield pipe.vae
    except BaseException:
        pipe.vae.to(previous.dtype)  # a call that broke off in fp16 may have left it upcast
        raise
    finally:
        if previous.dtype != pipe.vae.dtype:
            previous.to(pipe.vae.dtype)
        swap_vae(pipe, previous, allow_mismatch=True)


def robustify(
    pipe: DiffusionPipeline,
    vae: AutoencoderKL | str | PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    allow_mismatch: bool = False,
) -> AutoencoderKL:
    """Copies only the encoder of `vae` into the pipeline's own VAE, whose decoder (fine-tuned, say) stays.

    Arguments and errors are those of `swap_vae`; encoders of different architecture are refused as well. Where other
    factors are accepted, the pipeline's own stay.

    Returns:
        The VAE as it was, sharing the decoder's weights: `swap_vae(pipe, previous)` undoes this.
    """
    own = _vae_of(pipe)
    source = resolve_vae(vae, subfolder=subfolder, revision=revision, variant=variant)
    _check_fit(source, own, allow_mismatch)
    with _offload_suspended(pipe):
        _check_same_encoder(source, own)
        upcast = fit_for(pipe, _trial(source, own)).config.force_upcast
        previous = copy.deepcopy(own, {id(tensor): tensor for tensor in _tensors(own, DECODER_PARTS).values()})
        _copy_encoder(source, own)
    if upcast:  # fp16 overflows in the new encoder, whatever the old one bore
        own.register_to_config(force_upcast=True)
    return previous


def resolve_vae(
    vae: AutoencoderKL | str | PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> AutoencoderKL:
    """`vae` itself, or the one loaded from that folder or Hub id in float32.

    Raises:
        UserError: if it is no AutoencoderKL or cannot be loaded.
    """
    if isinstance(vae, AutoencoderKL):
        return vae
    if not isinstance(vae, (str, PathLike)):
        raise UserError(f"expected an AutoencoderKL, a folder or a Hub id, got {type(vae).__name__}")
    source = AutoencoderSource(
        pretrained_model_name_or_path=str(vae), subfolder=subfolder, revision=revision, variant=variant
    )
    read_config(source)
    return load_autoencoder(source)


def _trial(source: AutoencoderKL, own: AutoencoderKL) -> AutoencoderKL:
    """What `robustify` will make of `own`, which stays as it is."""
    trial = copy.deepcopy(own, {id(tensor): tensor for tensor in _tensors(own, DECODER_PARTS).values()})
    _copy_encoder(source, trial)
    trial.register_to_config(force_upcast=own.config.force_upcast or source.config.force_upcast)
    return trial


def _copy_encoder(source: AutoencoderKL, target: AutoencoderKL) -> None:
    for part in ENCODER_PARTS:
        if getattr(target, part) is not None:
            getattr(target, part).load_state_dict(getattr(source, part).state_dict())


def _vae_of(pipe: DiffusionPipeline) -> AutoencoderKL:
    vae = getattr(pipe, "vae", None)
    if not isinstance(vae, AutoencoderKL):
        raise UserError(f"the VAE of this {type(pipe).__name__} is {type(vae).__name__}, not an AutoencoderKL")
    return vae


def _check_fit(candidate: AutoencoderKL, present: AutoencoderKL, allow_mismatch: bool) -> None:
    wanted, got = _signature(present), _signature(candidate)
    differing = [name for name in wanted if got[name] != wanted[name]]
    refused = [name for name in differing if not (allow_mismatch and name in FACTORS)]
    if not refused:
        return
    listed = ", ".join(f"{name} {got[name]} instead of {wanted[name]}" for name in refused)
    hint = " (allow_mismatch=True accepts other factors)" if set(refused) <= set(FACTORS) else ""
    raise UserError(f"this VAE does not fit the pipeline: {listed}{hint}")


def _signature(vae: AutoencoderKL) -> dict[str, Any]:
    """What two VAEs must have in common to serve the same diffusion model."""
    signature = {name: vae.config.get(name) for name in (*STRUCTURE, *FACTORS)}
    signature["down-sampling"] = downsampling_factor(vae.config)
    # From a file these are lists, from code perhaps tuples.
    return {name: list(value) if isinstance(value, tuple) else value for name, value in signature.items()}


def _check_same_encoder(source: AutoencoderKL, own: AutoencoderKL) -> None:
    new, old = _architecture(source), _architecture(own)
    for name in sorted(new.keys() | old.keys()):
        if new.get(name) != old.get(name):
            found, wanted = new.get(name, "absent"), old.get(name, "absent")
            raise UserError(f"the encoders differ in architecture: {name} is {found} instead of {wanted}")


def _architecture(vae: AutoencoderKL) -> dict[str, Any]:
    """What two encoders must have in common to compute the same with the same weights."""
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(vae, ENCODER_PARTS).items()}
    return {name: vae.config[name] for name in SHAPELESS} | shapes


def _tensors(vae: AutoencoderKL, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """Parameters and buffers of the parts that the VAE has, the very objects."""
    weights = vae.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in weights.items() if name.split(".")[0] in parts}


def _in_place_of(previous: AutoencoderKL, replacement: AutoencoderKL) -> AutoencoderKL:
    """`replacement`, or a copy where its dtype must change, set up like `previous`."""
    if replacement.dtype != previous.dtype:
        replacement = copy.deepcopy(replacement).to(previous.dtype)
    replacement.to(previous.device)
    for name in MEMORY_SETTINGS:
        setattr(replacement, name, getattr(previous, name))
    return replacement


@contextmanager
def _offload_suspended(pipe: DiffusionPipeline) -> Iterator[None]:
    """Within, no component carries an offload hook and all weights are at hand; afterwards as before.

    Raises:
        UserError: under a device map, group offloading or another pipeline's hooks, which cannot be put on again.
    """
    if getattr(pipe, "hf_device_map", None) is not None:
        raise UserError("this pipeline has a device map; call pipe.reset_device_map() first")
    if pipe._maybe_raise_error_if_group_offload_active():
        raise UserError("this pipeline has group offloading; exchange the VAE before enable_group_offload")
    if getattr(pipe, "_all_hooks", None):
        enable = pipe.enable_model_cpu_offload
    elif not _offloaded(pipe.vae):
        yield
        return
    elif hasattr(pipe, "_offload_device"):
        enable = pipe.enable_sequential_cpu_offload
    else:
        raise UserError("the VAE is offloaded by another pipeline that shares it; exchange it there")
    pipe.remove_all_hooks()
    try:
        yield
    finally:
        enable(device=pipe._offload_device)


def _offloaded(vae: AutoencoderKL) -> bool:
    return any(isinstance(getattr(part, "_hf_hook", None), ModelHook) for part in vae.modules())
