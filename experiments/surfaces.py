"""Draw the loss surfaces of some VAEs of a finished evaluation of geometry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file

from srl_utils.evaluation.report.geometry import AROUND_IMAGES, draw_surfaces
from srl_utils.evaluation.results import Record
from srl_utils.evaluation.tasks.geometry import AREA, CURVATURE
from srl_utils.files import read_json


def draw_loss_surfaces(geometry: Path, vaes: Mapping[str, int], path: Path) -> None:
    """Draw the error around the first images, a column for each VAE.

    Args:
        geometry: folder of the evaluation.
        vaes: place of each VAE in the evaluation, 0 for the baseline, by the column's title.
        path: of the PNG.
    """
    stored = {name: geometry / f"parts/surface-{place}/000000" for name, place in vaes.items()}
    kept = {name: load_file(each.with_suffix(".safetensors")) for name, each in stored.items()}
    draw_surfaces(
        {name: tensors["images"] for name, tensors in kept.items()},
        {name: tensors["clean"] for name, tensors in kept.items()},
        {name: numbers_of(each.with_suffix(".json")) for name, each in stored.items()},
        path, **AROUND_IMAGES,
    )  # fmt: skip


def numbers_of(path: Path) -> list[dict[str, float]]:
    """Return curvature and area of each image in a stored batch, by metric."""
    numbers: dict[int, dict[str, float]] = {}
    for record in map(Record.from_json, read_json(path)):
        if record.setting.metric in (CURVATURE, AREA):
            numbers.setdefault(record.index, {})[record.setting.metric] = record.value
    return list(numbers.values())
