"""The miniature's video autoencoder, trained on still images, then on clips: moving scenes and pans over photographs.

    python -m miniature.build video

It has the shape of Wan's in small: causal, so that the first frame has a latent of its own and every later latent stands
for four frames. Still images come first, since they teach in a fraction of the time how to show a frame.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.utils.data import Dataset

from miniature.autoencoder import KL_WEIGHT, seen
from miniature.imagenet import NAME, ImageNetLayers
from miniature.measure import as_saved, save
from miniature.mixture import PHOTOGRAPH_SIDE, SIZE, Mixture, batches_of
from miniature.scenes import draw_clip
from miniature.training import BETAS, Loop, autocast, cosine_schedule, descend
from srl_utils.images.photographs import load_photographs
from srl_utils.images.pixels import frames_of, from_pil, on_device
from srl_utils.metrics.losses import FeatureDistance
from srl_utils.vae.networks import to_channels_last

ABOUT = """# The miniature's video autoencoder

A `diffusers.AutoencoderKLWan` of {parameters} million parameters for clips of 64 px, or another multiple of 4, and of 1 plus
a multiple of 4 frames. Its weights are in float16.

`python -m miniature.build video` trained it on the images of the other autoencoders, then on clips: drawn scenes whose
objects move, and pans over scikit-image's training photographs. Settings: {build}.

The table below is of single images; `make clips` measures clips.
"""
SETTINGS = ("still_steps", "clip_steps", "batch_size", "learning_rate", "seed")
STILLS = 4
"""Still images in the place of a clip."""
LATENT_CHANNELS = 12
FRAMES = 9
SCENE_SHARE = 0.5
FASTEST_PAN = 4.0  # pixels of the clip from frame to frame
MEASURED = 64
"""Clips whose latents give their statistics."""


def build(args: argparse.Namespace) -> None:
    """Train the autoencoder, measure it, and write it to `args.output_dir`."""
    torch.manual_seed(args.seed)
    vae = as_saved(train(args))
    mean, deviation = latent_statistics(vae, args.seed)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    save(vae, args, about=ABOUT, settings=SETTINGS)


def build_autoencoder() -> AutoencoderKLWan:
    """Return the autoencoder with random weights: Wan's blocks with fewer channels."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        scale_factor_spatial=4,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def train(args: argparse.Namespace) -> AutoencoderKLWan:
    """Train encoder and decoder together, for pixels and for features of the frames."""
    vae = to_channels_last(build_autoencoder().to(args.device))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=BETAS)
    steps = args.still_steps + args.clip_steps
    schedule = cosine_schedule(optimizer, steps)
    parts = {"vae": vae, "optimizer": optimizer, "schedule": schedule}
    loop = Loop(args.work_dir / "video.pt", parts, steps=steps, saving_steps=args.checkpointing_steps)
    perceptual = FeatureDistance(ImageNetLayers().to(args.device), NAME)
    batches = still_and_moving(args, loop.step)

    def update(step: int) -> dict[str, Tensor]:
        clips = on_device(next(batches), torch.device(args.device))
        generator = torch.Generator(args.device).manual_seed(args.seed * 1_000_003 + step)
        with autocast(clips.device, compiled=True):  # convolutions over time gain from bf16 without compiling too
            posterior = vae.encode(clips).latent_dist
            reconstruction = vae.decode(posterior.sample(generator)).sample.float()
            terms = seen(perceptual, frames_of(reconstruction), frames_of(clips))
        terms["KL"] = KL_WEIGHT * posterior.kl().float().mean()
        descend(vae, optimizer, torch.stack(list(terms.values())).sum())
        schedule.step()
        return terms

    loop.run(update)
    return vae


def still_and_moving(args: argparse.Namespace, first_step: int) -> Iterator[Tensor]:
    """Yield the batches from `first_step` on: images as clips of one frame `[N,3,1,SIZE,SIZE]`, then clips."""
    stills = range(min(first_step, args.still_steps), args.still_steps)
    for images, _ in batches_of(Mixture(args.seed), stills, STILLS * args.batch_size, args.num_workers):
        yield images.unsqueeze(2)
    clips = range(max(first_step, args.still_steps), args.still_steps + args.clip_steps)
    yield from batches_of(Clips(args.seed), clips, args.batch_size, args.num_workers)


class Clips(Dataset):
    """An endless mixture of clips `[3,FRAMES,SIZE,SIZE]` in [-1,1]. Clip i depends on (seed, i) alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.photographs = load_photographs("train", short_side=PHOTOGRAPH_SIDE)

    def __getitem__(self, index: int) -> Tensor:
        rng = np.random.default_rng((self.seed, index, 4))
        if rng.random() < SCENE_SHARE:
            return torch.stack(list(map(from_pil, draw_clip(self.seed, index, frames=FRAMES, size=SIZE))), dim=1)
        return self._pan(rng)

    def _pan(self, rng: np.random.Generator) -> Tensor:
        """Return a window that moves over a photograph at a constant speed, and maybe comes nearer."""
        photograph = self.photographs[rng.integers(len(self.photographs))]
        side = SIZE * (min(photograph.size) / SIZE / 2) ** rng.random()
        zoom = rng.uniform(0.97, 1.0)
        speed = side / SIZE * rng.uniform(0, FASTEST_PAN)
        angle = rng.uniform(0, 2 * np.pi)
        path = speed * (FRAMES - 1) * np.array([np.cos(angle), np.sin(angle)])
        room = np.array(photograph.size) - side - np.abs(path)
        start = rng.uniform(0, 1, size=2) * np.maximum(room, 0) - np.minimum(path, 0)
        frames = []
        for time in range(FRAMES):
            left, top = np.clip(start + path * time / (FRAMES - 1), 0, np.array(photograph.size) - side)
            inner = side * zoom**time
            box = (left, top, left + inner, top + inner)
            frames.append(from_pil(photograph.resize((SIZE, SIZE), box=box, reducing_gap=3.0)))
        clip = torch.stack(frames, dim=1)
        return clip.flip(-1) if rng.random() < 0.5 else clip


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, seed: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of the latents of the first clips."""
    samples = Clips(seed)
    clips = torch.stack([samples[number] for number in range(MEASURED)])
    latents = torch.cat([vae.encode(part.to(vae.device)).latent_dist.mean for part in clips.split(8)])
    channels = latents.transpose(0, 1).flatten(1).double()
    return channels.mean(dim=1), channels.std(dim=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this training."""
    parser.add_argument("--still_steps", type=int, default=2_500)
    parser.add_argument("--clip_steps", type=int, default=1_250)
    parser.add_argument("--batch_size", type=int, default=16, help="clips; four times as many still images")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--checkpointing_steps", type=int, default=250)
    parser.add_argument("--num_workers", type=int, default=1)
