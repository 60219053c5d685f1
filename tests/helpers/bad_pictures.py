"""Forty-odd kinds of files that a folder of images may hold: broken, hostile, or only unusual."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 24


def picture(mode: str = "RGB", size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """Noise, so that no encoder makes it short."""
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)


def encoded(file_format: str, image: Image.Image | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (image or picture()).save(file, file_format, **options)
    return file.getvalue()


def png_of(*chunks: tuple[bytes, bytes], width: int = SIDE, height: int = SIDE) -> bytes:
    """A PNG of an RGB header and these chunks, with correct checksums."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        parts.append(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)))
    return b"".join(parts)


def with_flipped_byte(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 0xFF
    return bytes(changed)


def tiff(values: np.ndarray) -> bytes:
    return encoded("TIFF", Image.fromarray(values))


JPEG, PNG = encoded("JPEG", quality=95), encoded("PNG")
SCANLINES = zlib.compress(bytes(SIDE * (3 * SIDE + 1)))
FLOATS = np.linspace(0, 1, SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE)

UNREADABLE: dict[str, bytes | Callable[[Path], object]] = {
    "no bytes.png": b"",
    "one byte.jpg": b"\xff",
    "zero bytes only.png": bytes(4096),
    "text.jpg": b"no picture but a text, renamed\n" * 50,
    "html.png": b"<html><body>404 Not Found</body></html>",
    "git-lfs pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "script.gif": b"#!/bin/sh\ntouch proof\n",
    "zip.png": b"PK\x03\x04" + bytes(200),
    "pdf.jpg": b"%PDF-1.7\n" + bytes(200),
    "postscript.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
    "jpeg cut in its header.jpg": JPEG[:20],
    "jpeg cut before its scan.jpg": JPEG[:300],
    "jpeg cut at half.jpg": JPEG[: len(JPEG) // 2],
    "jpeg cut by 100 bytes.jpg": JPEG[:-100],
    "jpeg of a header alone.jpg": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00",
    "png cut in its signature.png": PNG[:5],
    "png cut at half.png": PNG[: len(PNG) // 2],
    "png with a broken checksum in its header.png": with_flipped_byte(PNG, 30),
    "png with broken pixels.png": with_flipped_byte(PNG, 60),
    "png without pixels.png": png_of(),
    "png with too few pixels.png": png_of((b"IDAT", zlib.compress(bytes(100)))),
    "png of no width.png": png_of((b"IDAT", SCANLINES), width=0),
    "png of 2^31 pixels a side.png": png_of((b"IDAT", SCANLINES), width=2**31 - 1, height=2**31 - 1),
    "bomb of 900 megapixels.png": png_of((b"IDAT", zlib.compress(bytes(10**6))), width=30000, height=30000),
    "bomb of 178 megapixels.png": png_of((b"IDAT", zlib.compress(bytes(10**6))), width=13400, height=13400),
    "bomb in a text.png": png_of((b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))), (b"IDAT", SCANLINES)),
    "gif cut at half.gif": encoded("GIF")[:300],
    "webp cut at half.webp": encoded("WEBP", lossless=True)[:300],
    "bmp cut at half.bmp": encoded("BMP")[:300],
    "tiff cut at half.tif": tiff(FLOATS)[:300],
    "tiff with NaN.tif": tiff(np.where(FLOATS > 0.5, np.nan, FLOATS)),
    "tiff with infinity.tif": tiff(np.where(FLOATS > 0.5, np.inf, FLOATS)),
    "dangling link.png": lambda path: path.symlink_to("nowhere"),
    "link to itself.png": lambda path: path.symlink_to(path.name),
    "pipe that nobody writes to.png": os.mkfifo,
    "link to a device.png": lambda path: path.symlink_to("/dev/zero"),
}  # fmt: skip
"""Contents, or what makes the file."""

UNUSUAL: dict[str, bytes] = {
    "one pixel.png": encoded("PNG", picture(size=(1, 1))),
    "one pixel wide.png": encoded("PNG", picture(size=(1, 10_000))),
    "one pixel high.png": encoded("PNG", picture(size=(10_000, 1))),
    "cmyk.jpg": encoded("JPEG", picture("CMYK")),
    "16 bits.png": encoded("PNG", Image.fromarray((FLOATS * 65535).astype(np.uint16))),
    "32 bits.tif": tiff((FLOATS * 65535).astype(np.int32)),
    "floats.tif": tiff(FLOATS),
    "animated.gif": encoded("GIF", save_all=True, append_images=[picture("L")]),
    "animated.webp": encoded("WEBP", save_all=True, append_images=[picture("L").convert("RGB")]),
    "palette with transparency.png": encoded("PNG", picture().quantize(8), transparency=0),
    "two bits.png": encoded("PNG", picture().quantize(4), bits=2),
    "lab.tif": encoded("TIFF", picture("LAB")),
    "ycbcr.tif": encoded("TIFF", picture("YCbCr"), compression="jpeg"),
    "png that says it is jpeg.jpg": PNG,
    "jpeg that says it is png.png": JPEG,
    "png with a wrong checksum of its pixels.png": with_flipped_byte(PNG, -14),
    "rubbish after the end.jpg": JPEG + os.urandom(500),
    "exif that lies.jpg": encoded("JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff"),
    "bild-äöü-画像-🙂.png": PNG,
    "a name with\na line break.png": PNG,
    "--flag; $(touch proof) `x`.png": PNG,
    "<script>alert(1)</script>.png".replace("/", "\u2215"): PNG,
    "UPPER.PNG": PNG,
}  # fmt: skip


def fill(folder: Path, contents: dict[str, bytes | Callable[[Path], object]]) -> Path:
    """Puts the files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content(folder / name)
    return folder


def write_tar(path: Path, contents: dict[str, bytes]) -> bytes:
    """A WebDataset of `contents`; returns its bytes."""
    with tarfile.open(path, "w") as tar:
        for number, content in enumerate(contents.values()):
            member = tarfile.TarInfo(f"{number:04d}.png")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path.read_bytes()
