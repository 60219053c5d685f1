"""Train encoder and decoder of the miniature's autoencoder together against attacks: what the method does not do.

    python -m experiments.whole_training --vae miniature/weights/vae --output_dir outputs/both
    python -m experiments.whole_training --output_dir outputs/scratch                # from random weights

The loss is the error of reconstructions of attacked scenes; nothing keeps the latents. A stopped training resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from miniature.autoencoder import build_autoencoder
from miniature.scene_set import SceneSet, scene_set
from miniature.training import Settings, train
from srl_utils.attacks.draws import image_generators
from srl_utils.attacks.gradient import PGDConfig, pgd
from srl_utils.evaluation.tasks.finetuning import draw_numbers
from srl_utils.metrics.losses import mean_squared_error
from srl_utils.vae.layers import with_compilable_layers
from srl_utils.vae.networks import frozen

ATTACK = PGDConfig(epsilon=8 / 255, step_size=10 / 255, num_steps=1, random_start=True)
"""That of `--recipe fast`."""


def main() -> None:
    """Train the autoencoder and write it."""
    args = parse_args()
    torch.manual_seed(args.seed)
    vae = build_autoencoder() if args.vae is None else AutoencoderKL.from_pretrained(args.vae)
    scenes = scene_set(args.work_dir or args.output_dir / "scenes", seed=args.scenes_seed, count=args.num_scenes)
    settings = Settings(
        work_dir=args.output_dir / "state", steps=args.steps, batch_size=args.batch_size, seed=args.seed,
        learning_rate=args.learning_rate, device="cuda" if torch.cuda.is_available() else "cpu",
        torch_compile=args.torch_compile,
    )  # fmt: skip
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    if settings.torch_compile:
        with_compilable_layers(vae)
    loss = partial(
        robust_loss, scenes=scenes, settings=settings, clean_steps=args.clean_steps,
        reconstruct=settings.compiled(reconstruction),
    )  # fmt: skip
    vae = train(vae.to(settings.device, memory_format=torch.channels_last), loss, "autoencoder.pt", settings)
    vae.register_to_config(scaling_factor=scaling_factor(vae, scenes))
    vae.save_pretrained(args.output_dir)


def reconstruction(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Return the reconstructions from the means of the posteriors, `[N,3,H,W]`."""
    return vae.decode(vae.encode(images).latent_dist.mean).sample.float()


def robust_loss(
    vae: AutoencoderKL,
    step: int,
    *,
    scenes: SceneSet,
    settings: Settings,
    clean_steps: int,
    reconstruct: Callable[[AutoencoderKL, Tensor], Tensor] = reconstruction,
) -> Tensor:
    """Return the mean squared error of a batch's reconstructions, attacked from step `clean_steps` on.

    Args:
        vae: the autoencoder.
        step: of the training; it decides the scenes and the attack's start.
        scenes: to train on.
        settings: batch size, seed and device.
        clean_steps: first steps without an attack.
        reconstruct: `reconstruction`, or the same compiled.
    """
    numbers = draw_numbers(settings.seed, step, batch_size=settings.batch_size, out_of=len(scenes.captions))
    images = scenes.pixels(numbers).to(settings.device)
    shown = images
    if step >= clean_steps:
        positions = range(step * settings.batch_size, (step + 1) * settings.batch_size)
        with frozen(vae):
            shown = pgd(
                lambda attacked: mean_squared_error(reconstruct(vae, attacked), images),
                images, ATTACK, generators=image_generators(settings.seed, positions),
            )  # fmt: skip
    return mean_squared_error(reconstruct(vae, shown), images).mean()


@torch.no_grad()
def scaling_factor(vae: AutoencoderKL, scenes: SceneSet, *, most: int = 256) -> float:
    """Return 1 / standard deviation of the latents of the first scenes."""
    images = scenes.pixels(torch.arange(min(most, len(scenes.captions)))).to(vae.device)
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in images.split(32)])
    return round(1 / latents.std().item(), 5)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--vae", type=Path, default=None, help="where to start; without it, from random weights")
    add("--clean_steps", type=int, default=0, help="first steps without an attack")
    add("--steps", type=int, default=400)
    add("--batch_size", type=int, default=8)
    add("--learning_rate", type=float, default=5e-4)
    add("--num_scenes", type=int, default=1000)
    add("--scenes_seed", type=int, default=1, help="of the training scenes")
    add("--work_dir", type=Path, default=None, help="saved scenes; default: `scenes` in the output folder")
    add("--seed", type=int, default=0)
    add("--torch_compile", action="store_true", help="needs a C++ compiler on the CPU")
    add("--output_dir", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
