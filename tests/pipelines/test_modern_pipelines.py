"""The helpers on pipelines whose autoencoder is not an `AutoencoderKL`."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel
from helpers.autoencoders import small_autoencoder, with_other_encoder
from helpers.modern_pipelines import KINDS, build_pipeline, run_pipeline
from helpers.runs import draw_images
from helpers.small_pipelines import build_pipeline as build_sd_pipeline
from PIL import Image

from srl_utils import robust_vae, robustify, sanitize, swap_vae
from srl_utils.errors import UserError, WrongType
from srl_utils.pipelines.swapping import vae_of
from srl_utils.vae.families import FAMILIES, family_of

EVERY_KIND = pytest.mark.parametrize("name", KINDS)


@EVERY_KIND
def test_the_robust_vae_is_used_within_the_context(name: str) -> None:
    """Oracle: the pixels from before, with the same weights and afterwards; others within."""
    pipe = build_pipeline(name)
    own, before = vae_of(pipe), run_pipeline(pipe, name)
    with robust_vae(pipe, copy.deepcopy(own)):
        assert vae_of(pipe) is not own and torch.equal(run_pipeline(pipe, name), before)
    with robust_vae(pipe, with_other_encoder(own)):
        assert not torch.equal(run_pipeline(pipe, name), before)
    assert vae_of(pipe) is own and torch.equal(run_pipeline(pipe, name), before)


@EVERY_KIND
def test_robustify_gives_the_encoder_alone(name: str) -> None:
    """Oracle: the pixels of a pipeline that has the whole VAE, whose decoder is the same."""
    pipe, whole = build_pipeline(name), build_pipeline(name)
    robust = with_other_encoder(vae_of(pipe))
    robustify(pipe, robust)
    swap_vae(whole, robust)
    assert torch.equal(run_pipeline(pipe, name), run_pipeline(whole, name))


@pytest.mark.parametrize("name", FAMILIES)
def test_sanitize_takes_any_size(name: str) -> None:
    """Oracle: the size given, and the VAE's own reconstruction where no padding is needed."""
    vae, family = small_autoencoder(name), FAMILIES[name]
    assert sanitize(Image.new("RGB", (37, 29), "teal"), vae).size == (37, 29)
    image = draw_images(1, 32)
    with torch.no_grad():
        shown = image.unsqueeze(2) if family.video else image
        output = vae.encode(shown)
        latents = output.latent_dist.mean if "latent_dist" in output else next(iter(output.values()))
        expected = vae.decode(latents, **family.decoding(vae.config, latents)).sample.clamp(-1, 1)
    cleaned = sanitize((image[0] + 1) / 2, vae)
    torch.testing.assert_close(cleaned, (expected.reshape(3, 32, 32) + 1) / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["flux2", "ltx image-to-video"])
def test_statistics_may_be_rounded(name: str, tmp_path: Path) -> None:
    """Oracle: the same VAE from a folder, in float32, fits a pipeline in bfloat16; one with other statistics does not."""
    pipe = build_pipeline(name)
    for buffer in pipe.vae.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(0))
    pipe.vae.save_pretrained(tmp_path)
    pipe.to(torch.bfloat16)
    swap_vae(pipe, tmp_path)
    assert pipe.vae.dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"the buffer .* instead of"):
        swap_vae(pipe, small_autoencoder(KINDS[name].vae))


@pytest.mark.parametrize("other", ["AutoencoderKLTemporalDecoder", "VQModel"])
def test_a_vae_that_the_pipeline_cannot_call_is_refused(other: str) -> None:
    """Oracle: what Stable Diffusion hands to `decode`."""
    pipe = build_sd_pipeline("sd")
    with pytest.raises(UserError, match=f"a {other} cannot replace a AutoencoderKL: its decode takes no generator"):
        swap_vae(pipe, small_autoencoder(other))


def test_a_pipeline_without_a_vae_is_refused() -> None:
    """Oracle: specification: one line that names the pipeline."""
    pipe = DDPMPipeline(unet=UNet2DModel(), scheduler=DDPMScheduler())
    with pytest.raises(WrongType, match="this DDPMPipeline has no VAE"):
        swap_vae(pipe, small_autoencoder("VQModel"))


def test_a_derived_class_is_one_of_its_base() -> None:
    """Oracle: the base's family, and a swap that takes an object of the derived class."""

    class Derived(AutoencoderKL):
        """A user's own."""

    pipe = build_sd_pipeline("sd")
    vae = Derived.from_config(pipe.vae.config)
    assert family_of(vae) is FAMILIES["AutoencoderKL"]
    swap_vae(pipe, vae)
    assert pipe.vae is vae
