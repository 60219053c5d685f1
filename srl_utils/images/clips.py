"""Find clips and decode their frames: videos, animated images, and folders that hold the frames of a clip."""

from __future__ import annotations

import io
import os
import re
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Protocol

import fsspec
import torch
from PIL import Image
from torch import Tensor

from srl_utils.images.decoding import (
    HEAD,
    UnreadableImage,
    check_regular,
    content_or_path,
    decode_rgb,
    one_line_reason,
    open_image,
    over_white,
    to_srgb,
)
from srl_utils.images.listing import (
    VIDEO_SUFFIXES,
    Skipped,
    list_files,
    list_images,
    reason_of,
    suffix_of,
    why_no_image,
)
from srl_utils.images.videos import NEEDS_PYAV, Video, has_pyav

MIDDLE = 0.5
ANIMATED_SUFFIXES = frozenset({".gif", ".webp", ".apng"})
BESIDE_CLIPS = "a still image beside videos or animations"
OUTSIDE_FOLDERS = "a still image outside the sub-folders"


class Frames(Protocol):
    """The frames of a clip, upright and RGB.

    The length is the largest number of frames that there may be: what a file says of itself may be too much.
    """

    def __len__(self) -> int: ...

    def frames(self, first: int, /) -> Generator[Image.Image, None, None]: ...


def decode_clip(source: object, keep: Callable[[Image.Image], Tensor], *, num_frames: int, start: float) -> Tensor:
    """Return `num_frames` consecutive frames of a clip as `[3,T,...]`. Frames are kept one by one, so memory is bounded.

    Args:
        source: a `FrameFolder`, or a video or an animated image as `open_image` takes images.
        keep: turns an upright RGB frame into what is kept of it, `[3,...]`.
        num_frames: T, at least 2.
        start: where the frames begin, from 0 (the first possible frame) up to 1 (the last one, excluded).

    Raises:
        UnreadableImage: if the clip is broken or too short.
    """
    with one_line_reason(), _opened(source) as clip:
        if len(clip) < num_frames:
            raise _too_short(len(clip), num_frames)
        first = int(start * (len(clip) - num_frames + 1))
        with closing(clip.frames(first)) as frames:
            kept = [keep(frame) for frame in islice(frames, num_frames)]
        # Where there are fewer frames than it seemed, the last ones are taken.
        return torch.stack(kept if len(kept) == num_frames else _last(clip, keep, num_frames), dim=1)


def _last(clip: Frames, keep: Callable[[Image.Image], Tensor], num_frames: int) -> list[Tensor]:
    kept: deque[Tensor] = deque(maxlen=num_frames)
    with closing(clip.frames(0)) as frames:
        kept.extend(map(keep, frames))
    if len(kept) < num_frames:
        raise _too_short(len(kept), num_frames)
    return list(kept)


def _too_short(number: int, wanted: int) -> UnreadableImage:
    return UnreadableImage(f"has {number} frame{'s' * (number != 1)}, fewer than {wanted}")


@dataclass(frozen=True)
class FrameFolder:
    """A folder whose images, in the natural order of their names, are the frames of a clip."""

    folder: Path

    def paths(self) -> list[Path]:
        """Return the images directly in the folder."""
        visible = (path for path in self.folder.iterdir() if not path.name.startswith(".") and path.is_file())
        return sorted((path for path in visible if why_no_image(path) is None), key=_natural)


def clip_at(path: Path) -> Path | FrameFolder:
    """Return what `decode_clip` takes for a clip's file, or for the folder of its frames."""
    return FrameFolder(path) if path.is_dir() else path


@dataclass(frozen=True)
class FrameFiles:
    """The frames of a clip as image files."""

    paths: list[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def frames(self, first: int) -> Generator[Image.Image, None, None]:
        """Yield the frames from number `first` on."""
        for path in self.paths[first:]:
            try:
                yield decode_rgb(path)
            except UnreadableImage as error:
                raise UnreadableImage(f"{path.name}: {error}") from error


@dataclass(frozen=True)
class AnimatedImage:
    """The frames of an opened GIF, WebP or APNG."""

    image: Image.Image

    def __len__(self) -> int:
        return getattr(self.image, "n_frames", 1)

    def frames(self, first: int) -> Generator[Image.Image, None, None]:
        """Yield the frames from number `first` on."""
        for number in range(first, len(self)):
            try:
                self.image.seek(number)
            except (EOFError, OSError):  # the header states too many, or the file breaks off
                return
            yield over_white(*to_srgb(self.image))


@contextmanager
def _opened(source: object) -> Iterator[Frames]:
    if isinstance(source, FrameFolder):
        yield FrameFiles(source.paths())
        return
    with _open_file(source) as file:
        head = file.read(HEAD)
        if reason_of("", head) is not None:
            yield Video(file)
            return
    with open_image(source) as image:
        if not getattr(image, "is_animated", False):
            raise UnreadableImage("is a still image, and not a clip")
        yield AnimatedImage(image)


@contextmanager
def _open_file(source: object) -> Iterator[IO[bytes]]:
    source = content_or_path(source)
    if isinstance(source, str) and "://" in source:
        with fsspec.open(source, "rb") as file:
            yield file
    elif isinstance(source, (bytes, bytearray, memoryview)):
        yield io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        check_regular(Path(source))
        with open(source, "rb") as file:
            yield file
    else:
        raise UnreadableImage(f"{type(source).__name__} instead of a clip")


def is_clip(path: Path) -> bool:
    """Return whether `path` is a video, an animated image or a folder, whose images are then the frames."""
    return path.is_dir() or suffix_of(path.name) in VIDEO_SUFFIXES or _is_animated(path)


def list_clips(folder: Path) -> tuple[list[Path], Skipped]:
    """List the clips below `folder`, sorted, and the files that are in none.

    Clips are videos, animated images, and sub-folders that directly hold still images but neither of these.
    """
    images, others = list_images(folder)
    videos = list_files(folder, VIDEO_SUFFIXES)
    names = {str(path.relative_to(folder)) for path in videos}
    skipped = [(reason, name) for reason, group in others.names.items() for name in group if name not in names]
    if not has_pyav():
        skipped += [(NEEDS_PYAV, name) for name in sorted(names)]
    clips = set(videos) if has_pyav() else set()
    with_videos = {path.parent for path in videos}
    for parent, group in groupby(sorted(images, key=lambda path: (path.parent, path)), key=lambda path: path.parent):
        stills = list(group)
        animations = _animations(stills)
        clips.update(animations)
        if animations or parent in with_videos or parent == folder:
            reason = OUTSIDE_FOLDERS if parent == folder else BESIDE_CLIPS
            skipped += [(reason, str(path.relative_to(folder))) for path in stills if path not in animations]
        else:
            clips.add(parent)
    return sorted(clips), Skipped.of(sorted(skipped))


def _animations(images: Sequence[Path]) -> set[Path]:
    """Return the animated images among those of a folder.

    Frames of clips are often PNG files, and opening them all takes long, so the first one speaks for the rest.
    """
    pngs = [path for path in images if suffix_of(path.name) == ".png"]
    candidates = [path for path in images if suffix_of(path.name) in ANIMATED_SUFFIXES]
    candidates += pngs if pngs and _is_animated(pngs[0]) else []
    return set(filter(_is_animated, candidates))


def _is_animated(path: Path) -> bool:
    """Return whether a file holds an animation; a broken GIF does, so that it counts as a broken clip."""
    try:
        with open_image(path) as image:
            return getattr(image, "is_animated", False)
    except UnreadableImage:
        return suffix_of(path.name) == ".gif"


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Return a key that sorts 2.png before 10.png."""
    parts = re.split(r"(\d+)", path.name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]
