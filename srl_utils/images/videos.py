"""Decode a stretch of a video with PyAV, without decoding the rest of it."""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from importlib import import_module
from itertools import chain, islice
from typing import IO, Any

import numpy as np
from PIL import Image

from srl_utils.images.decoding import UnreadableImage, over_white

NEEDS_PYAV = "needs PyAV: pip install av"
# FFmpeg also knows playlists, which name other files and addresses to open; those are left out.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
UNKNOWN_FORMAT = "no video of a known format, or its beginning is broken"
BILINEAR, FULL_CHROMA, ACCURATE, SAME_ON_ALL_MACHINES = 0x2, 0x2000, 0x40000, 0x80000  # SWS_... of FFmpeg
CONVERSION = BILINEAR | FULL_CHROMA | ACCURATE | SAME_ON_ALL_MACHINES
# The signs of a display matrix (a, b, c, d), which maps a stored pixel (x, y) to (ax + cy, bx + dy).
ORIENTATIONS = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@lru_cache(maxsize=1)
def has_pyav() -> bool:
    """Return whether PyAV is installed."""
    try:
        import_module("av")
    except ImportError:
        return False
    return True


def _is_whole(packet: Any) -> bool:
    """Return whether a packet of PyAV is to be shown; the last one, which is empty, only marks the end."""
    return bool(packet.size) and not packet.is_discard and not packet.is_corrupt


class Video:
    """The frames of a video in an open file.

    The number of frames in the header is often 0 or wrong, so the packets are counted, which decodes nothing. A packet
    holds one frame at most: some codecs also have packets that are not shown. Damaged packets do not count, and neither
    do those that an edit list cuts off.

    Raises:
        UnreadableImage: if PyAV is not installed, or if the file is no video.
    """

    def __init__(self, file: IO[bytes]) -> None:
        if not has_pyav():
            raise UnreadableImage(NEEDS_PYAV)
        self.file = file
        with self._opened() as (container, stream):
            packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(stream) if _is_whole(packet)]
        self.most = len(packets)
        shown = {time for time, _ in packets if time is not None}
        self.times = sorted(shown) if len(shown) == self.most else []
        """Times at which frames are shown, in order; empty if packets lack them or share them."""
        self.keys = [time for time, is_key in packets if is_key and time is not None]

    def __len__(self) -> int:
        """Return the largest number of frames that there may be."""
        return self.most

    def frames(self, first: int) -> Generator[Image.Image, None, None]:
        """Yield upright RGB frames from number `first` on, transparent parts over white."""
        converter = import_module("av.video.reformatter").VideoReformatter()
        with closing(self._stretch(first)) as stretch:
            for frame in stretch:
                if frame.is_corrupt:
                    raise UnreadableImage("has a damaged frame")
                yield _upright_rgb(frame, converter)

    def _stretch(self, first: int) -> Generator[Any, None, None]:
        """Yield PyAV's frames from number `first` on, from the key frame before it if that can be sought."""
        if first and self.times:
            begin = self.times[first]
            key = max((time for time in self.keys if time <= begin), default=None)
            with closing(self._decoded(key)) as frames:
                head = next(frames, None)
                # An index by the times of decoding, or a damaged one, may lead too far: decode from the beginning then.
                if head is not None and head.pts is not None and head.pts <= begin:
                    yield from (frame for frame in chain([head], frames) if frame.pts is None or frame.pts >= begin)
                    return
        with closing(self._decoded(None)) as frames:
            yield from islice(frames, first, None)

    def _decoded(self, seek_to: int | None) -> Generator[Any, None, None]:
        with self._opened() as (container, stream):
            context = stream.codec_context
            context.thread_count = 1  # batches are made by several processes already
            context.options = {"err_detect": "explode", "max_pixels": str(Image.MAX_IMAGE_PIXELS or 2**31 - 1)}
            if seek_to is not None:
                container.seek(seek_to, stream=stream)
            yield from container.decode(stream)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """Open the container at its beginning: one that was read to the end cannot always be rewound."""
        av = import_module("av")
        self.file.seek(0)
        try:
            container = av.open(self.file, options={"format_whitelist": CONTAINERS})
        except av.error.FFmpegError as error:
            raise UnreadableImage(UNKNOWN_FORMAT) from error
        with container:
            cover = av.stream.Disposition.attached_pic  # the picture of a song
            stream = next((stream for stream in container.streams.video if not stream.disposition & cover), None)
            if stream is None:
                raise UnreadableImage("has no video")
            yield container, stream


def _upright_rgb(frame: Any, converter: Any) -> Image.Image:
    transparent = any(component.is_alpha for component in frame.format.components)
    pixels = converter.reformat(
        frame, format="rgba" if transparent else "rgb24", interpolation=CONVERSION, threads=1
    ).to_ndarray()
    image = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    if transparent:
        image = over_white(image, Image.fromarray(np.ascontiguousarray(pixels[..., 3])))
    orientation = _orientation(frame)
    return image if orientation is None else image.transpose(orientation)


def _orientation(frame: Any) -> Image.Transpose | None:
    """Return how to turn a frame upright; None if it is, or if its angle is no multiple of 90 degrees."""
    if not frame.rotation:  # PyAV raises an error at side data of kinds that it does not know, which are rarely turned
        return None
    matrix = next(bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX")
    a, b, _, c, d, *_ = np.sign(struct.unpack("=9i", matrix[:36])).tolist()  # (a, b, u, c, d, v, x, y, w)
    return ORIENTATIONS.get((a, b, c, d))
