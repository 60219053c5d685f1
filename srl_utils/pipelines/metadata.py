"""Read what an image file says beside its pixels: resolution, copyright and other texts, EXIF, XMP and IPTC."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

from PIL import ExifTags, Image, ImageCms, ImageFile, IptcImagePlugin
from PIL.PngImagePlugin import PngInfo

ORIENTATION, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, INCHES = 0x0112, 0x011A, 0x011B, 0x0128, 2
INCHES_PER_UNIT = {INCHES: 1.0, 3: 1 / 2.54}
DESCRIPTION, ARTIST, COPYRIGHT = 0x010E, 0x013B, 0x8298
XMP_TAG, IPTC_TAG = 0x02BC, 0x83BB
# Tags of the storage of pixels, of colours and of thumbnails, and blocks that are handled separately.
STALE = {
    *range(0x00FE, 0x010E), *range(0x0111, 0x011E), *range(0x0120, 0x0129), 0x012D, *range(0x013D, 0x0160),
    *range(0x0200, 0x020A), *range(0x0211, 0x0215), XMP_TAG, IPTC_TAG, 0x8649, 0x8773,
}  # fmt: skip
# In the Exif block: sizes, gamma, and the interoperability entry, which may name Adobe RGB.
STALE_EXIF = {0xA002, 0xA003, 0xA500, 0xA005}
MAKER_NOTE, COLOUR_SPACE, SRGB = 0x927C, 0xA001, 1
JPEG_START = b"\xff\xd8\xff"
STALE_XMP = [
    re.compile(rb'\s(?:tiff:(?:Orientation|ImageWidth|ImageLength)|exif:Pixel[XY]Dimension|photoshop:ICCProfile)="[^"]*"'),
    re.compile(rb"<(tiff:(?:Orientation|ImageWidth|ImageLength)|exif:Pixel[XY]Dimension|photoshop:ICCProfile)>.*?</\1>", re.DOTALL),
    re.compile(rb"<((?:xmp|xap):Thumbnails)\b.*?</\1>", re.DOTALL),
]  # fmt: skip
STALE_TEXTS = re.compile(r"XML:com\.adobe\.xmp|Raw profile type .*|Thumb::.*", re.IGNORECASE)
PNG_TEXTS = {"Copyright": COPYRIGHT, "Author": ARTIST, "Description": DESCRIPTION, "Comment": DESCRIPTION}
IPTC_TEXTS = {(2, 116): COPYRIGHT, (2, 80): ARTIST, (2, 120): DESCRIPTION}
IPTC_RESOURCE = 0x0404  # of Photoshop's block
LONGEST_SEGMENT = 65533  # bytes, of a JPEG
LONGEST_XMP = LONGEST_SEGMENT - 29
LARGEST_DPI = 65535  # of a JPEG


@dataclass(frozen=True)
class Metadata:
    """The metadata of an image. It describes no other pixels than those to be written.

    Attributes:
        dpi: resolution across and down, in dots per inch.
        exif: EXIF tags.
        xmp: the XMP packet.
        iptc: IPTC fields.
        texts: texts of a PNG.
        comment: comment of a JPEG or GIF.
    """

    dpi: tuple[float, float] | None = None
    exif: Image.Exif = field(default_factory=Image.Exif)
    xmp: bytes = b""
    iptc: bytes = b""
    texts: dict[str, str] = field(default_factory=dict)
    comment: bytes = b""

    def __bool__(self) -> bool:
        return bool(self.exif or self.xmp or self.iptc or self.texts or self.comment)


def read_metadata(image: Image.Image) -> Metadata:
    """Return the metadata of an opened image, as it holds for its upright sRGB pixels.

    Orientation, thumbnails, sizes, colour spaces and damaged blocks are left out.
    """
    turned = _orientation(image) in range(5, 9)
    texts = {
        str(key): str(text) for key, text in getattr(image, "text", {}).items() if not STALE_TEXTS.fullmatch(str(key))
    }
    iptc = _iptc(image)
    exif = _tidy_exif(image)
    for tag, text in _more_texts(image, texts, iptc).items():
        if tag not in exif and text:
            exif[tag] = text
    comment = image.info.get("comment", b"")
    return Metadata(
        dpi=_resolution(image, turned),
        exif=exif,
        xmp=_tidy_xmp(image),
        iptc=iptc,
        texts=texts,
        comment=comment if isinstance(comment, bytes) else str(comment).encode(),
    )


def save_options(metadata: Metadata, file_format: str) -> tuple[dict[str, object], list[str]]:
    """Return Pillow's options to write `metadata` and sRGB, and a list of what the format cannot hold."""
    exif = _exif_with_resolution(metadata)
    everything = exif.tobytes() if len(exif) else None
    if file_format == "PNG":
        return _some(pnginfo=_png_chunks(metadata), dpi=metadata.dpi, exif=everything), _iptc_lost(metadata)
    if file_format == "WEBP":
        told = _some(icc_profile=srgb_profile(), exif=everything, xmp=metadata.xmp)
        return told, _iptc_lost(metadata) + _texts_lost(metadata)
    if file_format == "TIFF":
        told = _some(icc_profile=srgb_profile(), exif=_with_blocks(exif, metadata).tobytes(), dpi=metadata.dpi)
        return told, _texts_lost(metadata)
    if file_format == "JPEG":
        told, lost = _jpeg_options(metadata, everything)
        return told, lost + _texts_lost(metadata)
    if file_format == "GIF":
        rest = metadata.exif or metadata.xmp or metadata.iptc or metadata.texts
        return {"comment": metadata.comment}, ["copyright and other metadata"] if rest else []
    return _some(dpi=metadata.dpi), ["copyright and other metadata"] if metadata else []


@lru_cache(maxsize=1)
def srgb_profile() -> bytes:
    """Return an ICC profile of sRGB with a fixed date."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)  # the date, which would be today's
    return bytes(profile)


def _some(**options: object) -> dict[str, object]:
    return {name: value for name, value in options.items() if value}


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow raises nearly any error for broken blocks
        return 1


def _resolution(image: Image.Image, turned: bool) -> tuple[float, float] | None:
    try:
        across, down = (float(value) for value in image.info.get("dpi") or _exif_resolution(image.getexif()))
    except Exception:  # missing, or not numbers
        return None
    # Pillow reports 1 dpi for a TIFF without resolution.
    if not (1 < across <= LARGEST_DPI and 1 < down <= LARGEST_DPI):
        return None
    return (down, across) if turned else (across, down)


def _exif_resolution(exif: Image.Exif) -> tuple[float, float]:
    """Return the resolution in dots per inch. WebP, AVIF and HEIF have no other place for it.

    Raises:
        KeyError: if there is none.
    """
    unit = INCHES_PER_UNIT[exif.get(RESOLUTION_UNIT, INCHES)]
    return float(exif[X_RESOLUTION]) / unit, float(exif[Y_RESOLUTION]) / unit


def _tidy_exif(image: Image.Image) -> Image.Exif:
    """Return a copy without thumbnails, tags of the old pixels, and tags that cannot be written."""
    tidy = Image.Exif()
    try:
        source = image.getexif()
        blocks = {tag: dict(source.get_ifd(tag)) for tag in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)}
    except Exception:
        return tidy
    tidy.endian = source.endian
    for tag, value in source.items():
        if tag not in STALE and tag not in blocks:
            _set_if_writable(tidy, tag, value)
    blocks[ExifTags.IFD.Exif] = _tidy_block(blocks[ExifTags.IFD.Exif])
    for tag, block in blocks.items():
        if block:
            _set_if_writable(tidy, tag, block)
    return tidy


def _tidy_block(block: dict[int, object]) -> dict[int, object]:
    note = block.get(MAKER_NOTE)
    preview = isinstance(note, bytes) and JPEG_START in note
    kept = {tag: value for tag, value in block.items() if tag not in STALE_EXIF and not (preview and tag == MAKER_NOTE)}
    return kept | ({COLOUR_SPACE: SRGB} if COLOUR_SPACE in kept else {})


def _set_if_writable(exif: Image.Exif, tag: int, value: object) -> None:
    trial = Image.Exif()
    trial[tag] = value
    try:
        trial.tobytes()
    except Exception:  # a type or a number that does not fit
        return
    exif[tag] = value


def _tidy_xmp(image: Image.Image) -> bytes:
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    xmp = xmp.encode() if isinstance(xmp, str) else bytes(xmp)
    for pattern in STALE_XMP:
        xmp = pattern.sub(b"", xmp)
    return xmp


def _iptc(image: Image.Image) -> bytes:
    photoshop = image.info.get("photoshop")
    data = photoshop.get(IPTC_RESOURCE, b"") if isinstance(photoshop, dict) else b""
    if not data and hasattr(image, "tag_v2"):
        data = image.tag_v2.get(IPTC_TAG, b"")
    return data if isinstance(data, bytes) else b""


def _more_texts(image: Image.Image, texts: dict[str, str], iptc: bytes) -> dict[int, str]:
    """Return the texts of a PNG or of IPTC by EXIF tag, for formats that hold EXIF alone."""
    found = {tag: texts[key] for key, tag in reversed(PNG_TEXTS.items()) if key in texts}
    try:
        records = IptcImagePlugin.getiptcinfo(image) if iptc and isinstance(image, ImageFile.ImageFile) else None
    except Exception:
        records = None
    for key, tag in IPTC_TEXTS.items():
        value = (records or {}).get(key)
        if isinstance(value, bytes):
            found.setdefault(tag, value.decode(errors="replace"))
    return found


def _exif_with_resolution(metadata: Metadata) -> Image.Exif:
    """Return a copy with the resolution and the comment; WebP has no other place for the resolution."""
    exif = Image.Exif()
    exif.endian = metadata.exif.endian
    exif.update(metadata.exif)
    if metadata.dpi is not None:
        across, down = (Fraction(value).limit_denominator(1000) for value in metadata.dpi)
        exif.update({X_RESOLUTION: float(across), Y_RESOLUTION: float(down), RESOLUTION_UNIT: INCHES})
    if metadata.comment and DESCRIPTION not in exif:
        exif[DESCRIPTION] = metadata.comment.decode(errors="replace")
    return exif


def _with_blocks(exif: Image.Exif, metadata: Metadata) -> Image.Exif:
    """Add XMP and IPTC to EXIF, as a TIFF holds them."""
    if metadata.xmp:
        exif[XMP_TAG] = metadata.xmp
    if metadata.iptc:
        exif[IPTC_TAG] = metadata.iptc
    return exif


def _png_chunks(metadata: Metadata) -> PngInfo:
    chunks = PngInfo()
    chunks.add(b"sRGB", b"\0")
    for key, text in metadata.texts.items():
        chunks.add_itxt(key, text) if any(ord(letter) > 255 for letter in text) else chunks.add_text(key, text)
    if metadata.comment and "Comment" not in metadata.texts:
        chunks.add_text("Comment", metadata.comment.decode(errors="replace"))
    if metadata.xmp:
        chunks.add_itxt("XML:com.adobe.xmp", metadata.xmp.decode(errors="replace"))
    return chunks


def _iptc_lost(metadata: Metadata) -> list[str]:
    return ["IPTC fields other than copyright, author and description"] if metadata.iptc else []


def _texts_lost(metadata: Metadata) -> list[str]:
    """Name the texts of a PNG that have no place in EXIF, such as the settings of an image generator."""
    names = sorted(metadata.texts.keys() - PNG_TEXTS.keys())
    return [f"texts of the PNG ({', '.join(names)})"] if names else []


def _jpeg_options(metadata: Metadata, exif: bytes | None) -> tuple[dict[str, object], list[str]]:
    blocks = {
        "exif": exif or b"",
        "xmp": metadata.xmp,
        "comment": metadata.comment,
        "extra": _photoshop_block(metadata.iptc),
    }
    limits = dict.fromkeys(blocks, LONGEST_SEGMENT) | {"xmp": LONGEST_XMP}
    kept = {name: block for name, block in blocks.items() if len(block) <= limits[name]}
    lost = [f"{name.upper()} data of {len(blocks[name])} bytes" for name in blocks if name not in kept]
    return _some(icc_profile=srgb_profile(), dpi=metadata.dpi, **kept), lost


def _photoshop_block(iptc: bytes) -> bytes:
    """Return the segment of a JPEG with IPTC fields; empty if there are none, or if they do not fit."""
    if not iptc:
        return b""
    resource = b"8BIM" + struct.pack(">HHI", IPTC_RESOURCE, 0, len(iptc)) + iptc + b"\0" * (len(iptc) % 2)
    content = b"Photoshop 3.0\0" + resource
    return b"\xff\xed" + struct.pack(">H", len(content) + 2) + content if len(content) < LONGEST_SEGMENT else b""
