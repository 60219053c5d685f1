"""Draw what image protections and a robust VAE do, for readers who have never heard of either."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from torch import Tensor

from experiments.runner import WEIGHTS
from srl_utils.attacks.draws import image_generators
from srl_utils.attacks.protections import PROTECTIONS, Victim, protect
from srl_utils.evaluation.report.grids import extremes_picture
from srl_utils.files import write_atomically
from srl_utils.images.decoding import decode_rgb
from srl_utils.images.pixels import from_pil, to_model_range, to_unit_range
from srl_utils.metrics.pixels import psnr
from srl_utils.pipelines import robust_vae
from srl_utils.vae.codec import Codec

PROTECTION, EPSILON, STEPS = "photoguard-encoder", 16 / 255, 100
STRENGTH = 0.3
SCENES_SHOWN = 4
COLUMNS = ("image", "protected image", "edit of the image", "edit of the protected one", "with the robust VAE")


def draw_example(scenes: Path, robust: Path, path: Path) -> None:
    """Draw the first scenes, protected on the original VAE, and edits by both VAEs.

    Args:
        scenes: folder of `miniature.draw`.
        robust: folder of the robust VAE.
        path: of the picture.
    """
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(WEIGHTS / "sd")
    pipe.set_progress_bar_config(disable=True)
    lines = (scenes / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = list(map(json.loads, lines[:SCENES_SHOWN]))
    clean = torch.stack([from_pil(decode_rgb(scenes / each["file_name"])) for each in chosen])
    victim = Victim.of(Codec.of(pipe.vae.requires_grad_(False), "original"))
    protected = protect(
        PROTECTIONS[PROTECTION], victim, clean, epsilon=EPSILON, num_steps=STEPS,
        generators=image_generators(0, range(len(clean))),
    )  # fmt: skip
    prompts = [each["text"] for each in chosen]
    wanted, spoilt = edited(pipe, clean, prompts), edited(pipe, protected, prompts)
    with robust_vae(pipe, robust):
        rescued = edited(pipe, protected, prompts)
    rows = []
    for number in range(len(clean)):
        shown = [(batch[number], "") for batch in (clean, protected, wanted)]
        for batch in (spoilt, rescued):
            quality = psnr(batch[number : number + 1], wanted[number : number + 1]).item()
            shown.append((batch[number], f"{quality:.0f} dB to the first edit"))
        rows.append(("", shown))
    picture = extremes_picture(rows, COLUMNS, cell=192)
    write_atomically(path, partial(picture.save, format="PNG"))


def edited(pipe: StableDiffusionImg2ImgPipeline, images: Tensor, prompts: list[str]) -> Tensor:
    """Return image-to-image edits of `images` `[N,3,H,W]` in [-1,1], with the same noise in each call."""
    output = pipe(
        prompt=prompts, image=to_unit_range(images), strength=STRENGTH, guidance_scale=2.5, num_inference_steps=20,
        generator=image_generators(1, range(len(images))), output_type="pt",
    )  # fmt: skip
    return to_model_range(output.images)
