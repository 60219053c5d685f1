"""Purifiers by diffusion models: small pipelines of diffusers, and denoisers whose answer is known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from helpers.purifying_pipelines import SIDE, build_pixel_model, build_stable_diffusion, build_upscaler
from helpers.runs import draw_images
from torch import Tensor

from srl_utils.attacks.draws import Generators, image_generators
from srl_utils.errors import UserError
from srl_utils.pipelines.loading import purifying_pipeline
from srl_utils.purifiers import PurifierResources, purifier_of
from srl_utils.purifiers.diffusing import GridConfig, crops, diffpure, gridpure

IMAGES = draw_images(2, SIDE)


def generators(*numbers: int) -> Generators:
    return image_generators(0, numbers or (0, 1))


@pytest.fixture
def stable_diffusion(tmp_path: Path) -> DiffusionPipeline:
    return purifying_pipeline(build_stable_diffusion(tmp_path))


@pytest.fixture
def upscaler(stable_diffusion: DiffusionPipeline) -> DiffusionPipeline:
    return build_upscaler(stable_diffusion)


@pytest.fixture
def pixel_model() -> DiffusionPipeline:
    return build_pixel_model()


@pytest.mark.parametrize("name", ["img2img-0.1", "noisy-upscaling-0.1", "diffpure-3", "gridpure"])
def test_small_pipelines(name: str, stable_diffusion, upscaler, pixel_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: invariance: an image alone, and a size that the pipeline does not take; each finds its own pipeline."""
    monkeypatch.setattr("srl_utils.purifiers.diffusing.STEPS", 10)
    purifier = purifier_of(name, PurifierResources(pipelines=[upscaler, pixel_model, stable_diffusion]))
    together = purifier(IMAGES, generators())
    assert together.shape == IMAGES.shape and together.abs().max() <= 1 and not torch.equal(together, IMAGES)
    torch.testing.assert_close(purifier(IMAGES[1:], generators(1)), together[1:], atol=1e-4, rtol=0)
    assert purifier(IMAGES[..., :27, :21], generators()).shape == (2, 3, 27, 21)
    assert not purifier.differentiable and purifier.passes > 0
    with pytest.raises(UserError, match=f"{name} needs a.* pipeline"):
        purifier_of(name)


@pytest.mark.parametrize("name", ["img2img-0.1", "noisy-upscaling-0.1", "diffpure-3", "gridpure"])
def test_half_precision(name: str, stable_diffusion, upscaler, pixel_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same networks in float32; the images stay float32."""
    monkeypatch.setattr("srl_utils.purifiers.diffusing.STEPS", 10)
    pipelines = [upscaler, pixel_model, stable_diffusion]
    purifier = (
        gridpure(pixel_model, GridConfig(rounds=1, timestep=2))
        if name == "gridpure"  # which takes 200 steps otherwise
        else purifier_of(name, PurifierResources(pipelines=pipelines))
    )
    expected = purifier(IMAGES, generators())
    for pipeline in pipelines:
        pipeline.to(torch.bfloat16)
    found = purifier(IMAGES, generators())
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=0.2, rtol=0)


def test_image_to_image_is_that_of_diffusers(stable_diffusion) -> None:
    """Oracle: the pipeline's own call, without a prompt and without guidance."""
    purified = purifier_of("img2img-0.1", PurifierResources(pipelines=[stable_diffusion]))(IMAGES, generators())
    output = stable_diffusion(
        prompt=["", ""], image=(IMAGES + 1) / 2, strength=0.1, guidance_scale=1.0, num_inference_steps=50,
        generator=generators(), output_type="pt",
    )  # fmt: skip
    torch.testing.assert_close(purified, output.images * 2 - 1, atol=1e-6, rtol=0)


def knowing(answer: float) -> SimpleNamespace:
    """A pipeline whose denoiser takes every image for a grey one of this value."""
    scheduler = DDPMScheduler(clip_sample=False)

    def denoiser(noisy: Tensor, step: int) -> SimpleNamespace:
        kept = scheduler.alphas_cumprod[step]
        return SimpleNamespace(sample=(noisy - kept.sqrt() * answer) / (1 - kept).sqrt())

    denoiser.dtype = torch.float32
    denoiser.config = SimpleNamespace(sample_size=16, block_out_channels=(8, 16))
    return SimpleNamespace(
        unet=denoiser, scheduler=scheduler, components={"unet": denoiser}, device=torch.device("cpu")
    )


def test_diffpure_returns_what_the_denoiser_takes_it_for() -> None:
    """Oracle: a denoiser that knows the image: all of the perturbation goes, and none of the image."""
    purified = diffpure(knowing(0.25), 100)(IMAGES, generators())
    torch.testing.assert_close(purified, torch.full_like(IMAGES, 0.25), atol=1e-4, rtol=0)


def test_gridpure_keeps_a_share_in_each_round() -> None:
    """Oracle: closed form with a denoiser that knows the image: what differs shrinks by the share in each round."""
    config = GridConfig(rounds=3, timestep=2, kept=0.5)
    purified = gridpure(knowing(0.25), config)(IMAGES, generators())
    torch.testing.assert_close(purified, 0.25 + 0.5**3 * (IMAGES - 0.25), atol=1e-3, rtol=0)


@pytest.mark.parametrize("sides", [(32, 32), (40, 33), (16, 50), (10, 12)])
def test_crops_cover_the_image(sides: tuple[int, int]) -> None:
    """Oracle: counting; every pixel is in a crop, and crops have the model's size where the image has it."""
    counts = torch.zeros(sides)
    for rows, columns in crops(sides, 16, 8):
        counts[rows, columns] += 1
        assert counts[rows, columns].shape == (min(16, sides[0]), min(16, sides[1]))
    assert counts.min() > 0
