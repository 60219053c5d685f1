from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from helpers.small_pipelines import SIZE, build_pipeline, diffusion_scheduler
from helpers.small_text_encoder import add_text_encoders
from PIL import Image
from scipy.ndimage import gaussian_filter
from test_denoiser import draw_embeddings, draw_latents
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from miniature.scenes import draw_scene
from srl_utils.attacks.denoiser import Denoiser
from srl_utils.attacks.gradient import PGDConfig, value_and_gradient
from srl_utils.attacks.protections import (
    PROTECTIONS,
    BlurGuardConfig,
    GlazeConfig,
    ProtectedBatch,
    Protection,
    Victim,
    grey,
    mist_pattern,
    protect,
    style_transfer,
)
from srl_utils.attacks.protections.losses import EDIT, FUSION_RATE, averaged, edit_distance, with_gradient
from srl_utils.errors import UserError
from srl_utils.images.pixels import from_pil
from srl_utils.metrics.losses import PerceptualDistance
from srl_utils.vae.codec import Codec
from srl_utils.vae.networks import LatentDecoder, LatentEncoder, Moments, split_moments

FACTOR, SHIFT = 0.5, 0.25  # as VAEs with a shift have it
# clean +- radius and the difference that a test takes: two roundings near 1.
ROUNDING = 1.2e-7

U0, U1 = 1.0, 0.5  # what the authors' units are in units of a [0,1] image
# Name: unit, norm, epsilon, step, steps, random start, schedule, minimise, prompt; in the authors' own numbers.
SETTINGS = {
    "photoguard-encoder": (U1, "linf", 0.06, 0.02, 1000, True, "linear", True, None),
    "photoguard-encoder-grey": (U1, "linf", 0.12, 0.01, 200, True, "linear", True, None),
    "photoguard-diffusion": (U1, "l2", 16, 1, 200, False, "constant", True, ""),
    "photoguard-diffusion-linf": (U1, "linf", 0.1, 0.006, 200, False, "constant", True, ""),
    "mist-textural": (U0, "linf", 16 / 255, 1 / 255, 100, True, "constant", True, None),
    "mist-semantic": (U0, "linf", 16 / 255, 1 / 255, 100, True, "constant", False, "a painting"),
    "mist-fused": (U0, "linf", 16 / 255, 1 / 255, 100, True, "constant", True, "a painting"),
    "advdm": (U0, "linf", 16 / 255, 1 / 255, 100, True, "constant", False, "a photo"),
    "advdm-minus": (U0, "linf", 16 / 255, 1 / 255, 100, True, "constant", True, "a photo"),
    "anti-dreambooth-fsmg": (U1, "linf", 0.05, 0.005, 100, False, "constant", False, "a photo of sks person"),
    "anti-dreambooth-aspl": (U1, "linf", 0.05, 0.005, 300, False, "constant", False, "a photo of sks person"),
    "diffusionguard": (U1, "linf", 16 / 255, 1 / 255, 800, False, "constant", False, ""),
    "sds": (U0, "linf", 16 / 255, 1 / 255, 100, False, "constant", False, "a photo"),
    "sds-minus": (U0, "linf", 16 / 255, 1 / 255, 100, False, "constant", True, "a photo"),
    "pid": (U0, "linf", 12.75 / 255, 1 / 255, 1000, True, "constant", False, None),
    "posterior-collapse-plus": (U0, "linf", 16 / 255, 2 / 255, 40, False, "constant", False, None),
    "posterior-collapse-minus": (U0, "linf", 16 / 255, 2 / 255, 40, False, "constant", True, None),
    "editshield": (U0, "linf", 0.05, 1 / 255, 30, False, "constant", False, None),
    "nightshade": (U0, "linf", 0.04, 0.04, 500, False, "linear", True, None),
    "uvcg": (U0, "linf", 16 / 255, 1 / 255, 100, True, "constant", True, None),  # UNCONFIRMED
}
BY_GRADIENT = [name for name in PROTECTIONS if not name.startswith("sds")]
ENCODER_ONLY = [name for name, protection in PROTECTIONS.items() if not protection.needs_denoiser]
WITHOUT_CHANCE = ("nightshade", "posterior-collapse-plus", "posterior-collapse-minus")
DENOISING = [name for name, protection in PROTECTIONS.items() if protection.needs_denoiser]


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    """Its predictions outweigh the noise, so that a loss tells of the image by few draws."""
    pipe = build_pipeline("sd")
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(30)
    return Denoiser.from_pipeline(pipe, draw_embeddings(pooled=False))


@pytest.fixture(scope="module")
def perceptual(random_lpips) -> PerceptualDistance:
    return PerceptualDistance(random_lpips)


def preset(name: str) -> Protection:
    """The protection, but with one repetition in place of ten."""
    protection = PROTECTIONS[name]
    single = partial(edit_distance, repetitions=1)
    return replace(protection, loss=single) if name.startswith("photoguard-diffusion") else protection


def victim_of(vae: AutoencoderKL, **parts: Any) -> Victim:
    encoder = LatentEncoder(vae)
    return Victim(
        encode=lambda images: split_moments(encoder(images)),
        decode=LatentDecoder(vae),
        scale=lambda latents: FACTOR * (latents - SHIFT),
        **parts,
    )


@pytest.fixture
def victim(tiny_vae, denoiser, perceptual) -> Victim:
    return victim_of(tiny_vae, denoiser=denoiser, perceptual=perceptual)


def loss_of(name: str, victim: Victim, clean: Tensor, target: Tensor, seeds: list[int]) -> Callable[[Tensor], Tensor]:
    """The protection's own loss with fresh generators."""
    protection = preset(name)
    goal = target.expand_as(clean) if protection.has_target else None
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return protection.loss(ProtectedBatch(victim=victim, clean=clean, target=goal, generators=generators))


def progress(name: str, victim: Victim, clean: Tensor, protected: Tensor, target: Tensor) -> Tensor:
    """How far the loss has gone where the protection wants it, `[N]`, mean of eight draws that are the same for both."""
    values = []
    for images in (clean, protected):
        loss = loss_of(name, victim, clean, target, [100 + i for i in range(len(clean))])
        with torch.no_grad():
            values.append(torch.stack([loss(images) for _ in range(8)]).mean(dim=0))
    before, after = values
    return before - after if PROTECTIONS[name].minimise else after - before


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_the_authors(name) -> None:
    """Oracle: the numbers of the files that the losses' docstrings name, in the units that stand there; exact."""
    unit, norm, epsilon, step, steps, random_start, schedule, minimise, prompt = SETTINGS[name]
    protection = PROTECTIONS[name]
    assert protection.name == name
    assert protection.config == PGDConfig(
        epsilon=unit * epsilon,
        norm=norm,
        step_size=unit * step,
        num_steps=steps,
        random_start=random_start,
        schedule=schedule,
    )
    assert (protection.minimise, protection.prompt) == (minimise, prompt)


def test_other_settings_are_the_authors() -> None:
    """Oracle: specification; what is no setting of a PGD."""
    glaze = PROTECTIONS["glaze"]
    assert glaze.config == GlazeConfig(epsilon=0.05, step_size=U1 * 0.01, num_steps=500, penalty=30)
    assert glaze.minimise and glaze.needs_target and glaze.needs_perceptual and not glaze.scalable
    blurguard = PROTECTIONS["blurguard"]
    assert blurguard.config == BlurGuardConfig(epsilon=U0 * 16 / 255, step_size=U1 * 2, num_steps=150 - 50)
    assert blurguard.minimise and not blurguard.has_target and not blurguard.needs_denoiser
    assert set(PROTECTIONS) == {*SETTINGS, "blurguard", "glaze"}
    assert FUSION_RATE == 10_000
    assert EDIT == {"num_steps": 4, "strength": 0.5, "guidance_scale": 7.5, "eta": 1.0}
    assert PROTECTIONS["photoguard-diffusion"].loss.keywords == {"repetitions": 10}
    assert PROTECTIONS["photoguard-diffusion-linf"].loss.keywords == {"repetitions": 5}
    assert [name for name, protection in PROTECTIONS.items() if not protection.scalable] == [
        "photoguard-diffusion", "glaze"
    ]  # fmt: skip


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_loss_goes_where_it_should(name, victim, images, generators) -> None:
    """Oracle: the protection's own loss on other draws than the attack's, for every image.

    From the clean images, which a random start would leave for worse ones before the few steps here. PID's loss is at
    its minimum there and needs the start. The denoiser knows little noise, so that eight steps at random times agree.
    """
    little_noise = diffusion_scheduler(num_train_timesteps=50)
    victim = replace(victim, denoiser=replace(victim.denoiser, scheduler=little_noise))
    clean, target = images(2, limit=0.5), images(1, seed=9)
    protection = preset(name)
    if name != "pid" and isinstance(protection.config, PGDConfig):
        protection = replace(protection, config=replace(protection.config, random_start=False))
    protected = protect(protection, victim, clean, generators=generators(1, 2), num_steps=8, target=target)
    assert (progress(name, victim, clean, protected, target) > 0).all()


@pytest.mark.parametrize("name", ENCODER_ONLY)
def test_encoder_attacks_work_on_the_trained_autoencoder(name, miniature_vae, perceptual, images, generators) -> None:
    """Oracle: the protection's own loss, which its few steps must change by a fiftieth at least."""
    clean = torch.stack([from_pil(draw_scene(5, index).image) for index in range(2)])
    victim, target = victim_of(miniature_vae, perceptual=perceptual), mist_pattern(*clean.shape[2:])
    protected = protect(PROTECTIONS[name], victim, clean, generators=generators(1, 2), num_steps=10, target=target)
    with torch.no_grad():
        before = loss_of(name, victim, clean, target, [7, 8])(clean)
    assert (progress(name, victim, clean, protected, target) > 0.02 * before).all()


@pytest.mark.parametrize("place", ["inside", "on the border"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("epsilon", [None, 3 / 255])
def test_budget_and_range_are_kept(epsilon, name, place, victim, images, generators) -> None:
    """Oracle: specification, the authors' budget or the one given, in the authors' norm, and [-1,1]."""
    clean = images(2, limit=0.5) if place == "inside" else images(2).sign()
    arguments = {"num_steps": 2, "epsilon": epsilon, "target": images(1, seed=9)}
    protected = protect(preset(name), victim, clean, generators=generators(1, 2), **arguments)
    unit, norm, authors, *_ = SETTINGS[name]
    radius = 2 * (unit * authors if epsilon is None else epsilon)
    change = (protected - clean).flatten(1)
    size = change.norm(dim=1) if norm == "l2" else change.abs().amax(dim=1)
    assert (size <= radius + ROUNDING * (change.shape[1] ** 0.5 if norm == "l2" else 1)).all()
    assert protected.min() >= -1 and protected.max() <= 1
    assert (size > 0).all() and not protected.requires_grad


def test_another_budget_scales_the_step(victim, images, generators) -> None:
    """Oracle: closed form. A first step of Nightshade is as long as its budget: twice epsilon between [-1,1] images."""
    clean = images(1, limit=0.5)
    for epsilon in (None, 0.02, 0.08):
        arguments = {"num_steps": 1, "epsilon": epsilon, "target": images(1, seed=9)}
        change = protect(PROTECTIONS["nightshade"], victim, clean, generators=generators(1), **arguments) - clean
        expected = torch.full_like(change, 2 * (epsilon or 0.04))
        torch.testing.assert_close(change.abs(), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("change", [{"epsilon": 0.0}, {"num_steps": 0}])
@pytest.mark.parametrize("name", PROTECTIONS)
def test_no_budget_or_no_step_is_the_identity(name, change, victim, images, generators) -> None:
    """Oracle: closed form, exact."""
    arguments = {"target": images(1, seed=9), **change}
    protected = protect(PROTECTIONS[name], victim, images(2), generators=generators(1, 2), **arguments)
    assert torch.equal(protected, images(2))


@pytest.mark.parametrize("name", [name for name, protection in PROTECTIONS.items() if not protection.joint])
def test_result_of_an_image_does_not_depend_on_its_batch(name, victim, images, generators) -> None:
    """Oracle: invariance, one image alone against the same image in a batch, with targets of its own.

    Convolutions round differently in batches, which flips the sign of a gradient near 0 in few pixels.
    """
    clean, target = images(2), images(2, seed=9)

    def run(which: slice, *seeds: int) -> Tensor:
        chosen = {"generators": generators(*seeds), "target": target[which]}
        return protect(preset(name), victim, clean[which], num_steps=2, **chosen)

    alone = run(slice(1, 2), 2)
    assert ((run(slice(0, 2), 1, 2)[1:] - alone).abs() > 1e-4).float().mean() < 0.02
    assert torch.equal(alone, run(slice(1, 2), 3)) == (name in WITHOUT_CHANCE)


@pytest.mark.parametrize("outer", [torch.no_grad, torch.enable_grad])
def test_parameters_get_no_gradient(outer, tiny_vae, victim, images, generators) -> None:
    """Oracle: invariance, trainable parameters of the VAE keep their `.grad`, whatever the caller's mode."""
    with outer():
        for name in PROTECTIONS:
            protect(preset(name), victim, images(1), generators=generators(1), num_steps=1, target=images(1, seed=9))
    assert all(parameter.grad is None for parameter in tiny_vae.parameters())
    assert any(parameter.requires_grad for parameter in tiny_vae.encoder.parameters())


@pytest.mark.parametrize("name", DENOISING)
def test_missing_denoiser_is_named(name, tiny_vae, images, generators) -> None:
    """Oracle: specification, the message says how to make one and with which prompt."""
    protection = PROTECTIONS[name]
    with pytest.raises(UserError, match=f"{name} needs a denoiser; Denoiser.from_pipeline.pipe, '{protection.prompt}'"):
        protect(protection, victim_of(tiny_vae), images(1), generators=generators(1))


def test_missing_perceptual_distance_is_named(tiny_vae, images, generators) -> None:
    """Oracle: specification; Glaze is the only one that has it."""
    with pytest.raises(UserError, match="glaze needs LPIPS; load_perceptual_distance"):
        protect(PROTECTIONS["glaze"], victim_of(tiny_vae), images(1), generators=generators(1), target=images(1))
    assert [name for name, protection in PROTECTIONS.items() if protection.needs_perceptual] == ["glaze"]


@pytest.mark.parametrize("name", ["nightshade", "glaze"])
def test_missing_target_is_named(name, victim, images, generators) -> None:
    """Oracle: specification; what is to be imitated cannot be guessed."""
    with pytest.raises(UserError, match=f"{name} needs a target image"):
        protect(PROTECTIONS[name], victim, images(1), generators=generators(1))


@pytest.mark.parametrize("shape", [(1, 8), (3, 16)])
def test_target_that_does_not_fit_is_refused(shape, victim, images, generators) -> None:
    """Oracle: specification; a target is one image or as many as there are, of their size."""
    with pytest.raises(UserError, match="does not fit images"):
        protect(PROTECTIONS["nightshade"], victim, images(2), generators=generators(1, 2), target=images(*shape))


@pytest.mark.parametrize("images_in", ["clean", "target"])
def test_range_is_checked(images_in, victim, images, generators) -> None:
    """Oracle: specification, images beyond [-1,1] are refused where they come in."""
    given = {"clean": images(1), "target": images(1), images_in: images(1, limit=3.0)}
    with pytest.raises(ValueError, match=r"images in \[-1,1\]"):
        protect(PROTECTIONS["nightshade"], victim, generators=generators(1), **given)


@pytest.mark.parametrize(
    ("name", "picture"),
    [("photoguard-encoder-grey", grey), ("photoguard-diffusion-linf", grey), ("mist-textural", mist_pattern)],
)
def test_default_target(name, picture, victim, images, generators) -> None:
    """Oracle: specification, no target is the same as the default one given, and not as another; exact."""

    def run(target: Tensor | None) -> Tensor:
        return protect(preset(name), victim, images(2), generators=generators(1, 2), num_steps=1, target=target)

    assert torch.equal(run(None), run(picture(16, 16)))
    assert not torch.equal(run(None), run(images(1, seed=9)))


def test_untargeted_protections_do_not_look_at_a_target(victim, images, generators) -> None:
    """Oracle: specification, exact; PhotoGuard's first attack heads for latents of 0 and not for a picture."""
    for name in ("photoguard-encoder", "advdm", "pid"):
        arguments = {"generators": generators(1), "num_steps": 1}
        with_target = protect(PROTECTIONS[name], victim, images(1), target=images(1, seed=9), **arguments)
        arguments["generators"] = generators(1)
        assert torch.equal(with_target, protect(PROTECTIONS[name], victim, images(1), **arguments))


def fixed_latents(mean: float, variance: float) -> Callable[[Tensor], Moments]:
    """A posterior in place of an encoder's: the images themselves times `mean`, and one variance."""
    return lambda images: Moments(mean * images, torch.full_like(images, variance))


def test_encoder_losses_are_their_formulas(images) -> None:
    """Oracle: closed form for an encoder that doubles its image and a posterior without spread."""
    victim = Victim(encode=fixed_latents(2.0, 0.0), decode=torch.nn.Identity(), scale=lambda latents: 3 * latents + 1)
    clean, target, other = images(2), images(1, seed=9), images(2, seed=5)

    def value(name: str) -> Tensor:
        return loss_of(name, victim, clean, target, [0, 1])(other)

    apart = (other - target).flatten(1)
    close = {"rtol": 1e-5, "atol": 0.0}
    torch.testing.assert_close(value("photoguard-encoder"), 2 * other.flatten(1).norm(dim=1), **close)
    torch.testing.assert_close(value("photoguard-encoder-grey"), 2 * apart.norm(dim=1), **close)
    torch.testing.assert_close(value("nightshade"), 2 * apart.norm(dim=1), **close)
    torch.testing.assert_close(value("mist-textural"), (3 * 2 * apart).square().sum(dim=1), **close)
    torch.testing.assert_close(value("glaze"), (2 * apart).square().mean(dim=1), **close)


def test_pid_compares_means_and_logarithms_of_variances(images) -> None:
    """Oracle: closed form for a posterior whose mean is the image and whose log-variance is three times the image."""
    victim = Victim(
        encode=lambda batch: Moments(batch, (3 * batch).exp()), decode=torch.nn.Identity(), scale=torch.nn.Identity()
    )
    clean, other = images(2), images(2, seed=5)
    value = loss_of("pid", victim, clean, clean, [0, 1])(other)
    torch.testing.assert_close(value, (1 + 9) * (other - clean).square().flatten(1).mean(dim=1), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("name", "variance"), [("posterior-collapse-plus", 1.0), ("posterior-collapse-minus", 1e-8)])
def test_posterior_collapse_is_the_divergence_from_a_prior(name, variance, images) -> None:
    """Oracle: torch.distributions, in float64, for a posterior whose mean is the image and whose variance varies."""
    victim = Victim(
        encode=lambda batch: Moments(batch, (3 * batch).exp()), decode=torch.nn.Identity(), scale=torch.nn.Identity()
    )
    clean = images(2)
    posterior = Normal(clean.double(), (1.5 * clean.double()).exp())
    prior = Normal(torch.zeros((), dtype=torch.float64), variance**0.5)
    expected = variance * kl_divergence(posterior, prior).flatten(1).mean(dim=1)
    torch.testing.assert_close(loss_of(name, victim, clean, clean, [0, 1])(clean).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", PROTECTIONS)
def test_protections_that_pull_latents_are_known(name) -> None:
    """Oracle: specification; those that minimise a distance of latents from fixed ones, which `latent-share` measures."""
    pulling = (
        "photoguard-encoder", "mist-textural", "mist-fused", "nightshade", "uvcg", "glaze", "photoguard-encoder-grey",
        "posterior-collapse-minus", "blurguard",
    )  # fmt: skip
    assert PROTECTIONS[name].pulls_latents == (name in pulling)


def looked_at(images: Tensor) -> Tensor:
    """Images as scipy blurs them, cut off after two pixels, and as Pillow rotates them, after the images themselves."""
    blurred = gaussian_filter(images.numpy(), (0, 0, 1.5, 1.5), mode="mirror", truncate=2 / 1.5)
    turned = [np.array(Image.fromarray(plane.numpy()).rotate(5, fillcolor=-1.0)) for plane in images.flatten(end_dim=1)]
    return torch.stack([images, torch.from_numpy(blurred), torch.from_numpy(np.stack(turned)).view_as(images)])


def test_editshield_moves_latents_of_three_views(images) -> None:
    """Oracle: closed form for an encoder that doubles its image; scipy's blur and Pillow's rotation, clip by clip too."""
    victim = Victim(encode=fixed_latents(2.0, 0.0), decode=torch.nn.Identity(), scale=torch.nn.Identity())
    clean, other = images(2, SIZE), images(2, SIZE, seed=5)
    expected = (2 * looked_at(other) - 2 * clean).square().mean(dim=(0, 2, 3, 4))
    torch.testing.assert_close(loss_of("editshield", victim, clean, clean, [0, 1])(other), expected)
    twice = [torch.stack([batch, batch], dim=2) for batch in (clean, other)]
    torch.testing.assert_close(loss_of("editshield", victim, twice[0], twice[0], [0, 1])(twice[1]), expected)


def test_diffusionguard_lengthens_the_first_prediction_of_an_edit(generators) -> None:
    """Oracle: diffusers' image-to-image pipeline at full strength with 4 steps, whose UNet is called first with the same
    noised latents. The latents are the images, and their posterior's sample is the first draw of each image."""
    pipe, latents, drawn, predicted = build_pipeline("sd img2img"), draw_latents(1), generators(7), []
    denoiser = Denoiser.from_pipeline(pipe, draw_embeddings(pooled=False))
    pipe.unet.register_forward_hook(lambda module, inputs, output: predicted.append(output[0]))
    torch.randn(latents.shape[1:], generator=drawn[0])
    settings = {"num_inference_steps": 4, "strength": 1.0, "guidance_scale": 1.0, "output_type": "latent"}
    pipe(image=latents, prompt_embeds=denoiser.prompt.embeds, generator=drawn[0], **settings)
    victim = Victim(
        encode=fixed_latents(1.0, 0.0), decode=torch.nn.Identity(), scale=torch.nn.Identity(), denoiser=denoiser
    )
    value = loss_of("diffusionguard", victim, latents, latents, [7])(latents)
    torch.testing.assert_close(value, predicted[0].flatten(1).norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["mist-textural", "glaze"])
def test_latents_are_sampled(name, images) -> None:
    """Oracle: closed form. Between two samples of one image's posterior of variance s the squared distance is 2 s on
    average; four standard errors of 2 * 3 * 32 * 32 squares."""
    victim = Victim(encode=fixed_latents(1.0, 0.7), decode=torch.nn.Identity(), scale=torch.nn.Identity())
    clean = images(2, SIZE)
    value = loss_of(name, victim, clean, clean[:1], [0, 1])(clean[:1].expand(2, -1, -1, -1))
    mean = value.mean().item() / (clean[0].numel() if name == "mist-textural" else 1)
    assert mean == pytest.approx(2 * 0.7, rel=4 * (2 / clean.numel()) ** 0.5)


@pytest.mark.parametrize("name", ["mist-semantic", "advdm", "advdm-minus", "anti-dreambooth-fsmg"])
def test_semantic_losses_are_the_denoisers(name, victim, images, generators) -> None:
    """Oracle: the denoiser's loss, held against diffusers elsewhere, of latents sampled and scaled by hand; exact."""
    clean, drawn = images(2), generators(4, 5)
    moments = victim.encode(clean)
    noise = torch.stack([torch.randn(moments.mean.shape[1:], generator=generator) for generator in drawn])
    latents = FACTOR * (moments.mean + moments.variance.sqrt() * noise - SHIFT)
    assert torch.equal(loss_of(name, victim, clean, clean, [4, 5])(clean), victim.denoiser.loss(latents, drawn))


def test_fused_is_textural_less_ten_thousand_times_semantic(victim, images) -> None:
    """Oracle: the two losses themselves, one after the other on the same generators."""
    clean, target = images(2), images(1, seed=9)
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    batch = ProtectedBatch(victim=victim, clean=clean, target=target.expand_as(clean), generators=generators)
    near, denoised = (PROTECTIONS[name].loss(batch)(clean) for name in ("mist-textural", "mist-semantic"))
    value = loss_of("mist-fused", victim, clean, target, [4, 5])(clean)
    torch.testing.assert_close(value, near - 10_000 * denoised, rtol=1e-5, atol=0)


def test_edit_distance_is_that_of_the_decoded_edit(victim, images, generators) -> None:
    """Oracle: `Denoiser.edit`, held against diffusers' pipeline elsewhere, between an encoder and a decoder by hand,
    and the mean value and gradient of two draws in a row."""
    clean, target, drawn = images(1, limit=0.5), images(1, seed=9), generators(4)
    single = clean.clone().requires_grad_(True)
    values = []
    for _ in range(2):
        moments = victim.encode(single)
        noise = torch.randn(moments.mean.shape[1:], generator=drawn[0])
        latents = FACTOR * (moments.mean + moments.variance.sqrt() * noise - SHIFT)
        edited = victim.denoiser.edit(latents, drawn, num_steps=4, strength=0.5, guidance_scale=7.5, eta=1.0)
        values.append((victim.decode(edited / FACTOR + SHIFT) - target).flatten().norm())
    expected = torch.stack(values).mean()
    (wanted,) = torch.autograd.grad(expected, single)
    loss = PROTECTIONS["photoguard-diffusion"].loss
    batch = ProtectedBatch(victim=victim, clean=clean, target=target, generators=generators(4))
    value, gradient = value_and_gradient(loss.func(batch, repetitions=2), clean)
    torch.testing.assert_close(value, expected[None], rtol=1e-4, atol=0)
    scale = wanted.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(gradient / clean.numel(), wanted, rtol=0, atol=1e-3 * scale)


def test_averaged_is_the_mean_of_the_calls() -> None:
    """Oracle: closed form. Of 1 x, 2 x and 3 x the mean is 2 x, with a gradient of 2."""
    factors = iter([1.0, 2.0, 3.0])
    images = torch.full((2, 3, 4, 4), 0.5)
    mean = averaged([lambda batch: next(factors) * batch.flatten(1).sum(dim=1)] * 3)
    value, gradient = value_and_gradient(mean, images)
    torch.testing.assert_close(value, torch.full((2,), 2 * 0.5 * 48))
    torch.testing.assert_close(gradient / 48, torch.full_like(images, 2.0))


def test_given_gradient_takes_the_place_of_the_true_one(images) -> None:
    """Oracle: closed form, exact."""
    at = images(2).requires_grad_(True)
    value = with_gradient(at.square().flatten(1).sum(dim=1), at, images(2, seed=5))
    assert torch.equal(value, at.square().flatten(1).sum(dim=1))
    assert torch.equal(torch.autograd.grad(value.sum(), at)[0], images(2, seed=5))


@pytest.mark.parametrize("name", ["sds", "sds-minus"])
def test_sds_pushes_the_score_error_through_the_encoder(name, victim, images, generators) -> None:
    """Oracle: autograd, `latents.backward(predicted - added noise)` with everything drawn by hand, and the step along
    its sign: up for sds, down for sds-minus."""
    clean, drawn = images(2, limit=0.5), generators(4, 5)
    pixels = clean.clone().requires_grad_(True)
    moments = victim.encode(pixels)
    spread = torch.stack([torch.randn(moments.mean.shape[1:], generator=generator) for generator in drawn])
    latents = FACTOR * (moments.mean + moments.variance.sqrt() * spread - SHIFT)
    timesteps = torch.stack([torch.randint(1000, (), generator=generator) for generator in drawn])
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in drawn])
    with torch.no_grad():
        noised = build_pipeline("sd").scheduler.add_noise(latents, noise, timesteps)
        error = victim.denoiser.predict_noise(noised, timesteps) - noise
    latents.backward(error)
    value, gradient = value_and_gradient(loss_of(name, victim, clean, clean, [4, 5]), clean)
    torch.testing.assert_close(value, error.square().flatten(1).mean(dim=1))
    scale = pixels.grad.abs().max().item()
    torch.testing.assert_close(gradient / clean[0].numel(), pixels.grad, rtol=0, atol=1e-4 * scale)
    protected = protect(PROTECTIONS[name], victim, clean, generators=generators(4, 5), num_steps=1)
    direction = {"sds": 1, "sds-minus": -1}[name] * pixels.grad.sign()
    # Gradients near 0 may round to the other side.
    assert ((protected - clean).sign() == direction).float().mean() > 0.999


def glazed(victim: Victim, clean: Tensor, target: Tensor, generators: Callable, **changes: float) -> Tensor:
    protection = replace(PROTECTIONS["glaze"], config=GlazeConfig(num_steps=12, **changes))
    return protect(protection, victim, clean, generators=generators(1, 2), target=target)


def test_bound_of_glaze_acts(victim, perceptual, images, generators) -> None:
    """Oracle: bound. Without a penalty the target's pull goes far beyond the LPIPS bound; a heavy one keeps it near."""
    clean, target = images(2, limit=0.5), images(1, seed=9)

    def distance(protected: Tensor) -> Tensor:
        return perceptual.distance(protected, perceptual.features(clean))

    settings = {"epsilon": 0.002, "step_size": 0.02}
    free = glazed(victim, clean, target, generators, penalty=0.0, **settings)
    bound = glazed(victim, clean, target, generators, penalty=1e4, **settings)
    assert (distance(free) > 2 * settings["epsilon"]).all()
    assert (distance(bound) < 0.6 * distance(free)).all()
    loose = glazed(victim, clean, target, generators, penalty=1e4, epsilon=0.9, step_size=0.02)
    assert (distance(loose) > 2 * settings["epsilon"]).all()


def test_glaze_is_adam_on_the_change(victim, perceptual, images, generators) -> None:
    """Oracle: torch.optim.Adam by hand on one image in the range, as the release writes it: a start in [-p,p], the
    clipped image with the gradient of the whole, MSE of sampled latents plus 30 times the excess of LPIPS."""
    clean, target, drawn = images(1), images(1, seed=9), generators(1)
    change = (2 * torch.rand(clean.shape[1:], generator=drawn[0]) - 1)[None] * 0.002
    optimizer = torch.optim.Adam([change.requires_grad_(True)], lr=0.01)
    features = perceptual.features(clean)
    for _ in range(3):
        shown = clean + change
        shown.data = shown.data.clamp(-1, 1)
        samples = []
        for picture in (target, shown):
            moments = victim.encode(picture)
            noise = torch.randn(moments.mean.shape[1:], generator=drawn[0])
            samples.append(moments.mean + moments.variance.sqrt() * noise)
        excess = (perceptual.distance(shown, features) - 0.002).clamp(min=0)
        optimizer.zero_grad()
        ((samples[1] - samples[0]).square().mean() + 30 * excess.sum()).backward()
        optimizer.step()
    expected = (clean + change).detach().clamp(-1, 1)
    config = replace(PROTECTIONS["glaze"].config, epsilon=0.002, num_steps=3)
    protected = protect(
        replace(PROTECTIONS["glaze"], config=config), victim, clean, generators=generators(1), target=target
    )
    # Adam divides by the gradient's size, and so gradients near 0 step by their rounding.
    assert ((protected - expected).abs() > 1e-4).float().mean() < 0.01
    assert (protected == 1).any() and (protected == -1).any()


def test_glaze_knows_tiny_gradients_from_none(perceptual, images, generators) -> None:
    """Oracle: closed form of Adam's first step, lr g / (|g| + 1e-8), where g is as small as for large images: with an
    encoder that shrinks its images by c, g = 2 c^2 (x - target) / n."""
    shrink = 2e-3
    victim = Victim(
        encode=fixed_latents(shrink, 0.0), decode=torch.nn.Identity(), scale=torch.nn.Identity(), perceptual=perceptual
    )
    clean, target = images(1, limit=0.5), images(1, seed=9)
    start = clean + 0.05 * (2 * torch.rand(clean.shape[1:], generator=generators(1)[0]) - 1)
    gradient = 2 * shrink**2 * (start - target) / clean.numel()
    assert 1e-9 < gradient.abs().mean() < 1e-7
    protection = replace(PROTECTIONS["glaze"], config=GlazeConfig(num_steps=1, penalty=0.0))
    protected = protect(protection, victim, clean, generators=generators(1), target=target)
    expected = start - 0.01 * gradient / (gradient.abs() + 1e-8)
    # Steps of 0.01 with the float32 rounding of a squared difference.
    torch.testing.assert_close(protected, expected, rtol=0, atol=1e-5)


def test_a_victim_of_a_codec_has_its_parts(tiny_vae, denoiser, perceptual, images) -> None:
    """Oracle: diffusers, the posterior and the decoder of the VAE itself, and its configuration's factor; exact."""
    codec = Codec.of(tiny_vae, "tiny")
    victim = Victim.of(codec, denoiser=denoiser, perceptual=perceptual)
    moments, posterior = victim.encode(images(2)), tiny_vae.encode(images(2)).latent_dist
    assert torch.equal(moments.mean, posterior.mean) and torch.equal(moments.variance, posterior.var)
    assert torch.equal(victim.decode(moments.mean), tiny_vae.decode(posterior.mean).sample)
    assert torch.equal(victim.scale(moments.mean), posterior.mean * tiny_vae.config.scaling_factor)
    assert victim.denoiser is denoiser and victim.perceptual is perceptual


def test_a_victim_scales_for_its_pipeline(tiny_vae, images) -> None:
    """Oracle: specification. Stable Diffusion ignores a VAE's shift, which its configuration alone would apply."""
    tiny_vae.register_to_config(scaling_factor=FACTOR, shift_factor=SHIFT)
    codec = Codec.of(tiny_vae, "tiny")
    latents = images(2)
    assert torch.equal(Victim.of(codec).scale(latents), FACTOR * (latents - SHIFT))
    assert torch.equal(Victim.of(codec, build_pipeline("sd")).scale(latents), FACTOR * latents)


@pytest.mark.parametrize("name", ["mist-textural", "advdm", "sds", "glaze", "photoguard-diffusion-linf"])
def test_without_generators_the_global_one_is_drawn_from(name, victim, images) -> None:
    """Oracle: specification; `torch.manual_seed` makes the result reproducible, and each image has draws of its own."""
    clean, results = images(1, limit=0.5).expand(2, -1, -1, -1), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(protect(preset(name), victim, clean, num_steps=1, target=images(1, seed=9)))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert not torch.equal(*results[0])


def test_unscale_undoes_scale(victim, images) -> None:
    """Oracle: round trip, for a factor and shift, and for ones of each channel; float32 rounding."""
    factor, shift = torch.tensor([0.5, 2.0, 3.0])[:, None, None], torch.tensor([0.1, -4.0, 0.0])[:, None, None]
    by_channel = replace(victim, scale=lambda latents: (latents - shift) * factor)
    for one in (victim, by_channel):
        torch.testing.assert_close(one.unscale(one.scale(images(2))), images(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (512, 512), (384, 640)])
def test_mist_pattern_is_a_tiled_picture_of_high_contrast(height, width) -> None:
    """Oracle: specification, shape and range; where it can be seen it repeats 3 times across and 8 times down."""
    pattern = mist_pattern(height, width)
    assert pattern.shape == (1, 3, height, width) and pattern.dtype == torch.float32
    assert pattern.min() >= -1 and pattern.max() <= 1
    if height < 384:
        return
    assert pattern.min() == -1 and pattern.max() == 1
    white = (pattern > 0).float().mean()
    assert 0.1 < white < 0.5
    big = mist_pattern(1440, 1440)
    assert torch.equal(big, big.roll(480, dims=3)) and torch.equal(big, big.roll(180, dims=2))


def test_style_transfer_is_the_pipelines_picture(tmp_path, images, generators) -> None:
    """Oracle: the pipeline called by hand for the second image alone, with its generator; the batch changes rounding."""
    pipe = add_text_encoders(build_pipeline("sd img2img"), tmp_path)
    clean = images(2, SIZE)
    styled = style_transfer(pipe, clean, generators=generators(1, 2), num_steps=4)
    alone = pipe(
        "Cubism by Picasso style",
        image=(clean[1:] + 1) / 2,
        strength=0.5,
        guidance_scale=7.5,
        num_inference_steps=4,
        generator=generators(2)[0],
        output_type="pt",
    ).images
    assert styled.shape == clean.shape
    torch.testing.assert_close(styled[1:], 2 * alone - 1, rtol=1e-3, atol=1e-3)
