"""What the app works with: the VAEs and pipelines that whoever started it has chosen, and who computes with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Event
from typing import TypeVar

from diffusers import DiffusionPipeline

from srl_utils.errors import UserError
from srl_utils.vae.codec import Codec

Model = TypeVar("Model")


@dataclass(frozen=True, kw_only=True)
class World:
    """The models that visitors choose from.

    Attributes:
        codecs: VAEs by name, the original first.
        pipelines: pipelines of diffusers by name.
        resolution: side in pixels of the square that is attacked and edited.
    """

    codecs: Mapping[str, Codec]
    pipelines: Mapping[str, DiffusionPipeline]
    resolution: int

    def codec(self, name: str | None) -> Codec:
        """Return the VAE of this name; raise a UserError if there is none."""
        return _chosen("VAE", self.codecs, name)

    def pipeline(self, name: str | None) -> DiffusionPipeline:
        """Return the pipeline of this name; raise a UserError if there is none."""
        return _chosen("pipeline", self.pipelines, name)


@dataclass
class Visitors:
    """The computations that run, so that each visitor can stop their own."""

    _stops: dict[str, Event] = field(default_factory=dict)

    def start(self, visitor: str) -> Event:
        """Return the event that stops the computation which the visitor begins."""
        self._stops[visitor] = Event()
        return self._stops[visitor]

    def stop(self, visitor: str) -> None:
        """Stop the visitor's computation, if there is one."""
        if stop := self._stops.pop(visitor, None):
            stop.set()


def _chosen(what: str, known: Mapping[str, Model], name: str | None) -> Model:
    if name is None or name not in known:
        raise UserError(f"there is no {what} '{name}'; choose from {', '.join(known) or 'none'}")
    return known[name]
