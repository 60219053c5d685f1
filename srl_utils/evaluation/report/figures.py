"""Draw results as figures: PSNR against epsilon and severity, and one group of bars for each attack."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from srl_utils.attacks.corruptions import severity_of
from srl_utils.evaluation.perturbations import ADAPTIVE, CLEAN, NO_THREAT
from srl_utils.evaluation.report.tables import METRIC_TITLES
from srl_utils.evaluation.results import Row, Rows
from srl_utils.files import write_atomically
from srl_utils.images.pixels import format_pixel_distance

USUAL_EPSILON = 8 / 255
"""The budget that papers report, in units of a [0,1] image; bars show it if it was run."""
LONGEST_NAME = 40
PANELS_ACROSS = 4
AMOUNTS = {"epsilon": "epsilon (1/255)", "severity": "severity"}
"""Labels of the horizontal axis."""
Curves = Mapping[str, Sequence[tuple[float, Row]]]
"""Amounts and rows of each attack, such as epsilon in 1/255 and the PSNR under the attack."""
MOST_TICKS = 7
# Grey for the baseline, then the palette of Okabe and Ito (2008), which colour-blind readers can distinguish.
COLOURS = ("#7f8a96", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vPX"
THREAT_TITLES = {
    "none": "clean and corrupted images",
    "transfer": "transferred attacks",
    "adaptive": "adaptive attacks",
    "certified": "certificates",
}
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#9aa3ad",
    "axes.grid": True,
    "axes.labelcolor": "#333a41",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.titlesize": 12,
    "font.size": 9,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "xtick.color": "#333a41",
    "ytick.color": "#333a41",
}


def draw_figures(rows: Rows, vaes: Sequence[str], folder: Path) -> dict[str, Path]:
    """Draw the figures of the PSNR as PNG files in `folder`, and return their paths by title.

    PSNR against epsilon is drawn only if an attack was run with two or more budgets, and against severity only if a
    corruption was.
    """
    measured = [row for row in rows if row.metric == "psnr"]
    clean = [row for row in measured if row.attack == CLEAN.name]
    figures: dict[str, Path] = {}
    # Ignore the user's own settings of matplotlib.
    with style.context(["default", STYLE]):
        for threat_model in dict.fromkeys(row.threat_model for row in measured):
            attacked = [row for row in measured if row.threat_model == threat_model and row.attack != CLEAN.name]
            name, slug = THREAT_TITLES.get(threat_model, threat_model), safe_name(threat_model)
            for amount, curves in (("epsilon", _by_epsilon(attacked)), ("severity", _by_severity(attacked))):
                if curves:
                    title = f"PSNR against {amount}, {name}"
                    started = {attack: [*((0.0, row) for row in clean), *points] for attack, points in curves.items()}
                    figure = _panels(title, started, vaes, label=AMOUNTS[amount])
                    figures[title] = save(figure, folder / f"psnr-by-{amount}-{slug}.png")
            epsilon = _epsilon_of_bars(attacked)
            title = f"PSNR, {name}{_budget(epsilon)}"
            groups = _by_name(clean + [row for row in attacked if row.epsilon in (0, epsilon)])
            figures[title] = save(_by_attack(title, groups, vaes, "psnr"), folder / f"psnr-by-attack-{slug}.png")
    return figures


def draw_data_sets(rows: Rows, vaes: Sequence[str], folder: Path) -> dict[str, Path]:
    """Draw the PSNR on each data set as PNG files in `folder`: of clean images, and under each attack on the VAE itself.

    Args:
        rows: results of several data sets.
        vaes: names of the VAEs, the baseline first.
        folder: gets the PNG files.

    Returns:
        Paths by title.
    """
    measured = [row for row in rows if row.metric == "psnr"]
    attacked = [row for row in measured if row.threat_model == ADAPTIVE]
    epsilon = _epsilon_of_bars(attacked)
    shown = [row for row in measured if row.attack == CLEAN.name] + [
        row for row in attacked if row.epsilon in (0, epsilon)
    ]
    figures: dict[str, Path] = {}
    with style.context(["default", STYLE]):
        for attack, own in _by_name(shown).items():
            groups = {name: [row for row in own if row.dataset == name] for name in _data_sets(rows)}
            title = f"PSNR on each data set, {attack}{'' if attack == CLEAN.name else _budget(epsilon)}"
            path = folder / f"psnr-by-data-set-{safe_name(attack)}.png"
            figures[title] = save(_by_attack(title, groups, vaes, "psnr"), path)
    return figures


def draw_bars(rows: Rows, vaes: Sequence[str], metric: str, folder: Path) -> dict[str, Path]:
    """Draw one metric under all attacks as PNG files in `folder`, and return their paths by title.

    Each threat model has a figure, which also shows the rows without a threat; without attacks, those have their own.

    Args:
        rows: results; there are no figures if they lack the metric.
        vaes: names of the VAEs, the baseline first.
        metric: its name.
        folder: gets the PNG files.
    """
    measured = [row for row in rows if row.metric == metric]
    threat_models = list(dict.fromkeys(row.threat_model for row in measured))
    figures: dict[str, Path] = {}
    with style.context(["default", STYLE]):
        for threat_model in [name for name in threat_models if name != NO_THREAT] or threat_models:
            shown = [row for row in measured if row.threat_model in (NO_THREAT, threat_model)]
            epsilon = _epsilon_of_bars(shown)
            groups = _by_name([row for row in shown if row.epsilon in (0, epsilon)])
            title = f"{METRIC_TITLES[metric]}, {THREAT_TITLES[threat_model]}{_budget(epsilon)}"
            path = folder / f"{metric}-by-attack-{safe_name(threat_model)}.png"
            figures[title] = save(_by_attack(title, groups, vaes, metric), path)
    return figures


def draw_curves(
    rows: Rows, vaes: Sequence[str], amounts: Mapping[str, float], folder: Path, *, label: str
) -> dict[str, Path]:
    """Draw each metric against an amount, with a line for each VAE and threat model; return the path by title.

    Args:
        rows: results; those without a threat (an amount of 0) start the lines of every threat model.
        vaes: names of the VAEs, the baseline first.
        amounts: amount by name of the attack.
        folder: gets the PNG file.
        label: what the amount is, such as `number of poisons`.
    """
    known = [row for row in rows if row.attack in amounts]
    metrics = list(dict.fromkeys(row.metric for row in known))
    threats = [name for name in THREAT_TITLES if name != "none" and any(row.threat_model == name for row in known)]
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(max(5.4, 0.8 + 2.9 * len(metrics)), 3.6))
        for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False).flat, metrics, strict=True):
            lines = {}
            for number, vae in enumerate(vaes):
                for threat, dashes in zip(threats or ["none"], ("-", "--"), strict=False):
                    points = sorted(
                        (amounts[row.attack], row.value)
                        for row in known
                        if (row.metric, row.vae) == (metric, vae) and row.threat_model in (threat, "none")
                    )
                    (line,) = axes.plot(
                        *zip(*points, strict=True), dashes, color=_colour(number), marker="o", markersize=4
                    )
                    lines[f"{vae}, {threat}" if threats else vae] = line
            axes.set(title=metric, xlabel=label)
        _finish(figure, f"Results against the {label}", list(lines.values()), list(lines))
        return {f"Results against the {label}": save(figure, folder / f"curves-{safe_name(label)}.png")}


def safe_name(text: str) -> str:
    """Return `text` with only letters, digits and hyphens, as part of a file name."""
    kept = "".join(character if character.isascii() and character.isalnum() else " " for character in text.lower())
    return "-".join(kept.split())[:LONGEST_NAME].strip("-") or "unnamed"


# --- PSNR against epsilon and severity ---


def _by_epsilon(rows: Rows) -> Curves:
    """Return rows with their epsilon in 1/255 by attack, of the attacks that were run with more than one."""
    return _with_two(
        {attack: [(255 * row.epsilon, row) for row in own if row.epsilon] for attack, own in _by_name(rows).items()}
    )


def _by_severity(rows: Rows) -> Curves:
    """Return rows with their severity by corruption, of the corruptions that were run at more than one."""
    curves: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        if severe := severity_of(row.attack):
            curves.setdefault(severe[0], []).append((severe[1], row))
    return _with_two(curves)


def _with_two(curves: Curves) -> Curves:
    """Return the curves that have two or more amounts."""
    return {name: points for name, points in curves.items() if len({amount for amount, _ in points}) > 1}


def _panels(title: str, curves: Curves, vaes: Sequence[str], *, label: str) -> Figure:
    """Draw a panel for each curve, with a line and its interval for each VAE; `label` says what the amounts are."""
    across = min(PANELS_ACROSS, len(curves))
    down = math.ceil(len(curves) / across)
    figure = Figure(figsize=(max(5.4, 0.8 + 2.7 * across), 1.4 + 2.3 * down))
    panels = list(figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat)
    amounts = sorted({amount for points in curves.values() for amount, _ in points} | {0.0})
    for number, (axes, (name, points)) in enumerate(zip(panels, curves.items(), strict=False)):
        axes.set_title(plain(name))
        lines = [_line(axes, points, vae, place) for place, vae in enumerate(vaes)]
        if number % across == 0:
            axes.set_ylabel("PSNR (dB)")
        if number + across >= len(curves):  # the last panel of its column, also where the last row is not full
            axes.set_xlabel(label)
            axes.tick_params(labelbottom=True)
        if len(amounts) <= MOST_TICKS:
            axes.set_xticks(amounts, [f"{amount:.3g}" for amount in amounts])
    for axes in panels[len(curves) :]:
        axes.remove()
    _finish(figure, title, lines, vaes)
    return figure


def _line(axes: Axes, points: Sequence[tuple[float, Row]], vae: str, number: int) -> Artist:
    own = sorted((amount, row.value, *_interval(row)) for amount, row in points if row.vae == vae)
    amounts, values, lows, highs = zip(*own, strict=True) if own else ([], [], [], [])
    colour = _colour(number)
    axes.fill_between(amounts, lows, highs, color=colour, alpha=0.18, linewidth=0)
    (line,) = axes.plot(
        amounts, values, color=colour, marker=MARKERS[number % len(MARKERS)], markersize=4, linewidth=1.6
    )
    return line


# --- one group of bars for each attack ---


def _epsilon_of_bars(rows: Rows) -> float:
    """Return the epsilon of the most attacks, of several the one nearest to `USUAL_EPSILON`; 0 if there is none."""
    runs = Counter(epsilon for _, epsilon in {(row.attack, row.epsilon) for row in rows} if epsilon)
    return min(runs, key=lambda epsilon: (-runs[epsilon], abs(epsilon - USUAL_EPSILON)), default=0.0)


def _budget(epsilon: float) -> str:
    """Return the end of a title that names the budget; empty if it is 0."""
    return f" at epsilon {format_pixel_distance(epsilon)}" if epsilon else ""


def _by_name(rows: Rows) -> dict[str, Rows]:
    return {attack: [row for row in rows if row.attack == attack] for attack in _attacks(rows)}


def _by_attack(title: str, groups: Mapping[str, Rows], vaes: Sequence[str], metric: str) -> Figure:
    """Draw horizontal bars, which leave room for many attacks with long names."""
    thickness = 0.8 / len(vaes)
    inches = len(groups) * (0.16 * len(vaes) + 0.12)
    figure = Figure(figsize=(7.5, 1.4 + inches))
    axes = figure.subplots()
    bars = []
    for number, vae in enumerate(vaes):
        own = [(place, row) for place, rows in enumerate(groups.values()) for row in rows if row.vae == vae]
        places = [place - 0.4 + (number + 0.5) * thickness for place, _ in own]
        values = [row.value for _, row in own]
        intervals = [_interval(row) for _, row in own]
        bars.append(axes.barh(places, values, height=0.92 * thickness, color=_colour(number)))
        for place, value, (low, high) in zip(places, values, intervals, strict=True):
            axes.plot([low, high], [place, place], color="#20252b", linewidth=1.1)
            axes.annotate(
                f"{value:.3g}", (max(value, high), place), xytext=(4, 0), textcoords="offset points", va="center",
                fontsize=7.5, color="#333a41",
            )  # fmt: skip
    axes.set_yticks(range(len(groups)), [plain(attack) for attack in groups])
    axes.set_ylim(len(groups) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.08)
    axes.set_xlabel(METRIC_TITLES[metric])
    _finish(figure, title, bars, vaes)
    return figure


# --- shared by all figures ---


def _attacks(rows: Rows) -> Iterable[str]:
    """Return the attacks in the order of their first row."""
    return dict.fromkeys(row.attack for row in rows)


def _data_sets(rows: Rows) -> Iterable[str]:
    """Return the data sets in the order of their first row."""
    return dict.fromkeys(row.dataset for row in rows if row.dataset is not None)


def _interval(row: Row) -> tuple[float, float]:
    low, high = row.ci95 or (row.value, row.value)
    return low, high


def _finish(figure: Figure, title: str, handles: Sequence[Any], vaes: Sequence[str]) -> None:
    figure.suptitle(plain(title, longest=90), x=0.01, ha="left")
    figure.legend(handles, [plain(vae) for vae in vaes], loc="outside lower left", ncols=3)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def plain(name: str, *, longest: int = LONGEST_NAME) -> str:
    """Return a name that matplotlib draws literally: no formula, and no leading underscore, which hides a label."""
    text = " ".join(name.split())
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return f"{' ' if text.startswith('_') else ''}{text}".replace("$", r"\$")


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as a PNG file and return its path."""
    write_atomically(path, lambda aside: figure.savefig(aside, format="png"))
    return path
