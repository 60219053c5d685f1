"""Rows of the zoo: what the standard protocol measured of one VAE, as JSON files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from srl_utils.errors import MissingFile, UnusableFile, UserError
from srl_utils.evaluation.perturbations import CLEAN
from srl_utils.evaluation.results import Row, Setting
from srl_utils.evaluation.study import THREAT_MODELS
from srl_utils.evaluation.tasks.base import DRIFT
from srl_utils.files import read_json, write_text_atomically
from srl_utils.zoo.entries import Entry, Subject
from srl_utils.zoo.protocols import PROTOCOLS, Protocol
from srl_utils.zoo.schema import checked


@dataclass(frozen=True, kw_only=True)
class ZooRow:
    """What was measured of one VAE."""

    name: str
    digest: str
    """Of the weights, as `Codec.digest`."""
    base: str | None
    """The VAE on which transferred attacks were made, and from which the drift was measured; None for the VAE itself."""
    base_digest: str | None
    """Of the base's weights."""
    protocol: str
    fingerprint: str
    """Of the protocol when it was measured."""
    images: str
    """Digest of the images."""
    failed_checks: list[str] | None
    """Questions of the robustness checks that failed; None if there were no checks, as for a VAE without a base."""
    encoder_ms: float
    """Time of the encoder for one image, in milliseconds."""
    device: str
    versions: str
    date: str
    results: Sequence[Row]
    """Of the evaluation: each metric under each attack."""

    @property
    def worst(self) -> Row:
        """Return the lowest mean PSNR, in dB, over all attacks and both threat models."""
        attacked = (row for row in self.results if row.metric == "psnr" and row.threat_model in THREAT_MODELS)
        return min(attacked, key=lambda row: row.value)

    @property
    def clean(self) -> float:
        """Return the mean PSNR of clean images, in dB."""
        return next(row.value for row in self.results if row.metric == "psnr" and row.attack == CLEAN.name)

    @property
    def drift(self) -> float | None:
        """Return the mean drift of clean images' latents from the base's; None if their shapes differ."""
        return next((row.value for row in self.results if row.metric == DRIFT and row.attack == CLEAN.name), None)

    @property
    def is_current(self) -> bool:
        """Return whether it was measured by the protocol as it is now."""
        return self.protocol in PROTOCOLS and self.fingerprint == PROTOCOLS[self.protocol].fingerprint

    def check(self, subject: Subject) -> None:
        """Refuse a row that does not belong to `subject` or to the protocol.

        Raises:
            UserError: if name, base, protocol, its settings, images, attacks, checks or the weights differ.
        """
        for field in ("name", "base", "protocol"):
            own, wanted = (getattr(each, field) or "none" for each in (self, subject))
            if own != wanted:
                raise UserError(f"the row has the {field} {own}, and the entry {wanted}; evaluate the entry")
        if not self.is_current:
            raise UserError(
                f"the row of {self.name} was measured by another version of the protocol; evaluate it again"
            )
        self._check_complete(PROTOCOLS[self.protocol])
        check_digest(subject, self.digest)
        check_base_digest(subject, self.base_digest)

    def _check_complete(self, protocol: Protocol) -> None:
        """Refuse a row that lacks something of its protocol, or has more.

        Raises:
            UserError: with the first difference.
        """
        if repeated := [setting for setting, n in Counter(row.setting for row in self.results).items() if n > 1]:
            raise UserError(f"the row of {self.name} has two results of {_named(repeated[0])}; evaluate it again")
        found = {row.setting: row.n for row in self.results if row.metric != DRIFT}
        other = sorted(protocol.settings ^ found.keys(), key=repr)
        if other:
            verb = "has a result that is not of" if other[0] in found else "lacks a result of"
            raise UserError(f"the row of {self.name} {verb} the protocol: {_named(other[0])}; evaluate it again")
        if numbers := set(found.values()) - {protocol.num_images}:
            raise UserError(
                f"the row of {self.name} has means of {min(numbers)} images, and the protocol {protocol.num_images}; "
                "evaluate it again"
            )
        if protocol.check_images and self.base is not None and self.failed_checks is None:
            raise UserError(f"the row of {self.name} has no robustness checks; evaluate it again")

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON values, which `read_row` reads."""
        return {**asdict(self), "results": [row.to_json() for row in self.results]}

    def write(self, path: Path) -> None:
        """Write the row as JSON, atomically."""
        write_text_atomically(path, f"{json.dumps(self.to_json(), indent=1)}\n")


def _named(setting: Setting) -> str:
    return f"{setting.metric} under {setting.attack}, {setting.threat_model}"


def check_rows(entries: Mapping[str, Entry], rows: Mapping[str, ZooRow]) -> None:
    """Refuse rows that cannot stand beside each other.

    Args:
        entries: the entries by name.
        rows: the rows by name; those without an entry are not checked.

    Raises:
        UserError: if a row does not belong to its entry, or has other images than its protocol or another row.
    """
    for name, row in rows.items():
        if name in entries:
            row.check(entries[name])
            check_images(row.images, PROTOCOLS[row.protocol], rows)


def check_digest(subject: Subject, found: str) -> None:
    """Refuse weights that are not those of `subject`.

    Raises:
        UserError: with both digests.
    """
    if subject.digest not in (None, found):
        raise UserError(f"{subject.name}: the weights have the digest {found}, and the entry has {subject.digest}")


def check_base_digest(subject: Subject, found: str | None) -> None:
    """Refuse weights that are not those of the base of `subject`; None stands for none.

    Raises:
        UserError: with both digests.
    """
    if (subject.base is None) != (found is None) or subject.base_digest not in (None, found):
        raise UserError(
            f"{subject.name}: the weights of the base have the digest {found or 'none'}, and the entry has "
            f"{subject.base_digest or 'none'}"
        )


def read_row(path: Path) -> ZooRow:
    """Return the row in a JSON file.

    Raises:
        MissingFile: a FileNotFoundError, if there is no such file.
        UnusableFile: an OSError, if it holds no row.
    """
    if not path.is_file():
        raise MissingFile(f"there is no row {path}; `python -m srl_utils.zoo evaluate` writes it")
    values = read_json(path)
    try:
        return checked(ZooRow, values)
    except UserError as error:
        raise UnusableFile(f"{path} is not a row of the zoo; evaluate the VAE again ({error})") from None


def read_rows(zoo: Path) -> dict[str, ZooRow]:
    """Return the current rows of a zoo by name, sorted.

    Raises:
        UnusableFile: an OSError, if a file holds no row.
    """
    rows = [read_row(path) for path in sorted((zoo / "rows").glob("*.json"))]
    return {row.name: row for row in rows if row.is_current}


def check_images(found: str, protocol: Protocol, rows: Mapping[str, ZooRow]) -> None:
    """Refuse images with another digest than those of the protocol and of the rows under it.

    Raises:
        UserError: with both digests.
    """
    fingerprint = protocol.fingerprint
    owners = {f"the row of {row.name}": row.images for row in rows.values() if row.fingerprint == fingerprint}
    for owner, expected in {"the protocol": protocol.image_digest, **owners}.items():
        if expected not in (None, found):
            raise UserError(f"the images have the digest {found}, and those of {owner} have {expected}")
