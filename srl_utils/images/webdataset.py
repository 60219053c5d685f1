"""Read tars of samples (WebDataset). Any member of a sample may be an image, and samples need not be alike.

Members whose names agree up to the first dot, such as `0001.jpg` and `0001.txt`, are one sample. The rest of the name
is the member's field.
"""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import os
import posixpath
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import datasets
from datasets.utils.file_utils import xopen

from srl_utils.console import warn_once
from srl_utils.errors import UserError, one_line
from srl_utils.images.captions import SIDECAR_COLUMNS, as_caption, decode_text
from srl_utils.images.decoding import image_suffixes
from srl_utils.images.framing import RawImage
from srl_utils.images.listing import HEAD, Skipped, reason_of, suffix_of

logger = logging.getLogger(__name__)

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
TEXT_SUFFIXES = frozenset({".txt", ".caption", ".text", ".json", ".cls"})
TAR_END = 1024  # bytes
ENOUGH = 100  # images after which the fields of samples are known
LONGEST_TEXT = 2**20  # bytes
Opener = Callable[..., Any]
"""Unpacks a path or an opened file."""
ANY_IMAGE = "image"
"""The default name of the column of images."""
COMPRESSED: dict[bytes, Opener] = {b"\x1f\x8b\x08": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
BROKEN = (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
NO_IMAGE = "samples without an image"
OTHER_IMAGE = "another image of the sample is used"
COLUMNS = ("image", "caption", "__key__")


class Member(NamedTuple):
    """A file of a tar: all of its content, or its beginning if the tar can be read at any place."""

    name: str
    offset: int
    size: int
    content: bytes

    @property
    def key(self) -> str:
        """Return the name up to the first dot of its last part."""
        folder, name = posixpath.split(self.name)
        return posixpath.join(folder, name.partition(".")[0])

    @property
    def field(self) -> str:
        """Return the lower-case rest of the name, such as `jpg` or `depth.png`."""
        return posixpath.split(self.name)[1].partition(".")[2].lower()

    @property
    def view(self) -> str:
        """Return the field without the suffix: "" for `jpg`, `depth` for `depth.png`."""
        return self.field.rpartition(".")[0]

    @property
    def why_no_image(self) -> str | None:
        """Return why the member is not read as an image; None if it is one."""
        suffix = suffix_of(self.name)
        return None if suffix in image_suffixes() else reason_of(suffix, self.content[:HEAD])


class TarImage(NamedTuple):
    """The place of an image in a tar, with its caption."""

    tar: str
    name: str
    offset: int
    size: int
    caption: str

    @property
    def label(self) -> str:
        return f"{self.tar}: {self.name}"


@dataclass(frozen=True)
class TarImages:
    """Undecoded images in tars, each read from its place."""

    images: Sequence[TarImage]

    def __len__(self) -> int:
        return len(self.images)

    def listed(self) -> list[tuple[str, str]]:
        """Return name and caption of each image; decodes nothing."""
        return [(one_line(image.label), image.caption) for image in self.images]

    def __getitem__(self, index: int) -> RawImage:
        image = self.images[int(index)]
        content = None  # if the tar has become unreadable, its images are unreadable, and the run continues
        with suppress(OSError), open(image.tar, "rb") as file:
            file.seek(image.offset)
            content = file.read(image.size)
        return RawImage(content, image.label, image.caption)


@dataclass(frozen=True)
class SampleReader:
    """Decides which members of a sample are its images, and what their captions are.

    Args:
        image_column: a field such as `depth.png`, or `depth` for the field in any format. For `jpg`, as for the default
            `image`, it is the member whose field is a format alone, else `image.*`, else every image of the sample.
        caption_column: a field such as `txt`, `caption` for `caption.txt`, or a key of the sample's JSON.
    """

    image_column: str
    caption_column: str | None

    def bytes_wanted(self, info: tarfile.TarInfo) -> int:
        """Return how many bytes of a member to read: 0 of an image with a suffix, all of a text, else its head."""
        suffix = suffix_of(info.name)
        if suffix in image_suffixes():
            return 0
        is_text = suffix in TEXT_SUFFIXES or info.name.lower().endswith(f".{self.caption_column or ''}".lower())
        return info.size if is_text and info.size <= LONGEST_TEXT else HEAD

    def images(self, sample: Sequence[Member]) -> list[tuple[Member, str]]:
        """Return the images of a sample that are chosen, each with its caption."""
        return [(member, self._caption(sample, member.view)) for member in self._chosen(sample)]

    def skipped(self, sample: Sequence[Member], images: Sequence[tuple[Member, str]]) -> list[tuple[str, str]]:
        """Return (reason, name) of the images that are not chosen and, if none is, of the sample's first member."""
        chosen = {member for member, _ in images}
        others = [member.name for member in sample if member not in chosen and member.why_no_image is None]
        if images:
            return [(OTHER_IMAGE, name) for name in others]
        if others:
            return [(f"samples without {self.image_column}", others[0])]
        reasons = [member.why_no_image or "" for member in sample]
        return [(next((reason for reason in reasons if reason.startswith("needs")), NO_IMAGE), sample[0].name)]

    def _chosen(self, sample: Sequence[Member]) -> list[Member]:
        wanted = self.image_column.lower()
        images = sorted(
            (member for member in sample if member.why_no_image is None), key=lambda member: member.field != wanted
        )
        if wanted == ANY_IMAGE or f".{wanted}" in image_suffixes():
            plain = [member for member in images if not member.view]
            named = [member for member in images if member.view == ANY_IMAGE]
            return plain[:1] or named[:1] or images
        view = wanted.rpartition(".")[0] if suffix_of(wanted) in image_suffixes() else wanted
        return [member for member in images if wanted == member.field or view == member.view][:1]

    def _caption(self, sample: Sequence[Member], view: str) -> str:
        if self.caption_column is None:
            return ""
        fields = {member.field: member.content for member in sample}
        wanted = self.caption_column.lower()
        prefixes = (f"{view}.", "")
        for name in (f"{prefix}{wanted}{suffix}" for suffix in ("", ".txt") for prefix in prefixes):
            if name in fields:
                return _text(fields[name])
        for name in (f"{prefix}json" for prefix in prefixes):
            if name in fields and (caption := as_caption(_keys(fields[name]).get(self.caption_column))):
                return caption
        others = SIDECAR_COLUMNS if wanted in SIDECAR_COLUMNS else ()
        texts = (fields.get(f"{prefix}{name}") for name in others for prefix in prefixes)
        return next((_text(content) for content in texts if content is not None), "")


@dataclass
class Census:
    """The fields and JSON keys of samples, for the message if no images or captions are found."""

    fields: dict[str, None] = field(default_factory=dict)
    keys: dict[str, None] = field(default_factory=dict)
    captions: int = 0
    images: int = 0

    def add(self, sample: Sequence[Member], images: Sequence[tuple[Member, str]]) -> None:
        for member in sample if self.images < ENOUGH else ():
            self.fields[member.field] = None
            if member.field == "json":
                self.keys.update(dict.fromkeys(map(str, _keys(member.content))))
        self.captions += sum(bool(caption) for _, caption in images)
        self.images += len(images)

    def check(self, reader: SampleReader, where: str) -> None:
        """Raise a UserError if there are no images, or no captions although they are wanted."""
        members = one_line(", ".join(list(self.fields)[:20])) or "none"
        if not self.images:
            raise UserError(
                f"no sample in {where} has an image '{reader.image_column}'; the samples have the members {members}",
                parameter="image_column",
            )
        if reader.caption_column is not None and not self.captions:
            keys = f", their JSON the keys {one_line(', '.join(list(self.keys)[:20]))}" if self.keys else ""
            raise UserError(
                f"there is no column '{reader.caption_column}' in {where}; the samples have the members {members}{keys}",
                parameter="caption_column",
            )


def is_tar(path: Path) -> bool:
    """Return whether the name is that of a tar, compressed or not."""
    return path.name.lower().endswith(TAR_SUFFIXES)


def index_tars(
    tars: Sequence[str], reader: SampleReader, *, where: str, cache_dir: str | None
) -> tuple[TarImages, Skipped]:
    """Find the images of local tars, which can then be read in any order.

    Compressed tars are unpacked into the cache once.

    Returns:
        The images, and the members that were skipped.

    Raises:
        UserError: if there are no images, or no captions of the wanted name.
    """
    found: list[TarImage] = []
    skipped: list[tuple[str, str]] = []
    census = Census()
    for tar in tars:
        _check_end(tar)
        place = unpacked(tar, cache_dir)
        for sample in _grouped(_in_order_of_samples(_members_at(place, tar, reader))):
            images = reader.images(sample)
            census.add(sample, images)
            found += [TarImage(place, image.name, image.offset, image.size, caption) for image, caption in images]
            skipped += [(why, f"{os.path.basename(tar)}: {name}") for why, name in reader.skipped(sample, images)]
    census.check(reader, where)
    return TarImages(found), Skipped.of(skipped, "members of tars")


def stream_tars(tars: Sequence[str], reader: SampleReader, *, where: str) -> datasets.IterableDataset:
    """Read the images of tars, local or remote, in sequence. Rows have `COLUMNS`; images are the bytes of their files.

    Raises:
        UserError: if the first tars hold no images, or no captions of the wanted name.
    """
    for tar in tars:
        _check_end(tar)
    census = Census()
    for sample in _grouped(member for tar in tars for member in _members_of(tar, reader)):
        census.add(sample, reader.images(sample))
        if census.images and (census.captions or reader.caption_column is None or census.images >= ENOUGH):
            break
    census.check(reader, where)
    return datasets.IterableDataset.from_generator(_rows, gen_kwargs={"tars": list(tars), "reader": reader})


def _rows(tars: Sequence[str], reader: SampleReader) -> Iterator[dict[str, object]]:
    for tar in tars:
        for sample in _grouped(_members_of(tar, reader)):
            images = reader.images(sample)
            for image, caption in images:
                yield dict(zip(COLUMNS, (image.content, caption, f"{tar}: {image.name}"), strict=True))
            for reason, name in [] if images else reader.skipped(sample, images):
                warn_once(f"{one_line(tar)}: {one_line(name)} skipped: {reason}")


def unpacked(tar: str, cache_dir: str | None) -> str:
    """Return the path of the tar itself, or of its unpacked copy in the cache if it is compressed."""
    with open(tar, "rb") as file:
        opener = _opener(file)
    if opener is None:
        return tar
    facts = os.stat(tar)
    name = sha256(f"{os.path.abspath(tar)} {facts.st_size} {facts.st_mtime_ns}".encode(errors="replace")).hexdigest()
    target = Path(cache_dir or datasets.config.HF_DATASETS_CACHE, "unpacked_tars", f"{name}.tar")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{name}.{os.getpid()}")
        with opener(tar) as packed, part.open("wb") as file, _ending_early(tar):
            shutil.copyfileobj(packed, file, 2**20)
        os.replace(part, target)
    return str(target)


def _opener(file: IO[bytes]) -> Opener | None:
    """Return the function that unpacks a file, or None if it is not compressed; rewinds the file."""
    head = file.read(tarfile.BLOCKSIZE)
    file.seek(0)
    if head[257:262] == b"ustar":  # a tar, whose first bytes, a name, may look like a compressed file
        return None
    return next((opener for magic, opener in COMPRESSED.items() if head.startswith(magic)), None)


def _check_end(tar: str) -> None:
    """Warn of a local tar without the zeros that close it: readers in sequence take such a tar for complete."""
    if "://" in tar:
        return
    with suppress(OSError), open(tar, "rb") as file:
        if _opener(file) is not None:
            return
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAR_END))
        if file.read() != bytes(TAR_END):
            warn_once(f"{one_line(tar)} ends early; the number of missing images is unknown")


@contextmanager
def _ending_early(tar: str) -> Iterator[None]:
    """Treat a tar that breaks off as one that ends there, with a warning."""
    try:
        yield
    except BROKEN as error:
        warn_once(f"{one_line(tar)} ends early; the number of missing images is unknown ({one_line(str(error))})")


def _members_at(place: str, tar: str, reader: SampleReader) -> Iterator[Member]:
    """Yield the members of an uncompressed tar; of images only the place is read."""
    with open(place, "rb") as file, _ending_early(tar):
        for archive, info in _infos(file, "r:", tar):
            wanted = reader.bytes_wanted(info)
            content = _content(archive, info).read(wanted) if wanted else b""
            yield Member(_plain_name(info), info.offset_data, info.size, content)


def _members_of(tar: str, reader: SampleReader) -> Iterator[Member]:
    """Yield the members in sequence, with the whole content of images."""
    try:
        with xopen(tar, "rb") as file, _ending_early(tar):
            opener = _opener(file)
            for archive, info in _infos(file if opener is None else opener(file), "r|", tar):
                content = _content(archive, info)
                beginning = content.read(reader.bytes_wanted(info))
                member = Member(_plain_name(info), info.offset_data, info.size, beginning)
                yield member._replace(content=beginning + content.read()) if member.why_no_image is None else member
    except FileNotFoundError as error:
        raise UserError(f"{one_line(tar)} cannot be read: {error.strerror or error}") from None


def _content(archive: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    """Open a file of a tar."""
    content = archive.extractfile(info)
    if content is None:
        raise tarfile.ReadError(f"{info.name} is no file")
    return content


def _infos(file: IO[bytes], mode: Literal["r:", "r|"], tar: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the files of a tar, or of several tars in a row.

    Skips what systems add, such as `._1.jpg`.
    """
    with tarfile.open(fileobj=file, mode=mode, ignore_zeros=True, errors="surrogateescape") as archive:
        for info in archive:
            archive.members = []  # type: ignore[attr-defined]  # undocumented, and would grow without end
            parts = _plain_name(info).split("/")
            if any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in parts):
                continue
            if info.isfile():
                yield archive, info
            elif not info.isdir():
                warn_once(f"{one_line(tar)}: {one_line(info.name)} skipped: a link or a device, and no file")


def _plain_name(info: tarfile.TarInfo) -> str:
    return posixpath.normpath(info.name).lstrip("/")


def _in_order_of_samples(members: Iterable[Member]) -> list[Member]:
    """Sort members so that each sample is together, in the order of the samples' first members."""
    members = list(members)
    first: dict[str, int] = {}
    for member in members:
        first.setdefault(member.key, len(first))
    return sorted(members, key=lambda member: first[member.key])


def _grouped(members: Iterable[Member]) -> Iterator[list[Member]]:
    """Yield samples: consecutive members of one key. A field that repeats begins the next sample."""
    for _, group in groupby(members, key=lambda member: member.key):
        sample: dict[str, Member] = {}
        for member in group:
            if member.field in sample:
                yield list(sample.values())
                sample = {}
            sample[member.field] = member
        yield list(sample.values())


def _text(content: bytes) -> str:
    try:
        return as_caption(decode_text(content))
    except ValueError:  # images without a caption are counted and named elsewhere
        return ""


def _keys(content: bytes) -> dict[str, object]:
    try:
        found = json.loads(_text(content))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
