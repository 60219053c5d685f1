"""Load VAEs from folders, the Hub and single files, and save them in the layout of diffusers and as single files."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from os.path import exists, isfile  # which, unlike pathlib's, say False of a name too long to be one
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file

from srl_utils.errors import MissingFile, UnusableFile, UserError
from srl_utils.files import save_tensors
from srl_utils.vae.families import named_family
from srl_utils.vae.files import check_keys, check_parameters, completed_config, first_line, refuse_pickles
from srl_utils.vae.low_rank import add_updates, load_updates, merged_state, updates_state
from srl_utils.vae.single_file import SUFFIX, SingleFile, save_single_file

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
UPDATES_NAME = "pytorch_lora_weights.safetensors"
"""Low-rank updates alone, under the name that diffusers gives them."""
SINGLE_FILE_NAME = "srl_vae.safetensors"
"""The full weights as one file in the original layout, for other programs."""
RGB = 3


@dataclass(frozen=True, kw_only=True)
class AutoencoderSource:
    """Where a VAE comes from: the arguments of `from_pretrained`, or a single file in place of the folder."""

    pretrained_model_name_or_path: str
    subfolder: str | None = None
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None

    @property
    def file(self) -> Path | None:
        """Return the single file that this names; None if it names a folder or a model of the Hub."""
        path = Path(self.pretrained_model_name_or_path, self.subfolder or "")
        return path if isfile(path) else None


def read_config(source: AutoencoderSource) -> dict[str, Any]:
    """Return the VAE's configuration, with diffusers' defaults for missing entries; loads no weights.

    Raises:
        MissingFile: a FileNotFoundError, if there is no configuration.
        UnusableFile: an OSError, if it cannot be read, or if the weights are pickles.
        UserError: a ValueError and the base of both, if the class is not in `FAMILIES`, if the configuration is
            impossible, if the VAE does not take RGB images, or if a single file does not tell its configuration.
    """
    name = source.pretrained_model_name_or_path
    file = read_single_file(source)
    return checked_config(_stated_config(source) if file is None else file.config(), name)


def read_single_file(source: AutoencoderSource) -> SingleFile | None:
    """Return what a single file says of its VAE; None if `source` names a folder or a model of the Hub.

    Raises:
        UnusableFile: an OSError, if the file is damaged, or if the weights are pickles.
        UserError: a ValueError and the base of both, if the file holds no VAE that can be read, or if a subfolder or a
            variant of it is asked for.
    """
    name = source.pretrained_model_name_or_path
    if source.subfolder and isfile(name):
        raise UserError(f"'{name}' is one file and has no subfolders; leave out the subfolder {source.subfolder}")
    refuse_pickles(name, source.subfolder)
    if source.file is None:
        return None
    if source.variant is not None:
        raise UserError(f"'{name}' is one file and has no variants; leave out the variant {source.variant}")
    return SingleFile.read(source.file)


def refuse_missing_file(source: AutoencoderSource) -> None:
    """Raise a MissingFile if `source` has the name of a single file, and nothing is there."""
    place = Path(source.pretrained_model_name_or_path, source.subfolder or "")
    if place.suffix == SUFFIX and not exists(place):
        raise MissingFile(f"there is no file '{place}'; give the path of a file that exists") from None


def _stated_config(source: AutoencoderSource) -> dict[str, Any]:
    """Return what the config.json of a folder or of a model on the Hub says."""
    arguments = asdict(source)
    arguments.pop("variant")
    name = source.pretrained_model_name_or_path
    try:
        return AutoencoderKL.load_config(**arguments)  # reads the file of any class
    except (OSError, ValueError, RecursionError) as error:
        refuse_missing_file(source)  # only now, since a model of the Hub may have such a name
        reason = str(error).strip().splitlines()[0]
        other_folder = Path(name).exists() and not Path(name, "model_index.json").exists()
        hint = "" if source.subfolder or other_folder else "; for the VAE of a whole pipeline, give the subfolder vae"
        fault = UnusableFile if Path(name, source.subfolder or "", CONFIG_NAME).exists() else MissingFile
        if not Path(name).exists():
            hint += "; there is no such folder here, and no such model was read from the Hub"
        raise fault(f"no VAE configuration at '{name}': {reason}{hint}") from None


def checked_config(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a configuration with diffusers' defaults for missing entries.

    Raises:
        UserError: if the class is not in `FAMILIES`, if the configuration is impossible, or if the VAE does not take RGB
            images. The messages call the VAE `name`.
    """
    said = config.get("_class_name", "configuration of no known class") if isinstance(config, dict) else "list"
    family = named_family(str(said), f"'{name}'")
    config = completed_config(config, family.kind, name)
    for channels in family.image_channels(config) - {RGB}:
        raise UserError(f"'{name}' takes or makes images of {channels} channels; only RGB is supported")
    return config


def load_autoencoder(source: AutoencoderSource) -> ModelMixin:
    """Load a VAE of any class in `FAMILIES` in float32, whatever the precision of the stored weights.

    Raises:
        MissingFile: a FileNotFoundError, if there is no configuration, or no weights as safetensors.
        UnusableFile: an OSError, if a file is damaged.
        UserError: a ValueError and the base of both, if the configuration is refused by `read_config`, or if the weights
            do not fit it or are not all finite.
    """
    name = source.pretrained_model_name_or_path
    config = read_config(source)
    if source.file is not None:
        return load_single_file(SingleFile.read(source.file), config)
    kind = named_family(config["_class_name"], name).kind
    try:
        vae, loading = kind.from_pretrained(**asdict(source), use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise _loading_error(error, source)(f"cannot load the VAE '{name}': {first_line(error)}") from None
    check_keys(name, missing=loading["missing_keys"], unexpected=loading["unexpected_keys"])
    check_parameters(vae, name)
    return vae.float()


def load_single_file(file: SingleFile, config: dict[str, Any]) -> AutoencoderKL:
    """Load a VAE of a checked configuration from one file, in float32, whatever the precision of the file.

    Raises:
        UserError: if the weights do not fit the configuration or are not all finite.
    """
    vae = file.load(config)
    check_parameters(vae, str(file.path))
    return vae


def _loading_error(error: Exception, source: AutoencoderSource) -> type[UserError]:
    """Return the class of error to raise: diffusers raises an OSError for missing and for damaged weights."""
    if not isinstance(error, OSError):
        return UserError
    place = Path(source.pretrained_model_name_or_path, source.subfolder or "")
    return UnusableFile if (place / variant_name(source.variant)).exists() else MissingFile


HALF_PRECISION = {"fp16": torch.float16, "bf16": torch.bfloat16}
SINGLE_FILE = "single_file"
VARIANTS = (*HALF_PRECISION, SINGLE_FILE)
"""What can be written beside the full weights: weights in half precision, and the full weights for other programs."""


def save_variant(vae: ModelMixin, folder: Path, variant: str) -> None:
    """Write one of `VARIANTS` beside the full weights; `from_pretrained(variant=...)` finds those in half precision.

    Raises:
        UserError: for a single file, as `check_single_file`.
    """
    if variant == SINGLE_FILE:
        save_single_file(vae, folder / SINGLE_FILE_NAME)
        return
    weights = {name: tensor.to(HALF_PRECISION[variant]).contiguous() for name, tensor in merged_state(vae).items()}
    save_tensors(weights, folder / variant_name(variant), metadata={"format": "pt"})


def variant_name(variant: str | None) -> str:
    """Return the file name of one of `VARIANTS`, or of another variant of diffusers; None means the full weights."""
    if variant == SINGLE_FILE:
        return SINGLE_FILE_NAME
    return WEIGHTS_NAME if variant is None else WEIGHTS_NAME.replace(".", f".{variant}.", 1)


def is_weights_file(name: str, variants: str = r"[\w-]+") -> bool:
    """Return whether weights have this name: diffusers' own, whole or in shards, safetensors or a pickle; updates; a single file.

    Args:
        name: a file name.
        variants: a pattern of the variants that count beside the full weights; by default all do.
    """
    variant, shard = rf"(\.({variants}))?", r"(-\d+-of-\d+)?"
    stem = WEIGHTS_NAME.partition(".")[0]
    kind = r"\.(safetensors|bin)"
    whole = rf"{stem}{shard}{variant}{shard}{kind}({variant}\.index{variant}\.json)?"
    return name in (UPDATES_NAME, SINGLE_FILE_NAME) or re.fullmatch(whole, name) is not None


def inference_dtype(config: dict[str, Any], variant: str) -> torch.dtype | None:
    """Return the dtype in which diffusers computes with weights of this variant; None for float32 (`force_upcast`)."""
    return None if variant == "fp16" and config.get("force_upcast") else HALF_PRECISION[variant]


def merge_updates(vae: ModelMixin, path: Path) -> None:
    """Add low-rank updates to the weights of the VAE that they were trained on, in place.

    Args:
        vae: the original, in float32.
        path: a `pytorch_lora_weights.safetensors` of a training.

    Raises:
        UserError: if the file is missing or damaged, or if it is of another VAE.
    """
    try:
        add_updates(vae, load_file(path))
    except FileNotFoundError:
        raise MissingFile(f"there are no low-rank updates at '{path}'") from None
    except SafetensorError as error:
        raise UnusableFile(f"'{path}' is damaged: {first_line(error)}") from None
    except (AttributeError, KeyError, RuntimeError):
        raise UserError(f"the low-rank updates at '{path}' do not fit this VAE") from None


def hide_local_origin(vae: ModelMixin) -> None:
    """Let the configuration name only the last part of the local folder that the VAE was loaded from."""
    origin = vae.config.get("_name_or_path")
    if origin and Path(origin).exists():
        vae.register_to_config(_name_or_path=Path(origin).resolve().name)


def save_autoencoder(vae: ModelMixin, folder: Path) -> None:
    """Write the configuration and the weights as `from_pretrained` reads them, and low-rank updates alone, if any, beside.

    `save_pretrained` refuses channels-last weights, and converting the VAE itself would move parameters that an
    optimizer and DistributedDataParallel hold. The configuration names the VAE that it was loaded from. Of a local
    folder it names only the last part, since the configuration is published.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hide_local_origin(vae)
    vae.save_config(folder)
    for name, state in ((WEIGHTS_NAME, merged_state(vae)), (UPDATES_NAME, updates_state(vae))):
        if state:
            weights = {key: tensor.contiguous() for key, tensor in state.items()}
            save_tensors(weights, folder / name, metadata={"format": "pt"})


def restore_autoencoder(vae: ModelMixin, folder: Path) -> None:
    """Set the weights of a VAE to those that `save_autoencoder` has written of it, in place and to the bit.

    A VAE with low-rank updates takes these alone, since their sum with the frozen weights is rounded.
    """
    if updates_state(vae):
        load_updates(vae, load_file(folder / UPDATES_NAME))
    else:
        vae.load_state_dict(load_file(folder / WEIGHTS_NAME))
