"""How much better one VAE is than another, image by image: tighter than what two separate intervals tell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from srl_utils.evaluation.reconstruction import Record
from srl_utils.metrics import bootstrap_interval


class Setting(NamedTuple):
    """What two values must share to be compared."""

    attack: str
    threat_model: str
    epsilon: float
    metric: str


class Difference(NamedTuple):
    """A mean over `n` images, and its 95% bootstrap interval."""

    value: float
    ci95: tuple[float, float]
    n: int


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """`values` less `reference`, by image number, over the images that both have; None where there is none."""
    differences = [values[index] - reference[index] for index in sorted(values.keys() & reference.keys())]
    if not differences:
        return None
    return Difference(sum(differences) / len(differences), bootstrap_interval(differences), len(differences))


def differences_to(baseline: str, records: Sequence[Record]) -> dict[tuple[str, Setting], Difference]:
    """Of every other VAE to `baseline`, under every setting in which they have images in common."""
    values: dict[tuple[str, Setting], dict[int, float]] = defaultdict(dict)
    for record in records:
        values[record.vae, Setting(*record[1:5])][record.index] = record.value
    found = {
        (vae, setting): paired_difference(by_image, values.get((baseline, setting), {}))
        for (vae, setting), by_image in values.items()
        if vae != baseline
    }
    return {key: difference for key, difference in found.items() if difference is not None}
