"""Write sanitized images: what each file format can hold, and how it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from srl_utils.errors import UserError
from srl_utils.files import write_atomically
from srl_utils.pipelines.metadata import Metadata, save_options

ANIMATION, PAGES = "frames", "pages"
FULLY, PARTLY = "fully", "partly"
GIGABYTE = 10**9
CLEAR = 2  # a GIF's disposal: each frame replaces the one before, also where it is transparent
GIF_COLOURS = 255  # and one more for transparency


@dataclass(frozen=True)
class Format:
    """What a file format holds.

    Attributes:
        name: Pillow's name.
        longest_side: in pixels.
        alpha: whether pixels can be transparent.
        sequence: the kind of several images in a file, `ANIMATION` or `PAGES`; "" for a single image.
        most_bytes: limit of the uncompressed pixels, 4 bytes each.
        options: for Pillow's `save`.
    """

    name: str
    longest_side: int
    alpha: bool = True
    sequence: str = ""
    most_bytes: float = float("inf")
    options: dict[str, object] = field(default_factory=dict)

    def refusal(self, size: tuple[int, int]) -> str | None:
        """Return why an image of this (width, height) cannot be written; None if it can."""
        width, height = size
        if max(size) > self.longest_side:
            return f"{self.name} holds sides of up to {self.longest_side} pixels, and this image has {width}x{height}"
        if 4 * width * height > self.most_bytes:
            return f"{self.name} holds up to {self.most_bytes / GIGABYTE:.0f} GB, and this image has {width}x{height} pixels"
        return None


FORMATS = {
    "PNG": Format("PNG", 2**31 - 1, sequence=ANIMATION),
    "JPEG": Format("JPEG", 65500, alpha=False, options={"quality": 95}),
    "WEBP": Format("WEBP", 16383, sequence=ANIMATION, options={"quality": 95}),
    "GIF": Format("GIF", 65535, sequence=ANIMATION),
    "TIFF": Format("TIFF", 2**31 - 1, sequence=PAGES),
    "BMP": Format("BMP", 2**31 - 1, alpha=False, most_bytes=4 * GIGABYTE),
}


@dataclass
class Film:
    """An image to write: one frame, or several of the kind that its format holds.

    Attributes:
        frames: RGB or RGBA.
        durations: milliseconds of each frame.
        loop: how often an animation is shown; 0 means forever, None once.
        still_first: whether the first frame is only for viewers without animation.
        lossless: whether a WebP is written without loss.
    """

    frames: list[Image.Image] = field(default_factory=list)
    durations: list[float] = field(default_factory=list)
    loop: int | None = None
    still_first: bool = False
    lossless: bool = False


def format_of(path: Path) -> Format | None:
    """Return the format that the suffix of `path` names; None if images cannot be written in it."""
    Image.init()
    return FORMATS.get(Image.registered_extensions().get(path.suffix.lower(), ""))


def format_to_write(path: Path) -> Format:
    """Return the format that the suffix of `path` names.

    Raises:
        UserError: if images cannot be written in it.
    """
    form = format_of(path)
    if form is None:
        raise UserError(f"{path} must end in one of {', '.join(writable_suffixes())}")
    return form


def writable_suffixes() -> list[str]:
    """Return the lower-case suffixes of `FORMATS`, sorted."""
    Image.init()
    return sorted(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)


def write_film(film: Film, metadata: Metadata, target: Path, form: Format) -> list[str]:
    """Write an image; return what `form` could not hold of its metadata and colours.

    Raises:
        OSError: if `target` cannot be written to.
    """
    told, lost = save_options(metadata, form.name)
    if film.still_first and len(film.frames) > 1 and form.name != "PNG":
        lost.append(f"the still image before the animation ({form.name} has no place for it)")
        film = replace(film, frames=film.frames[1:], durations=film.durations[1:])
    frames = _uniform(film.frames, form)
    options = {**form.options, **told, **_sequence_options(film, frames, form)}
    if form.name == "WEBP" and film.lossless:
        options["lossless"] = True
    if form.name == "TIFF" and sum(4 * frame.width * frame.height for frame in frames) > 4 * GIGABYTE:
        options["big_tiff"] = True
    write_atomically(target, lambda aside: frames[0].save(aside, format=form.name, **options))
    return lost


def losses(count: int, sequence: str, alphas: set[str], form: Format) -> list[str]:
    """Return in words what `form` cannot hold.

    Args:
        count: number of frames or pages of the source.
        sequence: their kind, as in `Format`.
        alphas: `FULLY`, `PARTLY` or both, if pixels are transparent in this way.
        form: format of the file to write.
    """
    lost = []
    if alphas and not form.alpha:
        lost.append(f"transparency ({form.name} has none: laid over white)")
    if PARTLY in alphas and form.name == "GIF":
        lost.append("partial transparency (GIF pixels are opaque or transparent)")
    if count > 1 and form.sequence != sequence:
        lost.append(f"{count - 1} of {count} {sequence} ({form.name} gets the first)")
    if form.name == "GIF":
        lost.append("colours (GIF holds 256 in a frame)")
    return lost


def _uniform(frames: Sequence[Image.Image], form: Format) -> list[Image.Image]:
    """Return the frames of an animation in one mode.

    They lack the `info` of their sources, which Pillow would write.
    """
    mode = "RGBA" if form.alpha and any(frame.mode == "RGBA" for frame in frames) else "RGB"
    uniform = [frame if form.sequence == PAGES else frame.convert(mode) for frame in frames]
    if form.name == "GIF":
        return [_with_palette(frame) for frame in uniform]
    return uniform


def _with_palette(frame: Image.Image) -> Image.Image:
    """Return a frame in 255 colours, with a 256th for transparent pixels."""
    indexed = frame.convert("RGB").quantize(GIF_COLOURS)
    if frame.mode != "RGBA":
        return indexed
    palette = (indexed.getpalette() or [])[: 3 * GIF_COLOURS]
    indexed.putpalette(palette + [0] * (3 * (GIF_COLOURS + 1) - len(palette)))
    clear = frame.getchannel("A").point([255] * 128 + [0] * 128)
    indexed.paste(GIF_COLOURS, mask=clear)
    indexed.info["transparency"] = GIF_COLOURS
    return indexed


def _sequence_options(film: Film, frames: Sequence[Image.Image], form: Format) -> dict[str, object]:
    if len(frames) == 1:
        return {}
    options: dict[str, object] = {"save_all": True, "append_images": frames[1:]}
    if form.sequence == PAGES:
        return options
    durations = [round(duration) for duration in film.durations]
    options["duration"] = durations
    if form.name == "GIF":
        options |= {"disposal": CLEAR if "transparency" in frames[0].info else 1, "optimize": False}
        return options if film.loop is None else {**options, "loop": film.loop}
    if form.name == "PNG" and film.still_first:
        options |= {"default_image": True, "duration": durations[1:]}
    return {**options, "loop": 1 if film.loop is None else film.loop}
