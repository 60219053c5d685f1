from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.small_pipelines import SIZE, build_pipeline
from test_denoiser import draw_embeddings, draw_latents

from srl_utils.attacks.denoiser import Denoiser
from srl_utils.attacks.protections import PROTECTIONS, ProtectedBatch, Victim, protect
from srl_utils.attacks.protections.masks import central_mask, widened_mask
from srl_utils.errors import UserError
from srl_utils.vae.codec import Codec

DIFFUSIONGUARD = PROTECTIONS["diffusionguard"]


@pytest.fixture
def pipe() -> DiffusionPipeline:
    """Its predictions tell of the image around the hole as much as of the noise."""
    pipe = build_pipeline("sd inpaint")
    with torch.no_grad():
        pipe.unet.conv_in.weight[:, 5:].mul_(10)
    return pipe


@pytest.fixture
def victim(pipe) -> Victim:
    denoiser = Denoiser.from_pipeline(pipe, draw_embeddings(pooled=False))
    return Victim.of(Codec.of(pipe.vae, "own"), pipe, denoiser=denoiser)


def test_central_mask_is_the_central_square(images) -> None:
    """Oracle: closed form, a quarter of the area, the same from every side."""
    mask = central_mask(images(1, SIZE))
    assert mask.mean() == 0.25 and mask[0, 0, SIZE // 2, SIZE // 2] == 1 and mask[0, 0, 0, 0] == 0
    assert torch.equal(mask, mask.flip(2)) and torch.equal(mask, mask.transpose(2, 3))


def test_widened_mask_keeps_the_hole_and_half_of_the_way_to_the_border(images, generators) -> None:
    """Oracle: closed form. Of 32 pixels the central 16 are a hole, and the outer 4 on each side never are."""
    masks = widened_mask(images(64, SIZE), generators(*range(64)))
    assert masks.shape == (64, 1, SIZE, SIZE) and set(masks.unique().tolist()) == {0.0, 1.0}
    assert (masks >= central_mask(masks)).all()
    assert masks[:, :, 4:-4, 4:-4].sum() == masks.sum()
    areas = masks.mean(dim=(1, 2, 3))
    assert areas.min() < 0.27 and areas.max() > 0.35
    crooked = [not torch.equal(mask, mask.flip(1)) for mask in masks]
    assert sum(crooked) > 32


def test_widened_mask_of_an_image_does_not_depend_on_its_batch(images, generators) -> None:
    """Oracle: invariance, exact, on sides that 4 does not divide; another draw is another mask."""
    shown = images(2, SIZE)[:, :, :30, :22]
    both, alone = widened_mask(shown, generators(1, 2)), widened_mask(shown[1:], generators(2))
    assert torch.equal(both[1:], alone) and not torch.equal(both[:1], alone)
    assert (alone >= central_mask(alone)).all()


def test_diffusionguard_lengthens_the_first_prediction_of_an_inpainting(pipe, victim, images, generators) -> None:
    """Oracle: diffusers' inpainting pipeline at full strength with 4 steps, the same mask and the same noise, whose UNet is
    called first with both and the latents of the image around the hole. Draws come in turn: mask, posterior, noise."""
    clean, drawn, predicted = images(1, SIZE), generators(7), []
    mask = widened_mask(clean, drawn)
    state = drawn[0].get_state()
    latents = draw_latents(1)
    for _ in range(2):  # the posterior's sample, then the noise
        noise = torch.randn(latents.shape[1:], generator=drawn[0])
    drawn[0].set_state(state)
    hook = pipe.unet.register_forward_hook(lambda module, inputs, output: predicted.append(output[0]))
    pipe(
        image=(clean + 1) / 2,
        mask_image=mask,
        prompt_embeds=victim.denoiser.prompt.embeds,
        latents=noise[None],
        generator=drawn[0],
        num_inference_steps=4,
        strength=1.0,
        guidance_scale=1.0,
        height=SIZE,
        width=SIZE,
        output_type="latent",
    )
    hook.remove()
    batch = ProtectedBatch(victim=victim, clean=clean, target=None, generators=generators(7))
    value = DIFFUSIONGUARD.loss(batch)(clean)
    torch.testing.assert_close(value, predicted[0].flatten(1).norm(dim=1), rtol=1e-4, atol=0)


def test_diffusionguard_protects_what_is_kept(victim, images, generators) -> None:
    """Oracle: closed form, the hole is not changed, and an odd number of steps cannot cancel out in the border, which is
    always kept; and the protection's own loss on other draws, which rises for every image."""
    clean = images(2, SIZE, limit=0.5)
    protected = protect(DIFFUSIONGUARD, victim, clean, generators=generators(1, 2), num_steps=11)
    hole = central_mask(clean).expand_as(clean) == 1
    assert torch.equal(protected[hole], clean[hole])
    assert (protected != clean)[:, :, :4].float().mean() > 0.99
    values = []
    for images_in in (clean, protected):
        batch = ProtectedBatch(victim=victim, clean=clean, target=None, generators=generators(100, 101))
        loss = DIFFUSIONGUARD.loss(batch)
        with torch.no_grad():
            values.append(torch.stack([loss(images_in) for _ in range(16)]).mean(dim=0))
    assert (values[1] > values[0]).all()


def test_diffusionguard_of_an_image_does_not_depend_on_its_batch(victim, images, generators) -> None:
    """Oracle: invariance, masks included; convolutions round differently in batches."""
    clean = images(2, SIZE)
    both = protect(DIFFUSIONGUARD, victim, clean, generators=generators(1, 2), num_steps=2)
    alone = protect(DIFFUSIONGUARD, victim, clean[1:], generators=generators(2), num_steps=2)
    assert ((both[1:] - alone).abs() > 1e-4).float().mean() < 0.02


@pytest.mark.parametrize("name", [name for name, each in PROTECTIONS.items() if each.needs_denoiser])
def test_other_protections_refuse_models_for_inpainting(name, victim, images, generators) -> None:
    """Oracle: specification; their losses have neither mask nor hole to give."""
    if PROTECTIONS[name].inpainting:
        assert name == "diffusionguard"
        return
    with pytest.raises(UserError, match=f"{name} attacks text-to-image models, and this denoiser inpaints"):
        protect(PROTECTIONS[name], victim, images(1, SIZE), generators=generators(1), num_steps=1)


def test_text_to_image_models_need_no_mask(victim, images, generators) -> None:
    """Oracle: specification; the whole image is attacked as before."""
    denoiser = Denoiser.from_pipeline(build_pipeline("sd"), victim.denoiser.prompt)
    clean = images(1, SIZE)
    protected = protect(
        DIFFUSIONGUARD, replace(victim, denoiser=denoiser), clean, generators=generators(1), num_steps=1
    )
    assert (protected != clean)[central_mask(clean).expand_as(clean) == 1].float().mean() > 0.9
