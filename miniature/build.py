"""Train a network of the miniature world: its autoencoders, CLIP, classifier or diffusion model.

    python -m miniature.build vae | vq | video | clip | classifier | diffusion         # make miniature: all of them

Every batch is a function of (seed, step), so a stopped run resumes with the same next batch.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from miniature import autoencoder, classifier, contrastive, diffusion, discrete, video
from miniature.scene_set import SceneSet, scene_set
from miniature.tokens import learn_tokenizer
from miniature.training import Settings
from srl_utils.resources import keep_freed_memory

WEIGHTS = Path("miniature/weights")


def main() -> None:
    args = parse_args()
    keep_freed_memory()
    args.build(args)


def build_clip(args: argparse.Namespace) -> None:
    """Train the CLIP and write it with its processor."""
    scenes = scenes_of(args)
    tokenizer = learn_tokenizer(scenes.captions, args.work_dir / "tokenizer")
    model = contrastive.train_clip(scenes, tokenizer, settings_of(args))
    model.save_pretrained(args.output_dir)
    processor = contrastive.build_processor(tokenizer)
    processor.save_pretrained(args.output_dir)
    processor.image_processor.save_pretrained(args.output_dir)  # transformers 4 needs this file too
    copy_vocabulary(args, args.output_dir)


def build_classifier(args: argparse.Namespace) -> None:
    """Train the classifier and write it with its processor."""
    vae = AutoencoderKL.from_pretrained(args.vae).eval().requires_grad_(False)
    model = classifier.train_classifier(scenes_of(args), vae, settings_of(args))
    model.save_pretrained(args.output_dir)
    classifier.build_image_processor().save_pretrained(args.output_dir)


def build_diffusion(args: argparse.Namespace) -> None:
    """Train the diffusion model and write it as a pipeline."""
    scenes = scenes_of(args)
    tokenizer = learn_tokenizer(scenes.captions, args.work_dir / "tokenizer")
    vae = AutoencoderKL.from_pretrained(args.vae).eval().requires_grad_(False)
    diffusion.build_pipeline(scenes, vae, tokenizer, settings_of(args)).save_pretrained(args.output_dir)
    copy_vocabulary(args, args.output_dir / "tokenizer")


def copy_vocabulary(args: argparse.Namespace, folder: Path) -> None:
    """Copy the files that transformers 4 loads a CLIP tokenizer from; transformers 5 writes another one."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(args.work_dir / "tokenizer" / name, folder)


def scenes_of(args: argparse.Namespace) -> SceneSet:
    """Return the training scenes."""
    return scene_set(args.work_dir, seed=args.seed, count=args.num_scenes)


def settings_of(args: argparse.Namespace) -> Settings:
    """Return the training's settings."""
    return Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="network")
    vae = add_command(commands, "vae", autoencoder.build, output="vae")
    autoencoder.add_arguments(vae)
    vq = add_command(commands, "vq", discrete.build, output="vq")
    discrete.add_arguments(vq)
    clips = add_command(commands, "video", video.build, output="video")
    video.add_arguments(clips)
    for name, build, output, steps, batch_size, learning_rate in (
        ("clip", build_clip, "clip", 900, 128, 5e-4),
        ("classifier", build_classifier, "classifier", 3_500, 64, 2e-3),
        ("diffusion", build_diffusion, "sd", 5_500, 256, 1e-3),
    ):
        command = add_command(commands, name, build, output=output)
        command.add_argument("--num_scenes", type=int, default=40_000, help="drawn once and saved in --work_dir")
        command.add_argument("--steps", type=int, default=steps)
        command.add_argument("--batch_size", type=int, default=batch_size)
        command.add_argument("--learning_rate", type=float, default=learning_rate)
        if name != "clip":
            command.add_argument("--vae", type=Path, default=WEIGHTS / "vae")
    return parser.parse_args()


def add_command(
    commands: argparse._SubParsersAction, name: str, build: Callable[[argparse.Namespace], None], *, output: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.set_defaults(build=build)
    command.add_argument("--output_dir", type=Path, default=WEIGHTS / output)
    command.add_argument("--work_dir", type=Path, default=Path("outputs/miniature"), help="saved states, for resuming")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--torch_compile", action="store_true", help="needs a C++ compiler on the CPU")
    command.add_argument("--seed", type=int, default=0)
    return command


if __name__ == "__main__":
    main()
