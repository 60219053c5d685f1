"""A training's arguments and versions, as records, cards and checkpoints keep them."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from srl_utils.errors import one_line
from srl_utils.training.resuming import shortened
from srl_utils.vae.loading import AutoencoderSource


def json_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return all arguments as JSON values, without the Hub token."""
    return {
        name: one_line(str(value)) if isinstance(value, (str, Path)) else value
        for name, value in vars(args).items()
        if name != "hub_token"
    }


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    return {name: version(name) for name in ("torch", "diffusers", "accelerate", "datasets")}


def autoencoder_source(args: argparse.Namespace) -> AutoencoderSource:
    """Return where the original VAE comes from."""
    return AutoencoderSource(**{name: getattr(args, name) for name in AutoencoderSource.__dataclass_fields__})


@dataclass(frozen=True)
class PublishedCommand:
    """A command line as the model card shows it."""

    arguments: Mapping[str, Any]
    """Arguments that differ from the paper's or the recipe's. Paths outside the working folder keep their last part."""
    line: str


def published_command(
    args: argparse.Namespace, paper: Mapping[str, Any], recipe: Mapping[str, Any], *, num_processes: int
) -> PublishedCommand:
    """Return the command line that repeats a run, without secrets and without folders of this machine.

    Args:
        args: arguments of the run.
        paper: `json_arguments` of the default recipe.
        recipe: `json_arguments` of the recipe of the run.
        num_processes: of the run; each trains on batches of its own.
    """
    arguments = {
        name: shortened(value)
        for name, value in json_arguments(args).items()
        if value != paper[name] or value != recipe[name]
    }
    several = ["--multi_gpu", "--num_processes", str(num_processes)] if num_processes > 1 else []
    words = ["accelerate", "launch", *several, "train_srl_vae.py"]
    for name, value in arguments.items():
        if name == "recipe" or value != recipe[name]:
            words += _words(name, value)
    return PublishedCommand(arguments, shlex.join(words))


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    values = [str(part) for part in (value if isinstance(value, list) else [value])]
    if values[0].startswith("-"):  # by itself it would be read as a flag
        return [f"--{name}={values[0]}"]
    return [f"--{name}", *values]
