"""Every supported class of autoencoder: encoded, scaled, trained and loaded by the same code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    Flux2Pipeline,
    LTXImageToVideoPipeline,
    ModelMixin,
)
from helpers.autoencoders import INSTANCES, STATISTICS, small_autoencoder
from helpers.modern_pipelines import build_pipeline
from torch import Tensor

from srl_utils.vae.codec import Codec
from srl_utils.vae.families import FAMILIES, family_of
from srl_utils.vae.latents import LatentScale
from srl_utils.vae.loading import AutoencoderSource, load_autoencoder
from srl_utils.vae.networks import LatentEncoder, downsampling_factor

EVERY_CLASS = pytest.mark.parametrize("name", FAMILIES)
VIDEO = [name for name, family in FAMILIES.items() if family.video]


def encoded(vae: ModelMixin, images: Tensor) -> Tensor:
    """What diffusers' own encoder gives, and its decoder then takes: the posterior's mean, or the point."""
    vae.use_slicing = not family_of(vae).batches  # diffusers' own way to process one at a time
    output = vae.encode(images)
    return output.latent_dist.mean if "latent_dist" in output else next(iter(output.values()))


def test_every_class_has_an_instance() -> None:
    """Oracle: specification."""
    assert INSTANCES.keys() == FAMILIES.keys()


@EVERY_CLASS
def test_codec_is_the_vae_itself(name: str, images) -> None:
    """Oracle: diffusers' own encode and decode, exactly; the gradient reaches the pixels, which attacks need."""
    vae, clean = small_autoencoder(name), images(2, 32)
    codec, family = Codec.of(small_autoencoder(name), "judged"), FAMILIES[name]
    with torch.no_grad():
        latents = encoded(vae, clean.unsqueeze(2) if family.video else clean)
        reconstructions = vae.decode(latents, **family.decoding(vae.config, latents)).sample
    assert torch.equal(codec.encode(clean), latents.squeeze(2) if family.video else latents)
    assert torch.equal(codec.reconstruct(clean), reconstructions.squeeze(2) if family.video else reconstructions)
    assert downsampling_factor(vae) == 32 // latents.shape[-1]
    shown = clean.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(codec.reconstruct(shown).square().sum(), shown)
    assert (gradient.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("name", VIDEO)
def test_clips_keep_their_frames(name: str, images) -> None:
    """Oracle: diffusers' own encode and decode of a clip, which comes back with all its frames."""
    vae, factor = small_autoencoder(name), FAMILIES[name].frames(small_autoencoder(name).config)
    clip = images(1 + 2 * factor, 32).transpose(0, 1)[None]
    with torch.no_grad():
        latents = encoded(vae, clip)
        assert torch.equal(Codec.of(vae, "judged").encode(clip), latents)
        decoded = vae.decode(latents).sample
        assert torch.equal(Codec.of(vae, "judged").reconstruct(clip), decoded) and decoded.shape == clip.shape


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in VIDEO])
def test_a_vae_of_images_takes_clips_frame_by_frame(name: str, images) -> None:
    """Oracle: diffusers' own encode of the frames; its decode too, which for one class looks at all frames of a clip."""
    vae, frames = small_autoencoder(name), images(6, 32)
    clips = torch.stack([frames[:3].transpose(0, 1), frames[3:].transpose(0, 1)])
    codec = Codec.of(vae, "judged")
    several = {"num_frames": 3} if name == "AutoencoderKLTemporalDecoder" else {}
    with torch.no_grad():
        latents, reconstructed = codec.encode(clips), codec.reconstruct(clips)
        expected = encoded(vae, frames)
        decoded = vae.decode(expected, **several).sample
    for seen, wanted in ((latents, expected), (reconstructed, decoded)):
        assert seen.shape[:3] == (2, wanted.shape[1], 3)
        torch.testing.assert_close(seen.transpose(1, 2).flatten(0, 1), wanted, atol=1e-5, rtol=1e-4)


@EVERY_CLASS
def test_the_encoders_side_is_what_gradients_reach_before_the_latent(name: str, images) -> None:
    """Oracle: autograd: parameters of the trained parts move the latents, and no others do."""
    vae = small_autoencoder(name)
    encoder = LatentEncoder(vae)
    encoder(images(1, 32)).square().sum().backward()
    reached = {key.partition(".")[0] for key, parameter in vae.named_parameters() if parameter.grad is not None}
    assert reached == {part for part in family_of(vae).trained if getattr(vae, part, None) is not None}
    assert {key.partition(".")[0] for key, _ in encoder.named_parameters()} == reached


def flux2_scale(vae: ModelMixin, latents: Tensor) -> Tensor:
    patches = Flux2Pipeline._patchify_latents(latents)
    deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    normal = (patches - vae.bn.running_mean.view(1, -1, 1, 1)) / deviation.view(1, -1, 1, 1)
    return Flux2Pipeline._unpatchify_latents(normal)


def statistics_scale(vae: ModelMixin, latents: Tensor) -> Tensor:
    """As the pipelines of Wan and Qwen-Image compute it. Mochi's has the inverse, before it decodes."""
    mean, deviation = (torch.tensor(vae.config[entry]).view(1, -1, 1, 1) for entry in ("latents_mean", "latents_std"))
    return (latents - mean) * (1 / deviation)


def ltx_scale(vae: ModelMixin, latents: Tensor) -> Tensor:
    normal = LTXImageToVideoPipeline._normalize_latents(latents.unsqueeze(2), vae.latents_mean, vae.latents_std)
    return normal.squeeze(2)


SCALES = {
    "AutoencoderKLFlux2": flux2_scale,
    "AutoencoderKLWan": statistics_scale,
    "AutoencoderKLQwenImage": statistics_scale,
    "AutoencoderKLLTXVideo": ltx_scale,
    "AutoencoderKLLTX2Video": ltx_scale,
    "AutoencoderKLMochi": statistics_scale,
}


@EVERY_CLASS
def test_scale_is_that_of_the_pipeline(name: str, images) -> None:
    """Oracle: the pipelines' own helpers or formulas, the factor of the configuration for the others; and the way back."""
    vae = small_autoencoder(name)
    for buffer in vae.buffers():  # statistics as of a trained VAE
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(0))
    latents = Codec.of(vae, "judged").encode(images(2, 32)).detach()
    scale = LatentScale.of(vae)
    own = SCALES.get(name, lambda vae, latents: latents * vae.config.scaling_factor)
    torch.testing.assert_close(scale.scale(latents), own(vae, latents))
    torch.testing.assert_close(scale.unscale(scale.scale(latents)), latents)
    if FAMILIES[name].video:
        torch.testing.assert_close(scale.scale(latents.unsqueeze(2)).squeeze(2), scale.scale(latents))


VARIANTS = {
    "patches of pixels (Wan 2.2)": lambda: AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True], scale_factor_spatial=4,
        patch_size=2, in_channels=12, out_channels=12, **STATISTICS,
    ),
    "a level without layers (DC-AE)": lambda: AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16), encoder_layers_per_block=(0, 1, 1), decoder_layers_per_block=(0, 1, 1),
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
    ),
    "a decoder that denoises (LTX 0.9.5)": lambda: AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8), layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), spatio_temporal_scaling=(True, True, False), patch_size=2,
        decoder_spatio_temporal_scaling=(True, False), decoder_inject_noise=(False, False, False),
        upsample_residual=(False, False), upsample_factor=(1, 1), down_block_types=("LTXVideo095DownBlock3D",) * 3,
        downsample_type=("spatial", "temporal", "conv"), timestep_conditioning=True, spatial_compression_ratio=4,
        temporal_compression_ratio=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", VARIANTS)
def test_released_variants(case: str, images, tmp_path: Path) -> None:
    """Oracle: the down-sampling of the latents, the size of the image, and the weights that were saved."""
    vae = VARIANTS[case]().eval()
    vae.save_pretrained(tmp_path)
    loaded = load_autoencoder(AutoencoderSource(pretrained_model_name_or_path=str(tmp_path)))
    codec, clean = Codec.of(loaded, "judged"), images(2, 32)
    with torch.no_grad():
        latents = codec.encode(clean)
        assert codec.decoder(latents).shape == clean.shape
        torch.testing.assert_close(latents, Codec.of(vae, "saved").encode(clean))
    assert downsampling_factor(loaded) == 32 // latents.shape[-1]


def test_frames_that_a_configuration_names(images) -> None:
    """Oracle: the two latents of a clip with so many frames after its first, and as many frames decoded."""
    vae = VARIANTS["a decoder that denoises (LTX 0.9.5)"]()
    clip = images(1 + family_of(vae).frames(vae.config), 32).transpose(0, 1)[None]
    codec = Codec.of(vae, "judged")
    with torch.no_grad():
        latents = codec.encode(clip)
        assert latents.shape[2] == 2 and codec.decoder(latents).shape == clip.shape


def test_inverted_factor(images) -> None:
    """Oracle: `prepare_latents` of diffusers' image-to-video pipeline of CogVideoX 1.5, which divides by the factor."""
    pipe = build_pipeline("cogvideo image-to-video")
    pipe.vae.register_to_config(invert_scale_latents=True)
    image = images(1, 32)
    with torch.no_grad():
        mean = pipe.vae.encode(image.unsqueeze(2)).latent_dist.mode()
    scale = LatentScale.of(pipe.vae, pipe)
    torch.testing.assert_close(scale.scale(mean), mean / pipe.vae_scaling_factor_image)
    torch.testing.assert_close(LatentScale.of(pipe.vae).scale(mean), mean * pipe.vae.config.scaling_factor)
