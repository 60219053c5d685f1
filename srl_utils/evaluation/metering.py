"""A bar that moves as networks work, so that an attack of a hundred steps is seen to move, whatever it is made of.

The unit is one image through a VAE's encoder and decoder. Costs are estimates (`Perturbation.passes`, `Task.passes`): a
stage that costs less than thought ends with a jump, one that costs more waits at its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from srl_utils.vae.codec import Codec

ENCODER, DECODER, DENOISER = 0.3, 0.7, 0.2
"""Shares of a pass, of one image forth; back to the image it is as much again."""


class Meter:
    """Moves `bar`, whose unit is a pass, within stages of known cost."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar
        self._done = self._end = 0.0

    @contextmanager
    def stage(self, title: str, passes: float) -> Iterator[None]:
        """Within, the bar says `title` and moves by `passes` at most; afterwards it has moved by them."""
        self._end = self._done + passes
        self.say(title)
        yield
        self._move(self._end)

    def say(self, title: str) -> None:
        """Puts `title` in front of the bar."""
        self.bar.set_description_str(title, refresh=False)
        self.bar.update(0)

    def count(self, passes: float) -> None:
        """Moves the bar by `passes`, within the stage."""
        self._move(min(self._done + passes, self._end))

    def watched(self, codec: Codec) -> Codec:
        """Return `codec`, whose work moves the bar from now on."""
        encoder, decoder = _Watched(codec.encoder, ENCODER, self), _Watched(codec.decoder, DECODER, self)
        return replace(codec, encoder=encoder, decoder=decoder)

    @contextmanager
    def watching(self, codecs: Sequence[Codec], denoiser: nn.Module | None) -> Iterator[None]:
        """Within, the work of these networks, none of them compiled, and of copies made of them moves the bar."""
        shares = {codec.encoder: ENCODER for codec in codecs} | {codec.decoder: DECODER for codec in codecs}
        if denoiser is not None:
            shares[denoiser] = DENOISER
        hooks = [network.register_forward_hook(partial(self._heard, share)) for network, share in shares.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _heard(self, share: float, network: nn.Module, given: object, output: Any) -> None:
        self.count(_cost(share, output if isinstance(output, Tensor) else output[0]))

    def _move(self, done: float) -> None:
        step = round(done) - round(self._done)
        self._done = done
        if step:
            self.bar.update(step)

    def __deepcopy__(self, memo: dict[int, Any]) -> Meter:
        """Of a network that is watched the copies are too, by the same bar."""
        return self


class _Watched(nn.Module):
    """A network whose calls move a bar. Hooks would make a compiled one compile again."""

    def __init__(self, network: nn.Module, share: float, meter: Meter) -> None:
        super().__init__()
        self.network, self.share, self.meter = network, share, meter

    def forward(self, given: Tensor) -> Tensor:
        output = self.network(given)
        self.meter.count(_cost(self.share, output))
        return output


def _cost(share: float, output: Tensor) -> float:
    return share * len(output) * (2 if output.requires_grad else 1)


def images_of(batch: Sequence[int], total: int) -> str:
    """Return which of how many images a batch holds, counted from 1, for a bar's title."""
    first, last = batch[0] + 1, batch[-1] + 1
    return f"image {first} of {total}" if first == last else f"images {first} to {last} of {total}"
