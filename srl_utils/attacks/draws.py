"""Random numbers for a batch: an image draws from its own generator, whatever batch it stands in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Generators = Sequence[torch.Generator]


def draw(sample: Callable[..., Tensor], shape: Sequence[int], generators: Generators | None, *, like: Tensor) -> Tensor:
    """Draws of `torch.rand` or `torch.randn`, one for each image of a batch.

    Args:
        sample: called as `sample(shape, generator=...)`.
        shape: of one image's draw.
        generators: one CPU generator per image.
        like: the batch `[N,...]`, whose device and dtype the draws get after they are drawn on the CPU in float32.

    Returns:
        `[N,*shape]`; row i comes from `generators[i]` alone.

    Raises:
        ValueError: unless there is one generator per image.
    """
    if generators is None or len(generators) != len(like):
        given = "none" if generators is None else len(generators)
        raise ValueError(f"random draws need one generator per image: {given} for {len(like)}")
    drawn = torch.stack([sample(tuple(shape), generator=generator) for generator in generators])
    if like.device.type == "cuda":
        drawn = drawn.pin_memory()  # from ordinary memory the copy would wait for all that the GPU has been given to do
    return drawn.to(like, non_blocking=True)


def draw_signs(shape: Sequence[int], generators: Generators | None, *, like: Tensor) -> Tensor:
    """-1 or 1 with even chances, `[N,*shape]`; arguments and errors are those of `draw`."""
    return torch.where(draw(torch.rand, shape, generators, like=like) < 0.5, -1.0, 1.0).to(like)


def draw_uniform(generators: Generators | None, *, like: Tensor) -> Tensor:
    """Uniform noise in [-1,1) of the shape of `like`; arguments and errors are those of `draw`."""
    return draw(torch.rand, like.shape[1:], generators, like=like).mul_(2).sub_(1)


def draw_normal(generators: Generators | None, *, like: Tensor) -> Tensor:
    """Noise of mean 0 and deviation 1 of the shape of `like`; arguments and errors are those of `draw`."""
    return draw(torch.randn, like.shape[1:], generators, like=like)


def image_generators(seed: int, indices: Iterable[int]) -> Generators:
    """Return a generator for each image number: what is drawn for an image does not depend on its batch."""
    return [torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63) for index in indices]
