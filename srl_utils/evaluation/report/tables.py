"""Write results as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from srl_utils.evaluation.results import Row, Rows
from srl_utils.images.pixels import format_pixel_distance

METRIC_TITLES = {
    "psnr": "PSNR (dB)", "ssim": "SSIM", "lpips-alex": "LPIPS (AlexNet)", "lpips-vgg": "LPIPS (VGG)",
    "lpips-squeeze": "LPIPS (SqueezeNet)", "clip": "CLIP similarity", "clip-text": "CLIP with the prompt",
    "shown": "share as prompted", "feature-similarity": "similarity of features", "rfid": "rFID", "rfid-changes": "rFID of changes between frames", "fid": "FID",
    "kid": "KID", "is": "Inception Score",
    "latent-travel": "latents moved", "latent-share": "share of the way to the target",
    "warping-error": "warping error", "flicker": "flicker", "token-flips": "share of tokens changed",
    "codebook-use": "share of codes used",
    "drift": "latent drift", "denoising-loss": "denoiser's loss", "difference": "largest difference",
    "curvature": "curvature along the attack", "raised-area": "area above clean + 1 dB",
    "raised-area-weights": "area above clean + 1 dB (weights)", "own-nearest": "nearest clean latent is its own",
    "label-silhouette": "silhouette of labels", "image-silhouette": "silhouette of images",
    "trustworthiness": "trustworthiness of the map",
    "lipschitz-encoder": "Lipschitz of the encoder (L2)", "lipschitz-both": "Lipschitz of both (L2)",
    "lipschitz-encoder-linf": "Lipschitz of the encoder (L-infinity)", "lipschitz-both-linf": "Lipschitz of both (L-infinity)",
    "certified": "share certified", "smoothing-error": "cost of smoothing", "certified-distance": "certified distance",
    "certificate-held": "certificate held", "path-length": "path over straight line", "worst-jump": "worst jump",
    "reencoding-drift": "drift by re-encoding",
}  # fmt: skip
HIGHER_IS_BETTER = frozenset({"psnr", "ssim", "clip", "clip-text", "shown", "feature-similarity", "is", "codebook-use"}) | {
    "own-nearest", "label-silhouette", "image-silhouette", "trustworthiness", "certified", "certificate-held",
}  # fmt: skip
DECIMALS = {
    "psnr": 2, "ssim": 4, "lpips-alex": 4, "lpips-vgg": 4, "lpips-squeeze": 4, "clip": 4, "clip-text": 4, "shown": 3, "feature-similarity": 4,
    "rfid": 2, "rfid-changes": 3, "fid": 2, "kid": 4, "is": 2,
    "latent-travel": 3, "latent-share": 3, "token-flips": 3, "codebook-use": 3, "warping-error": 5, "flicker": 4,
    "drift": 4, "denoising-loss": 4, "difference": 4,
    "curvature": 1, "raised-area": 3, "raised-area-weights": 3, "own-nearest": 3, "label-silhouette": 3,
    "image-silhouette": 3, "trustworthiness": 3, "lipschitz-encoder": 2, "lipschitz-both": 2,
    "lipschitz-encoder-linf": 4, "lipschitz-both-linf": 3, "certified": 3, "smoothing-error": 3,
    "certified-distance": 3, "certificate-held": 3, "path-length": 3, "worst-jump": 3, "reencoding-drift": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """A table of texts with a heading."""

    title: str
    explanation: str
    table: Sequence[Sequence[str]]
    """Lines of cells, the first one with the titles."""


def comparison_table(rows: Rows, vaes: Sequence[str]) -> str:
    """Return a Markdown table with a line for each attack and metric, and a column for each VAE.

    Cells have the mean and its 95% interval.
    """
    cells = {(row.attack, row.metric, row.vae): row for row in rows}
    lines = list(dict.fromkeys((row.attack, row.metric) for row in rows))
    table = [["images", "metric", *vaes]]
    for attack, metric in lines:
        values = [_cell(cells.get((attack, metric, vae))) for vae in vaes]
        table.append([_attack_title(cells, attack), METRIC_TITLES[metric], *values])
    return markdown_table(table)


def won_back(rows: Rows, attack: str, original: str, robust: str) -> float | None:
    """Return the share of the original VAE's PSNR loss under `attack` that the robust VAE avoids.

    Return None if the original VAE loses nothing.

    Args:
        rows: with the PSNR of both VAEs, for clean images and under the attack.
        attack: name of the attack.
        original: name of the original VAE.
        robust: name of the robust VAE.
    """
    value = {(row.vae, row.attack): row.value for row in rows if row.metric == "psnr"}
    lost = value[original, "clean"] - value[original, attack]
    return (value[robust, attack] - value[original, attack]) / lost if lost > 0 else None


def _attack_title(cells: dict, attack: str) -> str:
    epsilon = next(row.epsilon for (name, _, _), row in cells.items() if name == attack)
    return f"{attack}, {format_pixel_distance(epsilon)}" if epsilon else attack


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return " ".join(measured(row.metric, row.value, row.ci95))


def measured(
    metric: str, value: float, interval: Sequence[float] | None, *, sign: Literal["", "+"] = ""
) -> tuple[str, ...]:
    """Return the mean as text and, if there is one, its 95% interval.

    Args:
        metric: its number of decimals is used.
        value: the mean.
        interval: lower and upper bound, or None.
        sign: "+" writes a plus sign before positive numbers.
    """
    form = f"{sign}.{DECIMALS[metric]}f"
    if interval is None:
        return (f"{value:{form}}",)
    low, high = interval
    return f"{value:{form}}", f"[{low:{form}}, {high:{form}}]"


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    """Return lines of cells, the first one with the titles, as a Markdown table with aligned columns."""
    # tabulate does the same, but it is one more dependency, and it pads columns with long titles by two more spaces.
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in table
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
