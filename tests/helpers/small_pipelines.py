"""Every kind of diffusers pipeline that has a VAE, real but of a few channels: random weights, no text encoder.

pipe = build_pipeline("sdxl inpaint", dtype=torch.bfloat16)
images = run_pipeline(pipe, "sdxl inpaint")  # [1,3,32,32] in [0,1]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from helpers.runs import build_tiny_vae, draw_images

SIZE = 32
WIDTH = 8  # of the text embedding, and of everything else that may be as narrow
TOKENS = 4
STEPS = 2
UNET = {
    "sample_size": SIZE // 2,
    "block_out_channels": (WIDTH, 2 * WIDTH),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": WIDTH,
}
TIME_IDS = 6  # SDXL's sizes and crops, each embedded in WIDTH numbers
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": WIDTH,
    "projection_class_embeddings_input_dim": (TIME_IDS + 1) * WIDTH,
}
BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
# SD 3 and Flux: latents are shifted, and no 1x1 convolutions stand around them.
FLOW_VAE = {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.5305, "shift_factor": 0.0609}


def small_vae(**config: Any) -> AutoencoderKL:
    """The tiny VAE of the fixtures with other settings."""
    tiny = {name: value for name, value in build_tiny_vae().config.items() if not name.startswith("_")}
    return seeded(lambda: AutoencoderKL(**{**tiny, **config}))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, with the same random weights in each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def sd_parts(**unet: Any) -> dict[str, Any]:
    return {
        "vae": small_vae(),
        "unet": seeded(lambda: UNet2DConditionModel(**{**UNET, **BLOCKS, **unet})),
        "scheduler": diffusion_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def sd2_parts() -> dict[str, Any]:
    scheduler = diffusion_scheduler(prediction_type="v_prediction")
    return {**sd_parts(use_linear_projection=True), "scheduler": scheduler}


def controlnet_parts() -> dict[str, Any]:
    shared = {name: value for name, value in UNET.items() if name != "sample_size"}
    blocks = {"down_block_types": BLOCKS["down_block_types"], "conditioning_embedding_out_channels": (4, 4)}
    return {**sd_parts(), "controlnet": seeded(lambda: ControlNetModel(**shared, **blocks))}


def sdxl_parts() -> dict[str, Any]:
    unet = seeded(lambda: UNet2DConditionModel(**UNET, **SDXL))
    return {"vae": small_vae(), "unet": unet, "scheduler": diffusion_scheduler(), **without("text_encoder_2")}


def sd3_parts() -> dict[str, Any]:
    transformer = seeded(
        lambda: SD3Transformer2DModel(
            sample_size=SIZE // 2,
            pos_embed_max_size=SIZE // 2,
            num_layers=1,
            attention_head_dim=WIDTH,
            num_attention_heads=2,
            caption_projection_dim=2 * WIDTH,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
        )
    )
    return {**flow_parts(latent_channels=16), "transformer": transformer, **without("text_encoder_2", "text_encoder_3")}


def flux_parts() -> dict[str, Any]:
    transformer = seeded(
        lambda: FluxTransformer2DModel(
            in_channels=4 * 4,  # 2x2 latent pixels make a token
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
        )
    )
    return {**flow_parts(), "transformer": transformer, **without("text_encoder_2")}


def flow_parts(**vae: Any) -> dict[str, Any]:
    return {"vae": small_vae(**FLOW_VAE, **vae), "scheduler": FlowMatchEulerDiscreteScheduler()}


def without(*text_encoders: str) -> dict[str, None]:
    """These text encoders and their tokenizers, left out: the calls bring embeddings."""
    return {
        name.replace("text_encoder", kind): None for name in text_encoders for kind in ("text_encoder", "tokenizer")
    }


def diffusion_scheduler(**config: Any) -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, steps_offset=1, **config)


@dataclass(frozen=True)
class Kind:
    """A pipeline class, what it is built from, and what it is called with beside the embeddings."""

    pipeline: str
    parts: Callable[[], dict[str, Any]]
    arguments: tuple[str, ...] = ()
    pooled: bool = False

    @property
    def encodes(self) -> bool:
        """Whether the VAE's encoder is used. A ControlNet sees the image without it."""
        return "image" in self.arguments and "controlnet" not in self.pipeline.lower()


IMG2IMG = ("image", "strength")
INPAINT = (*IMG2IMG, "mask_image")
KINDS = {
    "sd": Kind("StableDiffusionPipeline", sd_parts),
    "sd img2img": Kind("StableDiffusionImg2ImgPipeline", sd_parts, IMG2IMG),
    "sd inpaint": Kind("StableDiffusionInpaintPipeline", lambda: sd_parts(in_channels=9), INPAINT),
    "sd controlnet": Kind("StableDiffusionControlNetPipeline", controlnet_parts, ("image",)),
    "sd instruct": Kind("StableDiffusionInstructPix2PixPipeline", lambda: sd_parts(in_channels=8), ("image",)),
    "sd2": Kind("StableDiffusionPipeline", sd2_parts),
    "sd2 img2img": Kind("StableDiffusionImg2ImgPipeline", sd2_parts, IMG2IMG),
    "sdxl": Kind("StableDiffusionXLPipeline", sdxl_parts, pooled=True),
    "sdxl img2img": Kind("StableDiffusionXLImg2ImgPipeline", sdxl_parts, IMG2IMG, pooled=True),
    "sdxl inpaint": Kind("StableDiffusionXLInpaintPipeline", sdxl_parts, INPAINT, pooled=True),
    "sd3": Kind("StableDiffusion3Pipeline", sd3_parts, pooled=True),
    "sd3 img2img": Kind("StableDiffusion3Img2ImgPipeline", sd3_parts, IMG2IMG, pooled=True),
    "sd3 inpaint": Kind("StableDiffusion3InpaintPipeline", sd3_parts, INPAINT, pooled=True),
    "flux": Kind("FluxPipeline", flux_parts, pooled=True),
    "flux img2img": Kind("FluxImg2ImgPipeline", flux_parts, IMG2IMG, pooled=True),
    "flux inpaint": Kind("FluxInpaintPipeline", flux_parts, INPAINT, pooled=True),
}  # fmt: skip


def build_pipeline(name: str, *, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The same pipeline in each call, weights and all."""
    kind = KINDS[name]
    parts = {**without("text_encoder"), **kind.parts()}
    pipe = getattr(diffusers, kind.pipeline)(**parts).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_pipeline(pipe: DiffusionPipeline, name: str) -> Tensor:
    """What `pipe` makes of the seeded inputs of this kind: images `[1,3,32,32]` in [0,1]."""
    kind = KINDS[name]
    available = {
        "image": (draw_images(1, SIZE) + 1) / 2,
        "mask_image": (torch.arange(SIZE) < SIZE // 2).float().expand(1, 1, SIZE, SIZE),
        "strength": 1 - 1 / STEPS,
    }
    arguments = {argument: available[argument] for argument in kind.arguments}
    noise = torch.Generator().manual_seed(1)
    arguments["prompt_embeds"] = torch.randn(1, TOKENS, WIDTH, generator=noise).to(dtype=pipe.dtype)
    if kind.pooled:
        arguments["pooled_prompt_embeds"] = torch.randn(1, WIDTH, generator=noise).to(dtype=pipe.dtype)
    if "height" in inspect.signature(pipe.__call__).parameters:
        arguments |= {"height": SIZE, "width": SIZE}
    arguments |= {"num_inference_steps": STEPS, "guidance_scale": 1.0, "generator": torch.Generator().manual_seed(2)}
    return pipe(**arguments, output_type="pt").images
