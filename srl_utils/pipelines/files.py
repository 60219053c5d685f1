"""Sanitize an image file, with all its frames and its metadata."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from srl_utils.errors import UserError
from srl_utils.images.decoding import UnreadableImage, open_image, to_srgb
from srl_utils.pipelines.formats import (
    ANIMATION,
    FULLY,
    PAGES,
    PARTLY,
    Film,
    Format,
    format_of,
    format_to_write,
    losses,
    write_film,
)
from srl_utils.pipelines.metadata import read_metadata
from srl_utils.pipelines.sanitizing import purify_frame
from srl_utils.purifiers import Purifier

# In other formats, further frames are layers, sizes, previews or gain maps of one image.
SEQUENCES = {
    "GIF": ANIMATION,
    "PNG": ANIMATION,
    "WEBP": ANIMATION,
    "AVIF": ANIMATION,
    "FLI": ANIMATION,
    "TIFF": PAGES,
    "DCX": PAGES,
}
WEBP_HEAD = 2**16  # bytes, in which the first pixels begin


def sanitize_file(source: Path, target: Path, purifier: Purifier, *, max_pixels: int | None = None) -> list[str]:
    """Purify every frame of an image file, and write it in the format that the target's suffix names.

    Args:
        source: a file of any readable format.
        target: the file to write; its suffix is one of `writable_suffixes`.
        purifier: for images of any size.
        max_pixels: the largest image to read, in place of Pillow's limit.

    Returns:
        What the written file lacks of `source`, in words.

    Raises:
        UnreadableImage: if the image or one of its frames cannot be read.
        UserError: if the target's format cannot hold the image or cannot be written. Nothing has been computed then.
        OSError: if `target` cannot be written to.
    """
    form = format_to_write(target)
    with open_image(source, max_pixels=max_pixels) as image:
        check_size(image, form)
        film, alphas = Film(lossless=_is_lossless_webp(source)), set()
        for index in range(_count_written(image, form)):
            _seek(image, index)
            frame, alpha = purify_frame(image, purifier, flat=not form.alpha)
            film.frames.append(frame)
            film.durations.append(_duration(image))
            alphas |= _alpha_kinds(alpha)
            if index == 0:  # now loaded, so the metadata after its pixels is known
                metadata, film.loop = read_metadata(image), image.info.get("loop")
                film.still_first = bool(image.info.get("default_image"))
        lost = losses(_count_frames(image), _sequence(image) or f"images in the {image.format} file", alphas, form)
        return lost + write_film(film, metadata, target, form)


def check_frames(source: Path, form: Format, *, max_frames: int, max_pixels: int) -> None:
    """Decode every frame that `sanitize_file` purifies for a file of the format `form`, one at a time.

    Args:
        source: a file of any readable format.
        form: the format of the file to write.
        max_frames: the most that it may have.
        max_pixels: the most that these frames may have together; they are counted before any is decoded.

    Raises:
        UnreadableImage: if there are more, or if the image or one of its frames cannot be read.
    """
    with open_image(source, max_pixels=max_pixels) as image:
        count = _count_written(image, form)
        if count > max_frames:
            raise UnreadableImage(f"its {count:,} frames are more than {max_frames:,}; make it shorter")
        for index in range(count):
            _seek(image, index)
            together = count * image.width * image.height  # of each frame anew, as those of a GIF may grow
            if count > 1 and together > max_pixels:
                raise UnreadableImage(
                    f"its {count:,} frames have more than {max_pixels:,} pixels together; make it smaller or shorter"
                )
            to_srgb(image)


def check_size(image: Image.Image, form: Format) -> None:
    """Raise a UserError if `form` cannot hold an image of this size."""
    if reason := form.refusal(image.size):
        raise UserError(f"{reason}; end the name of the output in .png or .tif")


def fitting_target(source: Path, target: Path, *, max_pixels: int | None = None) -> Path:
    """Return `target`, or a PNG beside it if the format of `target` cannot hold the image at `source`."""
    form = format_of(target)
    with open_image(source, max_pixels=max_pixels) as image:
        fits = form is not None and form.refusal(image.size) is None
    return target if fits else target.with_name(f"{target.name}.png")


def _sequence(image: Image.Image) -> str:
    """Return the kind of several images in an opened file, as in `Format`."""
    return SEQUENCES.get(image.format or "", "")


def _count_written(image: Image.Image, form: Format) -> int:
    """Return how many frames of an opened image a file of the format `form` gets."""
    count = _count_frames(image)  # in any case: a file whose frames cannot be counted is broken
    return count if form.sequence and form.sequence == _sequence(image) else 1


def _count_frames(image: Image.Image) -> int:
    try:
        return getattr(image, "n_frames", 1)
    except Exception as error:  # Pillow raises nearly any error for broken files
        raise UnreadableImage(f"its frames cannot be counted: {error}") from error


def _seek(image: Image.Image, index: int) -> None:
    if index == 0:
        return
    try:
        image.seek(index)
    except Exception as error:
        raise UnreadableImage(f"frame {index + 1} cannot be read: {error}") from error


def _duration(image: Image.Image) -> float:
    """Return the milliseconds of the frame that was loaded last; 0 if they are not known."""
    try:
        return float(image.info.get("duration", 0))
    except (TypeError, ValueError):
        return 0.0


def _alpha_kinds(alpha: Image.Image | None) -> set[str]:
    """Return `FULLY` if pixels are fully transparent, and `PARTLY` if pixels are partly transparent."""
    counts = [0] * 256 if alpha is None else alpha.histogram()
    return ({FULLY} if counts[0] else set()) | ({PARTLY} if any(counts[1:255]) else set())


def _is_lossless_webp(source: Path) -> bool:
    with source.open("rb") as file:
        head = file.read(WEBP_HEAD)
    return head[8:12] == b"WEBP" and b"VP8L" in head
