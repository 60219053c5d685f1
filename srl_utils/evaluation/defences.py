"""Defences: a VAE, and a purifier that changes the images before the VAE sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from srl_utils.attacks.draws import Generators
from srl_utils.images.pixels import by_frame
from srl_utils.purifiers import Purifier
from srl_utils.vae.codec import Codec


class PurifyingEncoder(nn.Module):
    """An encoder of purified images; clips are purified frame by frame.

    Args:
        encoder: maps images to raw moments.
        purifier: changes them first. While `generators` is set, image i draws from `generators[i]`.
    """

    def __init__(self, encoder: nn.Module, purifier: Purifier) -> None:
        super().__init__()
        self.encoder, self.purifier = encoder, purifier
        self.generators: Generators | None = None

    def purified(self, images: Tensor) -> Tensor:
        """Return purified images or clips, in [-1,1]."""
        return by_frame(lambda frames: self.purifier(frames, self._draws(len(images), len(frames))), images)

    def _draws(self, images: int, frames: int) -> Generators | None:
        """Return a generator for each frame; a single target may be encoded for a whole batch."""
        if self.generators is None:
            return None
        return [generator for generator in self.generators[:images] for _ in range(frames // images)]

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(self.purified(images))


@dataclass(frozen=True)
class Defence(Codec):
    """A VAE that sees purified images.

    Attributes:
        undefended: the VAE alone.
        front: the encoder with the purifier; `encoder` is this one, or one that counts its calls.
    """

    undefended: Codec
    front: PurifyingEncoder

    @classmethod
    def by(cls, codec: Codec, purifier: Purifier) -> Defence:
        """Return the defence of a VAE by a purifier."""
        encoder = PurifyingEncoder(codec.encoder, purifier)
        return cls(f"{codec.name} + {purifier.name}", codec.vae, encoder, codec.decoder, codec, encoder)

    @property
    def purifier(self) -> Purifier:
        """Return what changes the images first."""
        return self.front.purifier

    @cached_property
    def digest(self) -> str:
        """Return a digest of the weights, and the purifier's name."""
        return f"{self.undefended.digest}-{self.purifier.name}"

    @property
    def bare(self) -> Codec:
        return self.undefended

    @property
    def random(self) -> bool:
        return self.purifier.random

    @property
    def exposed(self) -> Codec:
        return self if self.purifier.differentiable else self.undefended

    def purified(self, images: Tensor) -> Tensor:
        return self.front.purified(images)

    @contextmanager
    def drawing(self, generators: Generators) -> Iterator[None]:
        before, self.front.generators = self.front.generators, generators
        try:
            yield
        finally:
            self.front.generators = before


def defences(codecs: Sequence[Codec], purifiers: Sequence[Purifier]) -> list[Codec]:
    """Return the VAEs alone, and then each of them with each purifier."""
    return [*codecs, *(Defence.by(codec, purifier) for purifier in purifiers for codec in codecs)]
