"""How smooth a VAE is: loss surfaces, clusters of latents, Lipschitz constants, certificates and re-encoding."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from srl_utils.command_line import Effects, positive_int
from srl_utils.errors import UserError
from srl_utils.evaluation.catalogue import AttackResources, select
from srl_utils.evaluation.cli.arguments import add_study_arguments, budget, study_effects
from srl_utils.evaluation.cli.running import fingerprint, settings, used_device
from srl_utils.evaluation.cli.setup import Setup, prepare, suitable
from srl_utils.evaluation.geometry_study import ATTACKED, GeometryStudy
from srl_utils.evaluation.perturbations import ADAPTIVE, CLEAN, NO_THREAT, noise
from srl_utils.evaluation.report.caveats import Caveat, caveats_of_metrics
from srl_utils.evaluation.report.document import ReportContent, write_report
from srl_utils.evaluation.report.figures import draw_curves
from srl_utils.evaluation.report.geometry import AROUND_IMAGES, draw_maps, draw_surfaces
from srl_utils.evaluation.results import Record, Row, Setting, by_setting, to_row, to_rows
from srl_utils.evaluation.tasks.base import Metrics
from srl_utils.evaluation.tasks.geometry import (
    AREA,
    CURVATURE,
    TRUST,
    WEIGHT_AREA,
    Certificate,
    Clusters,
    Interpolation,
    Part,
    Reencoding,
    Smoothness,
    Surface,
)
from srl_utils.files import sole_run
from srl_utils.geometry.certificate import FEWEST_SAMPLES, CenterSmoothing
from srl_utils.geometry.clusters import LatentMap, latent_map
from srl_utils.images.captions import names
from srl_utils.images.pixels import to_model_units
from srl_utils.vae.codec import Codec

PARTS = ("surface", "clusters", "smoothness", "certificate", "interpolation", "reencoding")
LOOK_AT_ATTACKED = frozenset({"surface", "clusters"})
PAIRED = frozenset({"clusters", "interpolation"})
ATTACK_FLAGS = ("epsilon", "attack_steps")
CERTIFICATE_FLAGS = ("attack_steps", "num_certified", "smoothing_sigma", "smoothing_samples")
LABEL_FLAGS = ("caption_column", "label_words")
"""They decide nothing that is stored."""
METRICS = Metrics(names=("psnr",))
"""Of those that other evaluations know."""


def run(args: argparse.Namespace) -> int:
    """Run the evaluation and return its exit code."""
    check_flags(args)
    setup = prepare(args)
    check_setup(args, setup)
    codecs = suitable(setup.codecs, check_continuous, setup.notes)
    study = build_study(args, setup, codecs)
    for note in setup.notes:
        setup.accelerator.print(note)
    if args.dry_run:
        setup.accelerator.print(f"Running on {used_device(setup.accelerator)}\n{describe(study)}")
        return 0
    with sole_run(args.output_dir, is_main_process=setup.accelerator.is_main_process):
        records = study.run()
        if setup.accelerator.is_main_process:
            write_report(build_report(args, setup, study, records), args.output_dir)
            print(f"Report: {args.output_dir / 'report.html'}, {args.output_dir / 'report.md'}")
    return 0


# --- what is checked before any long work ---


def check_flags(args: argparse.Namespace) -> None:
    """Raise a UserError if the flags cannot go together."""
    if args.smoothing_samples < FEWEST_SAMPLES:
        reason = f"a certificate needs at least {FEWEST_SAMPLES} samples, got {args.smoothing_samples}"
        raise UserError(reason, parameter="smoothing_samples")


def check_setup(args: argparse.Namespace, setup: Setup) -> None:
    """Raise a UserError if images or precision do not suit the parts.

    Args:
        args: `parts` and `label_words`.
        setup: what is loaded.
    """
    if setup.accelerator.mixed_precision != "no":
        raise UserError("derivatives need full precision: give `mixed_precision` no", parameter="mixed_precision")
    if paired := [part for part in args.parts if part in PAIRED and len(setup.images) < 2]:
        raise UserError(f"{' and '.join(paired)} need at least 2 images", parameter="num_images")
    labels = labels_of(setup.captions, args.label_words)
    if args.label_words and labels is None:
        raise UserError("needs at least two labels, and two images with the same one", parameter="label_words")


def check_continuous(codec: Codec) -> None:
    """Raise a UserError for a VAE of discrete latents, whose error has no curvature."""
    if codec.codebook is not None:
        raise UserError("its latents are discrete, and geometry needs continuous ones")


def labels_of(captions: Sequence[str], words: Sequence[str]) -> list[str] | None:
    """Return a label for each image; None if there are no labels, or a single one.

    Args:
        captions: of the images, "" for none.
        words: a label is the first of these that a caption has, or "other"; upper and lower case are one. Without words,
            it is the whole caption, if some captions are equal.
    """
    if words:
        labels = [next((word for word in words if names(caption, word)), "other") for caption in captions]
    else:
        labels = list(captions)
    return labels if 1 < len(set(labels)) < len(labels) else None


# --- the study ---


def build_study(args: argparse.Namespace, setup: Setup, codecs: Sequence[Codec]) -> GeometryStudy:
    """Return the study that the flags describe."""
    (attack,) = select([f"apgd-{args.attack_steps}"], [args.epsilon], AttackResources()).perturbations
    smoothing = CenterSmoothing(
        sigma=to_model_units(args.smoothing_sigma), samples=args.smoothing_samples, batch_size=args.batch_size
    )
    labels = labels_of(setup.captions, args.label_words)
    if unused := [word for word in args.label_words if not any(names(caption, word) for caption in setup.captions)]:
        setup.notes.append(f"no caption has {' or '.join(unused)}")
    if labels is None and "clusters" in args.parts:
        setup.notes.append(
            "label-silhouette was left out: it needs labels that images share: --caption_column, and --label_words if it has captions"
        )
    known: dict[str, Callable[[], Part]] = {
        "surface": lambda: Surface(attack=attack),
        "clusters": lambda: Clusters(attack=attack, noise=noise(args.epsilon), labels=labels),
        "smoothness": Smoothness,
        "certificate": lambda: Certificate(
            smoothing=smoothing, num_images=args.num_certified, attack_steps=args.attack_steps
        ),
        "interpolation": Interpolation,
        "reencoding": Reencoding,
    }
    return GeometryStudy(
        accelerator=setup.accelerator,
        codecs=codecs,
        attack=attack,
        parts=[known[name]() for name in PARTS if name in args.parts],
        images=setup.images,
        output_dir=args.output_dir,
        # Stored parts hold whole batches, and the noise of a certificate is drawn in batches.
        fingerprint={**shared_fingerprint(args, setup), "batch_size": args.batch_size},
        own_fingerprints=own_fingerprints(args),
        seed=args.seed,
        batch_size=args.batch_size,
    )


def shared_fingerprint(args: argparse.Namespace, setup: Setup) -> dict[str, object]:
    """Return what the values of all parts depend on."""
    of_parts = {*ATTACK_FLAGS, *CERTIFICATE_FLAGS, *LABEL_FLAGS}
    return {name: value for name, value in fingerprint(args, setup, METRICS).items() if name not in of_parts}


def own_fingerprints(args: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Return what else the values of the chosen parts depend on, by the names that `GeometryStudy` knows."""
    chosen = {
        ATTACKED: ATTACK_FLAGS if not LOOK_AT_ATTACKED.isdisjoint(args.parts) else (),
        "certificate": CERTIFICATE_FLAGS if "certificate" in args.parts else (),
    }
    return {name: {flag: getattr(args, flag) for flag in flags} for name, flags in chosen.items() if flags}


def describe(study: GeometryStudy) -> str:
    """Return what the study would measure, and its cost."""
    sizes = f"{len(study.images)} images, {len(study.codecs)} VAEs, {round(study.passes)} passes through one"
    return "\n".join([sizes, *(f"  {part.name}" for part in study.parts)])


# --- the report ---


def build_report(
    args: argparse.Namespace, setup: Setup, study: GeometryStudy, records: Sequence[Record]
) -> ReportContent:
    """Return the report's content; draw its figures."""
    vaes, folder = [codec.name for codec in study.codecs], args.output_dir / "figures"
    rows = to_rows(records)
    pictures: dict[str, Path] = {}
    for part in study.parts:
        if isinstance(part, Surface):
            pictures |= surface_figures(part, study, records, folder)
        elif isinstance(part, Clusters):
            maps = latent_maps(part, study, setup.notes)
            rows += trust_rows(maps, len(study.images))
            pictures |= draw_maps(maps, part.labels, folder / "map.png") if maps else {}
        elif isinstance(part, Certificate):
            certified = [vae for vae in vaes if any(row.vae == vae and row.attack in part.amounts for row in rows)]
            if certified:
                pictures |= draw_curves(rows, certified, part.amounts, folder, label="certified L2 radius")
        elif isinstance(part, Reencoding):
            pictures |= draw_curves(rows, vaes, part.amounts, folder, label="number of passes")
    return ReportContent(
        title="Geometry", baseline=vaes[0], vaes=vaes, rows=rows, records=records, checks=None, pictures=pictures,
        caveats=all_caveats(study), notes=setup.notes, settings=settings(args, setup),
    )  # fmt: skip


def surface_figures(part: Surface, study: GeometryStudy, records: Sequence[Record], folder: Path) -> dict[str, Path]:
    """Draw the surfaces over images and over weights; return the paths by title."""
    kept = {codec.name: study.tensors(part, codec) for codec in study.codecs}
    clean = {vae: tensors["clean"] for vae, tensors in kept.items()}
    values = by_setting(records)
    attacked = (part.attack.name, part.attack.objective, ADAPTIVE, part.attack.epsilon)
    own = (CLEAN.name, CLEAN.objective, NO_THREAT, CLEAN.epsilon)

    def numbers(done: tuple[str, str | None, str, float], metrics: Sequence[str]) -> dict[str, list[dict[str, float]]]:
        return {
            vae: [{metric: values[vae, Setting(*done, metric)][index] for metric in metrics} for index in range(len(each))]
            for vae, each in clean.items()
        }  # fmt: skip

    def surfaces(name: str) -> dict[str, Tensor]:
        return {vae: tensors[name] for vae, tensors in kept.items()}

    return draw_surfaces(
        surfaces("images"), clean, numbers(attacked, (CURVATURE, AREA)), folder / "surface-images.png", **AROUND_IMAGES,
    ) | draw_surfaces(
        surfaces("weights"), clean, numbers(own, (WEIGHT_AREA,)), folder / "surface-weights.png",
        title="Loss surface around the encoder's weights",
        across=f"first direction (1: {part.weight_range:.0%})", up=f"second direction (1: {part.weight_range:.0%})",
    )  # fmt: skip


def latent_maps(part: Clusters, study: GeometryStudy, notes: list[str]) -> dict[str, LatentMap]:
    """Return the map of each VAE's latents; without openTSNE or enough images, add a note and return none."""
    maps = {}
    for codec in study.codecs:
        kept = study.tensors(part, codec)
        try:
            maps[codec.name] = latent_map(kept["clean"], [kept["noisy"], kept["attacked"]], seed=study.seed)
        except UserError as error:
            notes.append(f"the map of latents was left out: {error}")
            return {}
    return maps


def trust_rows(maps: dict[str, LatentMap], count: int) -> list[Row]:
    """Return the trustworthiness of each VAE's map."""
    setting = Setting(CLEAN.name, CLEAN.objective, NO_THREAT, CLEAN.epsilon, TRUST)
    return [to_row(vae, setting, found.trustworthiness, n=count) for vae, found in maps.items()]


def all_caveats(study: GeometryStudy) -> list[Caveat]:
    """Return what limits the numbers of this study."""
    caveats = caveats_of_metrics(METRICS, study.images[:1].to(study.codecs[0].device), n=len(study.images))
    lipschitz = ("lipschitz-encoder", "lipschitz-encoder-linf", "lipschitz-both", "lipschitz-both-linf")
    caveats.append(Caveat("Lipschitz constants are local, at clean images, and lower bounds.", lipschitz))
    for part in study.parts:
        if isinstance(part, Certificate):
            text = (
                f"Each certificate holds with a probability of {part.smoothing.confidence:.0%}, for the smoothed "
                f"reconstructions of the first {min(part.num_images, len(study.images))} images. Distances and radii are Euclidean, of [0,1] images."
            )
            caveats.append(Caveat(text, ("certified", "certified-distance")))
    return caveats


# --- flags ---


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this evaluation."""
    add_study_arguments(parser)
    parser.set_defaults(num_images=16, num_frames=1, pipeline=None, threat_models=[ADAPTIVE])
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure; more can be added later")
    add("--epsilon", type=budget, default=8 / 255, help="budget of the attack and size of the noise")
    add("--attack_steps", type=positive_int, default=20, help="of APGD, on images and on certificates")
    add("--num_certified", type=positive_int, default=4, help="images to certify, the first ones")
    add("--smoothing_sigma", type=budget, default=0.1, help="standard deviation of the noise of a certificate")
    add("--smoothing_samples", type=positive_int, default=500, help="noisy images of each estimate of a certificate")
    add(
        "--caption_column", default=None,
        help="of the dataset, the tars, or the metadata in --data_dir: captions with --label_words, or labels",
    )  # fmt: skip
    add(
        "--label_words",
        nargs="+",
        default=[],
        metavar="WORD",
        help="the label is the first of these that a caption has",
    )


def effects(args: argparse.Namespace) -> Effects:
    """Return when each flag has an effect, and what it needs to have one."""
    certified = ("certificate" in args.parts, "certificate among --parts")
    attacked = (not LOOK_AT_ATTACKED.isdisjoint(args.parts), "surface or clusters among --parts")
    return {
        **study_effects(args),
        "epsilon": attacked,
        "attack_steps": (attacked[0] or certified[0], "surface, clusters or certificate among --parts"),
        **dict.fromkeys(("num_certified", "smoothing_sigma", "smoothing_samples"), certified),
        "caption_column": ("clusters" in args.parts, "clusters among --parts"),
        "label_words": ("clusters" in args.parts and args.caption_column is not None, "--caption_column and clusters"),
    }
