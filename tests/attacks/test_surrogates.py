from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.small_pipelines import build_pipeline
from test_denoiser import draw_embeddings
from test_protections import FACTOR, SHIFT, victim_of
from torch import Tensor

from srl_utils.attacks.denoiser import Denoiser
from srl_utils.attacks.protections import PROTECTIONS, ProtectedBatch, Victim, protect, surrogates
from srl_utils.attacks.protections.surrogates import SurrogateLoss

ASPL = PROTECTIONS["anti-dreambooth-aspl"]
FAST = 1e-2  # a learning rate with which few steps change the gradients' signs


@pytest.fixture
def victim(tiny_vae) -> Victim:
    return victim_of(tiny_vae, denoiser=Denoiser.from_pipeline(build_pipeline("sd"), draw_embeddings(pooled=False)))


def aspl(victim: Victim, clean: Tensor, drawn: list[torch.Generator], *, steps: int, rate: float) -> Tensor:
    """Algorithm 1 of the paper by hand: sampled latents, diffusers' noising, AdamW, and signs of the gradient."""
    scheduler = build_pipeline("sd").scheduler
    embeds = victim.denoiser.prompt.embeds.expand(len(clean), -1, -1)

    def loss(unet: UNet2DConditionModel, images: Tensor) -> Tensor:
        moments = victim.encode(images)
        spread = torch.stack([torch.randn(moments.mean.shape[1:], generator=generator) for generator in drawn])
        timesteps = torch.stack([torch.randint(1000, (), generator=generator) for generator in drawn])
        noise = torch.stack([torch.randn(spread.shape[1:], generator=generator) for generator in drawn])
        latents = FACTOR * (moments.mean + moments.variance.sqrt() * spread - SHIFT)
        return (unet(scheduler.add_noise(latents, noise, timesteps), timesteps, embeds).sample - noise).square().mean()

    def trained(unet: UNet2DConditionModel, images: Tensor) -> UNet2DConditionModel:
        unet = copy.deepcopy(unet).requires_grad_(True)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=rate)
        for _ in range(3):
            optimizer.zero_grad()
            loss(unet, images).backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
        return unet

    model, protected = victim.denoiser.unet, clean
    for number in range(steps):
        if number == 6:
            model = trained(model, protected)
        if number in (0, 6):
            surrogate = trained(model, clean)
        pixels = protected.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(surrogate, pixels), pixels)
        change = (protected + 0.005 * gradient.sign() - clean).clamp(-0.05, 0.05)
        protected = (clean + change).clamp(-1, 1)
    return protected


def share_that_differs(images: Tensor, others: Tensor) -> float:
    return ((images - others).abs() > 1e-4).float().mean().item()


def test_aspl_is_algorithm_1(victim, images, generators, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the algorithm by hand, a whole round and two steps of the next. Gradients near 0 may round to the other
    side. Without the training, the result is another one."""
    monkeypatch.setattr(surrogates, "LEARNING_RATE", FAST)
    clean = images(2)
    protected = protect(ASPL, victim, clean, generators=generators(4, 5), num_steps=8)
    assert share_that_differs(protected, aspl(victim, clean, generators(4, 5), steps=8, rate=FAST)) < 0.02
    assert share_that_differs(protected, aspl(victim, clean, generators(4, 5), steps=8, rate=0.0)) > 0.1


def test_the_pipeline_keeps_its_unet(victim, images, generators) -> None:
    """Oracle: the weights before, exact; none gets a gradient, and two calls give the same images."""
    unet = victim.denoiser.unet
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    first, again = (protect(ASPL, victim, images(1), generators=generators(4), num_steps=7) for _ in range(2))
    assert torch.equal(first, again)
    assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())
    assert all(weight.grad is None and not weight.requires_grad for weight in unet.parameters())


def test_images_of_a_set_are_protected_together(victim, images, generators, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: specification; what the surrogate learns from the other image changes the result, here alone."""
    monkeypatch.setattr(surrogates, "LEARNING_RATE", FAST)
    clean = images(2)
    alone = protect(ASPL, victim, clean[1:], generators=generators(5), num_steps=6)
    together = protect(ASPL, victim, clean, generators=generators(4, 5), num_steps=6)
    assert share_that_differs(together[1:], alone) > 0.05
    assert [name for name, protection in PROTECTIONS.items() if protection.joint] == ["anti-dreambooth-aspl"]


@pytest.mark.parametrize(("steps", "trainings"), [(1, 1), (6, 1), (7, 3), (18, 5)])
def test_fewer_steps_are_fewer_rounds(steps, trainings, victim, images, generators, monkeypatch) -> None:
    """Oracle: closed form. Each round has a training of the surrogate, and one of the model lies between two rounds."""
    taken = []
    monkeypatch.setattr(surrogates, "training_step", lambda *given: taken.append(given))
    protect(ASPL, victim, images(1), generators=generators(4), num_steps=steps)
    assert len(taken) == 3 * trainings


def test_half_precision_does_not_round_the_training_away(tiny_vae, images, generators: Callable) -> None:
    """Oracle: specification. The authors' steps of 5e-7 change nearly all weights of a float32 copy."""
    pipe = build_pipeline("sd", dtype=torch.bfloat16)
    victim = victim_of(tiny_vae, denoiser=Denoiser.from_pipeline(pipe, draw_embeddings(pooled=False)))
    loss = SurrogateLoss(ProtectedBatch(victim=victim, clean=images(1), target=None, generators=generators(4)))
    loss(images(1))
    before, after = (dict(unet.named_parameters()) for unet in (pipe.unet, loss.surrogate.unet))
    changed = [(after[name] != weight.float()).float().mean() for name, weight in before.items()]
    assert torch.stack(changed).mean() > 0.9
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert max((after[name] - weight.float()).abs().max() for name, weight in before.items()) < 3 * 5e-7 * 1.1 + 1e-6
