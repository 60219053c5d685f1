"""Make the miniature's video autoencoder robust: on clips, and on single frames.

    python -m experiments.clips                        # make clips

Trains it without an attack, on the frames of clips one by one, and on whole clips, each about as long as the others. The
evaluation attacks clips, their first frames, and single images, and tells which frames an attack on the first one reaches.
Finished parts are kept, so the command can be interrupted and repeated.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from experiments.claims import ORIGINAL, Results, decibels_won_back, percent, spread, trained_name
from experiments.clip_pictures import draw_animation, draw_strip
from experiments.runner import WEIGHTS, Module, Runner, experiment_parser, machine
from srl_utils.attacks.draws import image_generators
from srl_utils.evaluation.catalogue import AttackResources, select
from srl_utils.evaluation.motion import SHARE, TRAVEL
from srl_utils.evaluation.perturbations import ADAPTIVE, NO_THREAT
from srl_utils.evaluation.report.tables import markdown_table
from srl_utils.evaluation.tasks.base import DRIFT
from srl_utils.files import write_text_atomically
from srl_utils.images.datasets import load_validation_images
from srl_utils.images.pixels import parse_pixel_distance
from srl_utils.images.sources import DataSource
from srl_utils.metrics.clips import FLICKER, WARPING
from srl_utils.metrics.features import RFID_CHANGES
from srl_utils.metrics.pixels import psnr
from srl_utils.vae.codec import Codec
from srl_utils.vae.loading import AutoencoderSource, load_autoencoder

SEEDS, FRAMES, NUM_CLIPS = 3, 9, 8
TRAINING_CLIPS, CLIPS, TARGET, IMAGES = "training-clips", "clips", "target", "images"
ON_CLIPS = f"--num_frames {FRAMES}"
FAST = "--recipe fast --learning_rate 1e-4"
VARIANTS = {
    "no attack": f"{ON_CLIPS} {FAST} --pgd_steps 0 --max_train_steps 390",
    "single frames": f"{FAST} --max_train_steps 380",
    "clips": f"{ON_CLIPS} {FAST} --max_train_steps 240",
}
"""Flags by variant; the numbers of steps take about the same time. At five times the rate clean clips lose 1 dB."""
BATCH_CLIPS = 2
"""Clips of a training step, in the place of the `BATCH` single frames."""
ATTACK, ON_LATENTS, ON_FIRST, TO_TARGET = "apgd-50", "apgd-50-latents", "apgd-50-first", "uvcg"
LOST = "psnr-lost"
"""dB that an attack takes from a frame."""
EPSILON = "8/255"
EVALUATION = ["--epsilons", EPSILON, "--threat_models", ADAPTIVE, "--no_checks", "--batch_size", 4]
ON_IMAGES = [*EVALUATION, "--num_images", 32, "--attacks", "clean", ATTACK, "--metrics", "psnr", DRIFT]
ON_WHOLE_CLIPS = [
    *EVALUATION, "--num_images", NUM_CLIPS, "--num_frames", FRAMES, "--attacks", "clean", ATTACK, ON_LATENTS, ON_FIRST,
    TO_TARGET, "--metrics",
    "psnr", "ssim", DRIFT, TRAVEL, SHARE, WARPING, FLICKER, "rfid", RFID_CHANGES, "--classifier", WEIGHTS / "classifier",
]  # fmt: skip


def main() -> None:
    """Train, evaluate, and write the tables."""
    args = experiment_parser("clips", __doc__).parse_args()
    run = Runner(args.output_dir, WEIGHTS / "video", title="clips", num_calls=len(VARIANTS) * SEEDS + 6)
    run.scenes(TRAINING_CLIPS, 300, seed=1, num_frames=FRAMES)
    run.scenes(CLIPS, NUM_CLIPS, seed=0, num_frames=FRAMES)
    run.scenes(TARGET, 1, seed=2, num_frames=FRAMES)
    run.scenes(IMAGES, 32, seed=0)
    planned = {trained_name(variant, seed): (variant, seed) for seed in range(SEEDS) for variant in VARIANTS}
    run.modules([training_of(run, name, *planned[name]) for name in planned])
    names = list(planned)
    clips = ["--data_dir", args.output_dir / CLIPS, "--target", args.output_dir / TARGET / "00000"]
    run.evaluate("on-clips", "reconstruction", names, [*clips, *ON_WHOLE_CLIPS])
    run.evaluate("on-images", "reconstruction", names, ["--data_dir", args.output_dir / IMAGES, *ON_IMAGES])
    run.bar.close()
    on_clips, on_images = (Results.read(args.output_dir / name / "results.json") for name in ("on-clips", "on-images"))
    made = f"{machine()}, {date.today().isoformat()}, {EPSILON}, adaptive attacks"
    keep_losses(run, names[: len(VARIANTS)], args.output_dir / CLIPS)
    of_frames = Results.read(args.output_dir / "frames/results.json")
    draw_pictures(run, args.output_dir / CLIPS)
    text = "\n\n".join([made, quality_table(on_clips, on_images), movement_table(on_clips), frames_table(of_frames)])
    write_text_atomically(args.output_dir / "clips.md", f"{text}\n")
    print(text)


def training_of(run: Runner, name: str, variant: str, seed: int) -> Module:
    """Return the training of a variant's seed, on clips or on the frames one by one."""
    flags = ["--train_data_dir", run.folder / TRAINING_CLIPS, "--seed", seed, *shlex.split(VARIANTS[variant])]
    if ON_CLIPS in VARIANTS[variant]:
        return run.training(name, flags, batch_size=BATCH_CLIPS, num_validation=1)
    return run.training(name, flags)


def quality_table(on_clips: Results, on_images: Results) -> str:
    """Return a line for each variant: PSNR of clips and of single images, clean and attacked, and what is won back."""
    titles = ["clean (dB)", "attacked (dB)", "won back (%)"]
    clips, images = ([f"{kind}, {title}" for title in titles] for kind in ("clips", "images"))
    lines = [["VAE", *clips, "clips, first frame attacked (dB)", *images]]
    for variant in (ORIGINAL, *VARIANTS):
        first = on_clips.of(variant, ON_FIRST, ADAPTIVE, "psnr")
        lines.append([variant, *quality(on_clips, variant), spread(first), *quality(on_images, variant)])
    return markdown_table(lines)


def quality(results: Results, variant: str) -> list[str]:
    """Return a variant's PSNR, clean and attacked, in dB, and the share won back, in percent."""
    psnr = [results.of(variant, *setting, "psnr") for setting in (("clean", NO_THREAT), (ATTACK, ADAPTIVE))]
    return [*map(spread, psnr), spread(percent(decibels_won_back(results, variant, ATTACK)))]


def movement_table(results: Results) -> str:
    """Return a line for each variant: how far latents move, and how steady and how natural attacked clips look."""
    columns = {
        "drift": ("clean", NO_THREAT, DRIFT),
        "latents moved": (ON_LATENTS, ADAPTIVE, TRAVEL),
        "share of the way to the target": (TO_TARGET, ADAPTIVE, SHARE),
        "warping error, clean": ("clean", NO_THREAT, WARPING),
        "attacked": (ATTACK, ADAPTIVE, WARPING),
        "flicker": (ATTACK, ADAPTIVE, FLICKER),
        "FID of frames": (ATTACK, ADAPTIVE, "rfid"),
        "FID of changes": (ATTACK, ADAPTIVE, RFID_CHANGES),
    }
    lines = [["VAE", *columns]]
    for variant in (ORIGINAL, *VARIANTS):
        lines.append([variant, *(spread(results.of(variant, *column)) for column in columns.values())])
    return markdown_table(lines)


def frames_table(results: Results) -> str:
    """Return the PSNR that an attack on the first frame costs each frame, in dB, by VAE of the first seed."""
    lines = [["PSNR lost (dB)", *(f"frame {number}" for number in range(1, FRAMES + 1))]]
    for name in (ORIGINAL, *VARIANTS):
        lost = [results.of(name, at_frame(number), ADAPTIVE, LOST)[0] for number in range(1, FRAMES + 1)]
        lines.append([name, *(f"{value:.1f}" for value in lost)])
    return markdown_table(lines)


def keep_losses(run: Runner, names: Sequence[str], folder: Path) -> None:
    """Measure what an attack on the first frame costs each frame, and write it as results of `frames`, unless they exist."""
    path = run.folder / "frames/results.json"
    if path.exists():
        return
    clips = clips_in(folder)
    rows = [
        {"vae": name, "attack": at_frame(number), "threat_model": ADAPTIVE, "metric": LOST, "value": value}
        for name in (ORIGINAL, *names)
        for number, value in enumerate(lost_by_frame(codec_of(run, name), clips), start=1)
    ]
    path.parent.mkdir(exist_ok=True)
    write_text_atomically(path, json.dumps(rows, indent=1) + "\n")


def at_frame(number: int) -> str:
    """Return the name in the results of what the attack on the first frame does to frame `number`, from 1."""
    return f"{ON_FIRST}, frame {number}"


@torch.no_grad()
def lost_by_frame(codec: Codec, clips: Tensor) -> list[float]:
    """Return the mean PSNR that each frame of clips `[N,3,T,H,W]` loses when the first one is attacked, in dB."""
    before, after = codec.reconstruct(clips), codec.reconstruct(attacked(codec, clips, ON_FIRST))
    return [
        (psnr(before[:, :, time], clips[:, :, time]) - psnr(after[:, :, time], clips[:, :, time])).mean().item()
        for time in range(clips.shape[2])
    ]


@torch.no_grad()
def draw_pictures(run: Runner, folder: Path) -> None:
    """Draw the first clip, and how VAEs reconstruct it when it is attacked on them, as `clips.png` and `clips.gif`."""
    clip = clips_in(folder)[:1]
    codecs = {name: codec_of(run, name) for name in (ORIGINAL, "single frames", "clips")}
    shown = {"clip": clip[0], "not attacked": codecs[ORIGINAL].reconstruct(clip)[0]}
    shown |= {name: codec.reconstruct(attacked(codec, clip, ATTACK))[0] for name, codec in codecs.items()}
    draw_strip(shown, run.folder / "clips.png")
    draw_animation(shown, run.folder / "clips.gif")


def clips_in(folder: Path) -> Tensor:
    """Return the clips of the evaluation, `[N,3,T,H,W]` in [-1,1]."""
    data = DataSource(validation_data_dir=str(folder), num_frames=FRAMES)
    return load_validation_images(data, num_images=NUM_CLIPS, resolution=64).images


def codec_of(run: Runner, name: str) -> Codec:
    """Return a VAE of the experiment."""
    return Codec.of(load_autoencoder(AutoencoderSource(pretrained_model_name_or_path=str(run.vae(name)))), name)


def attacked(codec: Codec, clips: Tensor, name: str) -> Tensor:
    """Return clips `[N,3,T,H,W]` under an attack on a VAE, by its name in the catalogue."""
    (attack,) = select([name], [parse_pixel_distance(EPSILON)], AttackResources(clips=True)).perturbations
    return attack.apply(codec, clips, image_generators(0, range(len(clips))))


if __name__ == "__main__":
    main()
