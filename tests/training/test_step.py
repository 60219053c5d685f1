"""The fast step against the textbook's, and each of the things that make it fast against the plain one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import lpips
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from benchmarks.textbook import TextbookStep
from srl_utils.attacks.corruptions import gaussian_noise
from srl_utils.attacks.gradient import PGDConfig, pgd
from srl_utils.metrics.losses import PerceptualDistance, ReconstructionLoss
from srl_utils.training.objectives import OBJECTIVES, TERMS
from srl_utils.training.similarities import Similarity
from srl_utils.training.step import Step, build_networks, latents_first
from srl_utils.vae.latents import LatentScale
from srl_utils.vae.networks import EncoderMirror, LatentDecoder, LatentEncoder, frozen_copy

ATTACK = PGDConfig(epsilon=8 / 255, step_size=0.02, num_steps=3, random_start=False)
LEARNING_RATE = 1e-4


@pytest.fixture(scope="module")
def exact_lpips() -> lpips.LPIPS:
    """LPIPS with a small random trunk, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).double()


def our_step(vae: AutoencoderKL, loss: ReconstructionLoss | None = None, **settings: object) -> Step:
    return Step(networks=build_networks(vae, loss or ReconstructionLoss()), pgd=ATTACK, **settings)


def train(step: Step, batches: list[Tensor], generators: Callable) -> list[float]:
    """AdamW on each batch; returns the losses."""
    encoder = step.networks.encoder
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=LEARNING_RATE, fused=True)
    losses = []
    for images in batches:
        loss, _ = step(images, generators(*range(len(images))))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("lpips_weight", [0.0, 0.5])
def test_the_fast_step_is_the_textbooks(
    lpips_weight, either_tiny_vae, exact_lpips, images, generators, monkeypatch
) -> None:
    """Oracle: the textbook step, which shares no code, from the same weights over three steps.

    Both run in float64, where rounding decides no sign of a gradient and no step of Adam: in float32 the weights differ
    by 1% to 25% of what they moved, depending on the processor. The package's LPIPS has its eps outside the square root
    (`PerceptualDistance`); a vanishing eps takes that difference away.
    """
    monkeypatch.setattr("srl_utils.metrics.losses.EPSILON", 1e-20)
    perceptual = exact_lpips if lpips_weight else None
    vae = either_tiny_vae.double()
    plain = TextbookStep(
        copy.deepcopy(vae), perceptual, epsilon=ATTACK.radius, step_size=0.04, num_steps=3,
        lpips_weight=lpips_weight, originality_weight=0.1, learning_rate=LEARNING_RATE,
    )  # fmt: skip
    loss = ReconstructionLoss(PerceptualDistance(perceptual) if perceptual else None, weight=lpips_weight)
    fast = our_step(copy.deepcopy(vae), loss, originality_weight=0.1)
    batches = [images(2, 32, seed=seed).double() for seed in range(3)]
    expected = [plain(batch, batch).item() for batch in batches]
    assert train(fast, batches, generators) == pytest.approx(expected, rel=1e-9)
    before, ours, theirs = (
        torch.cat([tensor.flatten() for tensor in each.state_dict().values()])
        for each in (vae, fast.networks.vae, plain.vae)
    )
    assert ours.dtype == torch.float64
    assert (ours - theirs).norm() < 1e-6 * (theirs - before).norm()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("sample_posterior", [False, True])
def test_attacking_in_parts_changes_nothing(size, sample_posterior, tiny_vae, exact_lpips, images, generators) -> None:
    """Oracle: the attack on all images at once, in float64; an image's start, noise and target are its own in any part."""
    loss = ReconstructionLoss(PerceptualDistance(exact_lpips), weight=0.5)
    step = replace(
        our_step(tiny_vae.double(), loss, sample_posterior=sample_posterior), pgd=replace(ATTACK, random_start=True)
    )
    clean = images(5, 32).double()
    _, whole = step(clean, generators(*range(5)))
    _, parts = replace(step, attack_batch_size=size)(clean, generators(*range(5)))
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)


def test_terms_are_those_of_the_loss(tiny_vae, images, generators) -> None:
    """Oracle: closed form, the loss is the weighted sum of its terms; PSNR of one image is that of its error."""
    step = our_step(tiny_vae, originality_weight=0.3)
    train(step, [images(1)], generators)  # so that originality is not 0
    loss, terms = step(images(1), generators(0))
    values = dict(zip(TERMS, terms.tolist(), strict=True))
    assert values["originality"] > 0
    assert loss.item() == pytest.approx(values["mse"] + 0.3 * values["originality"], rel=1e-6)
    assert values["attacked_psnr"] == pytest.approx(10 * torch.log10(torch.tensor(4 / values["mse"])).item(), rel=1e-5)


def test_noise_takes_the_attack_s_place(tiny_vae, images, generators) -> None:
    """Oracle: closed form, the reconstruction error of images with the same white noise; no pass is an attack's."""
    step = our_step(tiny_vae, noise=8 / 255, originality_weight=0.0)
    clean = images(3)
    loss, _ = step(clean, generators(0, 1, 2))
    noisy = gaussian_noise(clean, 8 / 255, generators=generators(0, 1, 2))
    with torch.no_grad():
        reconstruction = tiny_vae.decode(tiny_vae.encode(noisy).latent_dist.mean).sample
    torch.testing.assert_close(loss.detach(), (reconstruction - clean).square().mean())


def test_latent_scale_enters_originality(tiny_vae, images, generators) -> None:
    """Oracle: closed form; means weigh with the scale's square, variances with its fourth power."""
    step = our_step(tiny_vae)
    train(step, [images(2)], generators)
    (mean, variance), (old_mean, old_variance) = (
        torch.chunk(network(images(2)), 2, dim=1) for network in (step.networks.encoder, step.networks.reference)
    )
    variance, old_variance = variance.clamp(-30, 20).exp(), old_variance.clamp(-30, 20).exp()
    _, terms = replace(step, latent_scale=LatentScale(factor=0.5))(images(2), generators(0, 1))
    expected = 0.5**2 * (mean - old_mean).square().mean() + 0.5**4 * (variance - old_variance).square().mean()
    assert terms[TERMS.index("originality")].item() == pytest.approx(expected.item(), rel=1e-4)


def test_without_originality_clean_images_are_not_encoded(tiny_vae, images, generators) -> None:
    """Oracle: counted passes; the loss is the reconstruction's alone."""
    step = our_step(tiny_vae, originality_weight=0.0)
    seen = []
    step.networks.encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    step.networks.reference.register_forward_hook(lambda *_: pytest.fail("the reference was asked"))
    loss, terms = step(images(3), generators(0, 1, 2))
    assert seen == [3]
    assert loss.item() == pytest.approx(terms[TERMS.index("mse")].item())


@pytest.mark.parametrize(("share", "order"), [(0.0, [0, 1, 2]), (0.5, [0, 2, 1]), (1.0, [0, 1, 2])])
def test_attacks_on_latents(share: float, order: list[int], tiny_vae, images, generators) -> None:
    """Oracle: PGD on the closed form of each half, image by image: the latents' distance, and the reconstruction's error.

    Half of three images are the first and the third. In float64, because a sign of a gradient near 0 is a matter of rounding.
    """
    pgd_config = replace(ATTACK, random_start=True)
    step = replace(
        our_step(
            tiny_vae.double(), latent_attack_share=share, latent_scale=LatentScale(factor=0.5), originality_weight=0.0
        ),
        pgd=pgd_config,
    )
    clean = images(3, 32).double()
    attacked = step.attack(step.batch(clean, generators(0, 1, 2)))
    vae = step.networks.vae
    with torch.no_grad():
        original = vae.encode(clean).latent_dist.mean

    def on_latents(number: int) -> Callable[[Tensor], Tensor]:
        return lambda x: (vae.encode(x).latent_dist.mean - original[number]).square().flatten(1).sum(1)

    def on_images(number: int) -> Callable[[Tensor], Tensor]:
        return lambda x: (vae.decode(vae.encode(x).latent_dist.mean).sample - clean[number]).square().flatten(1).sum(1)

    for place, number in enumerate(order):
        objective = on_latents(number) if place < {0.0: 0, 0.5: 2, 1.0: 3}[share] else on_images(number)
        expected = pgd(objective, clean[number : number + 1], pgd_config, generators=generators(number))
        torch.testing.assert_close(attacked[place : place + 1], expected)
    for size in (1, 2):  # parts of the batch are attacked alike
        in_parts = replace(step, attack_batch_size=size)
        torch.testing.assert_close(in_parts.attack(in_parts.batch(clean, generators(0, 1, 2))), attacked)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_which_images_are_attacked_on_latents(share: float, batch_size: int) -> None:
    """Oracle: an invariance: the same images whatever the batches are; and the share itself, in every row of images."""

    def attacked_on_latents(size: int) -> list[int]:
        chosen = []
        for start in range(0, 240, size):
            order, count = latents_first(range(start, start + size), share)
            assert sorted(order) == list(range(size))
            chosen += [start + index for index in order[:count]]
        return chosen

    chosen = attacked_on_latents(batch_size)
    assert chosen == attacked_on_latents(240)
    for stop in (1, 7, 40, 240):
        assert sum(number < stop for number in chosen) == pytest.approx(share * stop, abs=1)


def test_the_latent_distance_enters_the_loss(tiny_vae, images, generators) -> None:
    """Oracle: closed form, with the weight, and the square of the scale; its gradient moves the encoder alone."""
    step = our_step(tiny_vae, latent_weight=0.2, latent_scale=LatentScale(factor=0.5), originality_weight=0.0)
    clean = step.batch(images(2), generators(0, 1))
    attacked = step.attack(clean)
    loss, terms = step.loss(attacked, clean)
    values = dict(zip(TERMS, terms.tolist(), strict=True))
    with torch.no_grad():
        means = [tiny_vae.encode(batch).latent_dist.mean for batch in (attacked, clean.images)]
    assert values["latent"] == pytest.approx(0.25 * (means[0] - means[1]).square().mean().item(), rel=1e-4)
    assert loss.item() == pytest.approx(values["mse"] + 0.2 * values["latent"], rel=1e-6)


def test_feature_decodes_nothing(tiny_vae, images, generators) -> None:
    """Oracle: closed form: distances of latents alone; a decoder that is called fails the test."""
    scale = LatentScale(factor=0.5)
    step = replace(
        our_step(tiny_vae, objective=OBJECTIVES["feature"], latent_scale=scale), pgd=replace(ATTACK, random_start=True)
    )
    step.networks.decoder.register_forward_hook(lambda *_: pytest.fail("the decoder was asked"))
    clean = step.batch(images(2), generators(0, 1))
    attacked = step.attack(clean)
    loss, terms = step.loss(attacked, clean)
    values = dict(zip(step.terms, terms.tolist(), strict=True))
    with torch.no_grad():
        means = [tiny_vae.encode(batch).latent_dist.mean for batch in (attacked, clean.images)]
    assert values["latent"] == pytest.approx(0.25 * (means[0] - means[1]).square().mean().item(), rel=1e-4)
    assert values["latent"] > 0
    assert loss.item() == pytest.approx(values["latent"] + 0.01 * values["originality"], rel=1e-6)


@pytest.mark.parametrize("originality_weight", [0.0, 0.1])
def test_trades_is_its_formula(originality_weight: float, tiny_vae, images, generators) -> None:
    """Oracle: closed form, in float64 and with an encoder that has left its original: the attack is PGD on the distance
    from the same encoder's own latents, and the loss has the clean images' reconstruction."""
    vae = tiny_vae.double()
    built = our_step(vae, objective=OBJECTIVES["trades"], latent_weight=0.2, originality_weight=originality_weight)
    step = replace(built, pgd=replace(ATTACK, random_start=True))
    with torch.no_grad():
        for parameter in step.networks.encoder.parameters():
            parameter.mul_(1.1)
    clean = step.batch(images(2, 32).double(), generators(0, 1))
    attacked = step.attack(clean)
    own = vae.encode(clean.images).latent_dist.mean.detach()

    def distance(batch: Tensor) -> Tensor:
        return (vae.encode(batch).latent_dist.mean - own).square().flatten(1).mean(1)

    torch.testing.assert_close(attacked, pgd(distance, clean.images, step.pgd, generators=generators(0, 1)))
    loss, terms = step.loss(attacked, clean)
    values = dict(zip(step.terms, terms.tolist(), strict=True))
    with torch.no_grad():
        reconstruction = vae.decode(own).sample
        assert values["mse"] == pytest.approx((reconstruction - clean.images).square().mean().item(), rel=1e-5)
        assert values["latent"] == pytest.approx(distance(attacked).mean().item(), rel=1e-5)
    expected = values["mse"] + 0.2 * values["latent"] + originality_weight * values["originality"]
    assert loss.item() == pytest.approx(expected, rel=1e-6) and (values["originality"] > 0) == (originality_weight > 0)
    assert "attacked_psnr" not in values


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_purify_is_its_formula(share: float, tiny_vae, images, generators) -> None:
    """Oracle: closed form, in float64 and with an encoder that has left its original: the attack is PGD on what the original
    makes of the images, as `pgd` on diffusers' VAE finds it, and the loss is of what the encoder in training makes of them."""
    original = copy.deepcopy(tiny_vae.double())
    built = our_step(
        tiny_vae, objective=OBJECTIVES["purify"], latent_weight=0.2, latent_attack_share=share, originality_weight=0.1
    )
    step = replace(built, pgd=replace(ATTACK, random_start=True))
    with torch.no_grad():
        for parameter in step.networks.encoder.parameters():
            parameter.mul_(1.1)
    clean = step.batch(images(2, 32).double(), generators(0, 1))
    attacked = step.attack(clean)
    anchor = original.encode(clean.images).latent_dist.mean.detach()

    def damage(batch: Tensor) -> Tensor:
        latents = original.encode(batch).latent_dist.mean
        error = latents - anchor if share else original.decode(latents).sample - clean.images
        return error.square().flatten(1).mean(1)

    torch.testing.assert_close(attacked, pgd(damage, clean.images, step.pgd, generators=generators(0, 1)))
    loss, terms = step.loss(attacked, clean)
    values = dict(zip(step.terms, terms.tolist(), strict=True))
    with torch.no_grad():
        latents = step.networks.vae.encode(attacked).latent_dist.mean
        reconstruction = original.decode(latents).sample
    assert values["mse"] == pytest.approx((reconstruction - clean.images).square().mean().item(), rel=1e-5)
    assert values["latent"] == pytest.approx((latents - anchor).square().mean().item(), rel=1e-5)
    expected = values["mse"] + 0.2 * values["latent"] + 0.1 * values["originality"]
    assert loss.item() == pytest.approx(expected, rel=1e-6) and values["originality"] > 0
    assert "attacked_psnr" not in values  # not of an attack on the encoder in training


@pytest.mark.parametrize("sample_posterior", [False, True])
@pytest.mark.parametrize("originality_weight", [0.0, 0.1])
def test_equivariance_is_its_formula(
    originality_weight: float, sample_posterior: bool, tiny_vae, exact_lpips, images, generators
) -> None:
    """Oracle: closed form, image by image, on diffusers' VAE; transformed and untransformed images are among them."""
    vae, lpips_loss = tiny_vae.double(), ReconstructionLoss(PerceptualDistance(exact_lpips), weight=0.5)
    step = our_step(
        vae, lpips_loss, objective=OBJECTIVES["equivariance"], originality_weight=originality_weight,
        sample_posterior=sample_posterior,
    )  # fmt: skip
    step.networks.mirror.encoder.register_forward_hook(lambda *_: pytest.fail("an attack was made"))
    seen = []
    step.networks.encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    with torch.no_grad():
        for parameter in step.networks.encoder.parameters():
            parameter.mul_(1.1)
    clean = step.batch(images(6, 128).double(), generators(*range(6)))
    assert len(set(clean.similarities)) > 1 and Similarity() in clean.similarities
    assert torch.equal(step.attack(clean), clean.images)
    loss, terms = step.loss(clean.images, clean)
    values = dict(zip(step.terms, terms.tolist(), strict=True))
    assert seen == [6] and list(values) == ["loss", "originality", "mse", "lpips"]
    errors, distances = [], []
    for number, similarity in enumerate(clean.similarities):
        with torch.no_grad():
            posterior = vae.encode(clean.images[number : number + 1]).latent_dist
            noise = clean.latent_noise[number] if sample_posterior else 0
            reconstruction = vae.decode(similarity(posterior.mean + posterior.std * noise)).sample
            target = similarity(clean.images[number : number + 1])
            errors.append((reconstruction - target).square().mean().item())
            distances.append(exact_lpips(reconstruction, target).item())
    assert values["mse"] == pytest.approx(sum(errors) / 6, rel=1e-6)
    assert values["lpips"] == pytest.approx(sum(distances) / 6, rel=1e-4)
    expected = values["mse"] + 0.5 * values["lpips"] + originality_weight * values["originality"]
    assert loss.item() == pytest.approx(expected, rel=1e-6) and (values["originality"] > 0) == (originality_weight > 0)
    loss.backward()
    assert all(parameter.grad is not None for parameter in step.networks.encoder.parameters())


def test_half_precision_takes_the_attack_s_perceptual_loss_alone(tiny_vae, random_lpips, images, generators) -> None:
    """Oracle: counted calls: the twin's in the attack's steps, the float32 one's in the update; without, there is no twin."""
    loss = ReconstructionLoss(PerceptualDistance(random_lpips), weight=0.5)
    assert build_networks(copy.deepcopy(tiny_vae), loss).attacked_loss is loss
    networks = build_networks(tiny_vae, loss, autocast_dtype=torch.bfloat16)
    assert (networks.loss, networks.attacked_loss.weight) == (loss, 0.5)
    assert networks.attacked_loss.perceptual.dtype == torch.bfloat16
    seen = []
    for name, each in (("attack", networks.attacked_loss), ("update", networks.loss)):
        original = each.perceptual.distance
        each.perceptual.distance = lambda *given, name=name, original=original: (seen.append(name), original(*given))[1]
    Step(networks=networks, pgd=ATTACK)(images(2, 32), generators(0, 1))
    assert seen == ["attack"] * ATTACK.num_steps + ["update"]


def test_the_attack_computes_no_weight_gradients(tiny_vae, images, generators) -> None:
    """Oracle: specification; whatever the attack differentiates through is frozen, the encoder is not."""
    step = our_step(tiny_vae)
    networks = step.networks
    for module in (networks.mirror.encoder, networks.decoder, networks.reference, networks.loss):
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert all(parameter.requires_grad for parameter in networks.encoder.parameters())
    step(images(2), generators(0, 1))[0].backward()
    assert all(parameter.grad is not None for parameter in networks.encoder.parameters())


# --- frozen twins ---------------------------------------------------------------------------------------


def test_a_mirror_in_float32_is_the_same_memory(tiny_vae, images) -> None:
    """Oracle: invariance; weights changed in place are changed in the mirror, which costs nothing to refresh."""
    encoder = LatentEncoder(tiny_vae)
    mirror = EncoderMirror(encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.1)
    assert torch.equal(mirror.encoder(images(1)), encoder(images(1)))
    assert not any(parameter.requires_grad for parameter in mirror.encoder.parameters())
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_a_mirror_in_half_precision_follows_when_refreshed(tiny_vae, images) -> None:
    """Oracle: autocast, which casts the weights at every call: the same bits, once refreshed and not before."""
    encoder = LatentEncoder(tiny_vae, autocast_dtype=torch.bfloat16)
    mirror = EncoderMirror(encoder)
    assert torch.equal(mirror.encoder(images(1)), encoder(images(1)))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(mirror.encoder(images(1)), encoder(images(1)))
    mirror.refresh()
    assert torch.equal(mirror.encoder(images(1)), encoder(images(1)))


def test_half_weights_held_are_half_weights_cast(tiny_vae, images) -> None:
    """Oracle: autocast on the float32 weights, the same bits; the original keeps its own."""
    decoder = LatentDecoder(tiny_vae, autocast_dtype=torch.bfloat16)
    latents, before = torch.randn(1, 4, 8, 8), copy.deepcopy(decoder.state_dict())
    held = frozen_copy(decoder)
    assert {parameter.dtype for parameter in held.parameters()} == {torch.bfloat16, torch.float32}
    assert torch.equal(held(latents), decoder(latents))
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
