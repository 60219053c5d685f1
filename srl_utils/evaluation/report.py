"""Results as a table to read and pictures to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from srl_utils.codecs import Codec
from srl_utils.evaluation.metering import Meter
from srl_utils.evaluation.reconstruction import Perturbation, image_generators
from srl_utils.images import format_pixel_distance, to_pil
from srl_utils.losses import ReconstructionLoss
from srl_utils.metrics import psnr
from srl_utils.progress import progress_bar

Rows = Sequence[dict[str, object]]

METRIC_TITLES = {
    "psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS", "clip": "CLIP similarity", "clip-text": "CLIP with the prompt",
    "shown": "share as prompted", "rfid": "rFID", "fid": "FID", "kid": "KID", "is": "Inception Score",
    "drift": "latent drift", "denoising-loss": "denoiser's loss", "difference": "largest difference",
}  # fmt: skip
DECIMALS = {
    "psnr": 2, "ssim": 4, "lpips": 4, "clip": 4, "clip-text": 4, "shown": 3, "rfid": 2, "fid": 2, "kid": 4, "is": 2,
    "drift": 4, "denoising-loss": 4, "difference": 4,
}  # fmt: skip


def comparison_table(rows: Rows, vaes: Sequence[str]) -> str:
    """A Markdown table: one line per attack and metric, one column per VAE, 95% intervals beside the means."""
    cells = {(row["attack"], row["metric"], row["vae"]): row for row in rows}
    lines = list(dict.fromkeys((row["attack"], row["metric"]) for row in rows))
    table = [["images", "metric", *vaes]]
    for attack, metric in lines:
        values = [_cell(cells.get((attack, metric, vae))) for vae in vaes]
        table.append([_attack_title(cells, attack), METRIC_TITLES[metric], *values])
    return markdown_table(table)


def won_back(rows: Rows, attack: str, original: str, robust: str) -> float | None:
    """Return the share of the PSNR that `attack` costs the original VAE which the robust one has regained under it.

    None where the attack costs nothing.
    """
    value = {(row["vae"], row["attack"]): row["value"] for row in rows if row["metric"] == "psnr"}
    lost = value[original, "clean"] - value[original, attack]
    return (value[robust, attack] - value[original, attack]) / lost if lost > 0 else None


def comparison_picture(
    original: Codec,
    robust: Codec,
    images: Tensor,
    attack: Perturbation,
    loss: ReconstructionLoss,
    *,
    seed: int,
    cell: int = 160,
) -> Image.Image:
    """Photograph, attacked photograph, and what each VAE makes of the attacked one, with PSNR in dB.

    Every photograph has two lines: attacked on the original VAE, and attacked on the robust VAE itself, since
    a defence that only withstands attacks on something else proves nothing. `images` `[N,3,H,W]` in [-1,1].
    """
    device = next(original.decoder.parameters()).device
    clean = images.to(device)
    columns = ["photograph", "attacked", f"{original.name} VAE", f"{robust.name} VAE"]
    grid = _Grid(columns, rows=2 * len(images), cell=cell)
    bar = progress_bar(round(2 * attack.passes * len(images)), desc="picture", unit="pass")
    meter = Meter(bar)
    for half, victim in enumerate((original, robust)):
        with meter.stage(f"picture, {attack.name} on {victim.name}", attack.passes * len(images)):
            attacked = attack.apply(meter.watched(victim), loss, clean, image_generators(seed, range(len(images))))
        with torch.no_grad():
            outputs = [codec.reconstruct(attacked) for codec in (original, robust)]
        for number, photograph in enumerate(clean):
            row = 2 * number + half
            grid.put(row, 0, photograph, "")
            grid.put(row, 1, attacked[number], f"on the {victim.name} VAE")
            for column, output in enumerate(outputs, start=2):
                quality = psnr(output[number : number + 1], photograph[None]).item()
                grid.put(row, column, output[number], f"{quality:.1f} dB")
    bar.close()
    return grid.picture


def reconstruction_picture(codec: Codec, images: Tensor, *, cell: int = 128) -> Image.Image:
    """Photographs above, their clean reconstructions below; `images` `[N,3,H,W]` in [-1,1]."""
    device = next(codec.decoder.parameters()).device
    with torch.no_grad():
        outputs = codec.reconstruct(images.to(device))
    grid = _Grid([""] * len(images), rows=2, cell=cell)
    for column, (photograph, output) in enumerate(zip(images, outputs, strict=True)):
        grid.put(0, column, photograph, "")
        grid.put(1, column, output, f"{psnr(output[None].cpu(), photograph[None]).item():.1f} dB")
    return grid.picture


def extremes_picture(
    rows: Sequence[tuple[str, Sequence[tuple[Tensor, str]]]], titles: Sequence[str], *, cell: int = 160, label: int = 120
) -> Image.Image:
    """A line of captioned images for each label, such as worst, median and best.

    Args:
        rows: the label of each line, and its images `[3,H,W]` in [-1,1] with their captions.
        titles: one over each column.
        cell: side of a picture, pixels.
        label: width that a label may have, pixels; what is longer is cut.
    """
    grid = _Grid(titles, rows=len(rows), cell=cell, labels=[text for text, _ in rows], label=label)
    for row, (_, images) in enumerate(rows):
        for column, (image, caption) in enumerate(images):
            grid.put(row, column, image, caption)
    return grid.picture


class _Grid:
    """Pictures of one size in rows and columns, with a caption under each and a title over each column.

    `labels`, where there are any, stand on the left of the rows. Text that is too long for its place is cut.
    """

    GAP, LINE = 6, 18

    def __init__(self, titles: Sequence[str], *, rows: int, cell: int, labels: Sequence[str] = (), label: int = 0) -> None:
        self.cell = cell
        self.font = ImageFont.load_default(size=13)
        labels = [self._fitting(text, label) for text in labels]
        self.margin = max((round(self.font.getlength(text)) + self.GAP for text in labels), default=0)
        width = self.margin + len(titles) * (cell + self.GAP) + self.GAP
        self.picture = Image.new("RGB", (width, self._top(rows)), "white")
        self.draw = ImageDraw.Draw(self.picture)
        for row, text in enumerate(labels):
            self._write(self.GAP, self._top(row) + (cell - self.LINE) // 2, text)
        for column, title in enumerate(titles):
            self._write(self._left(column), 3, self._fitting(title, cell))

    def put(self, row: int, column: int, image: Tensor, caption: str) -> None:
        left, top = self._left(column), self._top(row)
        # Nearest neighbour: small images are shown as the pixels they are.
        picture = to_pil(image).resize((self.cell, self.cell), Image.Resampling.NEAREST)
        self.picture.paste(picture, (left, top))
        self._write(left, top + self.cell + 1, self._fitting(caption, self.cell))

    def _left(self, column: int) -> int:
        return self.margin + self.GAP + column * (self.cell + self.GAP)

    def _top(self, row: int) -> int:
        return self.LINE + self.GAP + row * (self.cell + self.LINE + self.GAP)

    def _write(self, left: int, top: int, text: str) -> None:
        self.draw.text((left, top), text, fill="black", font=self.font)

    def _fitting(self, text: str, width: int) -> str:
        """`text` on one line, its end replaced by an ellipsis where it is wider than `width` pixels."""
        text = " ".join(text.split())
        kept = text
        while kept and self.font.getlength(text) > width:
            kept = kept[:-1]
            text = f"{kept}…"
        return text


def _attack_title(cells: dict, attack: str) -> str:
    epsilon = next(row["epsilon"] for (name, _, _), row in cells.items() if name == attack)
    return f"{attack}, {format_pixel_distance(epsilon)}" if epsilon else attack


def _cell(row: dict[str, object] | None) -> str:
    if row is None:
        return ""
    return " ".join(measured(row["metric"], row["value"], row["ci95"]))


def measured(
    metric: str, value: float, interval: Sequence[float] | None, *, sign: Literal["", "+"] = ""
) -> tuple[str, ...]:
    """The mean as text and, where it has one, its 95% interval; with `sign` "+", gains carry theirs."""
    form = f"{sign}.{DECIMALS[metric]}f"
    if interval is None:
        return (f"{value:{form}}",)
    low, high = interval
    return f"{value:{form}}", f"[{low:{form}}, {high:{form}}]"


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them the titles, as a Markdown table with aligned columns."""
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in table
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
