"""Measured values: one record per image, one row per mean, and paired differences between VAEs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from srl_utils.evaluation.perturbations import Perturbation
from srl_utils.metrics.pixels import bootstrap_interval


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


class Record(NamedTuple):
    """One measured value of one image."""

    vae: str
    attack: str
    threat_model: str
    epsilon: float
    metric: str
    index: int
    value: float


def to_records(
    vae: str, perturbation: Perturbation, threat_model: str, numbers: Sequence[int], values: dict[str, Tensor]
) -> list[Record]:
    """One record per image and metric; `values` has a tensor `[N]` for each metric."""
    return [
        Record(vae, perturbation.name, threat_model, perturbation.epsilon, metric, number, value)
        for metric, per_image in values.items()
        for number, value in zip(numbers, per_image.tolist(), strict=True)
    ]


def to_rows(records: Sequence[Record]) -> list[dict[str, object]]:
    """Means over images with 95% bootstrap intervals, in the project's row format."""
    groups: dict[tuple, dict[int, float]] = defaultdict(dict)
    for record in records:
        groups[record[:5]][record.index] = record.value
    rows = []
    for (vae, attack, threat_model, epsilon, metric), by_image in groups.items():
        values = [by_image[index] for index in sorted(by_image)]
        rows.append(
            {
                "vae": vae,
                "attack": attack,
                "threat_model": threat_model,
                "epsilon": epsilon,
                "metric": metric,
                "value": sum(values) / len(values),
                "ci95": list(bootstrap_interval(values)),
                "n": len(values),
            }
        )
    return rows
