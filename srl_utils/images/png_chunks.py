"""Rewrite the chunks of a PNG that Pillow refuses or ignores into a form that it reads."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
LONGEST_TEXTS = 64 * 2**20  # bytes of all texts and the profile together; Pillow refuses more, and so does this module
PILLOWS_LIMIT = 2**20  # bytes; Pillow inflates no more of a single text
GREATEST_RATIO = 1030  # largest ratio of deflate
GRAY = 0  # colour type
COLOURED = (2, 6)
LOW_BYTES = "low_bytes"
"""Key of `Image.info`: the low bytes of RGB of 16 bits, whose high bytes are the image itself."""
TEXTS = (b"tEXt", b"iTXt")


class Chunk(NamedTuple):
    kind: bytes
    content: bytes


def readable_png(data: bytes) -> tuple[bytes, dict[str, Any]]:
    """Return a PNG that Pillow reads whatever the length of its texts, and entries for `Image.info`.

    Compressed texts above Pillow's limit are replaced by uncompressed ones. The profile and the code points of cICP
    move to the entries. The transparent gray of a PNG of fewer than 8 bits is scaled as Pillow scales gray.
    Uncompressed texts beyond `LONGEST_TEXTS` bytes are left out.

    Raises:
        ValueError: if the compressed texts and the profile have more than `LONGEST_TEXTS` bytes together.
    """
    info: dict[str, Any] = {}
    parts, copied, budget, room = [], 0, LONGEST_TEXTS, LONGEST_TEXTS
    header = b""
    for start, end, chunk in _chunks(data):
        replacement: Chunk | None = chunk
        if chunk.kind == b"IHDR":
            header = chunk.content
        elif chunk.kind == b"cICP" and len(chunk.content) == 4:
            info["cicp"] = tuple(chunk.content)
        elif chunk.kind == b"tRNS" and len(header) == 13 and header[9] == GRAY and 1 < header[8] < 8:
            replacement = Chunk(b"tRNS", _scaled(chunk.content, header[8]))
        elif (inflated := _inflated(chunk, budget)) is not None:
            budget -= len(inflated)
            replacement = _uncompressed(chunk, inflated)
            if replacement is None:
                info["icc_profile"] = inflated
        if replacement and replacement.kind in TEXTS:
            room -= len(replacement.content)
            replacement = replacement if room >= 0 else None
        if replacement is not chunk:
            parts += [data[copied:start], _encoded(replacement) if replacement else b""]
            copied = end
    return b"".join([*parts, data[copied:]]) if parts else data, info


def is_deep(data: bytes) -> bool:
    """Return whether this is a PNG of RGB with 16 bits, of which Pillow keeps 8."""
    return len(data) > 25 and data[24] == 16 and data[25] in COLOURED


def _chunks(data: bytes) -> Iterator[tuple[int, int, Chunk]]:
    """Yield start, end and content of each complete chunk; the content of pixels is left empty."""
    start = len(SIGNATURE)
    while start + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data):
            return
        yield start, end, Chunk(kind, b"" if kind in (b"IDAT", b"fdAT") else data[start + 8 : end - 4])
        start = end


def _encoded(chunk: Chunk) -> bytes:
    body = chunk.kind + chunk.content
    return struct.pack(">I", len(chunk.content)) + body + struct.pack(">I", zlib.crc32(body))


def _scaled(transparent: bytes, bits: int) -> bytes:
    value = int.from_bytes(transparent[:2], "big") & ((1 << bits) - 1)
    return struct.pack(">H", value * 255 // ((1 << bits) - 1))


def _compressed(chunk: Chunk) -> bytes | None:
    """Return the compressed part of a text or profile; None if there is none."""
    if chunk.kind in (b"zTXt", b"iCCP"):
        _, _, rest = chunk.content.partition(b"\0")
        return rest[1:] if rest[:1] == b"\0" else None
    if chunk.kind == b"iTXt":
        _, _, rest = chunk.content.partition(b"\0")
        parts = rest[2:].split(b"\0", 2)
        return parts[2] if rest[:2] == b"\1\0" and len(parts) == 3 else None
    return None


def _inflated(chunk: Chunk, budget: int) -> bytes | None:
    """Return the inflated text or profile if it is too long for Pillow; None for any other chunk."""
    compressed = _compressed(chunk)
    if compressed is None or len(compressed) * GREATEST_RATIO < PILLOWS_LIMIT:
        return None
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(compressed, PILLOWS_LIMIT)
        if not stream.unconsumed_tail:
            return None
        content += stream.decompress(stream.unconsumed_tail, max(budget - len(content), 1))
    except zlib.error:  # as Pillow, which treats broken texts as empty
        return b""
    if stream.unconsumed_tail or len(content) > budget:
        raise ValueError(f"its compressed texts have more than {LONGEST_TEXTS >> 20} MB")
    return content


def _uncompressed(chunk: Chunk, text: bytes) -> Chunk | None:
    """Return a text in a chunk without compression; None for a profile, which has no such form."""
    name, _, rest = chunk.content.partition(b"\0")
    if chunk.kind == b"zTXt":
        return Chunk(b"tEXt", name + b"\0" + text)
    if chunk.kind == b"iTXt":
        language, translated, _ = rest[2:].split(b"\0", 2)
        return Chunk(b"iTXt", name + b"\0\0\0" + language + b"\0" + translated + b"\0" + text)
    return None
