"""Convert a VAE between the folder of diffusers and the single file of other programs."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import nn

from srl_utils.errors import UnusableFile, UserError, errors_about
from srl_utils.files import check_writable, write_atomically
from srl_utils.vae.files import PICKLES, check_parameters
from srl_utils.vae.loading import (
    HALF_PRECISION,
    AutoencoderSource,
    checked_config,
    load_autoencoder,
    load_single_file,
    read_config,
    read_single_file,
    refuse_missing_file,
    save_autoencoder,
)
from srl_utils.vae.places import parse_place
from srl_utils.vae.single_file import (
    MODELS,
    SUFFIX,
    check_single_file,
    model_of,
    refusal,
    save_single_file,
)

PRECISIONS = {"fp32": torch.float32, **HALF_PRECISION}
FILE_SUFFIXES = (*PICKLES, ".pkl", ".sft", ".gguf", ".safetensor", SUFFIX)
"""What, in any case of its letters, ends the name of a file of weights and not that of a folder."""


def convert(
    source: AutoencoderSource, target: Path, *, config: str | None, precision: str, prefix: str = ""
) -> str | None:
    """Write the VAE at `source` to `target`: one file if its name ends in .safetensors, else a folder of diffusers.

    Args:
        source: a folder, a model of the Hub, or a single file.
        target: must not exist.
        config: for a single file that does not tell its configuration: one of `MODELS`, or a folder or Hub id with it, as
            `parse_place` reads it.
        precision: one of `PRECISIONS`.
        prefix: what the names in a single file begin with, one of `PREFIXES`.

    Returns:
        Which programs cannot use the written file; None if all of `PROGRAMS` can, or if it is a folder.

    Raises:
        UnusableFile: an OSError, if nothing can be written at `target`. No weights have been loaded then.
        UserError: a ValueError and the base of both, if `target` exists or has the suffix of other files, if the VAE
            cannot be loaded, or if the target cannot hold it.
    """
    single = target.suffix == SUFFIX
    _check_target(target)
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


def _check_target(target: Path) -> None:
    """Raise a UserError unless a VAE can be written to `target`, and its name does not promise another kind of file."""
    if os.path.lexists(target):
        state = "exists" if target.exists() else "is a link to nothing"
        raise UserError(f"{target} {state}; remove it, or give another target")
    if target.suffix != SUFFIX and target.name.lower().endswith(FILE_SUFFIXES):
        raise UserError(
            f"{target}: a single file's name has to end in {SUFFIX}, such as {target.with_suffix(SUFFIX).name}; the name "
            "of a folder must not end as that of a file of weights"
        )
    try:
        check_writable(target)
    except OSError as error:
        raise UnusableFile(f"cannot write {target}: {error.strerror or error}") from None


def _load(source: AutoencoderSource, config: str | None) -> ModelMixin:
    """Load the VAE at `source`; a single file gets the configuration that `config` names, if any."""
    if config is None:
        return load_autoencoder(source)
    file = read_single_file(source)
    if file is None:
        refuse_missing_file(source)
        raise UserError("it is for a single file; a folder has its own configuration", parameter="config")
    if config in MODELS:
        return load_single_file(file, checked_config(file.config_of(MODELS[config]), str(file.path)))
    with errors_about("config"):
        stated = read_config(parse_place(config))
    return load_single_file(file, stated)
