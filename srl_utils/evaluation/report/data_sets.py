"""Compare data sets: does a VAE's robustness carry over, and which kinds of image does the VAE serve worse?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import numpy as np

from srl_utils.evaluation.perturbations import CLEAN, NO_THREAT
from srl_utils.evaluation.report.caveats import Caveat
from srl_utils.evaluation.report.document import ReportContent
from srl_utils.evaluation.report.tables import Panel, measured
from srl_utils.evaluation.results import Difference, Setting, Values, by_setting, paired_difference
from srl_utils.images.pixels import format_pixel_distance
from srl_utils.metrics.pixels import bootstrap_interval

METRIC = "psnr"
KEPT = 0.75
"""Share of what is won back on the first data set that has to be won back on another one for the verdict `carries over`."""
CARRIES_OVER, LOST, UNCLEAR = "carries over", "does not carry over", "unclear"
NOTHING_LOST, NOTHING_WON = "baseline loses nothing", "nothing to carry over"
NOT_JUDGED = (
    "whether the robustness carries over was left out: it needs psnr among --metrics, clean among --attacks, and an attack "
    "that costs the baseline PSNR"
)
RESAMPLES = 2000


def compared(contents: Mapping[str, ReportContent], note: str) -> ReportContent:
    """Return the content of the report on all data sets.

    Args:
        contents: of the report on each data set, by its name; the others are compared with the first one.
        note: the report's first note.
    """
    first = next(iter(contents.values()))
    values = {name: by_setting(content.records) for name, content in contents.items()}
    own_settings = {name: content.settings["images"] for name, content in contents.items()}
    panels = (carrying_over(first, values), served(first, values))
    notes = [note, *([NOT_JUDGED] if panels[0] is None and _attacked(first) else [])]
    return replace(
        first,
        rows=[replace(row, dataset=name) for name, content in contents.items() for row in content.rows],
        records=(),
        parts=contents,
        panels=[panel for panel in panels if panel is not None],
        pictures={},
        notes=[*notes, *_common({name: content.notes for name, content in contents.items()})],
        caveats=_common_caveats(contents),
        settings={**first.settings, "images": "; ".join(own_settings.values())},
    )


# --- does it carry over? ---


class WonBack(NamedTuple):
    """The share of the baseline's lost PSNR that a VAE wins back, as a mean over images and as bootstrap resamples."""

    value: float
    resamples: np.ndarray
    """`[RESAMPLES]`, of the images."""
    certain_loss: bool
    """Whether the 95% interval of the baseline's loss lies above 0; else the share means nothing."""

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95% percentile-bootstrap interval of the share."""
        return _interval(self.resamples)

    @property
    def text(self) -> str:
        """Return the share and its interval in percent."""
        if not self.certain_loss:
            return NOTHING_LOST
        low, high = self.interval
        return f"{self.value:.0%} [{low:.0%}, {high:.0%}]"


def won_back(
    clean: Mapping[int, float], attacked: Mapping[int, float], robust: Mapping[int, float], *, seed: int = 0
) -> WonBack | None:
    """Return the share of the baseline's lost PSNR that a VAE wins back; None if no image has all three values.

    It is the mean of (robust - attacked) over the mean of (clean - attacked), both over the same images.

    Args:
        clean: PSNR of the baseline for clean images, by image number.
        attacked: PSNR of the baseline under the attack.
        robust: PSNR of the other VAE under the attack.
        seed: of the resampling of images.
    """
    images = sorted(clean.keys() & attacked.keys() & robust.keys())
    if not images:
        return None
    gained = np.array([robust[image] - attacked[image] for image in images])
    lost = np.array([clean[image] - attacked[image] for image in images])
    certain = bootstrap_interval(lost.tolist())[0] > 0
    picks = np.random.default_rng(seed).integers(0, len(images), size=(RESAMPLES, len(images)))
    with np.errstate(divide="ignore", invalid="ignore"):  # without a loss there is no share, and none is shown
        shares = gained[picks].mean(axis=1) / lost[picks].mean(axis=1)
        return WonBack(float(gained.mean() / lost.mean()), shares, certain)


def verdict(first: WonBack, other: WonBack) -> str:
    """Return whether the robustness on the first data set carries over to another one.

    It does if the share won back there is at least `KEPT` of the share on the first one: if the 95% interval of the
    difference of the two lies above 0. It does not if the interval lies below 0.
    """
    if not other.certain_loss:
        return ""  # the share's own text says so
    if not first.certain_loss or first.interval[0] <= 0:
        return NOTHING_WON
    low, high = _interval(other.resamples - KEPT * first.resamples)
    return CARRIES_OVER if low > 0 else LOST if high < 0 else UNCLEAR


def carrying_over(content: ReportContent, values: Mapping[str, Values]) -> Panel | None:
    """Return the table of the shares won back: a line for each VAE and attack, a column for each data set.

    Args:
        content: of the report on the first data set.
        values: of each data set.

    Returns:
        None if there is no attack, or no VAE beside the baseline.
    """
    first, *others = values
    table = [["VAE", "images", "epsilon", "threat model", first, *others]]
    for vae, setting in _lines(content, values[first]):
        if setting.objective is None:
            continue
        # The data sets' images are resampled independently, so their seeds differ.
        shares = [
            _won_back_on(own, content.baseline, vae, setting, seed=number) for number, own in enumerate(values.values())
        ]
        if shares[0] is not None:
            cells = [shares[0].text, *(_judged(shares[0], share) for share in shares[1:])]
            table.append([vae, setting.attack, _budget(setting), setting.threat_model, *cells])
    explanation = (
        f"The share of {content.baseline}'s lost PSNR that each VAE wins back. The robustness carries over to a data set if "
        f"the share there is at least {KEPT:.0%} of the share on {first}, and the 95% bootstrap interval of the difference "
        f"excludes 0; it is {UNCLEAR} if the interval includes 0."
    )
    return Panel("Does the robustness carry over?", explanation, table) if len(table) > 1 else None


def _attacked(content: ReportContent) -> bool:
    """Return whether a VAE was attacked that can be compared with the baseline."""
    return any(row.objective is not None and row.vae != content.baseline for row in content.rows)


def _won_back_on(values: Values, baseline: str, vae: str, setting: Setting, *, seed: int) -> WonBack | None:
    clean = values.get((baseline, Setting(CLEAN.name, None, NO_THREAT, 0.0, METRIC)), {})
    attacked, robust = values.get((baseline, setting), {}), values.get((vae, setting), {})
    return won_back(clean, attacked, robust, seed=seed)


def _judged(first: WonBack, other: WonBack | None) -> str:
    return "" if other is None else ": ".join(filter(None, (other.text, verdict(first, other))))


def _interval(resamples: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(resamples, (0.025, 0.975))
    return float(low), float(high)


# --- which images are served worse? ---


def served(content: ReportContent, values: Mapping[str, Values]) -> Panel | None:
    """Return the table of the PSNR's differences from the baseline: a line for each VAE and kind of attack or corruption.

    Args:
        content: of the report on the first data set.
        values: of each data set.

    Returns:
        None if the PSNR was not measured, or if there is no VAE beside the baseline.
    """
    first, *_ = values
    table = [["VAE", "images", "epsilon", "threat model", *values, "served worst"]]
    for vae, setting in _lines(content, values[first]):
        found = {
            name: paired_difference(own.get((vae, setting), {}), own.get((content.baseline, setting), {}))
            for name, own in values.items()
        }
        shown = {name: difference for name, difference in found.items() if difference is not None}
        cells = [_text(found[name]) for name in values]
        table.append([vae, setting.attack, _budget(setting), setting.threat_model, *cells, _worst(first, shown)])
    explanation = (
        f"PSNR (dB) of each VAE minus that of {content.baseline} on the same images. Served worst: the data set with the "
        f"lowest difference, and how far it is below that on {first}."
    )
    return Panel("Which images are served worse?", explanation, table) if len(table) > 1 else None


def _text(difference: Difference | None) -> str:
    return "" if difference is None else " ".join(measured(METRIC, difference.value, difference.ci95, sign="+"))


def _worst(first: str, differences: Mapping[str, Difference]) -> str:
    """Return the data set with the lowest difference, and how far it is below that of the first data set."""
    if first not in differences:
        return ""
    worst = min(differences, key=lambda name: differences[name].value)
    below = differences[worst].value - differences[first].value
    return worst if worst == first else f"{worst}, {below:+.2f} dB"


def _lines(content: ReportContent, values: Values) -> Iterator[tuple[str, Setting]]:
    """Yield each VAE beside the baseline with each setting in which its PSNR was measured."""
    for vae in content.others:
        yield from ((vae, setting) for name, setting in values if name == vae and setting.metric == METRIC)


def _budget(setting: Setting) -> str:
    return format_pixel_distance(setting.epsilon) if setting.epsilon else ""


# --- what limits the numbers ---


def _common(texts: Mapping[str, Sequence[str]]) -> list[str]:
    """Return each text once; those that not all data sets have name theirs."""
    everywhere = set.intersection(*map(set, texts.values()))
    shared = [text for text in next(iter(texts.values())) if text in everywhere]
    return shared + [f"{name}: {text}" for name, own in texts.items() for text in own if text not in everywhere]


def _common_caveats(contents: Mapping[str, ReportContent]) -> list[Caveat]:
    """Return each caveat once; those that not all data sets have name theirs."""
    metrics = list(dict.fromkeys(chain.from_iterable(_concerned(content) for content in contents.values())))
    return [
        Caveat(text, concerned)
        for concerned in metrics
        for text in _common({name: _texts(content, concerned) for name, content in contents.items()})
    ]


def _concerned(content: ReportContent) -> list[tuple[str, ...]]:
    return [tuple(caveat.metrics) for caveat in content.caveats]


def _texts(content: ReportContent, metrics: tuple[str, ...]) -> list[str]:
    return [caveat.text for caveat in content.caveats if tuple(caveat.metrics) == metrics]
