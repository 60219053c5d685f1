"""Read the colour space in the boxes of JPEG 2000, HEIF and AVIF files where Pillow ignores it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"
FILE_TYPE = b"ftyp"  # the kind of the first box of HEIF and AVIF
ICC_METHODS = (2, 3)  # restricted and any ICC profile
UNSPECIFIED = 2
# Transfer curves of television are close to sRGB on a display.
READ_AS_SRGB = (1, UNSPECIFIED, 6, 14, 15)
SRGB_PRIMARIES, SRGB_CURVE, RGB, FULL_RANGE = 1, 13, 0, 1


def embedded_profile(data: bytes) -> bytes | None:
    """Return the ICC profile in the header of a JP2 file; None if there is none."""
    for colour in _found(data, (b"jp2h", b"colr")):
        if len(colour) > 3 and colour[0] in ICC_METHODS:
            return colour[3:]
    return None


def code_points(data: bytes) -> tuple[int, int, int, int] | None:
    """Return the colour space of a HEIF or AVIF file as code points of ITU-T H.273; None if it names none.

    The code points are those of the decoded RGB pixels: primaries, transfer, matrix 0 and full range.
    """
    for meta in _found(data, (b"meta",)):
        for colour in _found(meta[4:], (b"iprp", b"ipco", b"colr")):  # skips the version
            if colour[:4] == b"nclx" and len(colour) >= 8:
                primaries, transfer = struct.unpack_from(">HH", colour, 4)
                primaries = SRGB_PRIMARIES if primaries == UNSPECIFIED else primaries
                return primaries, SRGB_CURVE if transfer in READ_AS_SRGB else transfer, RGB, FULL_RANGE
    return None


def _found(data: bytes, kinds: tuple[bytes, ...]) -> Iterator[bytes]:
    """Yield the contents of the boxes of the last kind that are nested in boxes of the kinds before."""
    for kind, content in _boxes(data):
        if kind == kinds[0]:
            if kinds[1:]:
                yield from _found(content, kinds[1:])
            else:
                yield content


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and content of each box; the last box may be cut short."""
    start = 0
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        begin = start + 8
        if length == 1 and start + 16 <= len(data):  # the length follows in 64 bits
            length, begin = struct.unpack_from(">Q", data, start + 8)[0], start + 16
        end = start + length if length else len(data)
        if end < begin:
            return
        yield kind, data[begin:end]
        start = end
