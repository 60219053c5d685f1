"""What the app works with: the VAEs and pipelines that whoever started it has chosen, and who computes with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Lock
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
    """The computations of all visitors, one at a time. As a context, it stops them at its end."""

    _stops: list[tuple[str, str, Event]] = field(default_factory=list)
    _turn: Lock = field(default_factory=Lock)

    @contextmanager
    def computing(self, session: str, tab: str) -> Iterator[Event]:
        """Wait until no other computation runs; within, it is this one's turn.

        A cancelled computation runs to its next step while gradio already starts another.

        Yields:
            The event that stops it.
        """
        mine = (session, tab, Event())
        self._stops.append(mine)
        try:
            with self._turn:
                yield mine[2]
        finally:
            self._stops.remove(mine)

    def stop(self, session: str | None = None, tab: str | None = None) -> None:
        """Stop the computations that a session has begun in a tab; None stands for all sessions or tabs."""
        for visitor, place, stop in self._stops.copy():
            if session in (None, visitor) and tab in (None, place):
                stop.set()

    def __enter__(self) -> Visitors:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop all computations, and wait for the end of the one that runs."""
        self.stop()
        with self._turn:
            pass


def _chosen(what: str, known: Mapping[str, Model], name: str | None) -> Model:
    if name is None or name not in known:
        raise UserError(f"there is no {what} '{name}'; choose from {', '.join(known) or 'none'}")
    return known[name]
