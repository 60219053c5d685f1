"""Draw the results of the paper's experiments: one figure for each of its claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.claims import CONTROL, NO_POISON, ORIGINAL, ROBUST, Results, won_back
from srl_utils.evaluation.perturbations import ADAPTIVE, NO_THREAT, TRANSFER
from srl_utils.evaluation.report.figures import STYLE, save

COLOURS = {ORIGINAL: "#7f8a96", CONTROL: "#d55e00", ROBUST: "#0072b2"}
Bars = Mapping[str, Mapping[str, Sequence[float]]]
"""Values of each training seed, by label and VAE."""


def draw_all(
    results: Mapping[str, Results],
    folder: Path,
    *,
    attack: str,
    edits: Mapping[str, Results],
    poisons: Mapping[str, int],
) -> None:
    """Draw `reconstruction.png`, `edits.png` and `poisons.png` in `folder`.

    Args:
        results: of the evaluations `reconstruction`, `poisoning` and `controls`.
        folder: of the files.
        attack: on the reconstruction.
        edits: results of the edits, by attack.
        poisons: numbers of poisons by their name in the results; the largest comes last.
    """
    figures = {
        "reconstruction": partial(reconstruction_figure, results["reconstruction"], attack),
        "edits": partial(edits_figure, edits),
        "poisons": partial(poisons_figure, results["poisoning"], results["controls"], poisons),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with style.context(["default", STYLE]):
        for name, draw in figures.items():
            save(draw(), folder / f"{name}.png")


def reconstruction_figure(results: Results, attack: str) -> Figure:
    """Return bars of the PSNR and SSIM of reconstructions: clean, and attacked on the original and on each VAE itself."""
    figure = Figure(figsize=(9, 3))
    settings = {"clean": ("clean", NO_THREAT), TRANSFER: (attack, TRANSFER), ADAPTIVE: (attack, ADAPTIVE)}
    for ax, (metric, title) in zip(figure.subplots(1, 2), {"psnr": "PSNR (dB)", "ssim": "SSIM"}.items(), strict=True):
        values = {
            label: {vae: results.of(vae, *setting, metric) for vae in COLOURS} for label, setting in settings.items()
        }
        draw_bars(ax, values, title=f"{title} of reconstructions")
    return with_legend(figure)


def edits_figure(attacked: Mapping[str, Results]) -> Figure:
    """Return bars of the share of an attack's damage to edits that is won back, in FID, for both threat models."""
    figure = Figure(figsize=(9, 5))
    for ax, threat in zip(figure.subplots(2, 1, sharey=True), (TRANSFER, ADAPTIVE), strict=True):
        values = {
            attack: {
                vae: [100 * share for share in won_back(results, vae, attack, threat, "fid")]
                for vae in (CONTROL, ROBUST)
            }
            for attack, results in attacked.items()
        }
        draw_bars(ax, values, title=f"FID of edits won back (%), {threat}")
    return with_legend(figure)


def poisons_figure(results: Results, controls: Results, poisons: Mapping[str, int]) -> Figure:
    """Return two panels: images as prompted against the number of poisons, and against the way that latents have gone."""
    figure = Figure(figsize=(9, 3))
    by_number, by_way = figure.subplots(1, 2)
    for vae, colour in COLOURS.items():
        points = {0: results.of(vae, NO_POISON, NO_THREAT, "shown")}
        points |= {number: results.of(vae, name, TRANSFER, "shown") for name, number in poisons.items()}
        draw_line(by_number, points, label=vae, colour=colour)
    most = max(poisons.values())
    ways = {0: controls.of(ORIGINAL, NO_POISON, NO_THREAT, "shown")}
    ways |= {
        int(name.split("-")[1]): controls.of(ORIGINAL, name, NO_THREAT, "shown")
        for name in controls.attacks
        if name.startswith("interpolated-") and name.endswith(f"-{most}")
    }
    draw_line(by_way, ways, label=ORIGINAL, colour=COLOURS[ORIGINAL])
    by_number.set(title="Images as prompted (%)", xlabel="number of poisons", ylim=(0, 100))
    by_way.set(
        title=f"Images as prompted (%), {most} interpolated latents",
        xlabel="latents, % of the way to the target",
        ylim=(0, 100),
    )
    return with_legend(figure)


def draw_bars(ax: Axes, values: Bars, *, title: str) -> None:
    """Draw a group of bars for each label: the mean over the seeds, with the standard deviation."""
    names = list(next(iter(values.values())))
    width = 0.8 / len(names)
    for place, vae in enumerate(names):
        for group, seeds in enumerate(each[vae] for each in values.values()):
            if seeds:
                error = stdev(seeds) if len(seeds) > 1 else 0.0
                left = group + (place - (len(names) - 1) / 2) * width
                ax.bar(left, mean(seeds), width * 0.92, yerr=error or None, color=COLOURS[vae], label=vae)
    ax.set_xticks(range(len(values)), [label.replace("-", "\n", 1) for label in values])
    ax.set_title(title)
    ax.grid(visible=False, axis="x")


def draw_line(ax: Axes, points: Mapping[int, Sequence[float]], *, label: str, colour: str) -> None:
    """Draw shares in percent against a number: the mean over the seeds, with the standard deviation."""
    seen = {x: [100 * value for value in seeds] for x, seeds in sorted(points.items()) if seeds}
    errors = [stdev(seeds) if len(seeds) > 1 else 0.0 for seeds in seen.values()]
    ax.errorbar(list(seen), list(map(mean, seen.values())), errors, color=colour, label=label, marker="o", capsize=2)


def with_legend(figure: Figure) -> Figure:
    """Add one legend for all panels below them."""
    entries = {
        label: handle
        for ax in figure.axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }  # fmt: skip
    labels = ["control" if label == CONTROL else label for label in entries]
    figure.legend(entries.values(), labels, loc="outside lower center", ncols=len(entries))
    return figure
