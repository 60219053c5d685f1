from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from helpers.small_pipelines import SIZE, TOKENS, WIDTH, build_pipeline, diffusion_scheduler
from helpers.small_text_encoder import add_text_encoders
from torch import Tensor

from srl_utils.attacks.denoiser import Denoiser, PromptEmbeddings
from srl_utils.errors import UserError

KINDS = ["sd", "sd2", "sdxl"]
SIDE = SIZE // 2
# One pass through the same UNet with the same inputs, in batches of other sizes.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def draw_embeddings(*, pooled: bool) -> PromptEmbeddings:
    noise = torch.Generator().manual_seed(3)
    shapes = [(1, TOKENS, WIDTH)] * 2 + [(1, WIDTH)] * (2 if pooled else 0)
    return PromptEmbeddings(*(torch.randn(shape, generator=noise) for shape in shapes))


def build_denoiser(kind: str) -> tuple[DiffusionPipeline, Denoiser]:
    pipe = build_pipeline(kind)
    return pipe, Denoiser.from_pipeline(pipe, draw_embeddings(pooled="xl" in kind))


def draw_latents(count: int, *, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def record_inputs(pipe: DiffusionPipeline) -> list[dict]:
    """What the UNet is called with from now on: its keyword arguments."""
    calls: list[dict] = []
    pipe.unet.register_forward_pre_hook(lambda module, args, inputs: calls.append(inputs), with_kwargs=True)
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_training_loss(kind, generators) -> None:
    """Oracle: diffusers' training script by hand, image by image: scheduler.add_noise, the UNet, and for v-prediction
    scheduler.get_velocity; the same draws are taken from a generator of the same seed."""
    pipe, denoiser = build_denoiser(kind)
    latents, prompt, expected = draw_latents(2), denoiser.prompt, []
    for row, generator in zip(latents.split(1), generators(4, 5), strict=True):
        timestep = torch.randint(1000, (1,), generator=generator)
        noise = torch.randn(row.shape, generator=generator)
        added = {"text_embeds": prompt.pooled, "time_ids": torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]])}
        output = pipe.unet(
            pipe.scheduler.add_noise(row, noise, timestep), timestep, prompt.embeds, added_cond_kwargs=added
        ).sample
        wanted = pipe.scheduler.get_velocity(row, noise, timestep) if kind == "sd2" else noise
        expected.append((output - wanted).square().mean())
    torch.testing.assert_close(denoiser.loss(latents, generators(4, 5)), torch.stack(expected), **CLOSE)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_is_recovered_from_a_perfect_unet(prediction, generators) -> None:
    """Oracle: closed form. A UNet that answers with the noise that was added, or with diffusers' velocity of it,
    predicts that noise, and its score error is 0."""
    scheduler = diffusion_scheduler(prediction_type=prediction)
    latents = draw_latents(2)
    blank = Denoiser(SimpleNamespace(dtype=torch.float32), scheduler, draw_embeddings(pooled=False), 2)
    timesteps, noise = blank.draw(latents, generators(0, 1))
    answer = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)

    class Oracle:
        dtype = torch.float32
        config = build_pipeline("sd").unet.config

        def __call__(self, *args, **inputs) -> SimpleNamespace:
            return SimpleNamespace(sample=answer)

    perfect = replace(blank, unet=Oracle())
    noised = perfect.add_noise(latents, noise, timesteps)
    # Rounding of two products near 1 in float32.
    torch.testing.assert_close(perfect.predict_noise(noised, timesteps), noise, rtol=1e-5, atol=1e-5)
    assert perfect.score_error(latents, generators(0, 1)).abs().max() < 1e-5
    assert perfect.loss(latents, generators(0, 1)).max() < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_score_error_is_the_predicted_less_the_added_noise(kind, generators) -> None:
    """Oracle: `predict_noise` on the noised latents, which the tests above hold against diffusers; no gradient."""
    _, denoiser = build_denoiser(kind)
    latents = draw_latents(2).requires_grad_(True)
    timesteps, noise = denoiser.draw(latents, generators(4, 5))
    predicted = denoiser.predict_noise(denoiser.add_noise(latents, noise, timesteps), timesteps)
    error = denoiser.score_error(latents, generators(4, 5))
    assert torch.equal(error, predicted - noise)
    assert predicted.requires_grad and not error.requires_grad


@pytest.mark.parametrize("kind", ["sd img2img", "sd2 img2img"])
def test_edit_is_that_of_the_pipeline(kind, generators) -> None:
    """Oracle: diffusers' image-to-image pipeline with its own DDIM, called with latents, 8 steps, strength 0.5,
    guidance 7.5 and eta 1; both draw the starting noise and then each step's from a generator of the same seed."""
    pipe, denoiser = build_denoiser(kind)
    latents = draw_latents(1)
    expected = pipe(
        image=latents,
        prompt_embeds=denoiser.prompt.embeds,
        negative_prompt_embeds=denoiser.prompt.negative,
        num_inference_steps=8,
        strength=0.5,
        guidance_scale=7.5,
        eta=1.0,
        generator=generators(7)[0],
        output_type="latent",
    ).images
    settings = {"num_steps": 4, "strength": 0.5, "guidance_scale": 7.5, "eta": 1.0}
    edited = denoiser.edit(latents, generators(7), **settings)
    torch.testing.assert_close(edited, expected, rtol=1e-3, atol=1e-4)
    assert (edited - latents).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_unet_is_told_what_the_pipeline_tells_it(kind, tmp_path, generators) -> None:
    """Oracle: the inputs that diffusers' own pipeline gives its UNet for the same prompt, size and guidance."""
    pipe = add_text_encoders(build_pipeline(kind), tmp_path)
    denoiser = Denoiser.from_pipeline(pipe, "a cat")
    calls = record_inputs(pipe)
    pipe("a cat", height=SIZE, width=SIZE, num_inference_steps=1, guidance_scale=7.5, output_type="latent")
    denoiser.edit(draw_latents(2), generators(0, 1), num_steps=1, strength=1.0, guidance_scale=7.5, eta=0.0)
    both, steered, free = calls
    assert not torch.equal(*both["encoder_hidden_states"].chunk(2))
    for index, ours in ((0, free), (1, steered)):
        theirs = both["encoder_hidden_states"][index].expand(2, -1, -1)
        assert torch.equal(ours["encoder_hidden_states"], theirs)
        for name, condition in (both["added_cond_kwargs"] or {}).items():
            assert torch.equal(ours["added_cond_kwargs"][name], condition[index].expand(2, -1))
    assert set(steered["added_cond_kwargs"]) == ({"text_embeds", "time_ids"} if kind == "sdxl" else set())


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, PNDMScheduler])
def test_loss_does_not_depend_on_the_sampler(scheduler, generators) -> None:
    """Oracle: invariance. Samplers noise latents in units of their own; the model was trained in one way, exactly."""
    pipe, denoiser = build_denoiser("sd")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    other = Denoiser.from_pipeline(pipe, denoiser.prompt)
    assert torch.equal(other.loss(draw_latents(2), generators(4, 5)), denoiser.loss(draw_latents(2), generators(4, 5)))


@pytest.mark.parametrize("call", ["loss", "score_error", "edit"])
def test_result_of_an_image_does_not_depend_on_its_batch(call, generators) -> None:
    """Oracle: invariance, single images against a batch; convolutions round differently in batches."""
    _, denoiser = build_denoiser("sd2")
    settings = {"num_steps": 2, "strength": 0.5, "guidance_scale": 7.5, "eta": 1.0} if call == "edit" else {}

    def run(latents: Tensor, seeds: list[int]) -> Tensor:
        return getattr(denoiser, call)(latents, generators(*seeds), **settings)

    latents = draw_latents(3)
    singles = torch.cat([run(latents[i : i + 1], [4 + i]) for i in range(3)])
    torch.testing.assert_close(run(latents, [4, 5, 6]), singles, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_the_latents_and_no_parameter(kind, generators) -> None:
    """Oracle: specification; the latents' gradient of a loss and of an edit is neither 0 nor without a number."""
    pipe, denoiser = build_denoiser(kind)
    latents = draw_latents(2).requires_grad_(True)
    edited = denoiser.edit(latents, generators(0, 1), num_steps=2, strength=0.5, guidance_scale=7.5, eta=1.0)
    for value in (denoiser.loss(latents, generators(0, 1)), edited):
        (gradient,) = torch.autograd.grad(value.square().sum(), latents)
        assert gradient.isfinite().all() and gradient.abs().amax(dim=(1, 2, 3)).min() > 0
    denoiser.loss(latents, generators(0, 1)).sum().backward()
    assert not any(parameter.requires_grad for parameter in pipe.unet.parameters())
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())


def test_timesteps_are_all_that_there_are(generators) -> None:
    """Oracle: closed form. Of 4 timesteps 64 draws miss one with a chance of 4 * 0.75^64, below 1e-7."""
    scheduler = DDIMScheduler(num_train_timesteps=4)
    denoiser = replace(build_denoiser("sd")[1], scheduler=scheduler)
    timesteps, noise = denoiser.draw(draw_latents(64), generators(*range(64)))
    assert set(timesteps.tolist()) == {0, 1, 2, 3} and timesteps.dtype == torch.int64
    # Four standard errors of the mean and of the deviation.
    assert noise.mean().abs() < 4 / noise.numel() ** 0.5
    assert (noise.std() - 1).abs() < 4 / (2 * noise.numel()) ** 0.5


def test_half_precision_unet_takes_and_gives_float32(generators) -> None:
    """Oracle: the same weights in float32; bfloat16 keeps 8 bits, of which a few are lost in ten layers."""
    _, full = build_denoiser("sdxl")
    half = Denoiser.from_pipeline(build_pipeline("sdxl", dtype=torch.bfloat16), full.prompt)
    value = half.loss(draw_latents(2), generators(0, 1))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, full.loss(draw_latents(2), generators(0, 1)), rtol=0.03, atol=0)


def of_other_prediction(pipe: DiffusionPipeline) -> None:
    pipe.scheduler = diffusion_scheduler(prediction_type="sample")


def of_flow_matching(pipe: DiffusionPipeline) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()


def with_classes(pipe: DiffusionPipeline) -> None:
    pipe.unet.register_to_config(num_class_embeds=10)


def with_image_embeddings(pipe: DiffusionPipeline) -> None:
    pipe.unet.register_to_config(addition_embed_type="image")


@pytest.mark.parametrize(
    ("kind", "spoil", "pooled", "message"),
    [
        ("flux", None, False, "denoiser of this FluxPipeline is not a UNet"),
        ("sd3", None, False, "is not a UNet"),
        ("sd instruct", None, False, "takes 8 channels and returns 4"),
        ("sd", of_other_prediction, False, "prediction type: sample"),
        ("sd", of_flow_matching, False, "FlowMatchEulerDiscreteScheduler"),
        ("sd", with_classes, False, "conditions other than a prompt"),
        ("sd", with_image_embeddings, False, "conditions other than a prompt"),
        ("sdxl", None, False, "needs the pooled embeddings"),
    ],
)
def test_other_models_are_refused(
    kind: str, spoil: Callable[[DiffusionPipeline], None] | None, pooled: bool, message: str
) -> None:
    """Oracle: specification, one clear line for what the formulas here do not describe."""
    pipe = build_pipeline(kind)
    if spoil:
        spoil(pipe)
    with pytest.raises(UserError, match=message):
        Denoiser.from_pipeline(pipe, draw_embeddings(pooled=pooled))


@pytest.mark.parametrize("call", ["loss", "score_error"])
def test_a_model_for_inpainting_is_asked_with_a_mask_alone(call: str, generators) -> None:
    """Oracle: specification, one clear line in place of the error of a convolution."""
    _, denoiser = build_denoiser("sd inpaint")
    assert denoiser.inpaints and not build_denoiser("sd")[1].inpaints
    with pytest.raises(UserError, match="needs a mask and an image too; use a text-to-image model"):
        getattr(denoiser, call)(draw_latents(1), generators(0))


def test_refiner_is_refused() -> None:
    """Oracle: specification. SDXL's refiner has five time ids, and so another width of added conditions."""
    pipe = build_pipeline("sdxl")
    pipe.unet.register_to_config(projection_class_embeddings_input_dim=6 * WIDTH)
    with pytest.raises(UserError, match="width 48, not 56"):
        Denoiser.from_pipeline(pipe, draw_embeddings(pooled=True))


def test_loss_without_generators_draws_from_the_global_one() -> None:
    """Oracle: PyTorch's global generator given for each latent; exact."""
    _, denoiser = build_denoiser("sd")
    values = []
    for given in (None, [torch.default_generator] * 2):
        torch.manual_seed(3)
        values.append(denoiser.loss(draw_latents(2), given))
    assert torch.equal(*values)


def test_draws_need_a_generator_for_each_image(generators) -> None:
    """Oracle: specification; one generator must not serve a whole batch by broadcasting."""
    _, denoiser = build_denoiser("sd")
    with pytest.raises(ValueError, match="one generator per image"):
        denoiser.loss(draw_latents(2), generators(0))
