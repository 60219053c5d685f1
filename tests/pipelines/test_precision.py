"""VAEs that overflow in half precision: in sanitize, in pipelines, and in evaluations."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from accelerate.hooks import attach_align_device_hook
from diffusers import AutoencoderKL
from helpers.runs import build_tiny_vae, draw_images
from helpers.small_pipelines import build_pipeline, run_pipeline, small_vae
from PIL import Image

from srl_utils.errors import UserError
from srl_utils.pipelines import robust_vae, robustify, sanitize, swap_vae
from srl_utils.pipelines.precision import reconstruct

GAIN = 300.0  # twice in a row, 90,000 times the activations: beyond fp16's 65,504


def overflowing(vae: AutoencoderKL, *parts: str) -> AutoencoderKL:
    """`vae`, changed so that it overflows in fp16, where a norm takes the gain off again."""
    with torch.no_grad():
        for part in parts or ("encoder", "decoder"):
            resnet = getattr(vae, part).mid_block.resnets[0]
            for tensor in (*resnet.norm1.parameters(), *resnet.conv1.parameters()):
                tensor *= GAIN
    return vae


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_sanitize_computes_in_float32_what_overflows(part: str) -> None:
    """Oracle: the same weights in float32; fp16 alone gives NaN. The VAE keeps its weights, dtype and configuration."""
    vae = overflowing(small_vae(force_upcast=False), part).half()
    before = copy.deepcopy(vae.state_dict())
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert vae.decode(vae.encode(images.half()).latent_dist.mean).sample.isnan().any()
    expected = sanitize(images, copy.deepcopy(vae).float())
    torch.testing.assert_close(sanitize(images, vae), expected, rtol=0, atol=1e-6)
    assert vae.dtype == torch.float16 and not vae.config.force_upcast
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8))
    assert np.asarray(sanitize(picture, vae)).std() > 1


def test_only_images_that_overflow_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: each image alone. An encoder that spoils bright images stands for one near fp16's limit."""
    vae = small_vae(force_upcast=False).half()
    plain = torch.cat([draw_images(1), -draw_images(1, seed=1).abs()])
    images = torch.cat([plain, draw_images(1, seed=2).abs()])
    encode = AutoencoderKL.encode
    bright: list[int] = []

    def spoiled(model: AutoencoderKL, pixels: torch.Tensor, **settings: object) -> object:
        output = encode(model, pixels, **settings)
        if model.dtype == torch.float16:
            output[0].parameters[pixels.float().mean(dim=(1, 2, 3)) > 0.2] = torch.inf
        else:
            bright.append(len(pixels))
        return output

    untouched = reconstruct(images, vae)
    in_float32 = reconstruct(images, copy.deepcopy(vae).float())
    monkeypatch.setattr(AutoencoderKL, "encode", spoiled)
    result = reconstruct(images, vae)
    assert bright == [1]
    assert torch.equal(result[:2], untouched[:2])
    torch.testing.assert_close(result[2], in_float32[2], rtol=0, atol=1e-5)


def test_an_offloaded_vae_computes_in_float32_too() -> None:
    """Oracle: the same VAE that is not offloaded."""
    vae = overflowing(small_vae(force_upcast=False)).half()
    images = torch.rand(1, 3, 8, 8)
    expected = sanitize(images, vae)
    attach_align_device_hook(
        vae, execution_device=torch.device("cpu"), offload=True, weights_map=dict(vae.state_dict())
    )
    assert vae.device.type == "meta"
    torch.testing.assert_close(sanitize(images, vae), expected, rtol=0, atol=1e-6)


def test_an_autocast_around_sanitize_does_no_harm() -> None:
    """Oracle: the result without it."""
    vae, images = overflowing(small_vae(force_upcast=False)), torch.rand(1, 3, 8, 8)
    expected = sanitize(images, vae)
    with torch.autocast("cpu", torch.float16):
        torch.testing.assert_close(sanitize(images, vae), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_that_are_not_finite_are_an_error(dtype: torch.dtype) -> None:
    """Oracle: the one line names the tensor that was spoiled."""
    vae = small_vae(force_upcast=False).to(dtype)
    with torch.no_grad():
        vae.decoder.conv_in.weight[0] = torch.nan
    with pytest.raises(UserError, match=r"decoder\.conv_in\.weight holds NaN"):
        sanitize(torch.rand(1, 3, 8, 8), vae)


def test_float32_that_overflows_is_an_error() -> None:
    """Oracle: finite weights whose products are not."""
    vae = build_tiny_vae()
    with torch.no_grad():
        vae.decoder.conv_out.weight.fill_(3e38)
    with pytest.raises(UserError, match="not finite, in float32 too"):
        sanitize(torch.rand(1, 3, 8, 8), vae)


def test_a_pipeline_that_upcasts_is_told_to() -> None:
    """Oracle: the pipeline with the same VAE and `force_upcast` set by hand; the caller's VAE keeps its configuration."""
    robust = overflowing(small_vae(force_upcast=False)).half()
    told = copy.deepcopy(robust)
    told.register_to_config(force_upcast=True)
    expected, pipe = (
        build_pipeline("sdxl img2img", dtype=torch.float16),
        build_pipeline("sdxl img2img", dtype=torch.float16),
    )
    swap_vae(expected, told)
    own = pipe.vae
    with robust_vae(pipe, robust):
        images = run_pipeline(pipe, "sdxl img2img")
    assert images.isfinite().all() and torch.equal(images, run_pipeline(expected, "sdxl img2img"))
    assert pipe.vae is own and not robust.config.force_upcast


@pytest.mark.parametrize("exchange", [swap_vae, robustify])
def test_a_pipeline_that_does_not_upcast_refuses(exchange: object) -> None:
    """Oracle: SD's pipeline ignores `force_upcast`; the error comes before anything is changed."""
    pipe = build_pipeline("sd", dtype=torch.float16)
    own, before = pipe.vae, copy.deepcopy(pipe.vae.state_dict())
    for upcast in (False, True):
        with pytest.raises(UserError, match="not finite in float16, in which the StableDiffusionPipeline computes"):
            exchange(pipe, overflowing(small_vae(force_upcast=upcast)))
    assert pipe.vae is own
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    exchange(build_pipeline("sd", dtype=torch.bfloat16), overflowing(small_vae(force_upcast=False)))


def test_robustify_tells_the_pipeline_to_upcast() -> None:
    """Oracle: finite images of SDXL with an encoder that overflows in fp16."""
    pipe = build_pipeline("sdxl img2img", dtype=torch.float16)
    pipe.vae.register_to_config(force_upcast=False)
    robustify(pipe, overflowing(small_vae(force_upcast=False), "encoder"))
    assert pipe.vae.config.force_upcast
    assert run_pipeline(pipe, "sdxl img2img").isfinite().all()


def test_what_a_pipeline_had_may_go_back() -> None:
    """Oracle: the VAE object from before, although it overflows."""
    pipe = build_pipeline("sd", dtype=torch.float16)
    own = overflowing(pipe.vae)
    previous = swap_vae(pipe, small_vae())
    swap_vae(pipe, previous)
    assert pipe.vae is own
