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
    """What was done to the images, and what was measured; two values of one setting can be compared."""

    attack: str
    """Name of the attack or corruption, `clean` for none."""
    objective: str | None
    """What the attack maximises, such as `mse` or `mse + lpips-vgg`; None where nothing is attacked."""
    threat_model: str
    """`transfer`, `adaptive` or `none`."""
    epsilon: float
    """Budget in units of a [0,1] image; 0 for an attack whose budget is in another measure."""
    metric: str
    """Name of the metric; that of LPIPS says the trunk: `lpips-alex` or `lpips-vgg`."""


class Record(NamedTuple):
    """One measured value of one image."""

    vae: str
    setting: Setting
    index: int  # type: ignore[assignment] # of the image; tuple.index is of no use here
    value: float

    @classmethod
    def from_json(cls, fields: Sequence[Any]) -> Record:
        """Return the record that JSON has turned into lists."""
        vae, setting, index, value = fields
        return cls(vae, Setting(*setting), index, value)


@dataclass(frozen=True, kw_only=True)
class Row:
    """The mean of a metric over images: one row of `results.json`. The first fields are those of `Setting`."""

    vae: str
    attack: str
    objective: str | None
    threat_model: str
    epsilon: float
    metric: str
    value: float
    ci95: tuple[float, float] | None
    """95% bootstrap interval; None for a metric that has no value per image."""
    n: int
    """Number of images."""

    @property
    def setting(self) -> Setting:
        """What two rows must share to be compared."""
        return Setting(self.attack, self.objective, self.threat_model, self.epsilon, self.metric)

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Row:
        """Return the row that `to_json` described."""
        interval = fields["ci95"]
        return cls(**{**fields, "ci95": interval and tuple(interval)})


Rows = Sequence[Row]


class Difference(NamedTuple):
    """A mean over `n` images, and its 95% bootstrap interval."""

    value: float
    ci95: tuple[float, float]
    n: int


def to_records(
    vae: str, perturbation: Perturbation, threat_model: str, numbers: Sequence[int], values: Mapping[str, Tensor]
) -> list[Record]:
    """Return one record per image and metric; `values` has a tensor `[N]` for each metric."""
    done = (perturbation.name, perturbation.objective, threat_model, perturbation.epsilon)
    return [
        Record(vae, Setting(*done, metric), number, value)
        for metric, per_image in values.items()
        for number, value in zip(numbers, per_image.tolist(), strict=True)
    ]


def to_row(vae: str, setting: Setting, value: float, *, n: int, ci95: tuple[float, float] | None = None) -> Row:
    """Return the row of one value."""
    return Row(vae=vae, **setting._asdict(), value=value, ci95=ci95, n=n)


def to_rows(records: Sequence[Record]) -> list[Row]:
    """Return the mean over images of each VAE and setting, with 95% bootstrap intervals."""
    groups: dict[tuple[str, Setting], dict[int, float]] = defaultdict(dict)
    for record in records:
        groups[record.vae, record.setting][record.index] = record.value
    rows = []
    for (vae, setting), by_image in groups.items():
        values = [by_image[index] for index in sorted(by_image)]
        rows.append(to_row(vae, setting, sum(values) / len(values), n=len(values), ci95=bootstrap_interval(values)))
    return rows


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Return `values` less `reference`, by image number, over the images that both have; None where there is none."""
    differences = [values[index] - reference[index] for index in sorted(values.keys() & reference.keys())]
    if not differences:
        return None
    return Difference(sum(differences) / len(differences), bootstrap_interval(differences), len(differences))


def differences_to(baseline: str, records: Sequence[Record]) -> dict[tuple[str, Setting], Difference]:
    """Return how every other VAE differs from `baseline`, under every setting in which they have images in common."""
    values: dict[tuple[str, Setting], dict[int, float]] = defaultdict(dict)
    for record in records:
        values[record.vae, record.setting][record.index] = record.value
    found = {
        (vae, setting): paired_difference(by_image, values.get((baseline, setting), {}))
        for (vae, setting), by_image in values.items()
        if vae != baseline
    }
    return {key: difference for key, difference in found.items() if difference is not None}
