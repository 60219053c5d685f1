"""Draws docs/results.png from two tables of docs/results.md.

python -m docs.scripts.figures
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1]
COLOURS = {"original": "#7f8c9a", "control": "#d55e00", "robust": "#0072b2"}
Table = dict[str, dict[str, float]]
"""Values by label and VAE."""


def read_table(page: str, heading: str, *, labels: int) -> Table:
    """Return the first table under a heading; its first `labels` columns make the label of a row."""
    section = page.split(f"\n### {heading}\n")[1]
    before_table = section.index("\n|") + 1
    lines = section[before_table:].split("\n\n")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    columns = header[labels:]
    return {", ".join(cells[:labels]): dict(zip(columns, map(float, cells[labels:]), strict=True)) for cells in rows}


def draw(page: str) -> Figure:
    """Return bars of PSNR, SSIM and FID for the original, the control and the robust VAE."""
    reconstruction = read_table(page, "Reconstruction", labels=2)
    inpainting = read_table(page, "Inpainting of protected images", labels=1)
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=[2, 2.2, 4.5])
    for ax, metric in zip(axes[:2], ("PSNR (dB)", "SSIM"), strict=True):
        chosen = {
            label.split(",")[0]: values for label, values in reconstruction.items() if label.endswith(f", {metric}")
        }
        bars(ax, chosen, title=f"Reconstruction, {metric}\n(higher is better)")
    bars(axes[2], inpainting, title="Inpainting of protected images, FID\n(lower is better)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def bars(ax: Axes, table: Table, *, title: str) -> None:
    """Draw a group of bars for each row, one bar for each VAE."""
    width = 0.8 / len(COLOURS)
    for place, (vae, colour) in enumerate(COLOURS.items()):
        heights = [values[vae] for values in table.values()]
        positions = [row + (place - 1) * width for row in range(len(table))]
        drawn = ax.bar(positions, heights, width * 0.92, color=colour, label=vae)
        ax.bar_label(drawn, fontsize=7, padding=1, fmt="%.3g")
    ax.set_xticks(range(len(table)), [label.replace(" ", "\n") for label in table], fontsize=8)
    ax.set_title(title, fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    matplotlib.use("agg")
    draw((DOCS / "results.md").read_text(encoding="utf-8")).savefig(DOCS / "results.png", dpi=110)


if __name__ == "__main__":
    main()
