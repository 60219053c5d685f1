"""Entries and rows of a small zoo."""

from __future__ import annotations

from pathlib import Path

import yaml

from srl_utils.evaluation.results import Setting, to_row
from srl_utils.zoo.entries import Entry, checked
from srl_utils.zoo.protocols import PROTOCOLS
from srl_utils.zoo.rows import ZooRow

FIELDS = {
    "name": "small", "weights": "outputs/small", "base": None, "protocol": "embedded", "objective": "srl", "data": "scenes",
    "budget": "8/255", "link": "https://example.org", "digest": None,
}  # fmt: skip
DIGEST = "0123456789abcdef"


def entry(**changes: object) -> Entry:
    """Return an entry that is accepted."""
    return checked(Entry, {**FIELDS, **changes})


def write_entry(zoo: Path, **changes: object) -> Path:
    """Write an entry where a zoo has it."""
    given = {**FIELDS, **changes}
    path = zoo / "entries" / f"{given['name']}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


def row(*psnr: float, name: str = "small", **changes: object) -> ZooRow:
    """Return a row with this PSNR clean, under noise, and under attacks, which are transferred and adaptive in turn."""
    settings = [Setting("clean", None, "none", 0.0, "psnr"), Setting("gaussian-noise", None, "none", 8 / 255, "psnr")]
    settings += [
        Setting(f"attack-{number}", "mse", ("transfer", "adaptive")[number % 2], 8 / 255, "psnr")
        for number in range(len(psnr) - 2)
    ]
    results = [to_row(name, setting, value, n=2) for setting, value in zip(settings, psnr, strict=True)]
    results.append(to_row(name, Setting("clean", None, "none", 0.0, "drift"), 0.25, n=2))
    fields = {
        "name": name, "digest": DIGEST, "protocol": "embedded", "fingerprint": PROTOCOLS["embedded"].fingerprint,
        "images": PROTOCOLS["embedded"].image_digest, "failed_checks": None, "encoder_ms": 1.5, "device": "CPU, 1 threads",
        "versions": "torch 2", "date": "2026-01-01", "results": results,
    }  # fmt: skip
    return ZooRow(**{**fields, **changes})
