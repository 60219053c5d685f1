"""The colour profile of a JPEG 2000 file, which Pillow passes over."""

from __future__ import annotations

import struct
from collections.abc import Iterator

SIGNATURE = b"\0\0\0\x0cjP  \r\n\x87\n"
ICC_METHODS = (2, 3)  # restricted and any ICC profile


def embedded_profile(data: bytes) -> bytes | None:
    """Return the ICC profile in the header of a JP2 file; None if there is none."""
    for kind, header in _boxes(data):
        if kind == b"jp2h":
            for inner, content in _boxes(header):
                if inner == b"colr" and len(content) > 3 and content[0] in ICC_METHODS:
                    return content[3:]
    return None


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of each box; the last one may lack its end."""
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
