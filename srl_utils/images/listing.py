"""List the images of a folder, and the files that were skipped with the reason."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from srl_utils.errors import one_line
from srl_utils.images.decoding import HEAD, NEEDED, foreign_format, image_formats, image_suffixes

logger = logging.getLogger(__name__)

MAGIC_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "AVIF", "HEIF")
BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # lengths of headers; the letters BM alone also begin words


SUFFIXES = {  # of the formats in `NEEDED`
    "AVIF": frozenset({".avif", ".avifs"}),
    "HEIF": frozenset({".heic", ".heics", ".heif", ".heifs", ".hif"}),
    "JXL": frozenset({".jxl"}),
}
NO_FORMAT = "no suffix of an image that Pillow reads"
VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi"})
VIDEO = "a video, not an image; trainings and evaluations take clips of videos with `num_frames`"
NO_SUFFIX = "no suffix, and no image by its content"
# Captions, tables, caches of trainers, notes and files of the system, which nobody takes for images.
COMPANIONS = frozenset({
    ".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".npy", ".npz", ".safetensors", ".xml",
    ".yaml", ".yml", ".toml", ".md", ".rst", ".html", ".log", ".ini", ".db", ".aae", ".xmp", ".url", ".lnk", ".py", ".sh",
    ".sha256", ".md5",
})  # fmt: skip


@dataclass(frozen=True)
class Skipped:
    """Files, or samples of tars, that were skipped: their names by reason."""

    names: Mapping[str, list[str]] = field(default_factory=dict)
    kind: str = "files"

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str]], kind: str = "files") -> Skipped:
        """Group pairs of (reason, name)."""
        names: dict[str, list[str]] = {}
        for reason, name in pairs:
            names.setdefault(reason, []).append(name)
        return cls(names, kind)

    def __len__(self) -> int:
        return sum(map(len, self.names.values()))

    def summary(self) -> str:
        """Return a line of counts and reasons without names."""
        reasons = "; ".join(f"{reason} ({len(names)})" for reason, names in self.names.items())
        return f"{len(self)} {self.kind} were skipped: {reasons}"

    def report(self) -> str:
        """Return `summary` with the first few names of each reason."""
        reasons = "; ".join(f"{reason} ({len(names)}: {few(names)})" for reason, names in self.names.items())
        return f"{len(self)} {self.kind} were skipped: {reasons}"


def list_images(folder: Path) -> tuple[list[Path], Skipped]:
    """List the images below `folder`, sorted, and the other files.

    A file without a suffix is an image if its first bytes say so. Hidden files appear in neither list, and neither do
    the usual companions of images, such as captions and tables.
    """
    images, others = [], []
    for path in list_files(folder):
        reason = why_no_image(path)
        if reason is None:
            images.append(path)
        elif path.suffix.lower() not in COMPANIONS:
            others.append((reason, str(path.relative_to(folder))))
    return images, Skipped.of(sorted(others))


def why_no_image(path: Path) -> str | None:
    """Return why a file is not read as an image; None if it is one."""
    suffix = suffix_of(path.name)
    if suffix in image_suffixes():
        return None
    return reason_of(suffix, _head(path) if is_told_by_content(suffix) else b"")


def suffix_of(name: str) -> str:
    """Return the lower-case suffix, "" for none; a number, as in `scan.0001`, is none."""
    suffix = os.path.splitext(name)[1].lower()
    return "" if suffix[1:].isdigit() else suffix


def is_told_by_content(suffix: str) -> bool:
    """Return whether the content decides what the file holds: phones also name JPEG files .heic."""
    return suffix == "" or _named_by(suffix) is not None


def reason_of(suffix: str, head: bytes) -> str | None:
    """Return why a file is not read whose suffix is not that of an image; None if `head` begins an image.

    Args:
        suffix: lower-case, "" for none.
        head: the first bytes; empty if they do not matter.
    """
    if suffix in COMPANIONS:
        return NO_FORMAT
    if suffix in VIDEO_SUFFIXES:
        return VIDEO
    # Raw files of cameras, of many suffixes, begin like a TIFF of their thumbnail.
    if any(_accepts(name, head) for name in MAGIC_FORMATS if not (suffix and name == "TIFF")):
        return None
    if file_format := foreign_format(head) or _named_by(suffix):
        return NEEDED[file_format]
    return NO_FORMAT if suffix else NO_SUFFIX


def _named_by(suffix: str) -> str | None:
    """Return which of `NEEDED` a suffix names; None if it names none of them."""
    return next((file_format for file_format, suffixes in SUFFIXES.items() if suffix in suffixes), None)


def _accepts(name: str, head: bytes) -> bool:
    """Return whether the bytes begin a file of this format that Pillow can decode."""
    if name not in image_formats() or (name == "BMP" and int.from_bytes(head[14:18], "little") not in BMP_HEADERS):
        return False
    accept = Image.OPEN[name][1]
    told = accept is not None and len(head) >= 4 and accept(head[:16])
    return bool(told) and not isinstance(told, str)  # Pillow returns a text if software is missing


def _head(path: Path) -> bytes:
    """Return the first bytes of a regular file; none of what cannot be read."""
    try:
        if path.is_file():  # reading a pipe may never end
            with path.open("rb") as file:
                return file.read(HEAD)
    except OSError:
        pass
    return b""


def few(names: Sequence[str], number: int = 3) -> str:
    """Return the first names, each in one line."""
    shown = ", ".join(map(one_line, names[:number]))
    return f"{shown}, ..." if len(names) > number else shown


def list_files(folder: Path, suffixes: frozenset[str] | None = None) -> list[Path]:
    """List the files below `folder`, sorted, without hidden files and folders.

    Links to folders are followed, and each folder is listed once, so a loop of links ends. A folder that cannot be read
    is skipped with a warning.

    Args:
        folder: where to look.
        suffixes: lower-case suffixes to list; None lists all files.
    """
    found: list[Path] = []
    visited: set[str] = set()
    for directory, subfolders, names in os.walk(folder, followlinks=True, onerror=_note_unlisted):
        real = os.path.realpath(directory)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and real not in visited)
        if real not in visited:
            found += [Path(directory, name) for name in names if not name.startswith(".")]
        visited.add(real)
    return sorted(path for path in found if suffixes is None or path.suffix.lower() in suffixes)


def _note_unlisted(error: OSError) -> None:
    logger.warning("folder skipped: %s (%s)", one_line(str(error.filename)), error.strerror)
