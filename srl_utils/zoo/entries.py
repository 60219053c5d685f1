"""Entries of the zoo: what a VAE is and where its weights are, as YAML files that are checked when they are read.

The fields are those of RobustBench's entries (Croce et al., arXiv 2010.09670), with a VAE's in place of a classifier's.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from srl_utils.errors import MissingFile, UnusableFile, UserError
from srl_utils.evaluation.cli.loading import BASELINE
from srl_utils.images.pixels import parse_pixel_distance
from srl_utils.zoo.protocols import PROTOCOLS
from srl_utils.zoo.schema import checked

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
DIGEST = re.compile(r"[0-9a-f]{16}")
TRAINING = ["python", "train_srl_vae.py"]
"""How every command begins: an entry runs a training of this repository and no other program."""
OUTPUT, PUBLISHING = "--output_dir", ("--push_to_hub", "--hub_")
"""The flag that says where the weights go, and how flags begin that publish them."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A VAE that can be measured."""

    name: str
    """Lower-case letters, digits and dashes; also the name of the entry's file."""
    weights: str
    """A folder, a single file or a Hub id, written like --baseline of the evaluation."""
    base: str | None
    """The VAE that was fine-tuned: attackers know it, and drift is measured from it. None if there is none."""
    protocol: str
    """One of `PROTOCOLS`."""
    digest: str | None
    """`Codec.digest` of the weights; None if another machine makes other bits."""
    base_digest: str | None
    """The same of the base; None if there is none, or if it is not known yet."""

    def check(self) -> None:
        """Raise a UserError if a value is impossible."""
        if not NAME.fullmatch(self.name):
            raise UserError(f"name: {self.name!r} is not made of lower-case letters, digits and single dashes")
        if self.base is not None and self.name == BASELINE:
            raise UserError(f"name: evaluations call the base {BASELINE}; choose another name, or rename the folder")
        if self.protocol not in PROTOCOLS:
            raise UserError(f"protocol: {self.protocol} is not known; choose from {', '.join(PROTOCOLS)}")
        for field in ("digest", "base_digest"):
            digest = getattr(self, field)
            if digest is not None and not DIGEST.fullmatch(digest):
                raise UserError(f"{field}: {digest!r} is not 16 hexadecimal digits")
        if self.base is None and self.base_digest is not None:
            raise UserError("base_digest: there is no base")


@dataclass(frozen=True, kw_only=True)
class Claims:
    """Numbers that the authors state, on their own images."""

    setting: str
    """Images and attack of the claims."""
    worst: float | None = None
    """PSNR under the attack, in dB."""
    clean: float | None = None
    """PSNR of clean images, in dB."""
    drift: float | None = None


@dataclass(frozen=True, kw_only=True)
class Entry(Subject):
    """A VAE of the zoo, with what its authors say of it."""

    objective: str
    """What the training minimised."""
    data: str
    """Images of the training."""
    budget: str | None
    """Of the attack in training, in units of a [0,1] image, such as 8/255; None without an attack."""
    link: str
    """A page on the VAE: its address, or a path in the repository."""
    command: str | None = None
    """Makes the weights where they are missing, and continues where it was interrupted: `python train_srl_vae.py ...`."""
    cost: float | None = None
    """Floating-point operations of the whole training, in TFLOP, as its authors counted them."""
    claims: Claims | None = None

    def check(self) -> None:
        """Raise a UserError if a value is impossible."""
        super().check()
        if self.budget is not None:
            try:
                parse_pixel_distance(self.budget)
            except ValueError as error:
                raise UserError(f"budget: {error}") from None
        if self.cost is not None and not self.cost > 0:
            raise UserError(f"cost: {self.cost:g} TFLOP are not above 0")
        if ":" in self.link.removeprefix("https://"):
            raise UserError(f"link: {self.link} is neither an address that starts with https:// nor a path")
        if self.command is not None:
            self._check_flags(training_flags(self.command))

    def _check_flags(self, flags: list[str]) -> None:
        """Refuse a training that leaves its weights elsewhere, or publishes them with the login of whoever measures them."""
        if publishing := [flag for flag in flags if flag.startswith(PUBLISHING)]:
            raise UserError(f"command: {publishing[0]} publishes; an entry's training may not")
        folders = [value for flag, value in pairwise([*flags, ""]) if flag == OUTPUT]
        folders += [flag.partition("=")[2] for flag in flags if flag.startswith(f"{OUTPUT}=")]
        if folders != [self.weights]:
            raise UserError(f"command: it needs {OUTPUT} {self.weights}, the entry's weights, once")


def training_flags(command: str) -> list[str]:
    """Return the flags of a command, which is a training; no shell reads it.

    Raises:
        UserError: if it runs something else.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"command: {error}") from None
    start = len(TRAINING)
    if words[:start] != TRAINING:
        raise UserError(f"command: it has to start with {' '.join(TRAINING)}")
    return words[start:]


def read_entry(path: Path) -> Entry:
    """Return the entry in a YAML file.

    Raises:
        MissingFile: a FileNotFoundError, if there is no such file.
        UnusableFile: an OSError, if it is not YAML.
        UserError: a ValueError and the base of both, if a field is missing, unknown, of another type or impossible.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingFile(f"there is no entry {path}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # PyYAML fails at impossible dates and numbers
        raise UnusableFile(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        return checked_entry(given)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def checked_entry(given: Any) -> Entry:
    """Return the entry with these fields.

    Raises:
        UserError: if a field is missing, unknown, of another type or impossible.
    """
    entry = checked(Entry, given)
    entry.check()
    return entry


def read_entries(zoo: Path) -> dict[str, Entry]:
    """Return the entries of a zoo by name, sorted.

    Raises:
        MissingFile: a FileNotFoundError, if there is no zoo.
        UserError: a ValueError, if an entry is refused by `read_entry`, or is in a file of another name.
    """
    if not (zoo / "entries").is_dir():
        raise MissingFile(
            f"there is no folder {zoo / 'entries'}; run this in a clone of the repository", parameter="zoo"
        )
    entries = {path: read_entry(path) for path in sorted((zoo / "entries").glob("*.yaml"))}
    for path, entry in entries.items():
        if path.stem != entry.name:
            raise UserError(f"{path}: the entry {entry.name} has to be in {entry.name}.yaml")
    return {entry.name: entry for entry in entries.values()}
