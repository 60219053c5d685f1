"""A small random instance of every supported class of autoencoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import diffusers
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    AutoencoderKLMagvit,
    AutoencoderKLMochi,
    AutoencoderKLQwenImage,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    AutoencoderTiny,
    ModelMixin,
    VQModel,
)

from srl_utils.vae.families import family_of

LEVELS = (8, 16)
BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
STATISTICS = {"latents_mean": [0.5, -0.5, 0.1, 0.0], "latents_std": [1.5, 0.5, 1.0, 2.0]}

BUILDERS: Mapping[str, Callable[[], ModelMixin]] = {
    "AutoencoderKL": lambda: AutoencoderKL(**BLOCKS, block_out_channels=LEVELS),
    "AsymmetricAutoencoderKL": lambda: AsymmetricAutoencoderKL(
        **BLOCKS, down_block_out_channels=LEVELS, up_block_out_channels=LEVELS
    ),
    "AutoencoderKLFlux2": lambda: AutoencoderKLFlux2(**BLOCKS, block_out_channels=LEVELS, latent_channels=4),
    "AutoencoderKLTemporalDecoder": lambda: AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32)
    ),
    "AutoencoderDC": lambda: AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=LEVELS,
        decoder_block_out_channels=LEVELS,
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        scaling_factor=0.4,
    ),
    "AutoencoderTiny": lambda: AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
    "VQModel": lambda: VQModel(**BLOCKS, block_out_channels=LEVELS, num_vq_embeddings=64),
    "AutoencoderKLWan": lambda: AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True], scale_factor_spatial=2,
        scale_factor_temporal=2, **STATISTICS,
    ),
    "AutoencoderKLQwenImage": lambda: AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True], **STATISTICS
    ),
    "AutoencoderKLHunyuanVideo": lambda: AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    ),
    "AutoencoderKLCogVideoX": lambda: AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    ),
    "AutoencoderKLLTXVideo": lambda: AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), spatio_temporal_scaling=(True, False), patch_size=2,
        decoder_spatio_temporal_scaling=(True, False), decoder_inject_noise=(False, False, False),
        upsample_residual=(False, False), upsample_factor=(1, 1), down_block_types=("LTXVideoDownBlock3D",) * 2,
        downsample_type=("conv", "conv"),
    ),
    "AutoencoderKLHunyuanImage": lambda: AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        spatial_compression_ratio=2, sample_size=256, scaling_factor=0.75,
    ),
    "AutoencoderKLHunyuanVideo15": lambda: AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=2, downsample_match_channel=False, upsample_match_channel=False,
    ),
    "AutoencoderKLLTX2Video": lambda: diffusers.AutoencoderKLLTX2Video(
        latent_channels=8, block_out_channels=(8, 8), down_block_types=("LTX2VideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8,), layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True, True), decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False),
        downsample_type=("spatial", "temporal"), upsample_type=("spatiotemporal",), upsample_residual=(True,),
        upsample_factor=(2,), patch_size=2, spatial_compression_ratio=4, temporal_compression_ratio=2,
    ),
    "AutoencoderKLMagvit": lambda: AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("SpatialDownBlock3D",) + ("SpatialTemporalDownBlock3D",) * 2,
        up_block_types=("SpatialUpBlock3D",) + ("SpatialTemporalUpBlock3D",) * 2,
    ),
    "AutoencoderKLMochi": lambda: AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32), decoder_block_out_channels=(32, 32), latent_channels=4,
        layers_per_block=(0, 1, 1), temporal_expansions=(2,), spatial_expansions=(2,),
        add_attention_block=(False, True, True), **STATISTICS,
    ),
}  # fmt: skip
INSTANCES = {name: build for name, build in BUILDERS.items() if hasattr(diffusers, name)}
"""One for each row of `srl_utils.vae.families.FAMILIES`."""


def small_autoencoder(name: str, *, seed: int = 0) -> ModelMixin:
    """Return a small autoencoder of the class `name` with random weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return INSTANCES[name]().eval()


def with_other_encoder(vae: ModelMixin) -> ModelMixin:
    """Return a copy of `vae` as the fine-tuning leaves it: other weights on the encoder's side, the rest the same."""
    other = copy.deepcopy(vae)
    noise = torch.Generator().manual_seed(3)
    for name, parameter in other.named_parameters():
        if name.partition(".")[0] in family_of(vae).trained:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=noise).to(parameter)
    return other
