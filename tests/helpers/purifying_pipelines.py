"""Small pipelines that purify images, of random weights: each is the same in every call."""

from __future__ import annotations

from pathlib import Path

from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

from helpers.runs import build_tiny_vae
from helpers.small_pipelines import BLOCKS, UNET, build_pipeline, seeded
from helpers.small_text_encoder import add_text_encoders

SIDE = 32
"""Of images that all of them take, in pixels."""
PIXEL_UNET = {
    "sample_size": SIDE // 2, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"),
}  # fmt: skip


def build_stable_diffusion(folder: Path) -> DiffusionPipeline:
    """Text-to-image; `folder` takes the tokenizer's files."""
    return add_text_encoders(build_pipeline("sd"), folder)


def build_upscaler(stable_diffusion: DiffusionPipeline) -> DiffusionPipeline:
    """Stable Diffusion's upscaler, with the text encoder of a text-to-image pipeline."""
    unet = seeded(lambda: UNet2DConditionModel(**UNET, **BLOCKS, in_channels=7, out_channels=4, num_class_embeds=1000))
    parts = {name: stable_diffusion.components[name] for name in ("text_encoder", "tokenizer")}
    pipe = StableDiffusionUpscalePipeline(
        vae=build_tiny_vae(), unet=unet, low_res_scheduler=DDPMScheduler(), scheduler=DDIMScheduler(), **parts
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_pixel_model() -> DiffusionPipeline:
    """An unconditional model of pixels."""
    return DDPMPipeline(unet=seeded(lambda: UNet2DModel(**PIXEL_UNET)), scheduler=DDPMScheduler())
