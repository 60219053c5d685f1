"""Images that targeted protections imitate."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from srl_utils.attacks.draws import Generators
from srl_utils.images.pixels import PIXEL_MAX, PIXEL_MIN, from_pil, to_model_range, to_unit_range

PATTERN_SIDE = 1440  # pixels, with 3 columns and 8 rows as in the authors' image
CELL_WIDTH, CELL_HEIGHT = PATTERN_SIDE // 3, PATTERN_SIDE // 8
# The word VEIL in a cell of 16 by 6.
STROKES = (
    ((1, 1), (2.5, 5), (4, 1)),
    ((8, 1), (5.5, 1), (5.5, 5), (8, 5)),
    ((5.5, 3), (7.5, 3)),
    ((9.75, 1), (9.75, 5)),
    ((12, 1), (12, 5), (14.5, 5)),
)


def grey(height: int, width: int) -> Tensor:
    """Return an image `[1,3,H,W]` of the middle of the range [-1,1]."""
    return torch.full((1, 3, height, width), (PIXEL_MIN + PIXEL_MAX) / 2)


def mist_pattern(height: int, width: int) -> Tensor:
    """Draw a target like Mist's, `[1,3,H,W]` in [-1,1]: a white word on black, repeated. It is not the authors' image."""
    unit = CELL_WIDTH / 16
    image = Image.new("RGB", (PATTERN_SIDE, PATTERN_SIDE))
    pen = ImageDraw.Draw(image)
    for left in range(0, PATTERN_SIDE, CELL_WIDTH):
        for top in range(0, PATTERN_SIDE, CELL_HEIGHT):
            for stroke in STROKES:
                points = [(left + unit * x, top + unit * y) for x, y in stroke]
                pen.line(points, fill="white", width=round(0.8 * unit), joint="curve")
    return from_pil(image.resize((width, height), Image.Resampling.BICUBIC)).unsqueeze(0)


def style_transfer(
    pipe: DiffusionPipeline,
    images: Tensor,
    style: str = "Cubism by Picasso",
    *,
    generators: Generators | None = None,
    num_steps: int = 50,
) -> Tensor:
    """Return the images in another style, as Glaze's targets.

    Source: AAAAAAsuka/Impress, trainset_style_trans_all.py: prompt "{style} style", strength 0.5, guidance 7.5, 50
    steps, with Stable Diffusion 2.1. (style_transfer.py has a strength of 0.4.)

    Args:
        pipe: an image-to-image pipeline.
        images: `[N,3,H,W]` in [-1,1].
        style: the style's name in the prompt.
        generators: one CPU generator per image; None draws from PyTorch's global generator.
        num_steps: the sampler's steps at full strength.

    Returns:
        `[N,3,H,W]` in [-1,1].
    """
    output = pipe(
        prompt=[f"{style} style"] * len(images),
        image=to_unit_range(images),
        strength=0.5,
        guidance_scale=7.5,
        num_inference_steps=num_steps,
        generator=None if generators is None else list(generators),
        output_type="pt",
    )
    return to_model_range(output.images.float()).to(images)
