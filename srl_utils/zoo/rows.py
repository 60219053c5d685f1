"""Rows of the zoo: what the standard protocol measured of one VAE, as JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from srl_utils.errors import MissingFile, UnusableFile, UserError
from srl_utils.evaluation.perturbations import CLEAN
from srl_utils.evaluation.results import Row
from srl_utils.evaluation.study import THREAT_MODELS
from srl_utils.evaluation.tasks.base import DRIFT
from srl_utils.files import read_json, write_text_atomically
from srl_utils.zoo.entries import Subject
from srl_utils.zoo.protocols import PROTOCOLS, Protocol


@dataclass(frozen=True, kw_only=True)
class ZooRow:
    """What was measured of one VAE."""

    name: str
    digest: str
    """Of the weights, as `Codec.digest`."""
    protocol: str
    fingerprint: str
    """Of the protocol when it was measured."""
    images: str
    """Digest of the images."""
    failed_checks: list[str] | None
    """Questions of the robustness checks that failed; None for a VAE without a base, which has none."""
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
            UserError: if name, protocol, its settings or the weights differ.
        """
        for field in ("name", "protocol"):
            if getattr(self, field) != getattr(subject, field):
                raise UserError(
                    f"the row has the {field} {getattr(self, field)}, and the entry {getattr(subject, field)}; "
                    "evaluate the entry"
                )
        if not self.is_current:
            raise UserError(
                f"the row of {self.name} was measured by another version of the protocol; evaluate it again"
            )
        check_digest(subject, self.digest)

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return {**asdict(self), "results": [row.to_json() for row in self.results]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ZooRow:
        """Return the row that `to_json` described."""
        return cls(**{**values, "results": [Row.from_json(row) for row in values["results"]]})

    def write(self, path: Path) -> None:
        """Write the row as JSON, atomically."""
        write_text_atomically(path, f"{json.dumps(self.to_json(), indent=1)}\n")


def check_digest(subject: Subject, found: str) -> None:
    """Refuse weights that are not those of `subject`.

    Raises:
        UserError: with both digests.
    """
    if subject.digest not in (None, found):
        raise UserError(f"{subject.name}: the weights have the digest {found}, and the entry has {subject.digest}")


def read_row(path: Path) -> ZooRow:
    """Return the row in a JSON file.

    Raises:
        MissingFile: a FileNotFoundError, if there is no such file.
        UnusableFile: an OSError, if it holds no row.
    """
    if not path.is_file():
        raise MissingFile(f"there is no row {path}; `python -m srl_utils.zoo evaluate` writes it")
    try:
        return ZooRow.from_json(read_json(path))
    except (TypeError, KeyError, AttributeError):
        raise UnusableFile(f"{path} is not a row of the zoo; evaluate the VAE again") from None


def read_rows(zoo: Path) -> dict[str, ZooRow]:
    """Return the current rows of a zoo by name, sorted.

    Raises:
        UnusableFile: an OSError, if a file holds no row.
    """
    rows = [read_row(path) for path in sorted((zoo / "rows").glob("*.json"))]
    return {row.name: row for row in rows if row.is_current}


def check_images(found: str, protocol: Protocol, zoo: Path) -> None:
    """Refuse images with another digest than those of the protocol and of the zoo's rows.

    Raises:
        UserError: with both digests.
    """
    measured = {f"the row of {row.name}": row for row in read_rows(zoo).values()}
    owners = {owner: row.images for owner, row in measured.items() if row.fingerprint == protocol.fingerprint}
    for owner, expected in {"the protocol": protocol.image_digest, **owners}.items():
        if expected not in (None, found):
            raise UserError(f"the images have the digest {found}, and those of {owner} have {expected}")
