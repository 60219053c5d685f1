"""Files of pictures written byte by byte or by tifffile: what Pillow does not write, and profiles to put into them."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import tifffile
from PIL import Image, ImageCms

HEIGHT, WIDTH = 13, 18
RAMP = np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)
"""`[H,W,3]` in [0,1], with pure and with mixed colours."""
ALPHA = np.clip(1.5 * RAMP[::-1], 0, 1)


def levels(unit: np.ndarray, bits: int = 8) -> np.ndarray:
    """Values in [0,1] as whole numbers of so many bits."""
    return (unit * (2**bits - 1)).round().astype(np.uint8 if bits <= 8 else np.uint16)


def over_white(unit: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Values in [0,1], gray `[H,W]` or `[H,W,3]`, as they are seen over white."""
    alpha = alpha if unit.ndim == 2 else alpha[..., None]
    return unit * alpha + 1 - alpha


def as_levels(unit: np.ndarray) -> np.ndarray:
    """Values in [0,1] as the `[H,W,3]` array in [0,255] that decoding should give."""
    return 255 * np.clip(unit if unit.ndim == 3 else unit[..., None].repeat(3, axis=-1), 0, 1)


def tiff(samples: np.ndarray, photometric: str = "minisblack", **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, samples, photometric=photometric, **options)
    return file.getvalue()


def packed(samples: np.ndarray, bits: int) -> bytes:
    """Whole numbers of so many bits each, the first bit the highest; each row ends with a whole byte."""
    rows = samples.reshape(len(samples), -1, 1).astype(np.uint32)
    return np.packbits((rows >> np.arange(bits)[::-1] & 1).reshape(len(samples), -1), axis=1).tobytes()


def packed_tiff(samples: np.ndarray, bits: int, photometric: int, order: str = "<", compress: bool = False) -> bytes:
    """A TIFF of one strip of packed samples, which tifffile writes only with another package."""
    data = packed(samples, bits)
    data = zlib.compress(data) if compress else data
    number = samples.shape[2] if samples.ndim == 3 else 1
    start = 8 + 2 + 12 * 9 + 4
    per_sample = struct.pack(f"{order}{number}H", *[bits] * number)
    tags = [
        (256, samples.shape[1]), (257, samples.shape[0]), (258, bits if number == 1 else start), (259, 8 if compress else 1),
        (262, photometric), (273, start + len(per_sample)), (277, number), (278, samples.shape[0]), (279, len(data)),
    ]  # fmt: skip
    entries = b""
    for code, value in tags:
        if code in (273, 279) or (code == 258 and number > 1):
            entries += struct.pack(f"{order}HHII", code, 3 if code == 258 else 4, number if code == 258 else 1, value)
        else:
            entries += struct.pack(f"{order}HHIHxx", code, 3, 1, value)
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return header + entries + bytes(4) + per_sample + data


def png(
    samples: np.ndarray,
    bits: int,
    colour_type: int,
    *chunks: tuple[bytes, bytes],
    last: tuple[bytes, bytes] | None = None,
) -> bytes:
    """A PNG of samples `[H,W]` or `[H,W,C]`, with chunks before its pixels and perhaps one after them."""
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], bits, colour_type, 0, 0, 0)
    rows = np.frombuffer(packed(samples, bits), np.uint8).reshape(len(samples), -1)
    pixels = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in ((b"IHDR", header), *chunks, (b"IDAT", pixels), *([last] if last else []), (b"IEND", b"")):
        parts.append(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)))
    return b"".join(parts)


def encoded(picture: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


def icc(space: bytes, connection: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2 with these tags."""
    start = 128 + 4 + 12 * (len(tags) + 1)
    table, body = struct.pack(">I", len(tags) + 1), b""
    for name, content in ({b"wtpt": b"XYZ " + struct.pack(">I3i", 0, 63190, 65536, 54061)} | tags).items():
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(">I4xI4s4s4s12x4s28x", start + len(body), 0x02400000, kind, space, connection, b"acsp")
    return (header + struct.pack(">3i", 63190, 65536, 54061)).ljust(128, b"\0") + table + body


def gray_icc(gamma: float) -> bytes:
    return icc(b"GRAY", b"XYZ ", b"mntr", {b"kTRC": struct.pack(">4s4xIHxx", b"curv", 1, round(256 * gamma))})


def cmyk_icc() -> bytes:
    """A printer whose inks let through less light than the plain formula says: a table of its 16 solid colours."""
    inks = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), axis=-1).reshape(16, 4)
    light = 1 - np.clip(inks[:, :3] * [0.8, 0.7, 0.9] + 0.85 * inks[:, 3:], 0, 1)
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = to_lab.apply(Image.fromarray(levels(light)[None]))
    points = np.asarray(lab).reshape(-1, 3) ^ [0, 128, 128]  # Pillow has a and b signed
    curve = bytes(range(256))
    table = struct.pack(">4s4xBBBx9i", b"mft1", 4, 3, 2, *(65536 * np.eye(3, dtype=int)).ravel())
    return icc(b"CMYK", b"Lab ", b"prtr", {b"A2B0": table + 4 * curve + points.astype(np.uint8).tobytes() + 3 * curve})
