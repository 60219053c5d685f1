"""The images that the miniature's autoencoders are trained on: scenes, dead leaves and crops of photographs.

Every sample is a function of (seed, number), so a stopped training resumes with the same next sample.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from miniature.scenes import draw_dead_leaves, draw_scene
from srl_utils.images.photographs import load_photographs
from srl_utils.images.pixels import from_pil

SIZE = 64
PHOTOGRAPH_SIDE = 512  # pixels of the shorter side; the smallest crops show photographs at full resolution
# Shares of a batch. Photographs have the statistics that the measurements use, dead leaves prevent overfitting to
# twelve photographs, and scenes are what the miniature diffusion model draws.
SHARES = {"scene": 0.5, "dead leaves": 0.15, "photograph": 0.35}


class Mixture(Dataset):
    """An endless mixture of training images. Sample i depends on (seed, i) alone.

    A sample is an image `[3,SIZE,SIZE]` in [-1,1] and a number: 0.0 for a scene, 1.0 for an image with texture.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.photographs = load_photographs("train", short_side=PHOTOGRAPH_SIDE)

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        rng = np.random.default_rng((self.seed, index, 2))
        kind = rng.choice(list(SHARES), p=list(SHARES.values()))
        if kind == "scene":
            return from_pil(draw_scene(self.seed, index, size=SIZE).image), 0.0
        if kind == "dead leaves":
            return from_pil(draw_dead_leaves(self.seed, index, size=SIZE)), 1.0
        photograph = self.photographs[rng.integers(len(self.photographs))]
        return from_pil(augmented_crop(rng, photograph)), 1.0


def augmented_crop(rng: np.random.Generator, photograph: Image.Image) -> Image.Image:
    """Return a random crop of a photograph, rotated, mirrored and recoloured at random."""
    side = int(SIZE * (min(photograph.size) / SIZE) ** (rng.random() ** 1.5))
    left = int(rng.integers(0, photograph.width - side + 1))
    top = int(rng.integers(0, photograph.height - side + 1))
    box = (left, top, left + side, top + side)
    crop = photograph.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    crop = crop.transpose(Image.Transpose(int(rng.integers(0, 7))))
    if rng.random() < 0.3:
        crop = Image.merge("RGB", [crop.split()[channel] for channel in rng.permutation(3)])
    for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        crop = enhance(crop).enhance(float(rng.uniform(0.6, 1.4)))
    return crop


def first_images(seed: int, count: int) -> Tensor:
    """Return the first samples' images, `[count,3,SIZE,SIZE]` in [-1,1]."""
    samples = Mixture(seed)
    return torch.stack([samples[number][0] for number in range(count)])


def sample_batches(args: argparse.Namespace, first_step: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of the steps from `first_step` to before `steps`.

    Returns:
        Images `[N,3,SIZE,SIZE]` and whether they have texture, `[N]`.
    """
    return batches_of(Mixture(args.seed), range(first_step, steps), args.batch_size, args.num_workers)


def batches_of(samples: Dataset, steps: range, batch_size: int, num_workers: int) -> Iterator:
    """Yield the batches of consecutive steps; step i has the samples from i times the batch's size."""
    numbers = range(steps.start * batch_size, steps.stop * batch_size)
    return iter(DataLoader(samples, batch_size, sampler=numbers, num_workers=num_workers))
