"""Convert a VAE between the folder of diffusers and the single file of other programs."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import nn

from srl_utils.errors import UserError
from srl_utils.files import write_atomically
from srl_utils.vae.files import check_parameters, refuse_pickles
from srl_utils.vae.loading import (
    HALF_PRECISION,
    AutoencoderSource,
    checked_config,
    load_autoencoder,
    load_single_file,
    read_config,
    save_autoencoder,
)
from srl_utils.vae.single_file import (
    MODELS,
    SUFFIX,
    SingleFile,
    check_single_file,
    model_of,
    refusal,
    save_single_file,
)

PRECISIONS = {"fp32": torch.float32, **HALF_PRECISION}


def convert(
    source: AutoencoderSource, target: Path, *, config: str | None, precision: str, prefix: str = ""
) -> str | None:
    """Write the VAE at `source` to `target`: one file if its name ends in .safetensors, else a folder of diffusers.

    Args:
        source: a folder, a model of the Hub, or a single file.
        target: must not exist.
        config: for a single file that does not tell its configuration: one of `MODELS`, or a folder or Hub id with it.
        precision: one of `PRECISIONS`.
        prefix: what the names in a single file begin with, one of `PREFIXES`.

    Returns:
        Which programs cannot use the written file; None if all of `PROGRAMS` can, or if it is a folder.

    Raises:
        UserError: if `target` exists, if the VAE cannot be loaded, or if the target cannot hold it.
    """
    single = target.suffix == SUFFIX
    if target.exists():
        raise UserError(f"{target} exists; remove it, or give another target")
    if prefix and not single:
        raise UserError(f"names begin with it only in a file whose name ends in {SUFFIX}", parameter="prefix")
    vae = _load(source, config)
    nn.Module.to(vae, PRECISIONS[precision])  # diffusers' own `to` warns of every change of precision
    check_parameters(vae, f"{source.pretrained_model_name_or_path} in {precision}")
    if not single:
        save_autoencoder(vae, target)
        return None
    check_single_file(vae)
    write_atomically(target, lambda aside: save_single_file(vae, aside, prefix=prefix))
    return refusal(model_of(vae.config))


def _load(source: AutoencoderSource, config: str | None) -> ModelMixin:
    """Load the VAE at `source`; a single file gets the configuration that `config` names, if any."""
    if config is None:
        return load_autoencoder(source)
    if source.file is None:
        raise UserError("it is for a single file; a folder has its own configuration", parameter="config")
    refuse_pickles(source.pretrained_model_name_or_path, source.subfolder)
    if config in MODELS:
        stated = checked_config(SingleFile.read(source.file).config_of(MODELS[config]), str(source.file))
    else:
        stated = read_config(AutoencoderSource(pretrained_model_name_or_path=config))
    return load_single_file(source.file, stated)
