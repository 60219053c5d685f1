"""Measured values: one record per image, one row per mean, and paired differences between VAEs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from srl_utils.evaluation.perturbations import Perturbation
from srl_utils.metrics.pixels import bootstrap_interval


class Setting(NamedTuple):
    """What was done to the images, and what was measured. Values with the same setting can be compared."""

    attack: str
    """Name of the attack or corruption, `clean` for none."""
    objective: str | None
    """What the attack maximises, such as `mse` or `mse + lpips-vgg`; None if nothing is attacked."""
    threat_model: str
    """`transfer`, `adaptive` or `none`; `certified` for bounds on every attack."""
    epsilon: float
    """Budget in units of a [0,1] image; 0 if the budget is in another measure, or if there is none."""
    metric: str
    """Name of the metric; for LPIPS with its network, such as `lpips-alex`."""


class Record(NamedTuple):
    """One measured value of one image."""

    vae: str
    setting: Setting
    index: int  # type: ignore[assignment] # of the image; it hides tuple.index, which nobody needs
    value: float

    @classmethod
    def from_json(cls, fields: Sequence[Any]) -> Record:
        """Return the record from the list that JSON stores."""
        vae, setting, index, value = fields
        return cls(vae, Setting(*setting), index, value)


@dataclass(frozen=True, kw_only=True)
class Row:
    """The mean of a metric over images: one row of `results.json`."""

    vae: str
    attack: str
    objective: str | None
    threat_model: str
    epsilon: float
    metric: str
    value: float
    ci95: tuple[float, float] | None
    """95% bootstrap interval of the mean; None for a metric of whole sets of images."""
    n: int
    """Number of images."""
    dataset: str | None = None
    """Name of the data set, if the evaluation has several; else the JSON has no such field."""

    @property
    def setting(self) -> Setting:
        """Return the setting; rows with the same setting can be compared."""
        return Setting(self.attack, self.objective, self.threat_model, self.epsilon, self.metric)

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        fields = asdict(self)
        return fields if self.dataset is not None else {name: fields[name] for name in fields if name != "dataset"}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Row:
        """Return the row that `to_json` described."""
        interval = fields["ci95"]
        return cls(**{**fields, "ci95": interval and tuple(interval)})


Rows = Sequence[Row]


class Difference(NamedTuple):
    """Mean of paired differences over `n` images, and its 95% bootstrap interval."""

    value: float
    ci95: tuple[float, float]
    n: int


def to_records(
    vae: str, perturbation: Perturbation, threat_model: str, numbers: Sequence[int], values: Mapping[str, Tensor]
) -> list[Record]:
    """Return one record per image and metric.

    Args:
        vae: name of the VAE.
        perturbation: what was done to the images.
        threat_model: `transfer`, `adaptive` or `none`.
        numbers: of the N images.
        values: one per image, `[N]`, for each metric.
    """
    done = (perturbation.name, perturbation.objective, threat_model, perturbation.epsilon)
    return [
        Record(vae, Setting(*done, metric), number, value)
        for metric, per_image in values.items()
        for number, value in zip(numbers, per_image.tolist(), strict=True)
    ]


def to_row(vae: str, setting: Setting, value: float, *, n: int, ci95: tuple[float, float] | None = None) -> Row:
    """Return the row of one value."""
    return Row(vae=vae, **setting._asdict(), value=value, ci95=ci95, n=n)


Values = Mapping[tuple[str, Setting], Mapping[int, float]]
"""Values by VAE and setting, and then by image number."""


def by_setting(records: Sequence[Record]) -> Values:
    """Return the values of records by VAE, setting and image."""
    values: dict[tuple[str, Setting], dict[int, float]] = defaultdict(dict)
    for record in records:
        values[record.vae, record.setting][record.index] = record.value
    return dict(values)


def to_rows(records: Sequence[Record]) -> list[Row]:
    """Return the mean over images for each VAE and setting, with its 95% bootstrap interval."""
    rows = []
    for (vae, setting), by_image in by_setting(records).items():
        values = [by_image[index] for index in sorted(by_image)]
        rows.append(to_row(vae, setting, sum(values) / len(values), n=len(values), ci95=bootstrap_interval(values)))
    return rows


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Return the mean of `values` minus `reference` over the images that both have; None if they share no image.

    Args:
        values: by image number.
        reference: by image number.
    """
    differences = [values[index] - reference[index] for index in sorted(values.keys() & reference.keys())]
    if not differences:
        return None
    return Difference(sum(differences) / len(differences), bootstrap_interval(differences), len(differences))


def differences_to(baseline: str, records: Sequence[Record]) -> dict[tuple[str, Setting], Difference]:
    """Return the paired difference of each other VAE from `baseline`, by VAE and setting, if they share images."""
    values = by_setting(records)
    found = {
        (vae, setting): paired_difference(by_image, values.get((baseline, setting), {}))
        for (vae, setting), by_image in values.items()
        if vae != baseline
    }
    return {key: difference for key, difference in found.items() if difference is not None}
