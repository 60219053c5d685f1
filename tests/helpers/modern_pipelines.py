"""A pipeline for each class of autoencoder that `small_pipelines` has not: real but tiny, with random weights.

pipe = build_pipeline("wan image-to-video")
frames = run_pipeline(pipe, "wan image-to-video")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from diffusers import (
    AmusedScheduler,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    HunyuanVideo15Transformer3DModel,
    LCMScheduler,
    LTXVideoTransformer3DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SCMScheduler,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
    UVit2DModel,
    WanTransformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from helpers.autoencoders import small_autoencoder
from helpers.runs import draw_images
from helpers.small_pipelines import BLOCKS, SIZE, STEPS, TOKENS, UNET, WIDTH, seeded, without
from srl_utils.images.pixels import to_pil

HEADS = {"num_layers": 1, "num_attention_heads": 2}
NO_TEXT = without("text_encoder")
FRAMES = 5
SIDE = 64  # the least that Flux 2 takes


def embedding(width: int = WIDTH) -> Tensor:
    return torch.randn(1, TOKENS, width, generator=torch.Generator().manual_seed(1))


def flux2_parts() -> dict[str, Any]:
    transformer = seeded(
        lambda: Flux2Transformer2DModel(
            in_channels=16, num_single_layers=1, attention_head_dim=16, joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 4, 4, 4), **HEADS,
        )
    )  # fmt: skip
    return {**NO_TEXT, "scheduler": FlowMatchEulerDiscreteScheduler(), "transformer": transformer}


def qwen_parts() -> dict[str, Any]:
    transformer = seeded(
        lambda: QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, attention_head_dim=16, joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4),
            **HEADS,
        )
    )  # fmt: skip
    return {**NO_TEXT, "scheduler": FlowMatchEulerDiscreteScheduler(), "transformer": transformer}


def qwen_edit_parts() -> dict[str, Any]:
    return {**qwen_parts(), "processor": None}


def sana_parts() -> dict[str, Any]:
    transformer = seeded(
        lambda: SanaTransformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, attention_head_dim=4, num_cross_attention_heads=2,
            cross_attention_head_dim=4, cross_attention_dim=WIDTH, caption_channels=WIDTH, sample_size=SIZE // 2,
            guidance_embeds=True, qk_norm="rms_norm_across_heads", **HEADS,
        )
    )  # fmt: skip
    return {**NO_TEXT, "scheduler": SCMScheduler(), "transformer": transformer}


def lcm_parts() -> dict[str, Any]:
    unet = seeded(lambda: UNet2DConditionModel(**UNET, **BLOCKS, time_cond_proj_dim=8))
    return {
        **NO_TEXT, "scheduler": LCMScheduler(), "unet": unet, "safety_checker": None, "feature_extractor": None,
        "requires_safety_checker": False,
    }  # fmt: skip


def svd_parts() -> dict[str, Any]:
    unet = seeded(
        lambda: UNetSpatioTemporalConditionModel(
            sample_size=SIZE // 2, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=WIDTH,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), num_attention_heads=2,
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
        )
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, projection_dim=WIDTH, num_hidden_layers=1, num_attention_heads=2, image_size=224,
        intermediate_size=16, patch_size=112,
    )  # fmt: skip
    return {
        "scheduler": EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.1,
                                            sigma_max=10.0),
        "unet": unet,
        "image_encoder": seeded(lambda: CLIPVisionModelWithProjection(vision)),
        "feature_extractor": CLIPImageProcessor(),
    }  # fmt: skip


def wan_parts() -> dict[str, Any]:
    transformer = seeded(
        lambda: WanTransformer3DModel(
            in_channels=10, out_channels=4, attention_head_dim=12, text_dim=WIDTH, ffn_dim=16, **HEADS
        )  # the latent, a mask of two frames, the image's latent
    )
    return {**NO_TEXT, "scheduler": FlowMatchEulerDiscreteScheduler(), "transformer": transformer}


def ltx_parts() -> dict[str, Any]:
    transformer = seeded(
        lambda: LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH, **HEADS
        )
    )
    return {**NO_TEXT, "scheduler": FlowMatchEulerDiscreteScheduler(), "transformer": transformer}


def cogvideo_parts() -> dict[str, Any]:
    transformer = seeded(
        lambda: CogVideoXTransformer3DModel(
            in_channels=8, out_channels=4, attention_head_dim=16, time_embed_dim=4, text_embed_dim=WIDTH,
            sample_width=SIDE // 8, sample_height=SIDE // 8, sample_frames=FRAMES, max_text_seq_length=TOKENS,
            use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True, **HEADS,
        )
    )  # fmt: skip
    return {**NO_TEXT, "scheduler": CogVideoXDDIMScheduler(), "transformer": transformer}


def kandinsky_parts() -> dict[str, Any]:
    unet = seeded(
        lambda: UNet2DConditionModel(
            **{**UNET, "sample_size": SIDE // 2}, in_channels=4, out_channels=8,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), addition_embed_type="image",
            encoder_hid_dim_type="image_proj", encoder_hid_dim=WIDTH, resnet_time_scale_shift="scale_shift",
        )
    )  # fmt: skip
    return {"scheduler": DDIMScheduler(), "unet": unet}


def amused_parts() -> dict[str, Any]:
    transformer = seeded(
        lambda: UVit2DModel(
            hidden_size=WIDTH, hidden_dropout=0.0, cond_embed_dim=WIDTH, micro_cond_encode_dim=2, micro_cond_embed_dim=10,
            encoder_hidden_size=WIDTH, codebook_size=64, vocab_size=66, in_channels=WIDTH, block_out_channels=WIDTH,
            num_res_blocks=1, num_hidden_layers=1, num_attention_heads=2, block_num_heads=2, attention_dropout=0.0,
            intermediate_size=16, sample_size=SIDE // 2,
        )
    )  # fmt: skip
    return {**NO_TEXT, "scheduler": AmusedScheduler(mask_token_id=65), "transformer": transformer}


def hunyuan15_parts() -> dict[str, Any]:
    transformer = seeded(
        lambda: HunyuanVideo15Transformer3DModel(
            in_channels=9, out_channels=4, attention_head_dim=16, num_refiner_layers=1, text_embed_dim=WIDTH,
            text_embed_2_dim=WIDTH, image_embed_dim=WIDTH, rope_axes_dim=(4, 6, 6), target_size=SIDE, **HEADS,
        )  # the latent, the image's latent, a mask
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    return {
        **without("text_encoder", "text_encoder_2"),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "transformer": transformer,
        "guider": ClassifierFreeGuidance(enabled=False),
        "image_encoder": seeded(lambda: SiglipVisionModel(vision)),
        "feature_extractor": SiglipImageProcessor(size={"height": 32, "width": 32}),
    }


@dataclass(frozen=True)
class Kind:
    """A pipeline class, its autoencoder's class, its other parts, and what it is called with beside image and size.

    Then the name under which it holds its autoencoder, and entries of that one's configuration that are not the usual ones.
    """

    pipeline: str
    vae: str
    parts: Callable[[], dict[str, Any]]
    arguments: Callable[[], dict[str, Any]] = field(default=lambda: {"prompt_embeds": embedding()})
    name: str = "vae"
    config: Mapping[str, Any] = field(default_factory=dict)


def masked() -> dict[str, Any]:
    return {
        "prompt_embeds": embedding(),
        "prompt_embeds_mask": torch.ones(1, TOKENS, dtype=torch.long),
        "true_cfg_scale": 1.0,
    }


def twofold() -> dict[str, Any]:
    embeddings = {"prompt_embeds": embedding(), "prompt_embeds_2": embedding()}
    masks = {f"prompt_embeds_mask{suffix}": torch.ones(1, TOKENS) for suffix in ("", "_2")}
    return {**embeddings, **masks}


CLIP_OF_FRAMES = {"num_frames": FRAMES}
KINDS = {
    "flux2": Kind("Flux2Pipeline", "AutoencoderKLFlux2", flux2_parts),
    "qwen img2img": Kind(
        "QwenImageImg2ImgPipeline", "AutoencoderKLQwenImage", qwen_parts, lambda: {**masked(), "strength": 0.5}
    ),
    "qwen edit": Kind("QwenImageEditPipeline", "AutoencoderKLQwenImage", qwen_edit_parts, masked),
    "sana img2img": Kind(
        "SanaSprintImg2ImgPipeline", "AutoencoderDC", sana_parts,
        lambda: {
            "prompt_embeds": embedding(), "prompt_attention_mask": torch.ones(1, TOKENS), "use_resolution_binning": False,
            "strength": 0.5,
        },
    ),
    "lcm img2img": Kind(
        "LatentConsistencyModelImg2ImgPipeline", "AutoencoderTiny", lcm_parts,
        lambda: {"prompt_embeds": embedding(), "strength": 0.5},
    ),
    "svd": Kind(
        "StableVideoDiffusionPipeline", "AutoencoderKLTemporalDecoder", svd_parts,
        lambda: {**CLIP_OF_FRAMES, "max_guidance_scale": 1.0},
    ),
    "wan image-to-video": Kind(
        "WanImageToVideoPipeline", "AutoencoderKLWan", wan_parts,
        lambda: {**CLIP_OF_FRAMES, "prompt_embeds": embedding(), "guidance_scale": 1.0},
    ),
    "ltx image-to-video": Kind(
        "LTXImageToVideoPipeline", "AutoencoderKLLTXVideo", ltx_parts,
        lambda: {
            **CLIP_OF_FRAMES, "prompt_embeds": embedding(), "prompt_attention_mask": torch.ones(1, TOKENS),
            "guidance_scale": 1.0,
        },
    ),
    "cogvideo image-to-video": Kind(
        "CogVideoXImageToVideoPipeline", "AutoencoderKLCogVideoX", cogvideo_parts,
        lambda: {**CLIP_OF_FRAMES, "prompt_embeds": embedding(), "guidance_scale": 1.0},
    ),
    "kandinsky img2img": Kind(
        "KandinskyV22Img2ImgPipeline", "VQModel", kandinsky_parts,
        lambda: {"image_embeds": embedding()[:, 0], "negative_image_embeds": -embedding()[:, 0], "strength": 0.5},
        name="movq", config={"latent_channels": 4},
    ),
    "amused img2img": Kind(
        "AmusedImg2ImgPipeline", "VQModel", amused_parts,
        lambda: {
            "prompt_embeds": embedding()[:, 0], "encoder_hidden_states": embedding(), "guidance_scale": 1.0, "strength": 0.5,
        },
        name="vqvae", config={"lookup_from_codebook": True},
    ),
    "hunyuan 1.5 image-to-video": Kind(
        "HunyuanVideo15ImageToVideoPipeline", "AutoencoderKLHunyuanVideo15", hunyuan15_parts,
        lambda: {**CLIP_OF_FRAMES, **twofold()},
    ),
}  # fmt: skip
OF_THEIR_OWN_SIZE = ("lcm img2img", "amused img2img", "hunyuan 1.5 image-to-video")
"""These take no size."""


def build_pipeline(name: str) -> DiffusionPipeline:
    """The same pipeline in each call, weights and all."""
    kind = KINDS[name]
    usual = small_autoencoder(kind.vae)
    vae = seeded(lambda: type(usual).from_config(usual.config, **kind.config)) if kind.config else usual
    pipe = getattr(diffusers, kind.pipeline)(**{kind.name: vae}, **kind.parts())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_pipeline(pipe: DiffusionPipeline, name: str) -> Tensor:
    """What `pipe` makes of a seeded image: images `[1,3,H,W]`, or frames `[1,T,3,H,W]`."""
    arguments = {
        "image": to_pil(draw_images(1, SIDE)[0]), "height": SIDE, "width": SIDE, "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(2), "output_type": "pt", **KINDS[name].arguments(),
    }  # fmt: skip
    if name in OF_THEIR_OWN_SIZE:
        del arguments["height"], arguments["width"]
    with patch.object(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (SIDE, SIDE, None)):
        return pipe(**arguments)[0]  # Qwen-Image-Edit would enlarge every image to a megapixel
