"""Whether a folder on the disk is what was written: a manifest of sizes and checksums, made last and checked first."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

MANIFEST = "manifest.json"
PIECE = 2**22  # bytes read at a time


def seal(folder: Path) -> None:
    """Writes the manifest of all files below `folder`, once these and it are on the disk itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    contents = {path.relative_to(folder).as_posix(): [path.stat().st_size, checksum(path)] for path in files}
    (folder / MANIFEST).write_text(json.dumps(contents, indent=1), encoding="utf-8")
    for path in [*files, folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        flush(path)


def fault(folder: Path) -> str | None:
    """What differs from the manifest, such as `optimizer.bin has 100 of 200 bytes`; None if `folder` is whole."""
    try:
        contents = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return next(filter(None, (_fault_of(folder / name, *expected) for name, expected in contents.items())), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # cut, flipped, or not to be read
        return f"{MANIFEST} cannot be read"


def _fault_of(path: Path, size: int, digest: str) -> str | None:
    found = path.stat().st_size
    if found != size:
        return f"{path.name} has {found} of {size} bytes"
    return None if checksum(path) == digest else f"{path.name} differs from its checksum"


def checksum(path: Path) -> str:
    """SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Has the disk write what it holds of a file, or of a folder's names, so that a loss of power finds it there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
