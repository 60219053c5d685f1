"""Entries and rows of a small zoo."""

from __future__ import annotations

from pathlib import Path

import yaml

from srl_utils.evaluation.perturbations import NO_THREAT
from srl_utils.evaluation.results import Row, Setting, to_row
from srl_utils.zoo.entries import Entry
from srl_utils.zoo.protocols import PROTOCOLS
from srl_utils.zoo.rows import ZooRow
from srl_utils.zoo.schema import checked

FIELDS = {
    "name": "small", "weights": "outputs/small", "base": None, "protocol": "embedded", "objective": "srl", "data": "scenes",
    "budget": "8/255", "link": "https://example.org", "digest": None, "base_digest": None,
}  # fmt: skip
DIGEST = "0123456789abcdef"
BASED = {"base": "x", "base_digest": DIGEST}
"""Of an entry or a row with a base."""


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


def row(clean: float, worst: float, *, name: str = "small", **changes: object) -> ZooRow:
    """Return a complete row: PSNR `clean` without an attack, `worst` under adaptive APGD, and one more under the others."""
    protocol = PROTOCOLS["embedded"]

    def value(setting: Setting) -> float:
        if setting.metric == "ssim":
            return 0.5
        if setting.threat_model == NO_THREAT:
            return clean
        return worst + ((setting.attack, setting.threat_model) != ("apgd-100", "adaptive"))

    settings = [*sorted(protocol.settings, key=repr), Setting("clean", None, NO_THREAT, 0.0, "drift")]
    results = [to_row(name, each, 0.25 if each.metric == "drift" else value(each), n=32) for each in settings]
    fields = {
        "name": name, "digest": DIGEST, "base": None, "base_digest": None, "protocol": "embedded",
        "fingerprint": protocol.fingerprint, "images": protocol.image_digest, "failed_checks": None, "encoder_ms": 1.5,
        "device": "CPU, 1 thread", "versions": "torch 2", "date": "2026-01-01", "results": results,
    }  # fmt: skip
    return ZooRow(**{**fields, **changes})


def psnr_rows(clean: float, noise: float, *attacked: float) -> list[Row]:
    """Return results with this PSNR of clean images, under noise, and under attacks, transferred and adaptive in turn."""
    settings = [
        Setting("clean", None, NO_THREAT, 0.0, "psnr"),
        Setting("gaussian-noise", None, NO_THREAT, 8 / 255, "psnr"),
    ]
    settings += [
        Setting(f"attack-{number}", "mse", ("transfer", "adaptive")[number % 2], 8 / 255, "psnr")
        for number in range(len(attacked))
    ]
    return [to_row("small", each, value, n=2) for each, value in zip(settings, (clean, noise, *attacked), strict=True)]
