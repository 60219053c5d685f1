"""Which defence helps: a table of purifiers and VAEs for each attack, with the best choice for each image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from srl_utils.evaluation.defences import Defence
from srl_utils.evaluation.perturbations import ADAPTIVE, CLEAN, NO_THREAT
from srl_utils.evaluation.report.tables import HIGHER_IS_BETTER, METRIC_TITLES, Panel, measured
from srl_utils.evaluation.results import Record, Row, Rows, Setting, Values, by_setting
from srl_utils.evaluation.timings import REPETITIONS, Timings
from srl_utils.images.pixels import format_pixel_distance
from srl_utils.metrics.features import FEATURE_SIMILARITY
from srl_utils.metrics.pixels import bootstrap_interval
from srl_utils.vae.codec import Codec

SHOWN = ("psnr", "ssim", "lpips-alex", "lpips-vgg", "clip", "clip-text", FEATURE_SIMILARITY, "fid", "rfid")
Found = dict[Setting, dict[str, Row]]
"""Rows by setting and VAE."""
NO_PURIFIER = "none"
BEST = "best purifier of each image"
EXPLANATION = (
    "The VAE, and the purifier in front of it, with the best mean for each attack and metric. The tables below have a line "
    "for each purifier, and one for the best purifier of each image: what someone who tries them all achieves. Adaptive "
    "attacks make another image for each purifier, so their tables lack that line. They know the purifier if it has a "
    "gradient, else the VAE alone."
)

PRICE = "What purifying costs an image that nobody has attacked: each line against the first."


def defence_panels(codecs: Sequence[Codec], rows: Rows, records: Sequence[Record], timings: Timings) -> list[Panel]:
    """Return panels with the best defences, with their seconds, and with all values for each attack and threat model.

    Args:
        codecs: the VAEs alone, and with purifiers.
        rows: of the study.
        records: of the study.
        timings: of all purifiers and encoders.
    """
    names = {(purifier_name(codec), codec.bare.name): codec.name for codec in codecs}
    found: Found = {}
    for row in rows:
        if row.metric in SHOWN:
            found.setdefault(row.setting, {})[row.vae] = row
    groups: dict[Setting, list[Setting]] = {}
    for setting in found:
        groups.setdefault(setting._replace(metric=""), []).append(setting)
    values = by_setting(records)
    return [
        _best_panel(found),
        _seconds_panel(timings),
        *(_panel(group, names, found, values) for group in groups.values()),
    ]


def purifier_name(codec: Codec) -> str:
    """Return the name of the purifier in front of a VAE."""
    return codec.purifier.name if isinstance(codec, Defence) else NO_PURIFIER


def _best_panel(found: Found) -> Panel:
    """Return the best defence for each setting."""
    table = [["images", "threat model", "metric", "best defence", "value"]]
    for setting, by_vae in found.items():
        best = _choice(setting)(by_vae.values(), key=lambda row: row.value)
        table.append([_title(setting), setting.threat_model, METRIC_TITLES[setting.metric], best.vae, _text(best)])
    return Panel("Which defence", EXPLANATION, table)


def _seconds_panel(timings: Timings) -> Panel:
    """Return what each defence costs: the purifier alone, and the purifier with each encoder."""
    seconds = {NO_PURIFIER: 0.0, **timings.purifiers}
    table = [["purifier", "purifying", *(f"purifying and encoding, {vae}" for vae in timings.encoders)]]
    for purifier, purifying in seconds.items():
        costs = [purifying, *(purifying + encoding for encoding in timings.encoders.values())]
        table.append([purifier, *map(_seconds, costs)])
    explanation = (
        f"On {timings.device}, for each image of a batch of {timings.n}: the fastest of {REPETITIONS} calls after a "
        "warm-up. The first line is the VAE's own encoding. The numbers were measured once; another run of the same "
        "command repeats them."
    )
    return Panel("Seconds per image", explanation, table)


def _seconds(value: float) -> str:
    """Return seconds with three significant digits, and no exponent."""
    return np.format_float_positional(value, precision=3, unique=False, fractional=False, trim="-") if value else "0"


def _panel(settings: Sequence[Setting], names: Mapping[tuple[str, str], str], found: Found, values: Values) -> Panel:
    """Return the table of settings that differ in the metric alone.

    Args:
        settings: as many as metrics.
        names: of the defences in the results, by purifier and VAE.
        found: rows of the study.
        values: of every image.
    """
    purifiers, vaes = (list(dict.fromkeys(part)) for part in zip(*names, strict=True))
    table = [["purifier", "metric", *vaes]]
    for setting in settings:
        by_vae, metric = found[setting], METRIC_TITLES[setting.metric]
        for purifier in purifiers:
            table.append([purifier, metric, *(_text(by_vae.get(names[purifier, vae])) for vae in vaes)])
        best = [_best(setting, [names[purifier, vae] for purifier in purifiers], values) for vae in vaes]
        if any(best) and setting.threat_model != ADAPTIVE:
            table.append([BEST, metric, *best])
    first = settings[0]
    explanation = PRICE if first.attack.partition(", ")[0] == CLEAN.name else ""
    threat = "" if first.threat_model == NO_THREAT else f", {first.threat_model}"
    return Panel(f"Defences: {_title(first)}{threat}", explanation, table)


def _title(setting: Setting) -> str:
    return f"{setting.attack}, {format_pixel_distance(setting.epsilon)}" if setting.epsilon else setting.attack


def _choice(setting: Setting) -> Callable[..., Any]:
    """Return `max` or `min`, whichever chooses the better value."""
    return max if setting.metric in HIGHER_IS_BETTER else min


def _text(row: Row | None) -> str:
    return "" if row is None else " ".join(measured(row.metric, row.value, row.ci95))


def _best(setting: Setting, defences: Sequence[str], values: Values) -> str:
    """Return the mean over images of the best value among defences; empty for a metric without a value per image."""
    by_image: dict[int, list[float]] = {}
    for defence in defences:
        for index, value in values.get((defence, setting), {}).items():
            by_image.setdefault(index, []).append(value)
    if not by_image:
        return ""
    best = [_choice(setting)(by_image[index]) for index in sorted(by_image)]
    return " ".join(measured(setting.metric, fmean(best), bootstrap_interval(best)))
