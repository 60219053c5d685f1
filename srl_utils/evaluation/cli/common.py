"""What all evaluations have in common: their flags, and what these say is to be loaded."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date, timedelta
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from os.path import abspath, exists, isdir  # which, unlike pathlib's, say False of a name too long to be one
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from diffusers import AutoencoderKL, DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import Tensor

from srl_utils.attacks.protections import PROTECTIONS, Protection
from srl_utils.command_line import (
    Effects,
    expanded_path,
    fraction,
    home_expanded,
    image_side,
    non_negative_float,
    pixel_distance,
    positive_int,
    seed,
)
from srl_utils.errors import UserError
from srl_utils.evaluation.catalogue import ITERATED, NOISE, Supplies, expanded, known_names
from srl_utils.evaluation.cells import Job
from srl_utils.evaluation.cli.places import FORM, described, parse_named_place, parse_place, resolved_commit
from srl_utils.evaluation.perturbations import Perturbation
from srl_utils.evaluation.report.caveats import Caveat, caveat_of_precision, caveats_of_metrics, caveats_of_prompts
from srl_utils.evaluation.report.document import Findings, write_report
from srl_utils.evaluation.report.extremes import draw_extremes
from srl_utils.evaluation.results import Record, Rows
from srl_utils.evaluation.sanity import Check, Depth, check_robustness
from srl_utils.evaluation.study import THREAT_MODELS, Study
from srl_utils.evaluation.tasks.base import Metrics, Task
from srl_utils.evaluation.tasks.editing import as_image_to_image
from srl_utils.files import read_json, sole_run, write_text_atomically
from srl_utils.images.datasets import ValidationImages, load_validation_images
from srl_utils.images.decoding import UnreadableImage, decode_rgb
from srl_utils.images.framing import centre_square, to_tensor
from srl_utils.images.listing import few
from srl_utils.images.sources import PHOTOGRAPHS, DataSource
from srl_utils.launching import check_launch, launched_accelerator, launched_precision, note_on_compiling
from srl_utils.metrics.features import (
    CLIP_MODEL,
    SET_METRICS,
    ImageClassifier,
    load_clip_similarity,
    load_image_classifier,
    load_inception_features,
)
from srl_utils.metrics.losses import LPIPS_METRICS, PerceptualDistance, load_perceptual_distance
from srl_utils.metrics.pixels import SSIM_WINDOW
from srl_utils.pipelines import robust_vae
from srl_utils.vae.codec import Codec, load_codec
from srl_utils.vae.files import first_line
from srl_utils.vae.loading import HALF_PRECISION, AutoencoderSource

CLIP_METRICS = ("clip", "clip-text")
BASELINE = "original"
LONGEST_WAIT = timedelta(days=1)
"""Of a process for the others, which may have a long attack more to make."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the flags say is to be loaded."""

    accelerator: Accelerator
    codecs: Sequence[Codec]
    """The baseline first."""
    images: Tensor
    """All of them, `[n,3,R,R]` in [-1,1], on the CPU."""
    captions: Sequence[str]
    names: Sequence[str]
    """Of the images: their paths or rows."""
    pipeline: DiffusionPipeline | None
    origins: Mapping[str, str]
    """Where VAEs and pipeline were loaded from, for the report's settings."""
    notes: list[str]
    """What a reader of the report must know; more may be added."""


@dataclass(frozen=True, kw_only=True)
class Scrutiny:
    """How the robustness is checked."""

    epsilon: float
    depth: Depth = field(default_factory=Depth)


def prepare(args: argparse.Namespace) -> Setup:
    """Loads images, VAEs and the pipeline.

    VAEs that the resolution does not suit are left out with a note.

    Raises:
        UserError: if one of them cannot be loaded, or if no VAE is left to hold against the baseline.
    """
    check_launch(os.environ)
    sources = vae_sources(args)
    notes = note_on_compiling(os.environ)
    loaded = load_images(args, notes)
    accelerator = launched_accelerator(
        os.environ,
        precision=args.mixed_precision or launched_precision(os.environ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    dtype = HALF_PRECISION.get(accelerator.mixed_precision)
    codecs = [_load_codec(name, source, accelerator.device, dtype) for name, source in sources.items()]
    origins = {f"VAE {name}": described(source, "config.json") for name, source in sources.items()}
    codecs = kept(codecs, lambda codec: check_fit(codec, loaded.images), notes)
    pipeline = None
    if args.pipeline is not None:
        source = _parsed("--pipeline", args.pipeline, parse_place)
        pipeline = load_pipeline(source, dtype).to(accelerator.device)
        origins["pipeline"] = described(source, "model_index.json")
    return Setup(
        accelerator=accelerator, codecs=codecs, images=loaded.images, captions=loaded.captions, names=loaded.names,
        pipeline=pipeline, origins=origins, notes=notes,
    )  # fmt: skip


def _load_codec(name: str, source: AutoencoderSource, device: torch.device, dtype: torch.dtype | None) -> Codec:
    try:
        return load_codec(name, source, device=device, autocast_dtype=dtype)
    except UserError as error:
        # In the words of this command line, which has no flag for the subfolder.
        reason = str(error).replace("add --subfolder vae", "add :vae")
        raise type(error)(f"the VAE {name} at {described(source, 'config.json')}: {reason}") from None


def kept(codecs: Sequence[Codec], check: Callable[[Codec], None], notes: list[str]) -> list[Codec]:
    """The VAEs that pass `check`; for each of the others there is a note.

    Raises:
        UserError: in the words of `check`, if the baseline fails, or if all others do.
    """
    check(codecs[0])
    passed, reasons = [codecs[0]], []
    for codec in codecs[1:]:
        try:
            check(codec)
            passed.append(codec)
        except UserError as error:
            reasons.append(f"{codec.name} was left out: {error}")
    if len(passed) == 1 and len(codecs) > 1:
        raise UserError("; ".join(reasons))
    notes.extend(reasons)
    return passed


def check_captions(setup: Setup, needing: str) -> None:
    """Raises a UserError, in the name of what needs them, if an image has no caption."""
    if not all(setup.captions):
        raise UserError(f"{needing} needs a caption for every image; name their column: --caption_column")


def named(texts: Sequence[str]) -> str:
    """The first few of `texts`, each in quotes and cut where it is long."""
    return few([f"'{text if len(text) <= 60 else f'{text[:57]}...'}'" for text in texts])


def run_study(
    args: argparse.Namespace,
    setup: Setup,
    task: Task,
    perturbations: Sequence[Perturbation],
    *,
    title: str,
    scrutiny: Scrutiny | None = None,
    images: Tensor | None = None,
    prompts: Sequence[str] = (),
    draw: Callable[[Study, Rows, Sequence[Record]], dict[str, Path]] = lambda study, rows, records: draw_extremes(
        study, records
    ),
) -> int:
    """Runs the study and writes its report.

    Args:
        scrutiny: of the robustness, which is checked unless the flags say otherwise; None where there is nothing to check.
        images: those of the study, where they are not all that were loaded.
        prompts: what text encoders read of the images or of those to be made.
        draw: makes the report's pictures, by title.
    """
    study = Study(
        accelerator=setup.accelerator,
        codecs=setup.codecs,
        perturbations=perturbations,
        threat_models=args.threat_models,
        task=task,
        images=setup.images if images is None else images,
        output_dir=args.output_dir,
        fingerprint=fingerprint(args, setup, task.metrics),
        seed=args.seed,
        batch_size=args.batch_size,
    )
    for note in setup.notes:
        setup.accelerator.print(note)
    if args.dry_run:
        setup.accelerator.print(f"Running on {used_device(setup.accelerator)}\n{describe(study)}")
        return 0
    with sole_run(args.output_dir, is_main_process=setup.accelerator.is_main_process):
        records = study.run()
        if setup.accelerator.is_main_process:
            checks = None if scrutiny is None else {} if args.no_checks else run_checks(args, study, scrutiny)
            rows = study.rows(records)
            pictures, caveats = draw(study, rows, records), all_caveats(args, setup, study, prompts)
            conclude(args, setup, rows, records, title=title, checks=checks, pictures=pictures, caveats=caveats)
    return 0


def describe(study: Study) -> str:
    """What the study would compute."""
    cells = list(study.cells())
    passes = sum(Job(cell, range(len(study.images))).cost(study.task.passes) for cell in cells)
    titles = "\n".join(f"  {cell.title}" for cell in cells)
    return f"{len(study.images)} images, {len(study.codecs)} VAEs, {passes} passes through one, in {len(cells)} cells\n{titles}"


def conclude(
    args: argparse.Namespace,
    setup: Setup,
    rows: Rows,
    records: Sequence[Record],
    *,
    title: str,
    checks: dict[str, list[Check]] | None,
    pictures: dict[str, Path],
    caveats: Sequence[Caveat],
) -> None:
    """Writes the report and says where it is."""
    findings = Findings(
        title=title,
        baseline=setup.codecs[0].name,
        vaes=[codec.name for codec in setup.codecs],
        rows=rows,
        records=records,
        checks=checks,
        notes=setup.notes,
        caveats=caveats,
        settings=settings(args, setup),
        pictures=pictures,
    )
    write_report(findings, args.output_dir)
    print(f"{verdict(checks)}Report: {args.output_dir / 'report.html'}, {args.output_dir / 'report.md'}")


def all_caveats(args: argparse.Namespace, setup: Setup, study: Study, prompts: Sequence[str]) -> list[Caveat]:
    """What limits the numbers of this study."""
    metrics = study.task.metrics
    found = caveats_of_metrics(metrics, study.images[:1].to(setup.accelerator.device), n=len(study.images))
    found += caveat_of_precision(setup.accelerator.mixed_precision)
    if prompts:
        found += caveats_of_prompts(metrics, setup.pipeline, prompts)
    if steps := getattr(args, "max_attack_steps", None):
        found.append(
            Caveat(
                f"Published protections take {steps} steps at most, and are weaker than their authors' where those take more."
            )
        )
    return found


def run_checks(args: argparse.Namespace, study: Study, scrutiny: Scrutiny) -> dict[str, list[Check]]:
    """Of every VAE but the baseline, on a few images; those done are kept."""
    epsilon, depth = scrutiny.epsilon, scrutiny.depth
    images = study.images[: args.num_check_images]
    checks = {}
    for number, codec in enumerate(study.codecs[1:], start=1):
        path = args.output_dir / "checks" / f"{number}-{epsilon!r}-{len(images)}-{depth.name}.json"
        if not path.exists():
            found = check_robustness(codec, study.baseline, images, epsilon=epsilon, seed=args.seed, depth=depth)
            write_text_atomically(path, json.dumps([asdict(check) for check in found], indent=1) + "\n")
        checks[codec.name] = [Check(**check) for check in read_json(path)]
    return checks


def verdict(checks: dict[str, list[Check]] | None) -> str:
    if checks is None:
        return ""
    failed = [f"{name}: {check.question}" for name, of_vae in checks.items() for check in of_vae if not check.passed]
    if failed:
        return f"{len(failed)} checks of the robustness FAILED ({'; '.join(failed)}). "
    return "All checks of the robustness passed. " if checks else "The robustness was not checked. "


def vae_sources(args: argparse.Namespace) -> dict[str, AutoencoderSource]:
    """The VAEs by name, the baseline first.

    Raises:
        UserError: if a name is given twice, or name or place is empty.
    """
    sources = {BASELINE: _parsed("--baseline", args.baseline, parse_place)}
    for text in args.vae:
        name, source = _parsed("--vae", text, parse_named_place)
        if name in sources:
            raise UserError(
                f"--vae {text}: there are two VAEs of the name {name}; write NAME={text.removeprefix(f'{name}=')}"
            )
        sources[name] = source
    return sources


T = TypeVar("T")


def _parsed(flag: str, text: str, parse: Callable[[str], T]) -> T:
    try:
        return parse(text)
    except UserError as error:
        raise type(error)(f"{flag} {error}") from None


def load_images(args: argparse.Namespace, notes: list[str]) -> ValidationImages:
    """Images and captions; where there are fewer than asked for, a note says so.

    Raises:
        UserError: if it is not clear which images are meant, or if there are none.
    """
    if (args.dataset_name is None) == (args.data_dir is None):
        raise UserError("give either --dataset_name or --data_dir, and not both")
    if args.resolution < SSIM_WINDOW:
        raise UserError(f"--resolution {args.resolution}: SSIM needs at least {SSIM_WINDOW} px")
    source = DataSource(
        dataset_name=args.dataset_name,
        validation_data_dir=args.data_dir,
        validation_split=args.split,
        image_column=args.image_column,
        caption_column=args.caption_column,
        streaming=args.streaming,
    )
    try:
        loaded = load_validation_images(source, num_images=args.num_images, resolution=args.resolution, seed=args.seed)
    except UserError as error:  # which names the flags of the training
        raise type(error)(with_flags_of_evaluation(str(error))) from None
    notes.extend(part.report() for part in loaded.passed_over if part)
    if loaded.without_caption:
        names = few(loaded.without_caption, 20)
        notes.append(f"{len(loaded.without_caption)} images without a caption were left out: {names}")
    if loaded.unreadable:
        notes.append(f"{len(loaded.unreadable)} unreadable images were passed over: {', '.join(loaded.unreadable)}")
    if len(loaded.images) < args.num_images:
        notes.append(f"there are {len(loaded.images)} images and not the {args.num_images} of --num_images")
    return loaded


def with_flags_of_evaluation(text: str) -> str:
    """Return a message on the training's flags with this command's."""
    flags = {"--validation_data_dir": "--data_dir", "--train_data_dir": "--data_dir", "--validation_split": "--split"}
    for training, evaluation in flags.items():
        text = text.replace(training, evaluation)
    return text


@torch.no_grad()
def check_fit(codec: Codec, images: Tensor) -> None:
    """Refuses a resolution that a VAE cannot take, and a VAE that returns no numbers, before hours of work."""
    sample = images[:1].to(codec.device)
    try:
        reconstruction = codec.reconstruct(sample)
    except RuntimeError as error:  # of layers that the image is too small for
        raise UserError(f"--resolution {sample.shape[-1]} does not suit {codec.name}: {first_line(error)}") from None
    if reconstruction.shape != sample.shape:
        raise UserError(
            f"--resolution {sample.shape[-1]} does not suit {codec.name}, which returns {reconstruction.shape[-1]} "
            "px; take a multiple of its down-sampling factor"
        )
    if not reconstruction.isfinite().all():
        raise UserError(
            f"{codec.name} returns values that are not finite, for a clean image already; if its weights are intact, "
            "try --mixed_precision no or bf16"
        )


def exchangeable(setup: Setup) -> Setup:
    """`setup` with those VAEs alone that can take the place of the pipeline's own; a note names each of the others.

    Raises:
        UserError: if the baseline cannot, or none of the others.
    """

    def check(codec: Codec) -> None:
        if not isinstance(codec.vae, AutoencoderKL):
            raise UserError(
                f"{codec.name} is a {type(codec.vae).__name__}, and pipelines exchange an AutoencoderKL alone"
            )
        try:
            with robust_vae(setup.pipeline, codec.vae):
                pass
        except UserError as error:
            raise UserError(f"--pipeline cannot work with {codec.name}: {error}") from None

    return replace(setup, codecs=kept(setup.codecs, check, setup.notes))


@torch.no_grad()
def strangers_to(
    pipeline: DiffusionPipeline, codecs: Sequence[Codec], images: Tensor, notes: list[str]
) -> frozenset[str]:
    """Names of the VAEs whose latents have other channels than the pipeline's denoiser makes; a note names each.

    Compared with what comes out of a UNet, since into those made for editing more goes in.

    Raises:
        UserError: if the baseline is one of them.
    """
    unet = pipeline.components.get("unet")
    channels = {codec.name: codec.encode(images[:1].to(codec.device)).shape[1] for codec in codecs}
    strangers = [name for name, number in channels.items() if unet is not None and number != unet.config.out_channels]
    for name in strangers:
        fault = f"--pipeline makes latents of {unet.config.out_channels} channels, and those of {name} have {channels[name]}"
        if name == codecs[0].name:
            raise UserError(fault)
        notes.append(f"attacks on the denoiser were not made on {name}: {fault}")
    return frozenset(strangers)


def add_metrics_argument(parser: argparse.ArgumentParser, known: Sequence[str], *, default: Sequence[str]) -> None:
    """Add `--metrics`; `lpips` alone is the one that papers report, on AlexNet."""
    parser.add_argument(
        "--metrics",
        nargs="+",
        type=lambda name: "lpips-alex" if name == "lpips" else name,
        choices=known,
        default=list(default),
    )


def build_metrics(args: argparse.Namespace, setup: Setup, classifier: ImageClassifier | None = None) -> Metrics:
    """What is measured; for what cannot be had there is a note instead. A `classifier` takes Inception's place."""
    loaders: dict[str, tuple[Sequence[str], Callable[[], Any]]] = {
        **{name: ((name,), partial(load_perceptual_distance, trunk)) for name, trunk in LPIPS_METRICS.items()},
        "features": (tuple(SET_METRICS), lambda: classifier or load_inception_features(args.inception_weights)),
        "clip": (CLIP_METRICS, lambda: load_clip_similarity(args.clip_model)),
    }
    names = [name for name in dict.fromkeys(args.metrics) if has_enough_images(name, len(setup.images), setup.notes)]
    networks: dict[str, Any] = {}
    for network, (served, load) in loaders.items():
        if wanted := [name for name in names if name in served]:
            try:
                networks[network] = load()
            except UserError as error:
                setup.notes.append(f"{', '.join(wanted)} left out: {error}")
                names = [name for name in names if name not in served]
    perceptual = [networks.pop(name).to(setup.accelerator.device) for name in LPIPS_METRICS if name in networks]
    return Metrics(names=names, perceptual=perceptual, **networks)


def has_enough_images(metric: str, num_images: int, notes: list[str]) -> bool:
    least = SET_METRICS[metric].least if metric in SET_METRICS else 1
    if num_images < least:
        notes.append(f"{metric} was left out: it needs at least {least} images, and there are {num_images}")
    return num_images >= least


def build_supplies(args: argparse.Namespace, setup: Setup) -> Supplies:
    """What some of the attacks need."""
    target = None if args.target is None else load_target(args).to(setup.accelerator.device)
    perceptual = try_lpips(setup) if wants_perceptual(args) else None
    painter = try_painter(setup) if wants_painter(args) else None
    strangers: frozenset[str] = frozenset()
    if setup.pipeline is not None and needs_denoiser(args):
        strangers = strangers_to(setup.pipeline, setup.codecs, setup.images, setup.notes)
    return Supplies(
        pipeline=setup.pipeline, strangers=strangers, painter=painter, perceptual=perceptual, target=target,
        max_steps=args.max_attack_steps,
    )  # fmt: skip


def load_pipeline(source: AutoencoderSource, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """With its weights in `dtype`, float32 by default."""
    place: str | Path = source.pretrained_model_name_or_path
    settings = {"revision": source.revision, "variant": source.variant, "use_safetensors": True}
    try:
        if source.subfolder:  # which pipelines, unlike models, do not know
            place = Path(place if isdir(place) else _snapshot(source), source.subfolder)
        pipeline = DiffusionPipeline.from_pretrained(place, **settings)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--pipeline {described(source, 'model_index.json')} cannot be loaded: {first_line(error)}"
        ) from None
    pipeline.set_progress_bar_config(disable=True)  # an image takes hundreds of steps, and there are hundreds of images
    return pipeline if dtype is None else pipeline.to(dtype)


def _snapshot(source: AutoencoderSource) -> str:
    """Where the files of the subfolder are that a pipeline may need; no pickle is among them."""
    kinds = ("json", "txt", "model", "safetensors")
    patterns = [f"{source.subfolder}/{pattern}" for kind in kinds for pattern in (f"*.{kind}", f"**/*.{kind}")]
    return snapshot_download(source.pretrained_model_name_or_path, revision=source.revision, allow_patterns=patterns)


def load_judge(args: argparse.Namespace) -> ImageClassifier | None:
    """The classifier, which has to know what is in the pictures.

    Raises:
        UserError: if it cannot be had, or if it is missing and something is to be judged by it.
    """
    if args.classifier is None and "shown" in args.metrics:
        raise UserError("--metrics shown needs a classifier to tell what an image shows: --classifier")
    return load_image_classifier(args.classifier) if args.classifier else None


def load_target(args: argparse.Namespace) -> Tensor:
    """The central square of the image, `[1,3,R,R]`."""
    try:
        return to_tensor(centre_square(decode_rgb(args.target), resolution=args.resolution))[None]
    except UnreadableImage as error:
        raise UserError(f"--target {args.target} cannot be read: {error}") from None


def wants_perceptual(args: argparse.Namespace) -> bool:
    chosen = expanded(args.attacks)
    return "glaze" in chosen or any(name.endswith("-lpips") for name in chosen)


def try_lpips(setup: Setup) -> PerceptualDistance | None:
    try:
        return load_perceptual_distance("vgg").to(setup.accelerator.device)
    except UserError as error:
        setup.notes.append(str(error))
        return None


def try_painter(setup: Setup) -> DiffusionPipeline | None:
    try:
        return None if setup.pipeline is None else as_image_to_image(setup.pipeline)
    except UserError as error:
        setup.notes.append(str(error))
        return None


def fingerprint(args: argparse.Namespace, setup: Setup, metrics: Metrics) -> dict[str, object]:
    """What the stored values depend on; attacks and epsilons may be added later."""
    free = {"attacks", "epsilons", "arguments", "dry_run", "output_dir", "batch_size", "no_checks", "num_check_images"}
    given = {name: value for name, value in sorted(vars(args).items()) if name not in free}
    if given.get("target"):
        given["target"] = digest(args.target.read_bytes())
    if args.pipeline is not None:
        source = parse_place(args.pipeline)
        if commit := resolved_commit(source, "model_index.json"):
            given["pipeline"] = f"{args.pipeline}, commit {commit}"
    return {
        **json.loads(json.dumps(given, default=str)),
        "vaes": {codec.name: codec.digest for codec in setup.codecs},
        "images": [*setup.images.shape, digest(setup.images.numpy().tobytes())],
        "threat_models": sorted(args.threat_models),
        "metrics": sorted(metrics.names),
        "mixed_precision": setup.accelerator.mixed_precision,
    }


def digest(content: bytes) -> str:
    return sha256(content).hexdigest()[:16]


def used_device(accelerator: Accelerator) -> str:
    """Return on what, and in which precision, an evaluation runs."""
    on_gpu = accelerator.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    return f"{accelerator.num_processes} x {device}, mixed precision {accelerator.mixed_precision}"


def settings(args: argparse.Namespace, setup: Setup) -> dict[str, str]:
    packages = ("torch", "diffusers", "torchmetrics", "accelerate")
    return {
        "command": shlex.join(["python", "-m", "srl_utils.evaluation", *args.arguments]),
        **setup.origins,
        "images": f"{len(setup.images)} of {args.dataset_name or Path(abspath(args.data_dir)).name}, {args.resolution} px",
        "seed": str(args.seed),
        "device": used_device(setup.accelerator),
        "versions": ", ".join(f"{name} {version(name)}" for name in packages) + f", Python {platform.python_version()}",
        "date": date.today().isoformat(),
    }


def folder(text: str) -> Path:
    place = expanded_path(text)
    if exists(place) and not isdir(place):
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return place


def needs_denoiser(args: argparse.Namespace) -> bool:
    return any(protection.needs_denoiser for protection in protections_of(args))


def wants_painter(args: argparse.Namespace) -> bool:
    return args.target is None and any(protection.drawn_target is not None for protection in protections_of(args))


def protections_of(args: argparse.Namespace) -> list[Protection]:
    return [PROTECTIONS[name] for name in expanded(args.attacks) if name in PROTECTIONS]


def budget(text: str) -> float:
    epsilon = pixel_distance(text)
    if epsilon == 0:
        raise argparse.ArgumentTypeError("an attack of size 0 shows the clean image, which --attacks clean measures")
    return epsilon


# --- arguments ---


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--baseline", required=True, metavar="PLACE", help=f"the original VAE, a folder or Hub id: {FORM}")
    add(
        "--vae",
        required=True,
        nargs="+",
        metavar="NAME=PLACE",
        help="VAEs to hold against it; the name may be left out",
    )
    add("--dataset_name", type=home_expanded, default=None, help="Hub dataset, local dataset folder, or scikit-image")
    add("--data_dir", type=home_expanded, default=None, help="folder of images (nested)")
    add(
        "--split",
        default=None,
        help="split of the dataset, or a part: test[:10%%]; default: its validation, test or only split",
    )
    add("--image_column", default="image", help="column of the dataset that holds the image")
    add("--streaming", action="store_true", help="read the dataset as a stream, without downloading it")
    add("--resolution", type=image_side, default=256, help="side of the images in pixels")
    add("--num_images", type=positive_int, default=64)
    add(
        "--inception_weights",
        type=expanded_path,
        default=None,
        help="torch-fidelity's Inception weights, for distances of sets",
    )
    add(
        "--clip_model", type=home_expanded, default=CLIP_MODEL, help="CLIP model (Hub id or folder); needs transformers"
    )
    add("--batch_size", type=positive_int, default=16)
    add("--seed", type=seed, default=0)
    add("--mixed_precision", choices=("no", "fp16", "bf16"), default=None, help="default: accelerate's configuration")
    add("--dry_run", action="store_true", help="check everything, print what would be computed, stop")
    add(
        "--output_dir",
        type=folder,
        default=Path("outputs/evaluation"),
        help="finished parts in it are not computed again",
    )


def add_attack_arguments(parser: argparse.ArgumentParser, *, attacks: Sequence[str], epsilons: Sequence[float]) -> None:
    add = parser.add_argument
    add("--attacks", nargs="+", default=list(attacks), help=f"presets or names: {', '.join(known_names())}")
    add("--epsilons", nargs="+", type=budget, default=list(epsilons))
    add("--threat_models", nargs="+", choices=THREAT_MODELS, default=list(THREAT_MODELS))
    add("--target", type=expanded_path, default=None, help="image that targeted protections make others look like")
    add("--max_attack_steps", type=positive_int, default=None, help="shortens the published protections")
    add_check_arguments(parser)


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--no_checks", action="store_true", help="leave out the checks of the robustness")
    add("--num_check_images", type=positive_int, default=8, help="images that the checks use")


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--pipeline", required=True, metavar="PLACE", help="diffusion pipeline, named as --baseline is")
    add(
        "--caption_column",
        default=None,
        help="of the data set, the tars, or the metadata.jsonl, metadata.csv or text files in --data_dir",
    )
    add(
        "--classifier",
        type=home_expanded,
        default=None,
        help="image classifier (folder or Hub id): takes Inception's place, and judges prompts",
    )
    add("--num_inference_steps", type=positive_int, default=50)
    add("--guidance_scale", type=non_negative_float, default=7.5)


def shared_effects(args: argparse.Namespace) -> Effects:
    """By flag, whether it has an effect beside the others, and what it needs to have one."""
    data_set = args.dataset_name not in (None, PHOTOGRAPHS)
    return {
        "split": (args.dataset_name is not None, "--dataset_name"),
        "image_column": (data_set or args.data_dir is not None, "a data set with columns"),
        "streaming": (data_set or args.data_dir is not None, "a data set that can be streamed"),
        "inception_weights": (not set(SET_METRICS).isdisjoint(args.metrics), "a distance of sets among --metrics"),
        "clip_model": (not set(CLIP_METRICS).isdisjoint(args.metrics), "a similarity of CLIP among --metrics"),
    }


def attack_effects(args: argparse.Namespace) -> Effects:
    names = expanded(args.attacks)
    adversarial = any(name in PROTECTIONS or ITERATED.fullmatch(name) for name in names)
    protections = protections_of(args)
    return {
        "epsilons": (adversarial or NOISE in names or not args.no_checks, "an attack, noise, or the checks"),
        "threat_models": (adversarial, "an attack on a VAE among --attacks"),
        "target": (any(protection.has_target for protection in protections), "an attack with a target"),
        "max_attack_steps": (bool(protections), "a published protection among --attacks"),
        **check_effects(args),
    }


def check_effects(args: argparse.Namespace) -> Effects:
    return {"num_check_images": (not args.no_checks, "the checks, which --no_checks leaves out")}


def pipeline_effects(args: argparse.Namespace) -> Effects:
    sets = not set(SET_METRICS).isdisjoint(args.metrics)
    return {
        "classifier": (sets or "shown" in args.metrics, "shown or a distance of sets among --metrics"),
        "inception_weights": (
            sets and args.classifier is None,
            "a distance of sets among --metrics and no --classifier",
        ),
    }


def share(text: str) -> float:
    value = fraction(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 would change nothing")
    return value
