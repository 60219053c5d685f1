"""Any diffusers VAE as a codec."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from helpers.autoencoders import small_autoencoder

from srl_utils.errors import UserError
from srl_utils.vae.codec import Codec, load_codec
from srl_utils.vae.loading import AutoencoderSource


def load(folder: Path) -> Codec:
    source = AutoencoderSource(pretrained_model_name_or_path=str(folder))
    return load_codec("judged", source, device=torch.device("cpu"))


def test_a_folder_is_loaded_whole(tmp_path: Path, images) -> None:
    """Oracle: the VAE that was saved, up to the order of sums in another layout of memory; its codec is frozen."""
    vae = small_autoencoder("AutoencoderKL")
    vae.save_pretrained(tmp_path)
    codec = load(tmp_path)
    expected = Codec.of(vae, "saved").reconstruct(images(1, 32))
    torch.testing.assert_close(codec.reconstruct(images(1, 32)), expected, atol=1e-4, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in codec.vae.parameters())


def test_other_models_are_refused(tmp_path: Path) -> None:
    """Oracle: specification; the message names what was found and what would do."""
    UNet2DModel(
        block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    ).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"is of the class UNet2DModel; the supported VAEs are AutoencoderKL, .*VQModel"
    ):
        load(tmp_path)
