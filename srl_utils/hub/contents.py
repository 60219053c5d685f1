"""Choose the files of a folder to publish, check that they belong together, and find outdated files of a repository."""

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
"""Files that a training writes beside weights and card. Checkpoints are not published, since optimizer states are not part
of the model. `training_args.json` is not published, since it names local folders; the card has the other arguments."""


@dataclass(frozen=True)
class Contents:
    """The published files of a folder.

    Attributes:
        folder: the folder.
        names: paths inside the folder, with slashes.
        left_out: weights that the folder's card does not describe.
    """

    folder: Path
    names: list[str]
    left_out: list[str]

    def sent(self, name: str) -> Path | bytes:
        """Return what is uploaded for a file: its path, or a configuration without the name of a local folder."""
        path = self.folder / name
        if name != CONFIG:
            return path
        config = json.loads(path.read_text(encoding="utf-8"))
        origin = Path(str(config.get("_name_or_path", "")))
        if not origin.is_absolute():
            return path
        return (json.dumps({**config, "_name_or_path": origin.name}, indent=2) + "\n").encode()

    def outdated(self, present: Iterable[str]) -> list[str]:
        """Return the files of a repository that an earlier upload left there and this one does not replace.

        These are all weights that diffusers would find beside the new ones, low-rank updates, results, journal and sample
        grids. Files that a training never writes stay. `describes_others` decides about the card.
        """
        others = sorted(set(present) - set(self.names))
        return [name for name in others if is_weights_file(name) or RECORDS.fullmatch(name)]

    def describes_others(self, card: str) -> bool:
        """Return whether a repository's card describes other weights than these."""
        recorded = recorded_weights(card)
        return recorded is not None and (not recorded or _other_file(self.folder, recorded) is not None)


def contents(folder: Path) -> Contents:
    """Return the files of `folder` to publish.

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
    """Return the SHA-256 of each weights file that the folder's card describes, after checking the files.

    Returns:
        None if there is no card, or if it does not name weights, such as a card written by hand.

    Raises:
        UserError: if a file is missing or differs, or if the training has not ended.
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
    """Return the first file of `recorded` that is missing in `folder` or has another SHA-256; None without one."""
    for name, expected in recorded.items():
        if not (folder / name).is_file() or checksum(folder / name) != expected:
            return name
    return None


def _is_published_weights(name: str) -> bool:
    """Return whether the name is that of safetensors or their index; loading a pickle can run code."""
    return is_weights_file(name) and ".bin" not in name
