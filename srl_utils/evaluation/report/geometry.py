"""Draw the figures of the geometry evaluation: loss surfaces and maps of latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from srl_utils.evaluation.report.figures import COLOURS, STYLE, plain, save
from srl_utils.evaluation.report.tables import METRIC_TITLES, measured
from srl_utils.geometry.clusters import LatentMap

NUM_SHOWN = 3
"""Images whose surfaces are drawn."""
SIDE = 2.9
"""Side of a picture, inches."""
EXTENT = (-1, 1, -1, 1)
PEAK = 255.0**2
"""Squared error of 0 dB, in squared grey levels."""
LABEL_COLOURS = (*COLOURS[1:], "#882255", "#999933", "#44aa99", "#f0e442", "#661100", "#332288")
"""As many as labels that the map names."""
AROUND_IMAGES = {
    "title": "Loss surface around images", "across": "attack (1: whole)", "up": "random signs (1: epsilon)",
}  # fmt: skip
"""Titles of the figure and of its axes."""


def draw_surfaces(
    surfaces: Mapping[str, Tensor], clean: Mapping[str, Tensor], numbers: Mapping[str, Sequence[Mapping[str, float]]],
    path: Path, *, title: str, across: str, up: str,
) -> dict[str, Path]:  # fmt: skip
    """Draw surfaces of the error as PSNR, a row for each image and a column for each VAE; return the path by title.

    All pictures have one colour scale. A line surrounds where the error is 1 dB above that of the middle.

    Args:
        surfaces: squared errors by VAE, `[N,P,P]`, in squared grey levels; the first `NUM_SHOWN` images are drawn.
        clean: squared error of the middle by VAE, `[N]`.
        numbers: by VAE and image, the values by metric that stand above each picture.
        path: gets the PNG file.
        title: of the figure.
        across: what the axis to the right is.
        up: what the axis upwards is.
    """
    rows = min(NUM_SHOWN, *(len(errors) for errors in surfaces.values()))
    shown = {vae: _decibels(errors[:rows]) for vae, errors in surfaces.items()}
    low, high = (function([function(each) for each in shown.values()]) for function in (np.min, np.max))
    scale = ScalarMappable(Normalize(low, high), cmap="viridis")
    with style.context(["default", STYLE, {"axes.grid": False}]):
        figure = Figure(figsize=(SIDE * len(shown) + 1.2, SIDE * rows + 0.6), layout="compressed")
        panels = figure.subplots(rows, len(shown), squeeze=False)
        for column, (vae, levels) in enumerate(shown.items()):
            for row in range(rows):
                axes, middle = panels[row, column], _decibels(clean[vae][row])
                axes.imshow(levels[row], origin="lower", extent=EXTENT, norm=scale.norm, cmap=scale.cmap)
                if levels[row].min() < middle - 1 < levels[row].max():
                    axes.contour(levels[row], [middle - 1], extent=EXTENT, colors="white", linewidths=1.2)
                axes.set_title(_heading(vae if row == 0 else "", numbers[vae][row]), fontsize=8)
            panels[-1, column].set_xlabel(across)
        for row in range(rows):
            panels[row, 0].set_ylabel(up)
        figure.colorbar(scale, ax=panels, label="PSNR (dB)", shrink=0.8)
        figure.suptitle(plain(title, longest=90), x=0.01, ha="left")
        return {title: save(figure, path)}


def _decibels(errors: Tensor) -> np.ndarray:
    """Return squared errors in squared grey levels as PSNR in dB."""
    return 10 * np.log10(PEAK / errors.double().clamp_min(1e-5).numpy())


def _heading(name: str, numbers: Mapping[str, float]) -> str:
    told = [f"{METRIC_TITLES[metric]}: {measured(metric, value, None)[0]}" for metric, value in numbers.items()]
    return "\n".join([*([plain(name)] if name else []), *told])


def draw_maps(maps: Mapping[str, LatentMap], labels: Sequence[str] | None, path: Path) -> dict[str, Path]:
    """Draw a map of latents for each VAE, with an arrow from each clean latent to its attacked one; return the path by title.

    Args:
        maps: by VAE; the others of a map are the noisy latents and the attacked ones.
        labels: of the images, which colour them; None for one colour.
        path: gets the PNG file.
    """
    title = "Map of the latents: arrows lead from clean to attacked images"
    names = sorted(set(labels)) if labels is not None else []
    named = len(names) <= len(LABEL_COLOURS)
    colours = [_colour(names.index(label)) for label in labels] if labels is not None else COLOURS[1]
    with style.context(["default", STYLE, {"axes.grid": False}]):
        figure = Figure(figsize=(4.2 * len(maps), 4.8))
        for axes, (vae, found) in zip(figure.subplots(1, len(maps), squeeze=False).flat, maps.items(), strict=True):
            _draw_map(axes, found, colours)
            axes.set_title(f"{plain(vae)}\ntrustworthiness: {found.trustworthiness:.3f}", fontsize=9)
        handles = [axes.scatter([], [], color=_colour(number)) for number in range(len(names))] if named else []
        marks = [axes.scatter([], [], color="#333a41", marker=mark) for mark in ("o", "+", "x")]
        shown = [*(plain(name) for name in names if named), "clean", "noisy", "attacked"]
        figure.legend([*handles, *marks], shown, loc="outside lower left", ncols=6)
        figure.suptitle(plain(title, longest=90), x=0.01, ha="left")
        return {title: save(figure, path)}


def _draw_map(axes: Axes, found: LatentMap, colours: str | Sequence[str]) -> None:
    noisy, attacked = found.others
    arrows = (attacked - found.clean).numpy()
    axes.quiver(*found.clean.T.numpy(), *arrows.T, angles="xy", scale_units="xy", scale=1, color="#9aa3ad", width=0.003)
    for places, marker, size in ((noisy, "+", 28), (attacked, "x", 22), (found.clean, "o", 18)):
        axes.scatter(places[:, 0], places[:, 1], c=colours, marker=marker, s=size, linewidths=0.9)
    axes.set(xticks=[], yticks=[])


def _colour(number: int) -> str:
    return LABEL_COLOURS[number % len(LABEL_COLOURS)]
