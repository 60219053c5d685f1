"""Whether a diffusion model still learns a concept from a few protected images of it, with each VAE."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median_low

from srl_utils.command_line import Effects, positive_int
from srl_utils.errors import UserError
from srl_utils.evaluation.catalogue import NOISE
from srl_utils.evaluation.cli.arguments import (
    add_attack_arguments,
    add_metrics_argument,
    add_pipeline_arguments,
    add_shared_arguments,
    attack_effects,
    classifier_effects,
    has_set_metrics,
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
    chosen_perturbations,
    defended,
    exchangeable,
    prepare,
)
from srl_utils.evaluation.perturbations import CLEAN
from srl_utils.evaluation.report.figures import draw_bars
from srl_utils.evaluation.results import Record, Rows
from srl_utils.evaluation.sanity import CheckSettings
from srl_utils.evaluation.study import Study
from srl_utils.evaluation.tasks.personalisation import NOT_FINETUNED, Personalisation, learnt_with
from srl_utils.files import write_atomically
from srl_utils.images.captions import names
from srl_utils.metrics.features import FEATURE_SIMILARITY

SIMILARITIES = ("clip", FEATURE_SIMILARITY, "clip-text", "shown")
METRICS = (*SIMILARITIES, "fid", "kid")
DEFAULT_METRICS = ("clip", "clip-text", FEATURE_SIMILARITY, "fid")
DEFAULT_ATTACKS = ("clean", NOISE, "anti-dreambooth-fsmg", "mist-fused", "photoguard-encoder", "glaze")
LEAST_HELD_OUT = 2
"""With fewer images beside the protected ones, generated images are compared with the protected ones' originals."""


def run(args: argparse.Namespace) -> int:
    """Run the evaluation and return its exit code."""
    finetuning = finetuning_config(args)
    classifier = load_classifier(args.classifier, args.metrics)
    setup = of_concept(defended(exchangeable(prepare(args)), args, classifier), args.concept, args.num_protected)
    learner = build_learner(args, setup, finetuning)
    attacks = list(dict.fromkeys([CLEAN, *chosen_perturbations(args, setup, classifier)]))
    images, held_out = setup.images.tensor_split([args.num_protected])
    share = args.num_protected / args.num_generated
    prompt = args.instance_prompt or f"a photo of sks {args.concept or ''}".rstrip()  # a rare word, as in DreamBooth
    task = Personalisation(
        metrics=build_metrics(args, setup, classifier, n=args.num_generated),
        learner=learner,
        images=images,
        references=held_out if len(held_out) >= LEAST_HELD_OUT else images,
        prompt=prompt,
        description=args.concept or prompt,
        protections={(each.name, each.epsilon): each for each in attacks},
        classifier=classifier,
        num_generated=args.num_generated,
    )
    setup.notes.extend(notes_of(task))
    run_study(
        args,
        setup,
        task,
        [NOT_FINETUNED, *(learnt_with(each, passes=share * each.passes) for each in attacks)],
        title="Personalisation on protected images",
        check_settings=CheckSettings(epsilon=median_low(args.epsilons)),
        images=task.reference(setup.codecs[0], range(args.num_generated), ""),
        prompts=[task.prompt],
        draw=partial(draw, task),
    )
    return 0


def of_concept(setup: Setup, concept: str | None, num_protected: int) -> Setup:
    """Return `setup` with the images whose captions name the concept; None takes all images.

    Raises:
        UserError: if an image has no caption, or if there are fewer images than have to be protected.
    """
    numbers: Sequence[int] = range(len(setup.images))
    if concept is not None:
        check_captions(setup, "--concept")
        numbers = [number for number in numbers if names(setup.captions[number], concept)]
    if len(numbers) < num_protected:
        named = "" if concept is None else f" whose captions name '{concept}'"
        raise UserError(
            f"there are {len(numbers)} images{named}, and {num_protected} are to be protected; give more images, or protect "
            "fewer",
            parameter="num_protected",
        )
    return setup.only(numbers)


def notes_of(task: Personalisation) -> list[str]:
    """Return what a reader must know about the images that were learnt and those that were compared with."""
    found = [
        f"the models learn {len(task.images)} images with the caption '{task.prompt}'; {task.num_generated} images generated "
        f"from it are compared with {len(task.references)} clean images"
    ]
    if task.references is task.images:
        found.append(
            "too few images were left to hold out: generated images are compared with the clean originals of those that "
            "the models learn, so that copies score well too"
        )
    if has_set_metrics(task.metrics.names) and task.num_generated != len(task.references):
        found.append(
            f"FID and KID compare {task.num_generated} generated images with as many clean ones: some of the "
            f"{len(task.references)} are repeated or left out"
        )
    return found


def draw(task: Personalisation, study: Study, rows: Rows, records: Sequence[Record]) -> dict[str, Path]:
    """Draw each similarity as bars, and some images that each fine-tuned model generates."""
    vaes, folder = [codec.name for codec in study.undefended], study.output_dir / "figures"
    drawn: dict[str, Path] = {}
    for metric in SIMILARITIES:
        drawn |= draw_bars(rows, vaes, metric, folder)
    path, clean = folder / "generated.png", [("clean images of the concept", task.references)]
    write_atomically(path, lambda aside: generated_picture(study, task.learner, clean).save(aside, format="PNG"))
    return drawn | {f"What the models generate from '{task.prompt}'": path}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this evaluation."""
    add_shared_arguments(parser)
    add_attack_arguments(parser, attacks=DEFAULT_ATTACKS, epsilons=[8 / 255])
    add_pipeline_arguments(parser)
    add = parser.add_argument
    add_metrics_argument(parser, METRICS, default=DEFAULT_METRICS)
    add(
        "--concept",
        default=None,
        help="words of the captions whose images are taken; default: all images show the concept",
    )
    add(
        "--instance_prompt", default=None,
        help="caption of all images, from which the models generate; default: 'a photo of sks' and the concept",
    )  # fmt: skip
    add(
        "--num_protected",
        type=positive_int,
        default=4,
        help="images that are protected and learnt; the others are held out",
    )
    add("--num_generated", type=positive_int, default=16, help="images that each model generates")
    add_finetuning_arguments(parser, steps=500, batch_size=2, learning_rate=1e-4, lora_rank=4)


def effects(args: argparse.Namespace) -> Effects:
    """Return when each flag has an effect, and what it needs to have one."""
    return {
        **shared_effects(args),
        **attack_effects(args.attacks, checked=not args.no_checks),
        **classifier_effects(args, args.attacks),
        "caption_column": (args.concept is not None, "--concept, which chooses images by their captions"),
    }
