"""Show attacked clips as VAEs reconstruct them: frames side by side, and in motion."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

from matplotlib import style
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from srl_utils.evaluation.report.figures import STYLE, save
from srl_utils.files import write_atomically
from srl_utils.images.pixels import to_pil

MILLISECONDS = 200
"""For which the animation shows a frame."""


def draw_strip(clips: Mapping[str, Tensor], path: Path, *, step: int = 2) -> None:
    """Draw every `step`-th frame of clips, one row each.

    Args:
        clips: `[3,T,H,W]` in [-1,1], by title.
        path: of the PNG.
        step: of the frames.
    """
    shown = range(0, next(iter(clips.values())).shape[1], step)
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(1.4 * len(shown), 1.4 * len(clips)))
        axes = figure.subplots(len(clips), len(shown), squeeze=False)
        for row, (title, clip) in zip(axes, clips.items(), strict=True):
            for ax, number in zip(row, shown, strict=True):
                ax.imshow(to_pil(clip[:, number]))
                ax.set(xticks=[], yticks=[])
            row[0].set_ylabel(title)
        for ax, number in zip(axes[0], shown, strict=True):
            ax.set_title(f"frame {number + 1}")
        save(figure, path)


def draw_animation(clips: Mapping[str, Tensor], path: Path) -> None:
    """Write an animation that plays clips beside each other, in an endless loop.

    Args:
        clips: `[3,T,H,W]` in [-1,1], by title.
        path: of the GIF.
    """
    length = next(iter(clips.values())).shape[1]
    first, *others = [beside({title: clip[:, number] for title, clip in clips.items()}) for number in range(length)]
    write_atomically(
        path,
        lambda aside: first.save(
            aside, format="GIF", save_all=True, append_images=others, duration=MILLISECONDS, loop=0
        ),
    )


def beside(images: Mapping[str, Tensor]) -> Image.Image:
    """Return images `[3,H,W]` in [-1,1] beside each other under their titles."""
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(1.4 * len(images), 1.7))
        for ax, (title, image) in zip(figure.subplots(1, len(images)), images.items(), strict=True):
            ax.imshow(to_pil(image))
            ax.set(title=title, xticks=[], yticks=[])
        drawn = BytesIO()
        figure.savefig(drawn, format="png")
    return Image.open(drawn).convert("RGB")
