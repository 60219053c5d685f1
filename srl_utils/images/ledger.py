"""Count the training images that were read, scaled up, or found unreadable."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from srl_utils.errors import UserError
from srl_utils.images.loading import Batch

logger = logging.getLogger(__name__)

STREAM_TRIAL = 200  # images of a stream to read before the share of unreadable ones is judged


class ImageLedger:
    """Counts the images that `training_batches` read, and logs the name of each unreadable image once.

    Args:
        num_images: size of the training set; None for a stream.
        world_size: number of processes, each of which reads as many images as this one. `add` takes the names of
            unreadable images from the others.
    """

    def __init__(self, num_images: int | None, *, world_size: int = 1) -> None:
        self.num_images = num_images
        self.world_size = world_size
        self.read = 0
        self.upscaled = 0
        self.bad_images: dict[str, None] = {}

    def update(self, batch: Batch) -> None:
        """Add one batch of this process."""
        self.read += len(batch.positions) * self.world_size
        self.upscaled += batch.upscaled
        self.add(batch.bad_images)

    def add(self, bad_images: Sequence[str]) -> None:
        """Add the names of unreadable images; a known name does not count again."""
        for name in bad_images:
            if name not in self.bad_images:
                self.bad_images[name] = None
                logger.warning("unreadable training image, replaced by another one: %s", name)

    @property
    def share(self) -> float:
        """Return the number of unreadable images as a share of the training set, or of what was read of a stream."""
        return len(self.bad_images) / max(self.num_images or self.read, 1)

    def check(self, max_bad_images: float) -> None:
        """Raise a UserError if `share` is above `max_bad_images`.

        A stream is not checked before `STREAM_TRIAL` images.
        """
        if self.share <= max_bad_images or (self.num_images is None and self.read < STREAM_TRIAL):
            return
        total = f"{self.num_images} training images" if self.num_images else f"the {self.read} images read so far"
        raise UserError(
            f"{len(self.bad_images)} of {total} cannot be read ({', '.join(islice(self.bad_images, 3))}, ...), which is more "
            f"than a share of {max_bad_images:g}; repair or remove them, or allow a larger share",
            parameter="max_bad_images",
        )

    def summary(self) -> str:
        """Return a line on the images that were replaced or scaled up; empty if there were none."""
        parts = []
        if self.bad_images:
            parts.append(f"{len(self.bad_images)} unreadable images were replaced by others")
        if self.upscaled:
            parts.append(f"images smaller than the resolution were scaled up {self.upscaled} times")
        return "; ".join(parts)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return {"read": self.read, "upscaled": self.upscaled, "bad_images": list(self.bad_images)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the counts of `state_dict`."""
        self.read, self.upscaled = state["read"], state["upscaled"]
        self.bad_images = dict.fromkeys(state["bad_images"])
