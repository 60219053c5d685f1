"""Draw each VAE's worst, median and best image under its strongest attack."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median_low

import torch
from PIL import Image

from srl_utils.attacks.draws import image_generators
from srl_utils.console import progress_bar
from srl_utils.evaluation.cells import attempted
from srl_utils.evaluation.report.grids import extremes_picture
from srl_utils.evaluation.results import Record
from srl_utils.evaluation.study import Study
from srl_utils.evaluation.tasks.base import Cell
from srl_utils.files import write_atomically
from srl_utils.images.pixels import format_pixel_distance
from srl_utils.metrics.pixels import psnr
from srl_utils.vae.codec import Codec

NUM_EXTREMES = 3
MOST_VAES = 6
"""VAEs that have pictures and are in them: more columns are too narrow to see anything."""


def draw_extremes(study: Study, records: Sequence[Record]) -> dict[str, Path]:
    """Draw a picture of each VAE's worst, median and best image by PSNR, with the outcomes of all VAEs alone, in `figures/`.

    Only the first `MOST_VAES` are drawn. If the task has several variants, the pictures show the middle one.

    Returns:
        Paths by title; empty if the PSNR was not measured.
    """
    pictures: dict[str, Path] = {}
    if "psnr" not in study.task.metrics.names:
        return pictures
    cells = [strongest_cell(study, records, codec) for codec in _drawn(study)]
    costs = [0 if cell is None else _cost(study, cell) for cell in cells]
    bar = progress_bar(round(sum(costs)), desc="pictures", unit="pass", disable=not any(cells))
    for number, (codec, cell, cost) in enumerate(zip(_drawn(study), cells, costs, strict=True)):
        if cell is None:
            continue
        path = study.output_dir / "figures" / f"extremes-{number}.png"
        with study.watched(bar) as meter, meter.stage(f"picture, {cell.title}", cost):
            picture = _picture(study, cell, extreme_images(study, records, cell, codec))
        write_atomically(path, partial(picture.save, format="PNG"))
        budget = format_pixel_distance(cell.perturbation.epsilon)
        title = f"Worst, median and best image of {codec.name} under {_name(study, cell)} ({budget}) on itself"
        pictures[title] = path
    bar.close()
    return pictures


def _drawn(study: Study) -> Sequence[Codec]:
    """Return the VAEs in the pictures."""
    return study.undefended[:MOST_VAES]


def _cost(study: Study, cell: Cell) -> float:
    """Return the estimated cost of a picture, in passes through encoder and decoder."""
    shown = study.task.passes / len(study.task.variants) * len(_drawn(study))
    return NUM_EXTREMES * (cell.perturbation.passes + shown)


def strongest_cell(study: Study, records: Sequence[Record], codec: Codec) -> Cell | None:
    """Return the attack on `codec` with the lowest mean PSNR, at the median epsilon; None if there is no attack.

    Attacks whose budget is in another measure are considered only if there are no others.
    """
    own = [cell for cell in study.cells() if cell.perturbation.adversarial and cell.source is codec]
    if not own:
        return None
    middle = median_low({cell.perturbation.epsilon for cell in own} - {0.0} or {0.0})
    candidates = [cell for cell in own if cell.perturbation.epsilon == middle]
    return min(candidates, key=lambda cell: fmean(_psnr_by_image(study, records, cell, codec).values()))


def extreme_images(study: Study, records: Sequence[Record], cell: Cell, codec: Codec) -> dict[str, int]:
    """Return the image numbers of the worst, the median and the best image, by these names."""
    by_image = _psnr_by_image(study, records, cell, codec)
    ordered = sorted(by_image, key=by_image.__getitem__)
    return {"worst": ordered[0], "median": ordered[len(ordered) // 2], "best": ordered[-1]}


def _variant(study: Study) -> str:
    """Return the middle variant of the task, which the pictures show."""
    variants = study.task.variants
    return variants[(len(variants) - 1) // 2]


def _name(study: Study, cell: Cell) -> str:
    """Return the attack's name in the results of that variant."""
    return attempted(cell.perturbation.name, _variant(study))


def _psnr_by_image(study: Study, records: Sequence[Record], cell: Cell, codec: Codec) -> dict[int, float]:
    """Return the PSNR of each image in dB, by image number."""
    wanted = (codec.name, _name(study, cell), cell.perturbation.epsilon, "psnr")
    threat_models = cell.threat_models[codec.name]
    return {
        record.index: record.value
        for record in records
        if (record.vae, record.setting.attack, record.setting.epsilon, record.setting.metric) == wanted
        and record.setting.threat_model in threat_models
    }


def _picture(study: Study, cell: Cell, chosen: dict[str, int]) -> Image.Image:
    numbers, variant = list(chosen.values()), _variant(study)
    clean = study.images[numbers].to(cell.source.device)
    # The same random draws as in the study reproduce the measured images.
    attacked = cell.perturbation.apply(cell.source, clean, image_generators(study.seed, numbers))
    with torch.no_grad():
        outcomes = [study.task.attempt(cell, codec, attacked, numbers, variant) for codec in _drawn(study)]
        references = [study.task.reference(codec, numbers, variant).to(clean.device) for codec in _drawn(study)]
    lines = []
    for line, name in enumerate(chosen):
        cells = [(clean[line], ""), (attacked[line], "")]
        cells += [(references[0][line], "")] if variant else []
        for outcome, reference in zip(outcomes, references, strict=True):
            quality = psnr(outcome[line : line + 1], reference[line : line + 1]).item()
            cells.append((outcome[line], f"{quality:.1f} dB"))
        lines.append((name, cells))
    wanted = [f"clean, {variant}"] if variant else []
    return extremes_picture(lines, titles=["image", "attacked", *wanted, *(codec.name for codec in _drawn(study))])
