"""Whether a diffusion model still learns a concept from images of which some are poisoned, with each VAE."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from srl_utils.attacks.protections import PROTECTIONS
from srl_utils.command_line import Effects, non_negative_int, positive_int
from srl_utils.evaluation.catalogue import AttackResources, select
from srl_utils.evaluation.cli.arguments import (
    add_check_arguments,
    add_metrics_argument,
    add_pipeline_arguments,
    add_shared_arguments,
    budget,
    check_effects,
    classifier_effects,
    shared_effects,
)
from srl_utils.evaluation.cli.learning import (
    add_finetuning_arguments,
    build_learner,
    finetuning_config,
    generated_picture,
)
from srl_utils.evaluation.cli.loading import load_classifier
from srl_utils.evaluation.cli.running import run_study
from srl_utils.evaluation.cli.setup import (
    Setup,
    build_metrics,
    check_captions,
    defended,
    exchangeable,
    perceptual_bound,
    prepare,
    try_lpips,
)
from srl_utils.evaluation.perturbations import Perturbation
from srl_utils.evaluation.report.figures import draw_curves
from srl_utils.evaluation.results import Record, Rows
from srl_utils.evaluation.sanity import CheckSettings
from srl_utils.evaluation.study import THREAT_MODELS, Study
from srl_utils.evaluation.tasks.poisoning import Dose, Poison, Poisoning, divide, doses, poisoning
from srl_utils.files import write_atomically
from srl_utils.metrics.features import ImageClassifier
from srl_utils.metrics.losses import LPIPS_METRICS

METRICS = ("psnr", "ssim", *LPIPS_METRICS, "clip", "clip-text", "shown", "fid", "kid")
USUAL_EPSILON = 8 / 255
"""Budget of the robustness checks if the budget of the poisons is in another measure, in units of a [0,1] image."""
INTERPOLATED = re.compile(r"interpolated-(\d{1,3})")
TARGETED = tuple(name for name, protection in PROTECTIONS.items() if protection.has_target)


def run(args: argparse.Namespace) -> int:
    """Run the evaluation and return its exit code."""
    finetuning = finetuning_config(args)
    classifier = load_classifier(args.classifier, args.metrics)
    setup = defended(exchangeable(prepare(args)), args, classifier)
    check_captions(setup, "poisoning")
    concepts = divide(
        setup.captions, concept=args.concept, target=args.target_concept, num_poisons=max(args.num_poisons),
        num_held_out=args.num_generated,
    )  # fmt: skip
    poisons = [build_poison(name, args, setup, classifier) for name in dict.fromkeys(args.protection)]
    given = {dose.name: dose for dose in doses(poisons, args.num_poisons)}
    task = Poisoning(
        metrics=build_metrics(args, setup, classifier),
        learner=build_learner(args, setup, finetuning),
        images=setup.images,
        captions=setup.captions,
        concepts=concepts,
        doses=given,
        classifier=classifier,
    )
    # All doses of a poison share the poisons of the largest.
    made = max(args.num_poisons) / max(1, len({*args.num_poisons} - {0})) / len(concepts.held_out)
    scalable = [poison.epsilon for poison in poisons if poison.epsilon]
    run_study(
        args,
        setup,
        task,
        [poisoning(dose, passes=made * dose.poison.passes) for dose in given.values()],
        title="Poisoned fine-tuning",
        check_settings=CheckSettings(epsilon=min(scalable, default=USUAL_EPSILON)),
        images=setup.images[concepts.held_out],
        prompts=setup.captions,
        draw=partial(draw, task),
    )
    return 0


def draw(task: Poisoning, study: Study, rows: Rows, records: Sequence[Record]) -> dict[str, Path]:
    """Draw each metric against the number of poisons, and some images that each fine-tuned model generates."""
    vaes, folder = [codec.name for codec in study.codecs], study.output_dir / "figures"
    curves: dict[str, Path] = {}
    for poison in dict.fromkeys(dose.poison for dose in task.doses.values() if dose.amount):
        amounts = {name: dose.amount for name, dose in task.doses.items() if dose.poison == poison or not dose.amount}
        curves |= draw_curves(rows, vaes, amounts, folder, label=f"number of poisons, {poison.name}")
    most = max(dose.amount for dose in task.doses.values())
    shares = {name: round(100 * dose.poison.share) for name, dose in task.doses.items() if is_control(dose, most)}
    if len(shares) > 2:
        curves |= draw_curves(rows, vaes, shares, folder, label=f"% of the way, {most} poisons")
    path = folder / "generated.png"
    write_atomically(path, lambda aside: generated_picture(study, task.learner).save(aside, format="PNG"))
    return curves | {"What the fine-tuned models generate from held-out captions": path}


def is_control(dose: Dose, amount: int) -> bool:
    """Return whether a dose is on the curve of interpolated latents: without an attack, of `amount` poisons or none."""
    return dose.poison.attack is None and dose.amount in (0, amount)


def build_poison(name: str, args: argparse.Namespace, setup: Setup, classifier: ImageClassifier | None) -> Poison:
    """Return the poison of this name: a protection, or interpolated latents.

    Args:
        name: of a protection, or `interpolated-PERCENT`.
        args: `epsilon`, a budget in the protections' own measure, and `max_attack_steps`, which shortens them.
        setup: has the pipeline; its notes are extended.
        classifier: bounds Glaze where LPIPS has no weights.

    Raises:
        UserError: if the protection needs something that is missing.
    """
    if match := INTERPOLATED.fullmatch(name):
        return Poison(name=name, share=int(match[1]) / 100)
    protection = PROTECTIONS[name]
    bound = perceptual_bound(setup, try_lpips(setup), classifier, "Glaze") if protection.needs_perceptual else None
    resources = AttackResources(pipeline=setup.pipeline, bound=bound, max_steps=args.max_attack_steps)
    epsilon = args.epsilon or protection.config.epsilon

    def towards(targets: Tensor) -> Perturbation:
        return select([name], [epsilon], replace(resources, target=targets)).perturbations[0]

    cost = towards(setup.images[:1]).passes  # raises before any work
    return Poison(name=name, attack=towards, epsilon=epsilon if protection.scalable else 0.0, passes=cost)


def poison_name(text: str) -> str:
    """Parse the name of a poison."""
    match = INTERPOLATED.fullmatch(text)
    if text in TARGETED or (match and 0 < int(match[1]) <= 100):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(TARGETED)}, interpolated-PERCENT (1 to 100)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this evaluation."""
    add_shared_arguments(parser)
    add_pipeline_arguments(parser)
    add = parser.add_argument
    add_metrics_argument(parser, METRICS, default=["clip", "clip-text", "fid"])
    add("--concept", required=True, help="word of the captions whose images are poisoned")
    add("--target_concept", required=True, help="word of the captions that poisoned images look like to the encoder")
    add(
        "--protection", nargs="+", type=poison_name, default=["nightshade"],
        help=f"how poisons are made: {', '.join(TARGETED)}, or interpolated-PERCENT: no attack, but latents taken so far to the target's",
    )  # fmt: skip
    add(
        "--epsilon",
        type=budget,
        default=None,
        help="budget of the poisons, in the protection's own measure; default: that of its authors",
    )
    add(
        "--num_poisons",
        nargs="+",
        type=non_negative_int,
        default=[0, 25, 50, 100],
        help="a model is fine-tuned for each of these numbers",
    )
    add(
        "--num_generated",
        type=positive_int,
        default=32,
        help="held-out images of the concept, whose captions are generated",
    )
    add(
        "--threat_models", nargs="+", choices=THREAT_MODELS, default=list(THREAT_MODELS),
        help="transfer: poisons made on the baseline; adaptive: poisons made on each VAE itself",
    )  # fmt: skip
    add("--max_attack_steps", type=positive_int, default=None, help="shortens the published protections")
    add_check_arguments(parser)
    add_finetuning_arguments(parser, steps=500, batch_size=8, learning_rate=1e-5, lora_rank=None)
    parser.set_defaults(num_images=500)


def effects(args: argparse.Namespace) -> Effects:
    """Return when each flag has an effect, and what it needs to have one."""
    poisoned = any(args.num_poisons)
    return {
        **shared_effects(args),
        **classifier_effects(args, args.protection),
        **check_effects(not args.no_checks),
        **dict.fromkeys(("epsilon", "threat_models", "max_attack_steps"), (poisoned, "a number of poisons above 0")),
    }
