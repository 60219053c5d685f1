"""Check what visitors upload: number of files, bytes, pixels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

from torch import Tensor

from srl_utils.errors import UserError
from srl_utils.images.decoding import UnreadableImage, decode_rgb
from srl_utils.images.framing import Crop

MAX_FILES = 16
"""Images that are cleaned at once."""
MAX_BYTES = 16 * 2**20
"""Size of a file."""
MAX_TOTAL = 64 * 2**20
"""Size of all files of an upload or a computation."""
KEEP = 600
"""Seconds after which an unused file is deleted."""
MAX_PIXELS = 2**22
"""Pixels of an image, as 2048 x 2048 has; of an animation that is cleaned, those of all frames together."""
MAX_FRAMES = 1000
"""Frames of an animation that is cleaned: each takes time and memory, however small it is."""


def checked(files: Sequence[str | Path] | None, *, most: int = MAX_FILES) -> list[Path]:
    """Return the paths of uploaded files, and let their ages count from now.

    Raises:
        UserError: if there are none, more than `most`, one of more than `MAX_BYTES`, more than `MAX_TOTAL` together, or if
            one has been deleted.
    """
    paths = [Path(file) for file in files or ()]
    if not paths:
        raise UserError("choose a file first")
    if len(paths) > most:
        raise UserError(f"{len(paths)} files are too many; choose {most} at most")
    sizes = [renew(path) for path in paths]
    for path, size in zip(paths, sizes, strict=True):
        if size > MAX_BYTES:
            raise UserError(f"{path.name} is too large; a file may have {MAX_BYTES // 2**20} MB")
    if sum(sizes) > MAX_TOTAL:
        raise UserError(f"the files are too large together; they may have {MAX_TOTAL // 2**20} MB")
    return paths


def renew(path: Path) -> int:
    """Let the age of an uploaded file count from now, and return its size in bytes.

    Raises:
        UserError: if it has been deleted.
    """
    try:
        os.utime(path)
        return path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path.name} was deleted after {KEEP // 60} minutes; choose it again") from None


@contextmanager
def in_use(paths: Sequence[Path], *, every: float) -> Iterator[None]:
    """Renew uploaded files every so many seconds within: to clean one image may take longer than files are kept."""
    ended = Event()

    def renew_all() -> None:
        while not ended.wait(every):
            for path in paths:
                with suppress(UserError):  # whoever reads a deleted file says so
                    renew(path)

    thread = Thread(target=renew_all, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def read_square(picture: str | Path | None, resolution: int) -> Tensor:
    """Return the central square of an uploaded image at `resolution` R, `[1,3,R,R]` in [-1,1].

    Raises:
        UserError: if there is none, or if it cannot be read or is too large.
    """
    if picture is None:
        raise UserError("choose an image first")
    (path,) = checked([picture])
    try:
        return Crop(resolution=resolution)(decode_rgb(path, max_pixels=MAX_PIXELS))[None]
    except UnreadableImage as error:
        raise UserError(f"{path.name} {reason_of(error)}") from None


def reason_of(error: UnreadableImage) -> str:
    """Return what is wrong with an image, as the end of a sentence that its name begins."""
    if "DecompressionBomb" in str(error):
        return f"has more than {MAX_PIXELS:,} pixels; make it smaller"
    return f"cannot be read: {error}"
