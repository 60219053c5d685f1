"""Draw what defences cost and win, and the price of staying close to the original."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from adjustText import adjust_text
from matplotlib import style
from matplotlib.figure import Figure

from experiments.claims import ORIGINAL, Defence
from experiments.figures import with_legend
from srl_utils.evaluation.report.figures import STYLE, save

KINDS = {"a trained VAE": ("o", "#0072b2"), "a purifier": ("s", "#d55e00"), "both": ("D", "#009e73")}
"""Marker and colour by kind of defence."""


def draw_defences(defences: Mapping[str, Defence], path: Path) -> None:
    """Draw for each threat model what defences win back of edits, against the harm that they do to clean ones.

    Args:
        defences: by name.
        path: of the PNG.
    """
    threats = list(next(iter(defences.values())).won)
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(12, 6))
        for ax, threat in zip(figure.subplots(1, len(threats), sharey=True), threats, strict=True):
            ax.set(title=threat, xlabel="harm: FID of clean edits", xscale="log")
            for name, defence in defences.items():
                if won := defence.mean_won(threat):
                    marker, colour = KINDS[kind_of(name)]
                    place = fmean(defence.harm), fmean(won)
                    ax.plot(*place, marker, color=colour, label=kind_of(name))
                    ax.text(*place, short_name(name), fontsize=7)
        figure.axes[0].set_ylabel("FID of protected edits won back (%)")
        with_legend(figure)
        for ax in figure.axes:
            adjust_text(list(ax.texts), ax=ax, arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.5})
        save(figure, path)


def draw_curves(curves: Mapping[str, Mapping[float, tuple[float, float]]], path: Path) -> None:
    """Draw the PSNR under attack of each rival against the drift of its latents.

    Args:
        curves: drift and PSNR in dB by originality weight, by rival.
        path: of the PNG.
    """
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(9, 4))
        ax = figure.subplots()
        for name, points in curves.items():
            ax.plot(*zip(*points.values(), strict=True), marker="o", label=name)
            for alpha, place in points.items():
                ax.annotate(f"{alpha:g}", place, xytext=(4, 4), textcoords="offset points", fontsize=7)
        ax.set(xlabel="drift of clean latents", ylabel="PSNR under attack (dB)", xscale="log")
        save(with_legend(figure), path)


def kind_of(name: str) -> str:
    """Return the kind of a defence, one of `KINDS`."""
    vae, plus, _ = name.partition(" + ")
    if not plus:
        return "a trained VAE"
    return "a purifier" if vae == ORIGINAL else "both"


def short_name(name: str) -> str:
    """Return a defence's name without its VAE, if it has a purifier."""
    return name.partition(" + ")[2] or name
