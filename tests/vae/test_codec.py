"""Any diffusers VAE as a codec."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    AutoencoderTiny,
    ModelMixin,
    UNet2DModel,
    VQModel,
)

from srl_utils.errors import UserError
from srl_utils.vae.codec import Codec, load_codec
from srl_utils.vae.loading import AutoencoderSource

DOWN, UP = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
SMALL = {"down_block_types": DOWN, "up_block_types": UP, "norm_num_groups": 4}
KINDS: dict[str, Callable[[], ModelMixin]] = {
    "AutoencoderKL": lambda: AutoencoderKL(**SMALL, block_out_channels=(8, 16)),
    "AsymmetricAutoencoderKL": lambda: AsymmetricAutoencoderKL(
        **SMALL, down_block_out_channels=(8, 16), up_block_out_channels=(8, 16)
    ),
    "VQModel": lambda: VQModel(**SMALL, block_out_channels=(8, 16), num_vq_embeddings=32),
    "AutoencoderTiny": lambda: AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
    ),
    "AutoencoderKLTemporalDecoder": lambda: AutoencoderKLTemporalDecoder(
        down_block_types=DOWN, block_out_channels=(32, 32)
    ),
}


def load(folder: Path) -> Codec:
    source = AutoencoderSource(pretrained_model_name_or_path=str(folder))
    return load_codec("judged", source, device=torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_codec_is_the_vae_itself(kind, images, tmp_path: Path) -> None:
    """Oracle: diffusers' own encode and decode; gradients reach the image, which attacks need."""
    torch.manual_seed(0)
    vae = KINDS[kind]().eval()
    vae.save_pretrained(tmp_path)
    codec, clean = load(tmp_path), images(2, 32)
    with torch.no_grad():
        encoded = vae.encode(clean)
        latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
        settings = {"num_frames": 1} if kind == "AutoencoderKLTemporalDecoder" else {}
        expected = vae.decode(latents, **settings).sample
    torch.testing.assert_close(codec.encode(clean), latents, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(codec.reconstruct(clean), expected, atol=1e-4, rtol=1e-4)
    shown = clean.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(codec.reconstruct(shown).square().sum(), shown)
    assert gradient.abs().sum() > 0
    torch.testing.assert_close(codec.scale(latents), latents * vae.config.scaling_factor)


def test_other_models_are_refused(tmp_path: Path) -> None:
    """Oracle: specification; the message names what was found and what would do."""
    UNet2DModel(
        block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is a UNet2DModel; the supported VAEs are AutoencoderKL, .*VQModel"):
        load(tmp_path)
