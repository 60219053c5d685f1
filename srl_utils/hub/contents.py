"""Which files of a folder are published, whether they belong together, and which files of a repository are outdated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from srl_utils.errors import UserError
from srl_utils.files import checksum
from srl_utils.hub.card import recorded_weights
from srl_utils.vae.loading import WEIGHTS_NAME, is_weights_file

CARD = "README.md"
CONFIG = "config.json"
RECORDS = re.compile(r"metrics\.jsonl|results\.json|samples/(step-\d+|comparison)\.png")
"""What a training writes beside weights and card. `checkpoint-*` is not published: optimizer states are no part of the
model. Nor is `training_args.json`, which names folders of this machine; the card has the arguments without them."""


@dataclass(frozen=True)
class Contents:
    """What is published of a folder."""

    folder: Path
    names: list[str]
    """Paths inside the folder, with slashes."""
    left_out: list[str]
    """Weights that the folder's card does not describe."""

    def sent(self, name: str) -> Path | bytes:
        """Return what is sent for a file: itself, but for a config that names a folder of this machine."""
        path = self.folder / name
        if name != CONFIG:
            return path
        config = json.loads(path.read_text(encoding="utf-8"))
        origin = Path(str(config.get("_name_or_path", "")))
        if not origin.is_absolute():
            return path
        return (json.dumps({**config, "_name_or_path": origin.name}, indent=2) + "\n").encode()

    def outdated(self, present: Iterable[str]) -> list[str]:
        """Return which files of a repository this upload makes outdated: those of an earlier upload not sent again.

        These are all weights that diffusers would find beside the new ones, results, journal and pictures. Files that
        a training never writes stay. The card is left to `describes_others`.
        """
        others = sorted(set(present) - set(self.names))
        return [name for name in others if is_weights_file(name) or RECORDS.fullmatch(name)]

    def describes_others(self, card: str) -> bool:
        """Return whether a repository's card is that of a training which made other weights than these."""
        recorded = recorded_weights(card)
        return recorded is not None and (not recorded or _other_file(self.folder, recorded) is not None)


def contents(folder: Path) -> Contents:
    """Return what is published of `folder`.

    Raises:
        UserError: if the folder's card describes other weights than those beside it.
    """
    described = described_weights(folder)
    weights = sorted(path.name for path in folder.iterdir() if _is_published_weights(path.name))
    chosen = [name for name in weights if described is None or name in described]
    files = [path for path in (*folder.glob("*"), *folder.glob("samples/*")) if path.is_file()]
    records = sorted(filter(RECORDS.fullmatch, (path.relative_to(folder).as_posix() for path in files)))
    names = [CONFIG, *chosen, *([CARD] if (folder / CARD).is_file() else []), *records]
    return Contents(folder, names, [name for name in weights if name not in chosen])


def described_weights(folder: Path) -> dict[str, str] | None:
    """Return the SHA-256 of each weights file that the folder's card describes, which its files have been held against.

    None where the folder has no card, or one that says nothing of weights, such as one written by hand.

    Raises:
        UserError: if one of the files is missing or another one, or if the training has not ended.
    """
    card = folder / CARD
    recorded = recorded_weights(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    if recorded is None:
        return None
    if WEIGHTS_NAME not in recorded:
        raise UserError(
            f"{card} was written before its training ended, so the weights beside it are of an earlier run; finish the "
            f"training, or remove {CARD}, results.json, metrics.jsonl and samples to publish the weights alone"
        )
    other = _other_file(folder, recorded)
    if other is not None:
        raise UserError(
            f"{card} describes another {other} than the one in {folder}; train again, or remove {CARD}, results.json, "
            "metrics.jsonl and samples to publish the weights alone"
        )
    return recorded


def _other_file(folder: Path, recorded: Mapping[str, str]) -> str | None:
    """The first file of `recorded` that is missing in `folder` or has another SHA-256."""
    for name, expected in recorded.items():
        if not (folder / name).is_file() or checksum(folder / name) != expected:
            return name
    return None


def _is_published_weights(name: str) -> bool:
    """Safetensors and their indices; what loads from a pickle can run code."""
    return is_weights_file(name) and ".bin" not in name
