"""Other ways to spend the time of the fast recipe, tried on the same images, learning rates and number of updates.

    python -m experiments.recipe_variants --like outputs/time-to-robustness/fast-seed0 --seeds 0 1 2

Repeats a finished run of train_srl_vae.py once with each variant and judges what comes out on held-out photographs. Seconds
are of training, without the first step. Finished trainings are kept, and so the same command goes on after an interruption.

Sources: Shafahi et al., "Adversarial Training for Free!" (NeurIPS 2019), for the gradient that serves twice; Zheng et al.,
"Efficient Adversarial Training with Transferable Adversarial Examples" (CVPR 2020), for perturbations carried over.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.textbook_training import train
from experiments.time_to_robustness import Judge, Point, add_judge_arguments, load_images, spread
from srl_utils.attacks.draws import Generators
from srl_utils.attacks.gradient import Objective, PGDConfig, value_and_gradient
from srl_utils.command_line import Parser, exit_code, non_negative_int
from srl_utils.errors import UserError
from srl_utils.evaluation.report.tables import markdown_table
from srl_utils.files import write_text_atomically
from srl_utils.images.pixels import to_model_units
from srl_utils.metrics.losses import ReconstructionLoss, Target, mean_squared_error
from srl_utils.training.step import Step, build_networks
from srl_utils.vae.latents import LatentScale
from srl_utils.vae.loading import HALF_PRECISION, AutoencoderSource, load_autoencoder
from srl_utils.vae.networks import split_moments

COLUMNS = ["variant", "attacked (dB)", "clean (dB)", "drift", "seconds"]


class OneStep:
    """The fast recipe as it is: one step from a random start, for one update."""

    updates_per_batch = 1
    fewest_images = 1
    """That a batch needs."""
    start: Tensor
    """Of the batch in work."""
    progress: float
    """Share of the training that is done."""

    def take(self, step: VariedStep, clean: Tensor, start: Tensor) -> Tensor:
        """`[N,3,H,W]` that the updates on a batch are made on, of which `start` is the attack's random start."""
        self.start = start
        return clean

    def __call__(self, step: VariedStep, clean: Tensor, target: Target) -> Tensor:
        """`[N,3,H,W]` that the encoder is to withstand; called once for each update."""
        return ascend(step, clean, self.start, step.objective(target))


class GrowingSteps(OneStep):
    """One step at first, two in the third quarter, three in the last, each with a size that crosses the ball."""

    def __call__(self, step: VariedStep, clean: Tensor, target: Target) -> Tensor:
        count = 1 if self.progress < 0.5 else 2 if self.progress < 0.75 else 3
        size = step.attack.step_size * (1.0, 0.6, 0.4)[count - 1]
        return ascend(step, clean, self.start, step.objective(target), count=count, size=size)


class CarriedOver(OneStep):
    """Two updates a batch, the second of which goes on from the first one's perturbation: training crops never return."""

    updates_per_batch = 2

    def __call__(self, step: VariedStep, clean: Tensor, target: Target) -> Tensor:
        self.start = ascend(step, clean, self.start, step.objective(target))
        return self.start


class ReusedGradient(OneStep):
    """Four updates a batch without an attack of their own: the update's backward pass moves the images as well."""

    updates_per_batch = 4

    def __call__(self, step: VariedStep, clean: Tensor, target: Target) -> Tensor:
        if self.start.grad is not None:
            self.start = move(step.attack, clean, self.start, self.start.grad, step.attack.step_size)
        self.start = self.start.detach().requires_grad_()
        return self.start


class Revisited(OneStep):
    """An update on as many new images as on those that come back for the second and the third time, a few updates later.

    Each goes on from the perturbation that it had. An attack's step moves it at every visit, and so does the update's own
    backward pass, whose gradient costs next to nothing: the third visit is the fifth step of an attack that paid for three.
    """

    visits, least_waiting = 3, 4
    fewest_images = visits
    ages: Sequence[int] = ()
    """Of the parts of the last update's images: how often each had been seen before."""
    clean: Tensor
    shown: Tensor

    def __init__(self) -> None:
        self.waiting: list[deque[tuple[Tensor, Tensor]]] = [deque() for _ in range(self.visits)]
        """By the number of visits, clean images and what they have become; of those never seen there are none."""

    def take(self, step: VariedStep, clean: Tensor, start: Tensor) -> Tensor:
        self._send_back(step)
        size = len(clean) // self.visits
        parts = list(zip(clean.split(size), start.split(size), strict=True))[: self.visits]
        self.ages = [0] * self.visits  # new images stand in for those that are to come back, until these do
        for age, waiting in enumerate(self.waiting):
            if len(waiting) > self.least_waiting:
                parts[age], self.ages[age] = waiting.popleft(), age
        self.clean, self.start = (
            torch.cat(each).contiguous(memory_format=torch.channels_last) for each in zip(*parts, strict=True)
        )
        return self.clean

    def __call__(self, step: VariedStep, clean: Tensor, target: Target) -> Tensor:
        sizes = [step.attack.step_size * (1.0 if age == 0 else 0.6) for age in self.ages]
        each = torch.tensor(sizes).repeat_interleave(len(clean) // self.visits).view(-1, 1, 1, 1).to(clean)
        self.shown = ascend(step, clean, self.start, step.objective(target), size=each).requires_grad_()
        return self.shown

    def _send_back(self, step: VariedStep) -> None:
        """Moves the last update's images by its gradient, and lets them wait for their next visit."""
        if not self.ages:
            return
        moved = move(step.attack, self.clean, self.shown, self.shown.grad, 0.5 * step.attack.step_size)
        for age, *part in zip(self.ages, self.clean.chunk(self.visits), moved.chunk(self.visits), strict=True):
            if age + 1 < self.visits:
                self.waiting[age + 1].append(tuple(part))


class HalfClean(OneStep):
    """Every second image is left as it is."""

    fewest_images = 2

    def __call__(self, step: VariedStep, clean: Tensor, target: Target) -> Tensor:
        half = len(clean) // 2
        attacked = ascend(step, clean[:half], self.start[:half], step.objective(target.part(0, half)))
        return torch.cat([attacked, clean[half:]])


class LowResolution(OneStep):
    """The step's direction is found at half the resolution, for a quarter of the cost."""

    def __call__(self, step: VariedStep, clean: Tensor, target: Target) -> Tensor:
        small = F.avg_pool2d(clean, 2)
        _, gradient = value_and_gradient(step.objective(step.networks.loss.target(small)), F.avg_pool2d(self.start, 2))
        return move(step.attack, clean, self.start, F.interpolate(gradient, scale_factor=2), step.attack.step_size)


class LatentAttack(OneStep):
    """Two steps that take the latents away from the original's, without the decoder: a third of the cost each."""

    def __call__(self, step: VariedStep, clean: Tensor, target: Target) -> Tensor:
        networks = step.networks
        with torch.no_grad():
            original = split_moments(networks.reference(clean)).mean

        def distance(images: Tensor) -> Tensor:
            return mean_squared_error(split_moments(networks.mirror.encoder(images)).mean, original)

        return ascend(step, clean, self.start, distance, count=2, size=0.6 * step.attack.step_size)


VARIANTS: dict[str, type[OneStep]] = {
    "fast": OneStep,
    "growing-steps": GrowingSteps,
    "carried-over": CarriedOver,
    "reused-gradient": ReusedGradient,
    "revisited": Revisited,
    "half-clean": HalfClean,
    "low-resolution": LowResolution,
    "latent-attack": LatentAttack,
}


@dataclass(frozen=True, kw_only=True)
class VariedStep(Step):
    """The project's step, with another way to find what the encoder is to withstand."""

    perturb: OneStep

    def _perturbed(self, clean: Tensor, target: Target, noise: Tensor | None, generators: Generators) -> Tensor:
        return self.perturb(self, clean, target)

    def objective(self, target: Target) -> Objective:
        """To be maximised by what is shown in place of `target`."""
        return self._objective(target, None)


def ascend(
    step: VariedStep,
    clean: Tensor,
    start: Tensor,
    objective: Objective,
    *,
    count: int = 1,
    size: float | Tensor | None = None,
) -> Tensor:
    """`count` steps up `objective` from `start`, of the recipe's size unless another is given."""
    images = start
    for _ in range(count):
        _, gradient = value_and_gradient(objective, images)
        images = move(step.attack, clean, images, gradient, step.attack.step_size if size is None else size)
    return images


def move(attack: PGDConfig, clean: Tensor, images: Tensor, gradient: Tensor, size: float | Tensor) -> Tensor:
    return attack.project(images.detach() + to_model_units(1.0) * size * gradient.sign(), clean)


class VariedTraining:
    """Updates by a variant, as `experiments.textbook_training.train` wants them: a call for each batch."""

    def __init__(self, settings: argparse.Namespace, variant: OneStep, device: str) -> None:
        names = AutoencoderSource.__dataclass_fields__
        self.vae = load_autoencoder(AutoencoderSource(**{name: getattr(settings, name) for name in names})).to(device)
        networks = build_networks(
            self.vae,
            ReconstructionLoss(),
            autocast_dtype=HALF_PRECISION.get(settings.mixed_precision),
            torch_compile=settings.torch_compile,
        )
        scale = LatentScale.of(self.vae.config)
        self.step = VariedStep(
            networks=networks,
            attack=PGDConfig(epsilon=settings.epsilon, step_size=settings.pgd_step_size, num_steps=settings.pgd_steps),
            originality_weight=settings.originality_weight,
            latent_scale=scale.factor_on(networks.device) if settings.originality_units == "scaled" else 1.0,
            perturb=variant,
        )
        self.parameters = list(networks.encoder.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, fused=True)
        self.num_batches, self.done = settings.max_train_steps, 0

    def __call__(self, clean: Tensor, start: Tensor) -> Tensor:
        """The updates on one batch; returns the last one's loss."""
        variant = self.step.perturb
        variant.progress = self.done / self.num_batches
        images = variant.take(self.step, clean, start)
        for _ in range(variant.updates_per_batch):
            loss, _ = self.step.loss(images, [])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.done += 1
        return loss.detach()


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    like = argparse.Namespace(**json.loads((args.like / "training_args.json").read_text())["arguments"])
    if like.lpips_weight:
        raise UserError(f"{args.like} was trained with LPIPS; give a run with --lpips_weight 0")
    for name in args.variants:
        fewest = VARIANTS[name].fewest_images
        if like.train_batch_size < fewest:
            raise UserError(
                f"{args.like} was trained on {like.train_batch_size} images at a time; {name} needs {fewest}"
            )
    args.model = like.pretrained_model_name_or_path
    judge = Judge(args, load_images(args))
    points = {name: [varied(args, like, judge, name, seed) for seed in args.seeds] for name in args.variants}
    report = markdown_table([COLUMNS, *table_rows(points)])
    write_text_atomically(args.output_dir / "variants.md", report + "\n")
    print(report)
    return 0


def varied(args: argparse.Namespace, like: argparse.Namespace, judge: Judge, name: str, seed: int) -> Point:
    """What a variant comes to with a seed, after as many updates as the run that it repeats."""
    folder = args.output_dir / f"{name}-seed{seed}"
    variant = VARIANTS[name]()
    batches = like.max_train_steps // variant.updates_per_batch
    settings = argparse.Namespace(
        **{**vars(like), "seed": seed, "max_train_steps": batches, "checkpointing_steps": batches}
    )
    if not (folder / f"checkpoint-{batches}").exists():
        train(settings, VariedTraining(settings, variant, args.device), folder)
    return judge.curve(folder)[-1]


def table_rows(points: dict[str, list[Point]]) -> Iterator[list[str]]:
    for name, of_seeds in points.items():
        measures = (("attacked", 2), ("clean", 2), ("drift", 4), ("seconds", 1))
        yield [name, *(spread([getattr(point, part) for point in of_seeds], digits) for part, digits in measures)]


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m experiments.recipe_variants", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--like", type=Path, required=True, help="--output_dir of a run with the fast recipe and without LPIPS")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--seeds", nargs="+", type=non_negative_int, default=[0, 1, 2])
    add("--output_dir", type=Path, default=Path("outputs/recipe-variants"))
    add_judge_arguments(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
