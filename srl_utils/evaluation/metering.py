"""A progress bar that advances with each call of a network, so that it moves during a long attack.

The unit is a pass: one image through a VAE's encoder and decoder. Costs are estimates (`Perturbation.passes`,
`Task.passes`). If a stage costs less than estimated, the bar jumps to its end; if it costs more, the bar waits there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from srl_utils.purifiers.base import DENOISER
from srl_utils.vae.codec import Codec

ENCODER, DECODER = 0.3, 0.7
"""Cost of one forward call for one image, in passes; the backward call costs as much again."""


class Meter:
    """Moves `bar`, whose unit is a pass, through stages of estimated cost."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar
        self._done = self._end = 0.0

    @contextmanager
    def stage(self, title: str, passes: float) -> Iterator[None]:
        """Within, show `title` and advance by at most `passes`; at the end, advance to exactly `passes`."""
        self._end = self._done + passes
        self.say(title)
        yield
        self._move(self._end)

    def say(self, title: str) -> None:
        """Show `title` in front of the bar."""
        self.bar.set_description_str(title, refresh=False)
        self.bar.update(0)

    def count(self, passes: float) -> None:
        """Advance by `passes`, but not beyond the end of the stage."""
        self._move(min(self._done + passes, self._end))

    def watched(self, codec: Codec) -> Codec:
        """Return a copy of `codec` whose calls move the bar."""
        encoder, decoder = _Watched(codec.encoder, ENCODER, self), _Watched(codec.decoder, DECODER, self)
        return replace(codec, encoder=encoder, decoder=decoder)

    @contextmanager
    def watching(self, codecs: Sequence[Codec], denoiser: nn.Module | None) -> Iterator[None]:
        """Within, calls of these networks and of their copies move the bar; no network may be compiled."""
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
        """Return the meter itself: copies of a watched network move the same bar."""
        return self


class _Watched(nn.Module):
    """A network whose calls move a bar. It wraps the network, because hooks would make a compiled one compile again."""

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
    """Return the images of a batch for a bar's title, counted from 1, such as `images 1 to 4 of 9`."""
    first, last = batch[0] + 1, batch[-1] + 1
    return f"image {first} of {total}" if first == last else f"images {first} to {last} of {total}"
