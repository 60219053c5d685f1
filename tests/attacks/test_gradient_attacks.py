from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import foolbox
import pytest
import torch
from eagerpy import astensor
from foolbox.attacks import L2ProjectedGradientDescentAttack, LinfProjectedGradientDescentAttack
from helpers.objectives import ROUNDING, euclidean, flat, linear, reconstruction_objective, wavy
from scipy.stats import kstest
from torch import Tensor

from miniature.scenes import draw_dead_leaves, draw_scene
from srl_utils.attacks.gradient import APGDConfig, Budget, PGDConfig, expected, negated, pgd, value_and_gradient
from srl_utils.images.pixels import from_pil, to_model_range, to_unit_range
from srl_utils.vae.networks import LatentEncoder, frozen

EPSILON = 8 / 255
RADIUS = 2 * EPSILON  # between images in [-1,1]
FIXED_START = PGDConfig(epsilon=EPSILON, random_start=False)
LENGTH = 0.5  # epsilon of an l2 ball: a root mean square of 4.6/255 in images of 16 pixels
EUCLIDEAN = PGDConfig(epsilon=LENGTH, norm="l2", step_size=0.1, random_start=False)


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
    projected = Budget(epsilon=EPSILON).project(wild, clean)
    assert torch.equal(projected, torch.stack([low, wild, high]).median(dim=0).values)
    assert torch.equal(Budget(epsilon=EPSILON).project(projected, clean), projected)


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


@pytest.mark.parametrize("seeds", [(), (0,), (0, 1, 2)])
def test_random_start_needs_a_generator_per_image(seeds, images, generators) -> None:
    """Oracle: specification; a fixed start needs none."""
    with pytest.raises(ValueError, match="one generator per image"):
        pgd(wavy, images(2), PGDConfig(), generators=generators(*seeds))
    pgd(wavy, images(2), FIXED_START, generators=generators(*seeds))


def test_default_attack_works_without_generators(images) -> None:
    """Oracle: PyTorch's global generator given for each image; seeded alike the attacks agree, and otherwise differ."""
    clean, results = images(2), []
    for seed, given in [(3, None), (3, [torch.default_generator] * 2), (4, None)]:
        torch.manual_seed(seed)
        results.append(pgd(wavy, clean, PGDConfig(), generators=given))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_starts_without_generators_differ_between_images_and_calls() -> None:
    """Oracle: specification; a batch of equal images gets different starts, and the next call gets others."""
    clean, config = torch.zeros(2, 3, 8, 8), PGDConfig(num_steps=1)
    first, second = pgd(flat, clean, config), pgd(flat, clean, config)
    assert not torch.equal(*first) and not torch.equal(first, second)


def test_fixed_start_leaves_the_global_generator_alone(images) -> None:
    """Oracle: invariance of the global generator's state."""
    before = torch.get_rng_state()
    pgd(wavy, images(2), FIXED_START)
    assert torch.equal(torch.get_rng_state(), before)


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


class GivenObjective:
    """Mixed into one of foolbox's attacks: maximises an objective of this project, from a given random start."""

    def __init__(self, objective, start: Tensor, **settings) -> None:
        super().__init__(**settings, random_start=True)
        self.objective, self.start = objective, start

    def get_loss_fn(self, model, labels):
        return lambda inputs: astensor(self.objective(to_model_range(model(inputs).raw))).sum()

    def get_random_start(self, x0, epsilon):
        return astensor(to_unit_range(self.start))

    def attack(self, clean: Tensor, epsilon: float) -> Tensor:
        attacked = self.run(
            foolbox.PyTorchModel(torch.nn.Identity().eval(), bounds=(0, 1), device="cpu"),
            to_unit_range(clean),
            foolbox.Misclassification(torch.zeros(len(clean), dtype=torch.long)),
            epsilon=epsilon,
        )
        return to_model_range(attacked)


class FoolboxPGD(GivenObjective, LinfProjectedGradientDescentAttack):
    pass


class FoolboxEuclideanPGD(GivenObjective, L2ProjectedGradientDescentAttack):
    pass


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
    theirs = FoolboxPGD(objective, start, steps=config.num_steps, abs_stepsize=config.step_size).attack(clean, EPSILON)
    assert (theirs - clean).abs().max() <= RADIUS + 4 * ROUNDING
    with torch.no_grad():
        reached = objective(theirs).mean()
        assert objective(ours).mean() >= 0.98 * reached
        # The comparison says something only where the attack has an effect to compare.
        assert reached > 1.2 * objective(clean).mean()


@pytest.mark.parametrize("place", ["inside", "anywhere", "on the border"])
@pytest.mark.parametrize(
    "change",
    [{}, {"random_start": True}, {"step_size": 5.0}, {"epsilon": 30.0, "step_size": 5.0}],
    ids=["fixed start", "random start", "huge step", "whole range"],
)
def test_result_is_in_the_euclidean_ball_and_in_the_range(change, place, images, generators) -> None:
    """Oracle: specification; lengths in float64, for images inside the range and for those at its border."""
    clean = {"inside": images(2, limit=0.5), "anywhere": images(2), "on the border": images(2).sign()}[place]
    config = replace(EUCLIDEAN, **change)
    attacked = pgd(wavy, clean, config, generators=generators(0, 1))
    # A rounding for each of 768 values, as a share of the length.
    assert (euclidean(attacked - clean) <= 2 * config.epsilon * (1 + 1e-5)).all()
    assert attacked.min() >= -1 and attacked.max() <= 1
    assert (attacked != clean).any()


def test_projection_into_the_euclidean_ball(images) -> None:
    """Oracle: closed form. Far from the range's border the nearest point of a ball lies on the line to its centre."""
    clean, budget = images(2, limit=0.1), Budget(epsilon=LENGTH, norm="l2")
    direction = images(2, seed=1)
    direction = direction / euclidean(direction).float()[:, None, None, None]
    outside = budget.project(clean + 3.0 * direction, clean)
    torch.testing.assert_close(outside, clean + 2 * LENGTH * direction, rtol=0, atol=1e-6)
    inside = clean + 0.9 * direction
    torch.testing.assert_close(budget.project(inside, clean), inside, rtol=0, atol=ROUNDING)


def test_euclidean_projection_clips_to_the_range() -> None:
    """Oracle: closed form by hand. From (1, 0, ...) the change (3, 4, 0, ...) has length 5; in a ball of length 1 it is
    (0.6, 0.8), of which the first leaves the range."""
    clean = torch.zeros(1, 3, 1, 1)
    clean[0, 0] = 1.0
    change = torch.tensor([3.0, 4.0, 0.0]).view(1, 3, 1, 1)
    projected = Budget(epsilon=0.5, norm="l2").project(clean + change, clean)
    torch.testing.assert_close(projected.flatten(), torch.tensor([1.0, 0.8, 0.0]), rtol=0, atol=ROUNDING)


def test_euclidean_start_is_uniform_in_the_ball(generators) -> None:
    """Oracle: closed form. In d dimensions the share of a ball's volume within reach s is s^d: that share is uniform on
    [0,1] (Kolmogorov and Smirnov's test), and so is the angle that two coordinates make, by symmetry."""
    clean = torch.zeros(300, 3, 2, 2)
    start = Budget(epsilon=0.1, norm="l2").draw(clean, generators(*range(300)))
    assert kstest((euclidean(start) / 0.2) ** 12, "uniform").pvalue > 0.01
    for first, second in [(0, 1), (5, 9)]:
        angle = torch.atan2(start.flatten(1)[:, first], start.flatten(1)[:, second])
        assert kstest((angle / torch.pi + 1) / 2, "uniform").pvalue > 0.01


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_start_follows_its_generator(norm, images, generators) -> None:
    """Oracle: invariance, exact: the batch's start is made of the images' own, in either norm."""
    clean, budget = images(3), Budget(epsilon=EPSILON, norm=norm)
    for draw in (budget.draw, budget.draw_border):
        singles = [draw(clean[i : i + 1], generators(7 + i)) for i in range(3)]
        assert torch.equal(draw(clean, generators(7, 8, 9)), torch.cat(singles))
        assert not torch.equal(singles[0], draw(clean[:1], generators(8)))


@pytest.mark.parametrize(
    "change",
    [{}, {"random_start": True, "step_size": 1000 * LENGTH}],
    ids=["fixed start", "random start"],
)
def test_maximum_of_a_linear_objective_in_the_euclidean_ball(change, images, generators) -> None:
    """Oracle: closed form. In the ball the maximum of <g,x> is at clean + 2 eps g/|g|: it gains 2 eps |g|.

    From a random start steps 1000 times the radius leave 1/1000 of the way to the maximum each.
    """
    clean, weights = images(2, limit=0.5), images(2, seed=1)
    objective = linear(weights)
    attacked = pgd(objective, clean, replace(EUCLIDEAN, **change), generators=generators(0, 1))
    size = euclidean(weights).float()
    # Roundings of up to ten steps.
    at_maximum = clean + 2 * LENGTH * weights / size[:, None, None, None]
    torch.testing.assert_close(attacked, at_maximum, rtol=0, atol=10 * ROUNDING)
    torch.testing.assert_close(objective(attacked) - objective(clean), 2 * LENGTH * size, rtol=1e-4, atol=0)


def test_euclidean_attack_equals_foolbox(tiny_vae, images, generators) -> None:
    """Oracle: foolbox's L2 PGD, same objective, budget, step, number of steps and random start: the same images.

    Both round in every one of ten steps, and the autoencoder passes the difference on: 1e-4 of a range of 2.
    """
    clean, config = images(2), replace(EUCLIDEAN, random_start=True)
    objective = reconstruction_objective(tiny_vae, clean)
    start = config.draw(clean, generators(0, 1))
    theirs = FoolboxEuclideanPGD(objective, start, steps=config.num_steps, abs_stepsize=config.step_size)
    ours = pgd(objective, clean, config, generators=generators(0, 1))
    torch.testing.assert_close(ours, theirs.attack(clean, LENGTH), rtol=0, atol=1e-4)
    assert euclidean(ours - start).min() > 0.1


def test_linear_schedule_leaves_a_hundredth() -> None:
    """Oracle: PhotoGuard's formula s - (s - s/100) i/N, worked out by hand for s = 1 and N = 10."""
    config = PGDConfig(step_size=1.0, num_steps=10, schedule="linear")
    expected = [1.0, 0.901, 0.802, 0.703, 0.604, 0.505, 0.406, 0.307, 0.208, 0.109]
    assert [config.step_at(step) for step in range(10)] == pytest.approx(expected)
    assert [replace(config, schedule="constant").step_at(step) for step in range(10)] == [1.0] * 10


@pytest.mark.parametrize(("schedule", "steps"), [("constant", 4.0), ("linear", 1 + 0.7525 + 0.505 + 0.2575)])
def test_schedule_is_what_the_attack_walks(schedule, steps, images) -> None:
    """Oracle: closed form, the sum of the four steps along the sign of a constant gradient."""
    clean, weights = images(2, limit=0.5), images(2, seed=1)
    config = replace(FIXED_START, epsilon=0.1, step_size=0.01, num_steps=4, schedule=schedule)
    attacked = pgd(linear(weights), clean, config)
    torch.testing.assert_close(attacked, clean + 2 * 0.01 * steps * weights.sign(), rtol=0, atol=4 * ROUNDING)


def test_negated_objective_is_minimised(images) -> None:
    """Oracle: closed form, the least value of <g,x> is at clean - 2 eps sign(g)."""
    clean, weights = images(2, limit=0.5), images(2, seed=1)
    assert torch.equal(negated(wavy)(clean), -wavy(clean))
    attacked = pgd(negated(linear(weights)), clean, FIXED_START)
    torch.testing.assert_close(attacked, clean - RADIUS * weights.sign(), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("kind", [Budget, PGDConfig, APGDConfig])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": -0.1}, "epsilon must be at least 0, got -0.1"),
        ({"epsilon": float("nan")}, "epsilon must be at least 0, got nan"),
        ({"norm": "l1"}, "norm must be one of linf, l2, got 'l1'"),
    ],
)
def test_impossible_budgets_are_refused(kind, change, message) -> None:
    """Oracle: specification, in every configuration; the message names the parameter and its value."""
    with pytest.raises(ValueError, match=message):
        kind(**change)


@pytest.mark.parametrize("kind", [PGDConfig, APGDConfig])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": -1}, "num_steps must be at least 0, got -1"),
        ({"num_restarts": 0}, "num_restarts must be at least 1, got 0"),
    ],
)
def test_impossible_lengths_are_refused(kind, change, message) -> None:
    """Oracle: specification; the message names the parameter and its value."""
    with pytest.raises(ValueError, match=message):
        kind(**change)


def test_unknown_schedule_is_refused() -> None:
    """Oracle: specification, the message names what there is."""
    with pytest.raises(ValueError, match="constant, linear"):
        PGDConfig(schedule="cosine")


def test_the_mean_of_draws() -> None:
    """Oracle: closed form: the mean of (d x)^2 over draws d has the gradient 2 x times the mean of d^2; one draw is the
    objective itself."""
    draws = iter([1.0, 2.0, 3.0] * 2)
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def objective(batch: Tensor) -> Tensor:
        return (next(draws) * batch).square().flatten(1).mean(dim=1)

    value, gradient = value_and_gradient(expected(objective, 3), images)
    squares = images.square().flatten(1).mean(dim=1)
    assert value.tolist() == pytest.approx((14 / 3 * squares).tolist())
    torch.testing.assert_close(gradient, 2 * 14 / 3 * images)
    with torch.no_grad():
        assert expected(objective, 3)(images).tolist() == pytest.approx(value.tolist())
    assert expected(objective, 1) is objective
