from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import foolbox
import pytest
import torch
from eagerpy import astensor
from foolbox.attacks import LinfProjectedGradientDescentAttack
from torch import Tensor

from miniature.scenes import draw_dead_leaves, draw_scene
from srl_utils.attacks.gradient import PGDConfig, pgd, project_linf, value_and_gradient
from srl_utils.autoencoders import LatentDecoder, LatentEncoder, frozen, split_moments
from srl_utils.images import from_pil, to_model_range, to_unit_range
from srl_utils.losses import ReconstructionLoss

EPSILON = 8 / 255
RADIUS = 2 * EPSILON  # between images in [-1,1]
FIXED_START = PGDConfig(epsilon=EPSILON, random_start=False)
# clean +- radius rounds once near 1, and the difference that a test takes once more: 2^-23 at most.
ROUNDING = 1.2e-7


def wavy(images: Tensor) -> Tensor:
    """An objective with many maxima in the ball; image i alone decides on value i."""
    return torch.sin(35 * images + 1).flatten(1).sum(dim=1)


def flat(images: Tensor) -> Tensor:
    """An objective with gradient 0: what an attack returns is its start."""
    return (0 * images).flatten(1).sum(dim=1)


def linear(weights: Tensor):
    return lambda images: (weights * images).flatten(1).sum(dim=1)


def reconstruction_objective(vae, clean: Tensor, loss: ReconstructionLoss | None = None):
    """The training's inner objective, on the posterior mean."""
    loss = loss or ReconstructionLoss()
    encoder, decoder, target = LatentEncoder(vae), LatentDecoder(vae), loss.target(clean)
    return lambda images: loss(decoder(split_moments(encoder(images)).mean), target)


@pytest.mark.parametrize("place", ["inside", "anywhere", "on the border"])
@pytest.mark.parametrize(
    "config",
    [
        FIXED_START,
        PGDConfig(epsilon=EPSILON),
        PGDConfig(epsilon=EPSILON, num_restarts=3),
        PGDConfig(epsilon=EPSILON, keep_best=True),
        PGDConfig(epsilon=EPSILON, step_size=1.0, num_steps=3),
        PGDConfig(epsilon=1.0, step_size=0.3),
    ],
    ids=["fixed start", "random start", "restarts", "keep best", "huge step", "whole range"],
)
def test_result_is_in_the_ball_and_in_the_range(config, place, images, generators) -> None:
    """Oracle: specification, for images inside the range and for images whose every value is -1 or 1."""
    clean = {"inside": images(2, limit=0.5), "anywhere": images(2), "on the border": images(2).sign()}[place]
    attacked = pgd(wavy, clean, config, generators=generators(0, 1))
    assert (attacked - clean).abs().max() <= 2 * config.epsilon + ROUNDING
    assert attacked.min() >= -1 and attacked.max() <= 1
    assert (attacked != clean).any()
    assert not attacked.requires_grad


@pytest.mark.parametrize("change", [{"epsilon": 0.0}, {"num_steps": 0}])
@pytest.mark.parametrize("random_start", [True, False])
def test_no_budget_or_no_step_is_the_identity(change, random_start, images) -> None:
    """Oracle: closed form, exact."""
    config = replace(PGDConfig(random_start=random_start), **change)
    assert torch.equal(pgd(wavy, images(2), config), images(2))


@pytest.mark.parametrize("random_start", [True, False])
def test_maximum_of_a_linear_objective_is_reached(random_start, images, generators) -> None:
    """Oracle: closed form. In the ball the maximum of <g,x> is at clean + 2 eps sign(g): it gains 2 eps |g|_1."""
    clean, weights = images(3, limit=0.5), images(3, seed=1)
    config = PGDConfig(epsilon=EPSILON, random_start=random_start)
    objective = linear(weights)
    attacked = pgd(objective, clean, config, generators=generators(0, 1, 2))
    gain = objective(attacked) - objective(clean)
    # One float32 rounding per pixel, and sums of 768 terms.
    torch.testing.assert_close(attacked, clean + RADIUS * weights.sign(), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(gain, RADIUS * weights.abs().flatten(1).sum(dim=1), rtol=1e-5, atol=0)


def test_maximum_of_a_linear_objective_at_the_border(images, generators) -> None:
    """Oracle: closed form, the ball's corner clipped to [-1,1] pixel by pixel; exact but for one rounding."""
    clean, weights = images(2).sign(), images(2, seed=1)
    attacked = pgd(linear(weights), clean, PGDConfig(epsilon=EPSILON), generators=generators(0, 1))
    torch.testing.assert_close(attacked, (clean + RADIUS * weights.sign()).clamp(-1, 1), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("num_steps", [1, 3, 4, 7])
def test_few_steps_go_as_far_as_steps_do(num_steps, images) -> None:
    """Oracle: closed form, min(eps, steps * step) along the sign: a step is in units of a [0,1] image as eps is."""
    clean, weights = images(2, limit=0.5), images(2, seed=1)
    config = replace(FIXED_START, num_steps=num_steps, step_size=2 / 255)
    reach = 2 * min(EPSILON, num_steps * 2 / 255)
    attacked = pgd(linear(weights), clean, config)
    # One rounding per step.
    torch.testing.assert_close(attacked, clean + reach * weights.sign(), rtol=0, atol=num_steps * ROUNDING)


def test_projection_is_the_nearest_point(images) -> None:
    """Oracle: closed form per pixel, the median of the value and the two ends of the allowed interval; exact."""
    clean, wild = images(2), images(2, seed=1, limit=2.0)
    low, high = (clean - RADIUS).clamp(min=-1), (clean + RADIUS).clamp(max=1)
    projected = project_linf(wild, clean, EPSILON)
    assert torch.equal(projected, torch.stack([low, wild, high]).median(dim=0).values)
    assert torch.equal(project_linf(projected, clean, EPSILON), projected)


def test_arguments_are_not_changed(images, generators) -> None:
    """Oracle: invariance, the clean batch keeps its values although projection works in place."""
    clean = images(2)
    pgd(wavy, clean, PGDConfig(num_restarts=2), generators=generators(0, 1))
    assert torch.equal(clean, images(2))


@pytest.mark.parametrize("outer", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("fails", [False, True])
def test_parameters_are_left_as_they_were(outer, fails, tiny_vae, images, generators) -> None:
    """Oracle: invariance, `.grad` keeps object and value, `requires_grad` comes back, also after an exception."""
    encoder = LatentEncoder(tiny_vae)
    encoder.quant_conv.weight.requires_grad_(False)
    for number, parameter in enumerate(encoder.parameters()):
        parameter.grad = None if number % 2 else torch.full_like(parameter, 3.0)
    before = [(parameter.requires_grad, parameter.grad) for parameter in encoder.parameters()]
    inside = []
    attacked_objective = reconstruction_objective(tiny_vae, images(2))

    def objective(batch: Tensor) -> Tensor:
        inside.append(any(parameter.requires_grad for parameter in encoder.parameters()))
        if fails:
            raise RuntimeError("out of memory")
        return attacked_objective(batch)

    expected = pytest.raises(RuntimeError, match="out of memory") if fails else nullcontext()
    with expected, outer(), frozen(encoder):
        attacked = pgd(objective, images(2), PGDConfig(num_steps=2), generators=generators(0, 1))
        assert (attacked != images(2)).any()
    assert inside and not any(inside)
    for (required, gradient), parameter in zip(before, encoder.parameters(), strict=True):
        assert parameter.requires_grad == required
        assert parameter.grad is gradient
        assert gradient is None or (gradient == 3).all()


def test_attack_without_frozen_leaves_gradients_alone(tiny_vae, images) -> None:
    """Oracle: invariance, trainable parameters get no `.grad` from the attack itself."""
    pgd(reconstruction_objective(tiny_vae, images(1)), images(1), replace(FIXED_START, num_steps=1))
    assert all(parameter.grad is None for parameter in tiny_vae.parameters())
    assert all(parameter.requires_grad for parameter in tiny_vae.encoder.parameters())


@pytest.mark.parametrize(
    "config", [PGDConfig(), PGDConfig(num_restarts=2), PGDConfig(keep_best=True)], ids=["one", "restarts", "best"]
)
def test_batch_equals_concatenated_singles(config, images, generators) -> None:
    """Oracle: invariance, exact for an objective that works pixel by pixel."""
    clean = images(3)
    batch = pgd(wavy, clean, config, generators=generators(4, 5, 6))
    singles = [pgd(wavy, clean[i : i + 1], config, generators=generators(4 + i)) for i in range(3)]
    assert torch.equal(batch, torch.cat(singles))


def test_batch_of_an_autoencoder_equals_singles(tiny_vae, images, generators) -> None:
    """Oracle: invariance of the objective that is reached.

    Convolutions round differently in batches, which flips the sign of a gradient near 0 here and there.
    """
    clean, config = images(3), PGDConfig(num_steps=5)
    attacked = pgd(reconstruction_objective(tiny_vae, clean), clean, config, generators=generators(4, 5, 6))
    for i in range(3):
        alone = reconstruction_objective(tiny_vae, clean[i : i + 1])
        single = pgd(alone, clean[i : i + 1], config, generators=generators(4 + i))
        torch.testing.assert_close(alone(attacked[i : i + 1]), alone(single), rtol=1e-3, atol=0)


def test_random_start_depends_on_its_generator_alone(images, generators) -> None:
    """Oracle: invariance. Where the gradient is 0 the start is returned: it follows its generator through batches."""
    clean, config = images(3), PGDConfig(epsilon=EPSILON, num_steps=1)
    starts = pgd(flat, clean, config, generators=generators(4, 5, 6))
    swapped = pgd(flat, clean.flip(0)[:2], config, generators=generators(6, 5))
    assert torch.equal(starts[1:].flip(0), swapped)
    other = pgd(flat, clean[1:2], config, generators=generators(99))
    assert not torch.equal(starts[1:2], other)


def test_random_start_is_uniform_in_the_ball(generators) -> None:
    """Oracle: closed form, a uniform variable on [-r,r] has deviation r/sqrt(3) and reaches its ends."""
    start = pgd(flat, torch.zeros(1, 3, 64, 64), PGDConfig(epsilon=EPSILON, num_steps=1), generators=generators(0))
    count = start.numel()
    # Four standard errors; a uniform sample of n comes within 10 r/n of its end but for 1 in 100.
    assert start.mean().item() == pytest.approx(0, abs=4 * RADIUS / (3 * count) ** 0.5)
    assert start.std().item() == pytest.approx(RADIUS / 3**0.5, rel=4 / (2 * count) ** 0.5)
    assert start.max() > RADIUS * (1 - 10 / count) and start.min() < -RADIUS * (1 - 10 / count)


@pytest.mark.parametrize("seeds", [None, (), (0,), (0, 1, 2)])
def test_random_start_needs_a_generator_per_image(seeds, images, generators) -> None:
    """Oracle: specification; a fixed start needs none."""
    given = None if seeds is None else generators(*seeds)
    with pytest.raises(ValueError, match="one generator per image"):
        pgd(wavy, images(2), PGDConfig(), generators=given)
    pgd(wavy, images(2), FIXED_START, generators=given)


@pytest.mark.parametrize("change", [{"keep_best": True}, {"num_restarts": 4}], ids=["keep best", "restarts"])
def test_best_is_never_below_the_last_iterate_of_one_run(change, images, generators) -> None:
    """Oracle: bound, image by image; on a wavy objective the last iterate is not the best, so it must also gain."""
    clean, config = images(4), PGDConfig(epsilon=EPSILON, num_steps=3)
    last = wavy(pgd(wavy, clean, config, generators=generators(0, 1, 2, 3)))
    best = wavy(pgd(wavy, clean, replace(config, **change), generators=generators(0, 1, 2, 3)))
    assert (best >= last).all()
    assert (best > last).any()


def test_best_iterate_is_chosen_for_each_image(generators) -> None:
    """Oracle: closed form. The step of 8 eps overshoots the maximum at the start of image 0, which must be kept;
    image 1, whose maximum lies beyond the ball, must end at the ball's border."""
    clean = torch.zeros(2, 3, 4, 4)
    maximum = torch.tensor([0.01, 1.0])[:, None, None, None]
    config = replace(FIXED_START, keep_best=True, step_size=EPSILON, num_steps=4)
    attacked = pgd(lambda batch: -(batch - maximum).square().flatten(1).sum(dim=1), clean, config)
    assert torch.equal(attacked[0], clean[0])
    torch.testing.assert_close(attacked[1], torch.full((3, 4, 4), RADIUS), rtol=0, atol=ROUNDING)


def test_half_precision_gradients_keep_their_sign(images) -> None:
    """Oracle: float32. A mean over pixels has gradients near 1e-8 here, below the smallest float16 (6e-8)."""
    clean = images(2, 64)

    def objective(dtype: torch.dtype):
        return lambda batch: (0.01 * batch.to(dtype)).float().sub(0.01 * clean).square().flatten(1).mean(dim=1)

    start = clean + 0.1 * images(2, 64, seed=1)
    signs = {}
    for dtype in (torch.float32, torch.float16):
        signs[dtype] = value_and_gradient(objective(dtype), start)[1].sign()
    unscaled = start.clone().requires_grad_(True)
    (lost,) = torch.autograd.grad(objective(torch.float16)(unscaled).sum(), unscaled)
    assert (lost == 0).float().mean() > 0.9, "the objective is meant to be one where unscaled gradients vanish"
    zeros = {dtype: (sign == 0).float().mean().item() for dtype, sign in signs.items()}
    # Rounding the image to float16 (2^-11) zeroes or flips differences as small as that: 0.5% of those up to 0.1.
    assert zeros[torch.float16] <= zeros[torch.float32] + 0.01
    assert (signs[torch.float16] == signs[torch.float32]).float().mean() > 0.98


class ReconstructionPGD(LinfProjectedGradientDescentAttack):
    """Foolbox's attack with the reconstruction objective and a given random start."""

    def __init__(self, objective, start: Tensor, **settings) -> None:
        super().__init__(**settings, random_start=True)
        self.objective, self.start = objective, start

    def get_loss_fn(self, model, labels):
        return lambda inputs: astensor(self.objective(to_model_range(model(inputs).raw))).sum()

    def get_random_start(self, x0, epsilon):
        return astensor(self.start)


def test_attack_is_not_weaker_than_foolbox(miniature_vae, generators) -> None:
    """Oracle: foolbox's L-infinity PGD, same objective, VAE, budget, step, number of steps and random start.

    The two round differently ([0,1] against [-1,1]), so a few signs differ: 2% of the loss are allowed.
    """
    pictures = [draw_scene(77, i).image for i in range(2)] + [draw_dead_leaves(77, i) for i in range(2)]
    clean = torch.stack([from_pil(picture) for picture in pictures])
    objective = reconstruction_objective(miniature_vae, clean)
    config = PGDConfig(epsilon=EPSILON, step_size=2 / 255, num_steps=10)
    ours = pgd(objective, clean, config, generators=generators(0, 1, 2, 3))
    start = pgd(flat, clean, replace(config, num_steps=1), generators=generators(0, 1, 2, 3))
    theirs = ReconstructionPGD(
        objective, to_unit_range(start), steps=config.num_steps, abs_stepsize=config.step_size
    ).run(
        foolbox.PyTorchModel(torch.nn.Identity().eval(), bounds=(0, 1), device="cpu"),
        to_unit_range(clean),
        foolbox.Misclassification(torch.zeros(4, dtype=torch.long)),
        epsilon=config.epsilon,
    )
    theirs = to_model_range(theirs)
    assert (theirs - clean).abs().max() <= RADIUS + 4 * ROUNDING
    with torch.no_grad():
        reached = objective(theirs).mean()
        assert objective(ours).mean() >= 0.98 * reached
        # The comparison says something only where the attack has an effect to compare.
        assert reached > 1.2 * objective(clean).mean()
