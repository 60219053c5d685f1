"""Latents at the denoiser's scale, held against diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    AutoencoderTiny,
    DiffusionPipeline,
    ModelMixin,
    StableVideoDiffusionPipeline,
    VQModel,
)
from helpers.small_pipelines import SIZE, TOKENS, WIDTH, build_pipeline, run_pipeline, small_vae
from torch import Tensor

from srl_utils.attacks.gradient import PGDConfig
from srl_utils.attacks.protections import Victim
from srl_utils.evaluation.tasks.editing import build_edits
from srl_utils.images.pixels import to_model_range
from srl_utils.metrics.losses import ReconstructionLoss, originality_loss
from srl_utils.training.objectives import TERMS
from srl_utils.training.step import Step, build_networks
from srl_utils.vae.codec import Codec, load_codec
from srl_utils.vae.latents import LatentScale
from srl_utils.vae.loading import AutoencoderSource
from srl_utils.vae.networks import Moments

STATISTICS = {"latents_mean": [-1.5, 0.4, 2.0, 0.1], "latents_std": [8.4, 5.3, 0.5, 5.0], "scaling_factor": 0.5}
NO_STATISTICS = {"latents_mean": None, "latents_std": None}
SIDE = SIZE // 2


def no_noise(latents: Tensor, *schedule: Tensor) -> Tensor:
    return latents


def posterior_mean(latents: Tensor) -> Callable[[Tensor], SimpleNamespace]:
    """An encoder that answers with these latents, as `retrieve_latents` takes them without a draw."""
    return lambda images: SimpleNamespace(latents=latents)


def prepared(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """What the image-to-image pipeline makes of an image with these raw latents, before any noise; Flux's unpacked."""
    pipe.vae.encode = posterior_mean(latents)
    pipe.scheduler.add_noise = no_noise
    pipe.scheduler.scale_noise = lambda clean, timestep, noise: clean
    image, count = torch.zeros(len(latents), 3, SIZE, SIZE), len(latents)
    given = {"dtype": torch.float32, "device": torch.device("cpu"), "generator": torch.Generator()}
    steps = torch.tensor([1.0] * count)
    if "Flux" not in type(pipe).__name__:
        return pipe.prepare_latents(image, steps, count, 1, **given)
    packed, _ = pipe.prepare_latents(image, steps, count, latents.shape[1], SIZE, SIZE, **given)
    return pipe._unpack_latents(packed, SIZE, SIZE, pipe.vae_scale_factor)


VAES = {
    "sd img2img": {},
    "sd2 img2img": {"scaling_factor": 0.7},
    "sdxl img2img": {"scaling_factor": 0.13025},
    "sdxl img2img, playground": STATISTICS,
    "sdxl img2img, mean alone": {**STATISTICS, "latents_std": None},
    "sdxl img2img, deviation alone": {**STATISTICS, "latents_mean": None},
    "sd3 img2img": {"scaling_factor": 1.5305, "shift_factor": 0.0609, "latent_channels": 16},
    "flux img2img": {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False},
    "flux img2img, no shift": {"scaling_factor": 0.3611, "shift_factor": 0.0},
    "sd img2img, ignored entries": {**STATISTICS, "shift_factor": 0.3},
    "sd2 img2img, ignored shift": {"shift_factor": 0.3},
    "sdxl img2img, ignored shift": {"shift_factor": 0.3},
    "flux img2img, ignored statistics": {**STATISTICS, "shift_factor": 0.3},
}


def draw(vae: ModelMixin) -> Tensor:
    shape = (2, vae.config.latent_channels, SIDE, SIDE)
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1


@pytest.mark.parametrize("case", VAES)
def test_scale_is_what_the_pipeline_encodes_to(case: str) -> None:
    """Oracle: `prepare_latents` of diffusers' own image-to-image pipeline, its noise left out; and the way back."""
    vae = small_vae(**VAES[case])
    pipe = build_pipeline(case.partition(",")[0])
    pipe.register_modules(vae=vae)
    scale, latents = LatentScale.of(vae, pipe), draw(vae)
    scaled = scale.scale(latents)
    torch.testing.assert_close(scaled, prepared(pipe, latents))
    torch.testing.assert_close(scale.unscale(scaled), latents)


@pytest.mark.parametrize("case", VAES)
def test_unscale_is_what_the_pipeline_decodes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what diffusers' own pipeline gives its decoder for the latents that its last step ends with."""
    name = case.partition(",")[0]
    vae, pipe = small_vae(**VAES[case]), build_pipeline(name)
    pipe.register_modules(vae=vae)
    ended, decoded = [], []
    step, decode = pipe.scheduler.step, vae.decode

    def keep(*args: Any, **settings: Any) -> tuple[Tensor]:
        (latents, *rest) = step(*args, **settings)
        ended.append(latents)
        return (latents, *rest)

    monkeypatch.setattr(pipe.scheduler, "step", keep)
    monkeypatch.setattr(vae, "decode", lambda latents, **how: decoded.append(latents) or decode(latents, **how))
    run_pipeline(pipe, name)
    last = ended[-1]
    if "flux" in name:
        last = pipe._unpack_latents(last, SIZE, SIZE, pipe.vae_scale_factor)
    torch.testing.assert_close(LatentScale.of(vae, pipe).unscale(last), decoded[0])


def test_video_latents_are_those_of_the_video_pipeline() -> None:
    """Oracle: diffusers' `decode_latents` of Stable Video Diffusion, which divides by the factor before it decodes."""
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",), block_out_channels=(32,), scaling_factor=0.3
    )
    seen: list[Tensor] = []

    class Decoder:
        config = vae.config
        forward = vae.forward

        @staticmethod
        def decode(latents: Tensor, **settings: Any) -> SimpleNamespace:
            seen.append(latents)
            return SimpleNamespace(sample=latents[:, :3])

    latents = torch.randn(1, 2, 4, 8, 8)
    StableVideoDiffusionPipeline.decode_latents(SimpleNamespace(vae=Decoder), latents, num_frames=2)
    torch.testing.assert_close(LatentScale.of(vae).unscale(latents.flatten(0, 1)), seen[0])


@pytest.mark.parametrize("build", [AutoencoderTiny, VQModel])
def test_tiny_and_quantised_latents_are_those_of_the_factor(build: type[ModelMixin], images, tmp_path: Path) -> None:
    """Oracle: closed form, the factor of the configuration; pipelines look at nothing else, `latent_shift` included."""
    build(scaling_factor=0.6).save_pretrained(tmp_path)
    codec = load_codec(
        "judged", AutoencoderSource(pretrained_model_name_or_path=str(tmp_path)), device=torch.device("cpu")
    )
    latents = torch.randn(2, codec.vae.config.latent_channels, 4, 4)
    torch.testing.assert_close(codec.scale(latents), 0.6 * latents)


def test_loaded_codec_has_the_scale_of_its_files(images, tmp_path: Path) -> None:
    """Oracle: diffusers' formula by hand, on the latents of the loaded VAE."""
    small_vae(**STATISTICS).save_pretrained(tmp_path)
    codec = load_codec(
        "judged", AutoencoderSource(pretrained_model_name_or_path=str(tmp_path)), device=torch.device("cpu")
    )
    latents = codec.encode(images(2, SIZE))
    mean, deviation = (torch.tensor(STATISTICS[key]).view(1, 4, 1, 1) for key in ("latents_mean", "latents_std"))
    torch.testing.assert_close(codec.scale(latents), (latents - mean) * 0.5 / deviation)


def test_statistics_take_the_place_of_a_shift() -> None:
    """Oracle: SDXL's pipelines, which do not look at `shift_factor`."""
    pipe, vae = build_pipeline("sdxl img2img"), small_vae(**STATISTICS, shift_factor=0.3)
    pipe.register_modules(vae=vae)
    latents = draw(vae)
    torch.testing.assert_close(LatentScale.of(vae).scale(latents), prepared(pipe, latents))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("config", [STATISTICS, {"scaling_factor": 0.5, "shift_factor": 0.1}])
def test_scale_keeps_the_dtype(config: dict[str, Any], dtype: torch.dtype) -> None:
    """Oracle: specification."""
    scale, latents = LatentScale.configured(config), torch.ones(2, 4, 3, 3, dtype=dtype)
    assert scale.scale(latents).dtype == scale.unscale(latents).dtype == dtype


def test_a_victim_unscales_each_channel() -> None:
    """Oracle: the inverse, latents from before."""
    scale = LatentScale.configured(STATISTICS)
    victim = Victim(encode=lambda images: Moments(images, images), decode=lambda latents: latents, scale=scale.scale)
    latents = draw(small_vae())
    torch.testing.assert_close(victim.unscale(victim.scale(latents)), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(victim.unscale(latents), scale.unscale(latents), rtol=1e-5, atol=1e-5)


def test_originality_is_measured_at_the_denoisers_scale(generators) -> None:
    """Oracle: closed form. The squared distance of scaled means and, of the variance of scaled samples, of squares."""
    scale = LatentScale.configured(STATISTICS)
    (generator,) = generators(0)
    mean, other, variance, other_variance = torch.rand(4, 2, 4, 3, 3, generator=generator)
    factor = 0.5 / torch.tensor(STATISTICS["latents_std"]).view(1, 4, 1, 1)
    expected = (scale.scale(mean) - scale.scale(other)).square().mean(dim=(1, 2, 3))
    expected += (factor**2 * (variance - other_variance)).square().mean(dim=(1, 2, 3))
    found = originality_loss(mean, variance, other, other_variance, scale=scale.factor_for(mean))
    torch.testing.assert_close(found, expected)


def test_the_step_measures_originality_at_the_denoisers_scale(images, generators) -> None:
    """Oracle: closed form on the moments of diffusers' own encoders, before and after its weights are changed."""
    vae, factor = small_vae(**STATISTICS), 0.5 / torch.tensor(STATISTICS["latents_std"]).view(1, 4, 1, 1)
    with torch.no_grad():
        before = vae.encode(images(2)).latent_dist
        scale = LatentScale.of(vae)
        networks = build_networks(vae, ReconstructionLoss())
        vae.encoder.conv_out.bias += 0.1
        after = vae.encode(images(2)).latent_dist
    step = Step(networks=networks, pgd=PGDConfig(num_steps=1, epsilon=0.1, step_size=0.1), latent_scale=scale)
    _, terms = step(images(2), generators(0, 1))
    expected = (factor * (after.mean - before.mean)).square().mean()
    expected += (factor**2 * (after.var - before.var)).square().mean()
    assert terms[TERMS.index("originality")].item() == pytest.approx(expected.item(), rel=1e-3)


def codec_of(vae: AutoencoderKL) -> Codec:
    return Codec.of(vae, "judged")


@pytest.mark.parametrize(
    "case", [case for case in VAES if case.startswith(("sdxl", "sd3", "flux")) or "ignored" in case]
)
def test_inpainting_keeps_the_surroundings(case: str, images, generators) -> None:
    """Oracle: invariance. Around the hole an edit's latents end as the pipeline's own encoding of the image, and the
    result has the image's size."""
    name = case.partition(",")[0]
    pipe, vae = build_pipeline(name), small_vae(**VAES[case])
    pipe.register_modules(vae=vae)
    edit = build_edits(pipe, strengths=[], num_inference_steps=3, guidance_scale=1.0)["inpainting"]
    ended: list[Tensor] = []

    def decode(latents: Tensor, **settings: Any) -> tuple[Tensor]:
        ended.append(latents)
        return (torch.zeros(1, 3, SIZE, SIZE),)

    vae.decode = decode
    noise = torch.Generator().manual_seed(1)
    shapes = {"prompt_embeds": (1, TOKENS, WIDTH)}
    if not name.startswith(("sd ", "sd2")):
        shapes["pooled_prompt_embeds"] = (1, WIDTH)
    embeddings = {name: torch.randn(shape, generator=noise) for name, shape in shapes.items()}
    codec, shown = codec_of(vae), (images(1, SIZE) + 1) / 2
    with torch.no_grad():
        arguments = edit.arguments(codec, shown, generators(1))
        raw = vae.encode(to_model_range(shown)).latent_dist.mean
        sizes = {"height": SIZE, "width": SIZE} if "flux" in name else {}
        edit.pipeline(**embeddings, **arguments, **edit.settings, **sizes, generator=generators(1), output_type="pt")
    kept = (ended[0] - raw).abs().amax(dim=1) < 1e-4
    rows = slice(SIDE // 4, 3 * SIDE // 4)
    assert not kept[:, rows, rows].any()
    kept[:, rows, rows] = True
    assert kept.all()


@pytest.mark.parametrize("name", ["sd img2img", "sdxl img2img", "sd3 img2img", "flux img2img"])
def test_edits_have_the_size_of_the_image(name: str, images, generators) -> None:
    """Oracle: specification. Flux would else choose a size of its own, and take the image for that."""
    pipe = build_pipeline(name)
    edits = build_edits(pipe, strengths=[0.5], num_inference_steps=2, guidance_scale=1.0)
    for edit in edits.values():
        edit.pipeline.encode_prompt = lambda *args, **settings: encoded(pipe)
        assert edit(codec_of(pipe.vae), images(1, SIZE), ["a cat"], generators(1)).shape == (1, 3, SIZE, SIZE)


def encoded(pipe: DiffusionPipeline) -> tuple[Tensor | None, ...]:
    """What `encode_prompt` of each family returns: embeddings, negative and pooled ones, and Flux's text ids."""
    embeds, pooled = torch.zeros(1, TOKENS, WIDTH), torch.zeros(1, WIDTH)
    kind = type(pipe).__name__
    if "Flux" in kind:
        return embeds, pooled, torch.zeros(TOKENS, 3)
    return (embeds, embeds, pooled, pooled) if "3" in kind or "XL" in kind else (embeds, embeds)


def test_a_codec_scales_for_a_pipeline() -> None:
    """Oracle: closed form. Stable Diffusion's denoiser sees the factor alone; without a pipeline the files decide."""
    codec, latents = codec_of(small_vae(**STATISTICS)), torch.ones(1, 4, 2, 2)
    torch.testing.assert_close(codec.scale(latents, build_pipeline("sd")), 0.5 * latents)
    torch.testing.assert_close(codec.scale(latents, build_pipeline("sdxl")), LatentScale.of(codec.vae).scale(latents))
