"""Draw images in rows and columns, with captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from srl_utils.attacks.draws import image_generators
from srl_utils.console import progress_bar
from srl_utils.evaluation.metering import Meter
from srl_utils.evaluation.perturbations import Perturbation
from srl_utils.images.pixels import to_pil
from srl_utils.metrics.pixels import psnr
from srl_utils.vae.codec import Codec


def comparison_picture(
    original: Codec,
    robust: Codec,
    images: Tensor,
    attack: Perturbation,
    *,
    seed: int,
    cell: int = 160,
) -> Image.Image:
    """Draw photographs, attacked photographs, and their reconstructions by two VAEs, with PSNR in dB.

    Each photograph has two rows: one attacked on the original VAE, and one attacked on the robust VAE itself.

    Args:
        original: the VAE before fine-tuning.
        robust: the VAE after fine-tuning.
        images: `[N,3,H,W]` in [-1,1].
        attack: made on each VAE.
        seed: fixes the attack's starts.
        cell: side of an image in the picture, pixels.
    """
    device = next(original.decoder.parameters()).device
    clean = images.to(device)
    columns = ["photograph", "attacked", f"{original.name} VAE", f"{robust.name} VAE"]
    grid = _Grid(columns, rows=2 * len(images), cell=cell)
    bar = progress_bar(round(2 * attack.passes * len(images)), desc="picture", unit="pass")
    meter = Meter(bar)
    for half, victim in enumerate((original, robust)):
        with meter.stage(f"picture, {attack.name} on {victim.name}", attack.passes * len(images)):
            attacked = attack.apply(meter.watched(victim), clean, image_generators(seed, range(len(images))))
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
    """Draw photographs in one row and their reconstructions below, with PSNR in dB.

    Args:
        codec: the VAE.
        images: `[N,3,H,W]` in [-1,1].
        cell: side of an image in the picture, pixels.
    """
    device = next(codec.decoder.parameters()).device
    with torch.no_grad():
        outputs = codec.reconstruct(images.to(device))
    grid = _Grid([""] * len(images), rows=2, cell=cell)
    for column, (photograph, output) in enumerate(zip(images, outputs, strict=True)):
        grid.put(0, column, photograph, "")
        grid.put(1, column, output, f"{psnr(output[None].cpu(), photograph[None]).item():.1f} dB")
    return grid.picture


def extremes_picture(
    rows: Sequence[tuple[str, Sequence[tuple[Tensor, str]]]],
    titles: Sequence[str],
    *,
    cell: int = 160,
    label: int = 120,
) -> Image.Image:
    """Draw one row of captioned images for each label, such as worst, median and best.

    Args:
        rows: the label of each row, and its images `[3,H,W]` in [-1,1] with their captions.
        titles: one above each column.
        cell: side of an image in the picture, pixels.
        label: greatest width of a label, pixels; longer labels are cut.
    """
    grid = _Grid(titles, rows=len(rows), cell=cell, labels=[text for text, _ in rows], label=label)
    for row, (_, images) in enumerate(rows):
        for column, (image, caption) in enumerate(images):
            grid.put(row, column, image, caption)
    return grid.picture


class _Grid:
    """Images of one size in rows and columns, with captions, column titles and optional row labels; long text is cut.

    matplotlib's ImageGrid has no cells of exact pixel size, no captions, and does not cut text to a width.
    """

    GAP, LINE = 6, 18

    def __init__(
        self, titles: Sequence[str], *, rows: int, cell: int, labels: Sequence[str] = (), label: int = 0
    ) -> None:
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
        """Draw one image `[3,H,W]` in [-1,1], or the first frame of a clip `[3,T,H,W]`, with its caption below."""
        left, top = self._left(column), self._top(row)
        image = image[:, 0] if image.ndim == 4 else image
        # Nearest neighbour keeps the pixels of small images visible.
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
        """Return `text` on one line, cut with an ellipsis if it is wider than `width` pixels."""
        text = " ".join(text.split())
        kept = text
        while kept and self.font.getlength(text) > width:
            kept = kept[:-1]
            text = f"{kept}…"
        return text
