"""Check the files of a VAE and say in one line what is wrong, on shapes alone, before memory is used.

A configuration may come from a stranger. It is checked against the signature of the diffusers class that it names, so
a new argument of that class needs no change here.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin
from torch import nn

from srl_utils.errors import UnusableFile, UserError
from srl_utils.vae.families import FAMILIES

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
DIFFUSERS_PICKLE = "diffusion_pytorch_model.bin"
MAX_BILLIONS = 2  # of weights; the VAE of Stable Diffusion has 0.08
LARGEST_INTEGER = 2**16  # of channels, groups, entries and pixels
LARGEST_DEPTH = 64  # of layers in a block, and of blocks
REQUIRED = inspect.Parameter.empty
DEPTHS = re.compile(r"layers_per_|num_.*_blocks")
LATENT_CHANNELS = ("latent_channels", "z_dim")


def completed_config(config: dict[str, Any], kind: type[ModelMixin], name: str) -> dict[str, Any]:
    """Return `config` with the defaults of `kind` for missing entries, as diffusers reads it.

    Raises:
        UserError: if an entry is unknown or impossible, or if the configuration describes no network.
    """
    parameters = inspect.signature(kind.__init__).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items() if key != "self"}
    complete = {**defaults, **config}
    for key, value in complete.items():
        if value is REQUIRED:
            raise UserError(
                f"the configuration of '{name}' cannot be: it leaves out {key}, which {kind.__name__} needs"
            )
    for key, default in defaults.items():
        deep = DEPTHS.search(key) is not None
        largest, least_entry = (LARGEST_DEPTH, 0) if deep else (LARGEST_INTEGER, 1)  # a level may have no layers
        if not _possible(complete[key], default, largest, least_entry=least_entry):
            raise UserError(f"the configuration of '{name}' cannot be: its {key} is {short(complete[key])}")
    factor = complete.get("scaling_factor")
    if factor is not None and not factor > 0:
        raise UserError(f"the configuration of '{name}' cannot be: its scaling_factor is {factor}")
    _check_statistics(complete, name)
    network = _network({key: complete[key] for key in defaults}, kind, name, left_out=sorted(defaults.keys() - config))
    unknown = sorted(key for key in config.keys() - network.config.keys() if not key.startswith("_"))
    if unknown:
        raise UserError(
            f"the configuration of '{name}' says {unknown[0]}, which {kind.__name__} does not know in this version of "
            "diffusers; update diffusers, or remove the entry from its config.json"
        )
    return complete


def _check_statistics(config: dict[str, Any], name: str) -> None:
    """Raise a UserError unless the mean and deviation of the latents, if both are given, have a value per channel."""
    statistics = {key: config.get(key) for key in ("latents_mean", "latents_std")}
    if None in statistics.values():  # diffusers uses them only together
        return
    channels = next(config[key] for key in LATENT_CHANNELS if key in config)
    for key, values in statistics.items():
        if not isinstance(values, (tuple, list)) or len(values) != channels:
            raise UserError(
                f"the configuration of '{name}' cannot be: its {key} is {short(values)}; give a list of "
                f"{channels} numbers, one for each latent channel"
            )
    deviations = config["latents_std"]
    if not min(deviations) > 0:
        raise UserError(f"the configuration of '{name}' cannot be: its latents_std is {short(deviations)}")


def _network(arguments: dict[str, Any], kind: type[ModelMixin], name: str, left_out: list[str]) -> ModelMixin:
    """Build the network on the meta device, which takes no memory."""
    try:
        with torch.device("meta"):
            network = kind(**arguments)
    except Exception as error:  # diffusers and torch raise nearly any error here
        hint = f"; it leaves out {', '.join(left_out)}" if left_out else ""
        raise UserError(
            f"the configuration of '{name}' describes no {kind.__name__}: {first_line(error)}{hint}"
        ) from None
    billions = sum(parameter.numel() for parameter in network.parameters()) / 1e9
    if billions > MAX_BILLIONS:
        raise UserError(f"the configuration of '{name}' describes a network of {billions:.0f} billion weights")
    return network


def _possible(value: object, default: object, largest: int, *, least: int = 1, least_entry: int = 1) -> bool:
    """Return whether `value` suits an argument with this default.

    A number is finite, a count is from `least` to `largest`, or from `least_entry` in a list, and the entries of a list suit
    the first entry of the default. A default without entries says nothing of them.
    """
    if default is REQUIRED:  # required entries of a VAE are counts and lists of counts
        default = [1] if isinstance(value, (tuple, list)) else 1
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int):
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= largest
    if isinstance(default, float):
        return isinstance(value, (int, float)) and math.isfinite(value)
    if isinstance(default, (tuple, list)):
        if not isinstance(value, (tuple, list)) or len(value) > LARGEST_DEPTH:
            return False
        if not default:
            return True
        return len(value) > 0 and all(_possible(entry, default[0], largest, least=least_entry) for entry in value)
    if default is None:  # optional entries of a VAE are numbers and lists of numbers
        entries: Sequence[object] = value if isinstance(value, (tuple, list)) else [value]
        return value is None or all(_possible(entry, 0.0, largest) for entry in entries)
    if isinstance(default, str):  # some classes take a name for all levels, or one for each
        return all(isinstance(entry, str) for entry in (value if isinstance(value, (tuple, list)) else [value]))
    return isinstance(value, type(default))


def check_keys(name: str, *, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raise a UserError if weights lack tensors, or hold some that the configuration does not describe."""
    for keys, fault in ((missing, "lack"), (unexpected, "hold beyond what its configuration describes")):
        if keys:
            raise UserError(
                f"cannot load the VAE '{name}': its weights {fault} {len(keys)} tensors, such as {min(keys)}"
            )


def check_parameters(vae: nn.Module, name: str) -> None:
    """Raise a UserError unless all weights are finite."""
    for key, tensor in vae.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"cannot use the VAE '{name}': its {key} holds NaN or infinite values")


def refuse_pickles(name: str, subfolder: str | None) -> None:
    """Refuse local weights that are a pickle, which can run code when it is loaded.

    Raises:
        UnusableFile: an OSError, with the command that converts the weights.
    """
    place = Path(name, subfolder or "")
    if place.is_file() and place.suffix != ".safetensors":
        raise UnusableFile(
            f"'{name}' is a file, but not of safetensors; a pickle can run code when it is loaded. To convert it: "
            + _conversion(place.parent, _single_file(place), name)
        )
    if not place.is_dir() or any(place.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in place.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise UnusableFile(
            f"'{name}' holds its weights as a pickle ({pickles[0]}), which can run code when it is loaded. To convert "
            "it: " + _conversion(place, _pickle(place, pickles), name)
        )


def _pickle(place: Path, pickles: list[str]) -> str:
    """Return the call that loads a folder's pickles: those that diffusers names, or else the first as a single file."""
    if DIFFUSERS_PICKLE in pickles:
        return f"from_pretrained({str(place)!r}, use_safetensors=False)"
    return _single_file(place / pickles[0])


def _single_file(path: Path) -> str:
    """Return the call that loads `path`, with the configuration beside it.

    Without one, diffusers guesses the configuration and asks the Hub for it.
    """
    beside = f", config={str(path.parent)!r}" if (path.parent / "config.json").is_file() else ""
    return f"from_single_file({str(path)!r}{beside})"


def _conversion(folder: Path, load: str, name: str) -> str:
    """Return the command that converts weights; `folder` may have a configuration, which names their class."""
    target = f"{Path(name).with_suffix('')}-safetensors"
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = AutoencoderKL.__name__
    if kind not in FAMILIES:
        kind = AutoencoderKL.__name__
    program = f"from diffusers import {kind} as VAE; VAE.{load}.save_pretrained({target!r})"
    return f"python -c {shlex.quote(program)}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message and, in brackets, that of its deepest cause."""
    said = next((line for line in map(str.strip, str(error).splitlines()) if line), type(error).__name__)
    origin = error.__cause__ or error.__context__
    while origin is not None and (origin.__cause__ or origin.__context__):
        origin = origin.__cause__ or origin.__context__
    return said if origin is None else f"{said.rstrip('.')} ({first_line(origin)})"


def short(value: object) -> str:
    """Return a value as text of at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
