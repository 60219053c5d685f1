"""Clean uploaded images, each with its own size, transparency and metadata."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from srl_utils.app.uploads import MAX_FRAMES, MAX_PIXELS, reason_of
from srl_utils.errors import UserError, one_line
from srl_utils.images.decoding import UnreadableImage
from srl_utils.pipelines.files import check_frames, sanitize_file
from srl_utils.pipelines.formats import FORMATS
from srl_utils.pipelines.sanitizing import build_purifier
from srl_utils.purifiers import LOOP
from srl_utils.vae.codec import Codec

PURIFIERS = (
    LOOP, f"jpeg-75+{LOOP}", f"resize-0.5+{LOOP}", f"noise-0.05+{LOOP}", "jpeg-75", "webp-75", "resize-0.5",
    "adverse-cleaner",
)  # fmt: skip
"""What visitors choose from: purifiers that take seconds and need nothing but a VAE."""


@dataclass(frozen=True)
class Purified:
    """A cleaned image: the uploaded file, the PNG, and what the PNG lacks of the upload."""

    source: Path
    result: Path
    lost: Sequence[str]


def purify(
    sources: Sequence[Path], codec: Codec, purifier: str, folder: Path, report: Callable[[int], object]
) -> list[Purified]:
    """Write the cleaned images to `folder` as PNG files of the same size.

    All images are decoded before the first is cleaned, which takes little time beside it: a bad one costs no work.

    Args:
        sources: the images.
        codec: what `vae-loop` uses.
        purifier: one of `PURIFIERS`.
        folder: gets the files; it exists.
        report: hears the number of each image before it is cleaned; an error that it raises ends the work.

    Raises:
        UserError: if there is no such purifier, or if an image cannot be read or is too large; it names the image.
            Nothing has been cleaned then.
    """
    if purifier not in PURIFIERS:
        raise UserError(f"there is no purifier '{purifier}'; choose from {', '.join(PURIFIERS)}")
    change = build_purifier(purifier, codec.vae)
    for source in sources:
        check_image(source)
    made = []
    for number, source in enumerate(sources):
        report(number)
        result = free_place(folder, f"{source.stem}-purified")
        made.append(Purified(source, result, sanitize_file(source, result, change, max_pixels=MAX_PIXELS)))
    return made


def check_image(source: Path) -> None:
    """Raise a UserError that names an image if a frame of it cannot be read, or if it has too many frames or pixels."""
    try:
        check_frames(source, FORMATS["PNG"], max_frames=MAX_FRAMES, max_pixels=MAX_PIXELS)
    except UnreadableImage as error:
        raise UserError(one_line(f"{source.name} {reason_of(error)}")) from None


def free_place(folder: Path, stem: str) -> Path:
    """Return a PNG in `folder` that does not exist; two uploads may have the same name."""
    place, number = folder / f"{stem}.png", 2
    while place.exists():
        place, number = folder / f"{stem}-{number}.png", number + 1
    return place
