"""Random numbers for a batch of images: each image draws from its own generator, whatever batch it is in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Generators = Sequence[torch.Generator]
"""One CPU generator per image. Functions that also take None draw from PyTorch's global generator then."""


def draw(sample: Callable[..., Tensor], shape: Sequence[int], generators: Generators | None, *, like: Tensor) -> Tensor:
    """Draw random numbers for each image of a batch, on the CPU in float32.

    Args:
        sample: `torch.rand`, `torch.randn` or another function that is called as `sample(shape, generator=...)`.
        shape: shape of one image's draw.
        generators: one CPU generator per image. None draws from PyTorch's global generator, image by image, so that
            `torch.manual_seed` makes the result reproducible.
        like: the batch `[N,...]`. The result gets its device and dtype.

    Returns:
        `[N,*shape]`. Row i depends on `generators[i]` alone.

    Raises:
        ValueError: if the number of generators is not the number of images.
    """
    if generators is None:
        generators = [torch.default_generator] * len(like)
    if len(generators) != len(like):
        raise ValueError(f"random draws need one generator per image, got {len(generators)} for {len(like)} images")
    drawn = torch.stack([sample(tuple(shape), generator=generator) for generator in generators])
    if like.device.type == "cuda":
        drawn = drawn.pin_memory()  # a copy from ordinary memory waits until the GPU has finished all its work
    return drawn.to(like, non_blocking=True)


def draw_signs(shape: Sequence[int], generators: Generators | None, *, like: Tensor) -> Tensor:
    """Draw -1 or 1 with equal probability, `[N,*shape]`; see `draw` for arguments and errors."""
    return torch.where(draw(torch.rand, shape, generators, like=like) < 0.5, -1.0, 1.0).to(like)


def draw_uniform(generators: Generators | None, *, like: Tensor) -> Tensor:
    """Draw uniform noise in [-1,1) of the shape of `like`; see `draw` for arguments and errors."""
    return draw(torch.rand, like.shape[1:], generators, like=like).mul_(2).sub_(1)


def draw_normal(generators: Generators | None, *, like: Tensor) -> Tensor:
    """Draw noise of mean 0 and standard deviation 1 of the shape of `like`; see `draw` for arguments and errors."""
    return draw(torch.randn, like.shape[1:], generators, like=like)


def image_generators(seed: int, indices: Iterable[int]) -> Generators:
    """Return one generator for each image number: what an image draws does not depend on its batch."""
    return [torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63) for index in indices]


def purifying_generators(seed: int, indices: Iterable[int], *, attacked: bool = False) -> Generators:
    """Return one generator for each image number, from which purifiers draw.

    Args:
        seed: of the evaluation; the draws are not those of `image_generators`.
        indices: numbers of the images.
        attacked: whether the draws are those of an attacker, who does not know which ones will be judged.
    """
    return image_generators((seed + 1) * 7_919 + attacked, indices)
