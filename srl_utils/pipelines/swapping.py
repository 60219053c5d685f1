"""Exchange the VAE of a diffusers pipeline, or only its encoder, and keep the pipeline's settings."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from accelerate.hooks import ModelHook
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from srl_utils.errors import UserError, WrongType
from srl_utils.pipelines.precision import fit_for
from srl_utils.vae.families import FAMILIES, family_of, find_family
from srl_utils.vae.files import LATENT_CHANNELS, short
from srl_utils.vae.loading import AutoencoderSource, load_autoencoder
from srl_utils.vae.networks import downsampling_factor

NAMES = ("vae", "movq", "vqvae")
"""Names under which pipelines hold their VAE: movq those of Kandinsky, vqvae those with discrete latents."""
STRUCTURE = ("in_channels", "out_channels", *LATENT_CHANNELS)
FACTORS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "invert_scale_latents")
BUFFERS = ("bn.running_mean", "bn.running_var", "latents_mean", "latents_std")
"""Buffers that hold factors: of Flux 2 and of LTX."""
STATISTICS = tuple(f"the buffer {name}" for name in BUFFERS)
# Attributes that enable_slicing, enable_tiling and their users set on a VAE.
MEMORY_SETTINGS = re.compile(r"use_(slicing|tiling|framewise_\w+)|tile_.*|num_\w+_batch_size")
# Parts of the architecture that do not show in the shape of any weight.
SHAPELESS = ("act_fn", "norm_num_groups")
COMPILED = "_orig_mod"  # torch.compile has no public way back to the module that it wraps
_TAKEN_OUT: WeakKeyDictionary[DiffusionPipeline, WeakSet[ModelMixin]] = WeakKeyDictionary()
"""The VAEs that each pipeline has had: they fit it, so putting one back needs no `allow_mismatch`."""


def swap_vae(
    pipe: DiffusionPipeline,
    vae: ModelMixin | str | PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    allow_mismatch: bool = False,
) -> ModelMixin:
    """Put `vae` into `pipe` and return the VAE that was there; `swap_vae(pipe, previous)` undoes it.

    Only `pipe` changes. Pipelines that share its components, such as those from `from_pipe`, keep their VAE; swap each
    of them. A pipeline that `from_pipe` makes later gets the new VAE.

    The new VAE takes over device, dtype, slicing, tiling and offloading. A VAE object of the pipeline's dtype is used
    itself, and so changes for other pipelines that use it. A VAE object of another dtype is copied and converted. The
    new VAE keeps its own `force_upcast`. If it overflows in a half-precision pipeline all the same, a copy with
    `force_upcast` is used, or the VAE is refused if the pipeline ignores that setting.

    Args:
        pipe: any pipeline whose VAE is of a class in `FAMILIES`; it may be called `vae`, `movq` or `vqvae`.
        vae: such a VAE, a folder, a single file, or a Hub id.
        subfolder: folder of the VAE inside `vae`, as in `from_pretrained`.
        revision: branch, tag or commit of a Hub id.
        variant: variant of the weight files, such as fp16.
        allow_mismatch: accept, and use, other scaling and shift factors. A VAE object that `pipe` had before is always
            accepted.

    Raises:
        MissingFile: a FileNotFoundError, if there is no VAE at that place.
        WrongType: a TypeError, if `vae` or the VAE of `pipe` is of another class.
        UserError: a ValueError and the base of both, if `vae` cannot be loaded; if its channels, down-sampling or
            factors do not fit; if `pipe` has a device map, group offloading or another pipeline's hooks; or if `vae`
            overflows in the pipeline's precision.
    """
    previous = vae_of(pipe)
    replacement = resolve_vae(vae, subfolder=subfolder, revision=revision, variant=variant)
    _check_newcomer(replacement, pipe, allow_mismatch)
    with _offload_suspended(pipe):
        newcomer = _in_place_of(previous, replacement)
        _register(pipe, newcomer if _had(pipe, replacement) else fit_for(pipe, newcomer))
    return previous


@contextmanager
def robust_vae(pipe: DiffusionPipeline, vae: ModelMixin | str | PathLike[str], **settings: Any) -> Iterator[ModelMixin]:
    """Use `vae` in `pipe` within the context, and the pipeline's own VAE again afterwards, also after an exception.

    The same object returns, in the pipeline's dtype if that has changed within. A VAE object that is passed as `vae`
    gets back its own slicing and tiling. Arguments and errors are those of `swap_vae`.
    """
    settings_before = _memory_settings(vae) if isinstance(vae, ModelMixin) else {}
    dtype = _dtype_beside_vae(pipe)
    previous = swap_vae(pipe, vae, **settings)
    try:
        yield vae_of(pipe)
    except BaseException:
        if _dtype_beside_vae(pipe) == dtype:
            vae_of(pipe).to(previous.dtype)  # a call that failed in fp16 may have left it in float32
        raise
    finally:
        if previous.dtype != vae_of(pipe).dtype:
            previous.to(vae_of(pipe).dtype)
        swap_vae(pipe, previous)
        for name, value in settings_before.items():
            setattr(vae, name, value)


def robustify(
    pipe: DiffusionPipeline,
    vae: ModelMixin | str | PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    allow_mismatch: bool = False,
) -> ModelMixin:
    """Give the VAE of `pipe` the encoder of `vae`; its own decoder, which may be fine-tuned, stays.

    A copy of the pipeline's VAE is used, which shares no weight with the original, so other pipelines with the same VAE
    keep their encoder. Compiled parts are not compiled in the copy.

    Arguments and errors are those of `swap_vae`. An encoder of another architecture is refused too. If other factors
    are accepted, the pipeline's own stay.

    Returns:
        The VAE object that was there; `swap_vae(pipe, previous)` undoes the change.
    """
    previous = vae_of(pipe)
    source = resolve_vae(vae, subfolder=subfolder, revision=revision, variant=variant)
    _check_newcomer(source, pipe, allow_mismatch)
    with _offload_suspended(pipe):
        _check_same_encoder(source, previous)
        robust = _plain_copy(previous)
        for part in _encoder_parts(source):
            getattr(robust, part).load_state_dict(_plain(getattr(source, part)).state_dict())
        if source.config.get("force_upcast"):  # the new encoder overflows in fp16, even if the old one does not
            robust.register_to_config(force_upcast=True)
        _register(pipe, fit_for(pipe, robust))
    return previous


def resolve_vae(
    vae: ModelMixin | str | PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> ModelMixin:
    """Return `vae` itself, or the VAE loaded in float32 from a folder, a single file or a Hub id.

    Raises:
        WrongType: a TypeError, if it is neither.
        UserError: a ValueError, if it cannot be loaded; see `load_autoencoder`.
    """
    if isinstance(vae, ModelMixin) and find_family(vae):
        return vae
    if not isinstance(vae, (str, PathLike)):
        raise WrongType(
            f"expected a VAE, a folder or a Hub id, got {type(vae).__name__}; the classes of VAEs are {', '.join(FAMILIES)}"
        )
    source = AutoencoderSource(
        pretrained_model_name_or_path=str(vae), subfolder=subfolder, revision=revision, variant=variant
    )
    return load_autoencoder(source)


def vae_of(pipe: DiffusionPipeline) -> ModelMixin:
    """Return the VAE of a pipeline.

    Raises:
        WrongType: a TypeError, if it has none or one of a class that is not in `FAMILIES`.
    """
    vae = getattr(pipe, _name(pipe))
    if find_family(vae) is None:
        raise WrongType(
            f"the VAE of this {type(pipe).__name__} is {type(vae).__name__}; supported are {', '.join(FAMILIES)}"
        )
    return vae


def _name(pipe: DiffusionPipeline) -> str:
    """Return the name under which a pipeline holds its VAE."""
    name = next((name for name in NAMES if getattr(pipe, name, None) is not None), None)
    if name is None:
        raise WrongType(f"this {type(pipe).__name__} has no VAE")
    return name


def _register(pipe: DiffusionPipeline, vae: ModelMixin) -> None:
    _TAKEN_OUT.setdefault(pipe, WeakSet()).add(vae_of(pipe))
    pipe.register_modules(**{_name(pipe): vae})


def _had(pipe: DiffusionPipeline, vae: ModelMixin) -> bool:
    """Return whether `vae` is or was in `pipe`: putting it back never fails."""
    return vae is vae_of(pipe) or vae in _TAKEN_OUT.get(pipe, ())


def _check_newcomer(candidate: ModelMixin, pipe: DiffusionPipeline, allow_mismatch: bool) -> None:
    """Raise a UserError unless `candidate` fits `pipe` and its weights are loaded."""
    if _had(pipe, candidate):
        return
    if _offloaded(candidate):
        raise UserError(
            "the VAE given is offloaded by another pipeline; call remove_all_hooks() there first, or give its folder"
        )
    _check_fit(candidate, vae_of(pipe), allow_mismatch)


def _check_fit(candidate: ModelMixin, present: ModelMixin, allow_mismatch: bool) -> None:
    lacking = _decoding_options(present) - _decoding_options(candidate)
    if lacking:
        kinds = f"a {type(candidate).__name__} cannot replace a {type(present).__name__}"
        raise UserError(f"{kinds}: its decode takes no {', '.join(sorted(lacking))}")
    wanted, got = _signature(present), _signature(candidate)
    differing = [name for name in wanted | got if not _alike(got.get(name), wanted.get(name))]
    refused = [name for name in differing if not (allow_mismatch and name in (*FACTORS, *STATISTICS))]
    if not refused:
        return
    listed = ", ".join(f"{name} {short(got.get(name))} instead of {short(wanted.get(name))}" for name in refused)
    hint = " (allow_mismatch=True accepts other factors)" if set(refused) <= {*FACTORS, *STATISTICS} else ""
    raise UserError(f"this VAE does not fit the pipeline: {listed}{hint}")


def _decoding_options(vae: ModelMixin) -> set[str]:
    """Return the names of the arguments of `decode` beside the latents; pipelines hand them over."""
    return set(list(inspect.signature(type(vae).decode).parameters)[2:])


def _alike(value: Any, other: Any) -> bool:
    """Return whether two entries are equal; statistics may have been rounded to bfloat16."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.shape == other.shape and torch.allclose(value.cpu().float(), other.cpu().float(), rtol=2**-7)
    return type(value) is type(other) and value == other


def _signature(vae: ModelMixin) -> dict[str, Any]:
    """Return what two VAEs must have in common to serve the same diffusion model."""
    signature = {name: vae.config.get(name) for name in (*STRUCTURE, *FACTORS)}
    signature |= {f"the buffer {name}": buffer for name, buffer in vae.named_buffers() if name in BUFFERS}
    signature["shift_factor"] = signature["shift_factor"] or None  # 0 and None both mean no shift
    signature["down-sampling"] = downsampling_factor(vae)
    signature["frames"] = family_of(vae).video
    # A file gives lists, code may give tuples.
    return {name: list(value) if isinstance(value, tuple) else value for name, value in signature.items()}


def _dtype_beside_vae(pipe: DiffusionPipeline) -> torch.dtype | None:
    """Return the dtype of the pipeline's other networks.

    It tells apart a call that upcasts the VAE, which does not change it, and a move of the pipeline, which does.
    """
    networks = (part for part in pipe.components.values() if isinstance(part, ModelMixin) and part is not vae_of(pipe))
    return next((network.dtype for network in networks), None)


def _check_same_encoder(source: ModelMixin, own: ModelMixin) -> None:
    new, old = _architecture(source), _architecture(own)
    for name in sorted(new.keys() | old.keys()):
        if new.get(name) != old.get(name):
            found, wanted = new.get(name, "absent"), old.get(name, "absent")
            raise UserError(f"the encoders differ in architecture: {name} is {found} instead of {wanted}")


def _architecture(vae: ModelMixin) -> dict[str, Any]:
    """Return what two encoders must have in common to compute the same with the same weights."""
    shapes = {
        f"{part}.{name}": tuple(tensor.shape)
        for part in _encoder_parts(vae)
        for name, tensor in _plain(getattr(vae, part)).state_dict().items()
    }
    return {name: vae.config.get(name) for name in SHAPELESS} | shapes


def _encoder_parts(vae: ModelMixin) -> list[str]:
    """Return the names of the encoder's parts; not every VAE has a `quant_conv`."""
    return [part for part in family_of(vae).trained if getattr(vae, part, None) is not None]


def _plain(module: nn.Module) -> nn.Module:
    """Return `module`, or the module that `torch.compile` wrapped."""
    return getattr(module, COMPILED, module)


def _plain_copy(vae: ModelMixin) -> ModelMixin:
    """Return a copy that shares no weight with `vae` and uses the methods of its class.

    A compiled method that was assigned, as in `vae.decode = torch.compile(vae.decode)`, would still use the weights of
    `vae`, so the copy drops it.
    """
    wrapped = {id(part): copy.deepcopy(_plain(part)) for part in vae.children()}
    twin = copy.deepcopy(vae, wrapped)
    for module in twin.modules():
        for name, value in list(vars(module).items()):
            own = isinstance(value, MethodType) and value.__self__ is module
            if callable(getattr(type(module), name, None)) and not own:
                delattr(module, name)
    return twin


def _in_place_of(previous: ModelMixin, replacement: ModelMixin) -> ModelMixin:
    """Return `replacement` set up like `previous`, or a converted copy if its dtype differs.

    A replacement that another pipeline offloads in the meantime stays as it is.
    """
    if _offloaded(replacement):
        return replacement
    if replacement.dtype != previous.dtype:
        replacement = copy.deepcopy(replacement).to(previous.dtype)
    replacement.to(previous.device)
    for name, value in _memory_settings(previous).items():
        if hasattr(replacement, name):
            setattr(replacement, name, value)
    return replacement


def _memory_settings(vae: ModelMixin) -> dict[str, Any]:
    return {name: value for name, value in vars(vae).items() if MEMORY_SETTINGS.fullmatch(name)}


@contextmanager
def _offload_suspended(pipe: DiffusionPipeline) -> Iterator[None]:
    """Remove the offload hooks of a pipeline's components within the context, and put them on again afterwards.

    diffusers has public methods to start and end offloading, but none that tells whether, how and to which device a
    pipeline is offloaded. Hence the private attributes.

    Raises:
        UserError: if the pipeline has a device map, group offloading or another pipeline's hooks, which cannot be put
            on again.
    """
    if getattr(pipe, "hf_device_map", None) is not None:
        raise UserError("this pipeline has a device map; call pipe.reset_device_map() first")
    if pipe._maybe_raise_error_if_group_offload_active():
        raise UserError("this pipeline has group offloading; exchange the VAE before enable_group_offload")
    if getattr(pipe, "_all_hooks", None):
        enable = pipe.enable_model_cpu_offload
    elif not _offloaded(vae_of(pipe)):
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


def _offloaded(vae: ModelMixin) -> bool:
    """Return whether a hook of accelerate is on the VAE; accelerate has no public query for it."""
    return any(isinstance(getattr(part, "_hf_hook", None), ModelHook) for part in vae.modules())
