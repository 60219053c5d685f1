"""Read TIFF files that Pillow refuses or misreads: fractions, long integers, packed bits, planes of 16 bits."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import tifffile
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import IFDRational

from srl_utils.images.png_chunks import LOW_BYTES
from srl_utils.images.sample_ranges import BITS_PER_SAMPLE, MAX_SAMPLE, S_MAX_SAMPLE, Declared, unit_values

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
COMPRESSION, SAMPLES_PER_PIXEL, PLANAR, ICC_PROFILE = 259, 277, 284, 34675
UNCOMPRESSED, SEPARATE_PLANES = 1, 2
COLOUR_SAMPLES = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4}  # by TIFF's PhotometricInterpretation
PALETTE, CMYK = 3, 5
MODES = {1: "L", 3: "RGB", 4: "CMYK"}
PREMULTIPLIED, ALPHA = 1, 2  # TIFF's ExtraSamples
KEPT_TAGS = (270, 271, 272, 282, 283, 296, 305, 306, 315, 33432)  # description, resolution, author, copyright, ...
ORIENTATION = 274
WHOLE_BYTES = (8, 16, 32, 64)


class TiffPages(Image.Image):
    """The pages of a TIFF file as tifffile reads them, upright. RGB of 16 bits has its `LOW_BYTES` beside it."""

    format = "TIFF"

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._file = tifffile.TiffFile(io.BytesIO(data))
        self.n_frames = len(self._file.pages)
        self.is_animated = self.n_frames > 1
        self.seek(0)

    def seek(self, frame: int) -> None:
        """Read the page of this number, from 0."""
        if not 0 <= frame < self.n_frames:
            raise EOFError("no more pages in TIFF file")
        page = self._file.pages[frame].aspage()
        self.declared = Declared.of_tiff({tag.code: tag.value for tag in page.tags})
        samples, alpha = _planes(page, self.declared)
        image = _merged(samples, alpha, page)
        self.im, self._mode, self._size = image.im, image.mode, image.size
        self.info = {"icc_profile": page.tags.valueof(ICC_PROFILE), "exif": _kept(page).tobytes()}
        if image.mode.startswith("RGB"):
            self.info[LOW_BYTES] = _merged(samples << 8, None, page)
        self._frame = frame

    def tell(self) -> int:
        """Return the number of the page."""
        return self._frame

    def close(self) -> None:
        """Close the file; the page that was read last stays."""
        self._file.close()


def misread_by_pillow(tags: Mapping[int, object]) -> bool:
    """Return whether Pillow opens a file with these tags but takes the wrong bytes or bits for the pixels."""
    uncompressed = tags.get(COMPRESSION, UNCOMPRESSED) == UNCOMPRESSED
    declares_white = MAX_SAMPLE in tags or S_MAX_SAMPLE in tags
    return is_deep(tags) and (declares_white or (uncompressed and tags.get(PLANAR) == SEPARATE_PLANES))


def is_deep(tags: Mapping[int, Any]) -> bool:
    """Return whether the pixels of a file with these tags have several samples of more than 8 bits."""
    bits = np.atleast_1d(tags.get(BITS_PER_SAMPLE, 1))
    return int(tags.get(SAMPLES_PER_PIXEL, len(bits))) > 1 and bits.max() > 8


def _planes(page: tifffile.TiffPage, declared: Declared) -> tuple[np.ndarray, np.ndarray | None]:
    """Return colours `[H,W,C]` and alpha `[H,W]`, if any, of 16 bits."""
    _check(page)
    values = _samples(page)
    if page.photometric == PALETTE:
        return np.moveaxis(np.asarray(page.colormap), 0, -1)[values[..., 0]], None
    unit = unit_values(values[..., : COLOUR_SAMPLES[page.photometric]], declared)
    alpha = _alpha(page, values, declared._replace(inverted=False))
    if alpha is not None and PREMULTIPLIED in page.extrasamples:
        unit = np.clip(unit / np.maximum(alpha, 1e-6)[..., None], 0, 1)
    return _sixteen_bits(unit), None if alpha is None else _sixteen_bits(alpha)


def _sixteen_bits(unit: np.ndarray) -> np.ndarray:
    return (65535 * unit).round().astype(np.uint16)


def _merged(samples: np.ndarray, alpha: np.ndarray | None, page: tifffile.TiffPage) -> Image.Image:
    """Return colours and alpha of 16 bits as an upright image.

    Gray keeps all its bits; other images keep their high bytes.
    """
    if samples.shape[-1] == 1 and alpha is None:
        image = Image.fromarray(samples[..., 0])
    else:
        planes = [*np.moveaxis(samples, -1, 0), *([] if alpha is None else [alpha])]
        mode = MODES[samples.shape[-1]] + ("" if alpha is None else "A")
        image = Image.merge(mode, [Image.fromarray((plane >> 8).astype(np.uint8)) for plane in planes])
    image.getexif()[ORIENTATION] = page.tags.valueof(ORIENTATION, 1)
    return ImageOps.exif_transpose(image)


def _alpha(page: tifffile.TiffPage, values: np.ndarray, declared: Declared) -> np.ndarray | None:
    colours = COLOUR_SAMPLES[page.photometric]
    unnamed = page.photometric == 2 and not page.extrasamples
    kind = page.extrasamples[0] if page.extrasamples else ALPHA if unnamed else 0
    if page.photometric in (PALETTE, CMYK) or values.shape[-1] <= colours or kind not in (PREMULTIPLIED, ALPHA):
        return None
    return unit_values(values[..., colours], declared)


def _check(page: tifffile.TiffPage) -> None:
    """Raise a ValueError if the page is not an image that this module reads, is too large, or is cut short."""
    if page.photometric not in COLOUR_SAMPLES or page.imagedepth != 1:
        raise ValueError(f"TIFF with photometric interpretation {page.photometric} and {page.bitspersample} bits")
    pixels = page.imagewidth * page.imagelength
    if not 0 < pixels <= (Image.MAX_IMAGE_PIXELS or pixels):
        raise Image.DecompressionBombError(f"{pixels} pixels are more than {Image.MAX_IMAGE_PIXELS}")
    if page.samplesperpixel > COLOUR_SAMPLES[page.photometric] + 4:
        raise ValueError(f"TIFF with {page.samplesperpixel} samples per pixel, which is no image")
    size, segments = page.parent.filehandle.size, _segments(page)
    stored = sum(count for _, count in segments)
    packed = pixels * page.samplesperpixel * page.bitspersample // 8 if page.compression == UNCOMPRESSED else 1
    outside = any(offset <= 0 or count <= 0 or offset + count > size for offset, count in segments)
    if outside or stored < packed or len(segments) < math.prod(page.chunked):
        raise ValueError("TIFF that is cut short")


def _samples(page: tifffile.TiffPage) -> np.ndarray:
    """Return the file's own numbers, `[H,W,S]`."""
    planar = page.planarconfig == SEPARATE_PLANES and page.samplesperpixel > 1
    if page.bitspersample not in WHOLE_BYTES:
        return _unpacked(page, planar)
    values = page.asarray().reshape(page.shape)
    if planar:
        return np.moveaxis(values, 0, -1)
    return values.reshape(page.imagelength, page.imagewidth, page.samplesperpixel)


def _unpacked(page: tifffile.TiffPage, planar: bool) -> np.ndarray:
    """Return the file's own numbers `[H,W,S]` if they fill no whole bytes, such as 12 bits.

    tifffile needs another package for these.
    """
    decompress = tifffile.TIFF.DECOMPRESSORS[page.compression]
    if page.is_tiled or page.predictor != 1 or page.fillorder != 1 or not 8 < page.bitspersample < 32:
        raise ValueError(f"TIFF with {page.bitspersample} bits per sample in tiles or with a predictor")
    file = page.parent.filehandle
    segments = [file.read_array(np.uint8, count, offset).tobytes() for offset, count in _segments(page)]
    packed = b"".join(segments if page.compression == UNCOMPRESSED else map(decompress, segments))
    planes, samples = (page.samplesperpixel, 1) if planar else (1, page.samplesperpixel)
    row = page.imagewidth * samples * page.bitspersample
    rows = np.frombuffer(packed, np.uint8)[: planes * page.imagelength * -(-row // 8)].reshape(-1, -(-row // 8))
    bits = np.unpackbits(rows, axis=1)[:, :row].reshape(planes, page.imagelength, page.imagewidth, samples, -1)
    weights = 1 << np.arange(page.bitspersample)[::-1]
    values = bits @ weights.astype(np.uint32)
    return np.moveaxis(values, 0, -1)[..., 0, :] if planar else values[0]


def _segments(page: tifffile.TiffPage) -> list[tuple[int, int]]:
    return list(zip(page.dataoffsets, page.databytecounts, strict=True))


def _kept(page: tifffile.TiffPage) -> Image.Exif:
    """Return the tags that describe the image apart from its pixels."""
    exif = Image.Exif()
    for code in KEPT_TAGS:
        if (value := page.tags.valueof(code)) is not None:
            exif[code] = IFDRational(*value) if isinstance(value, tuple) and len(value) == 2 else value
    return exif
