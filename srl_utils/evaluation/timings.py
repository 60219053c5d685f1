"""What a defence costs: the seconds that a purifier and a VAE's encoder take for an image."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from srl_utils.attacks.draws import purifying_generators
from srl_utils.console import progress_bar
from srl_utils.evaluation.defences import Defence
from srl_utils.files import read_json, write_text_atomically
from srl_utils.resources import seconds_of
from srl_utils.vae.codec import Codec

NUM_TIMED = 4
"""Images, or clips, that are timed in one batch."""
REPETITIONS = 5
"""Of each call after a warm-up. The fastest counts: all that slows one down is other work of the machine."""


@dataclass(frozen=True, kw_only=True)
class Timings:
    """The fastest of a few calls, in seconds for each image or clip of a small batch."""

    purifiers: dict[str, float]
    """By name."""
    encoders: dict[str, float]
    """By name of the VAE."""
    device: str
    """On which they were measured."""
    n: int
    """Number of images or clips in the batch."""


def kept_timings(path: Path, codecs: Sequence[Codec], images: Tensor, *, seed: int, device: str) -> Timings:
    """Return the timings that `path` holds; measure and store them if it does not exist.

    Args:
        path: a JSON file.
        codecs: the VAEs alone, and behind purifiers.
        images: `[n,3,H,W]` or `[n,3,T,H,W]` in [-1,1]; the first `NUM_TIMED` are timed.
        seed: of what purifiers draw.
        device: on which the codecs run, in words.
    """
    if not path.exists():
        found = measured_timings(codecs, images, seed=seed, device=device)
        write_text_atomically(path, json.dumps(asdict(found), indent=1) + "\n")
    return Timings(**read_json(path))


@torch.no_grad()
def measured_timings(codecs: Sequence[Codec], images: Tensor, *, seed: int, device: str) -> Timings:
    """Time each purifier and each encoder once: neither depends on the other. See `kept_timings` for the arguments."""
    images = images[:NUM_TIMED]
    numbers = range(len(images))
    purified = {codec.purifier.name: codec for codec in codecs if isinstance(codec, Defence)}
    encoded = {codec.bare.name: codec.bare for codec in codecs}
    with progress_bar(len(purified) + len(encoded), desc="seconds per image", unit="defence") as bar:

        def timed(codec: Codec, work: Callable[[Tensor], Tensor]) -> float:
            shown = images.to(codec.device)

            def call() -> None:
                with codec.drawing(purifying_generators(seed, numbers)):
                    work(shown)

            call()
            seconds = min(seconds_of(call, codec.device) for _ in range(REPETITIONS)) / len(images)
            bar.update()
            return seconds

        return Timings(
            purifiers={name: timed(codec, codec.purified) for name, codec in purified.items()},
            encoders={name: timed(codec, codec.encode) for name, codec in encoded.items()},
            device=device,
            n=len(images),
        )
