"""Write files completely or not at all: atomic writes, checksums, locks, kept tensors; and read paths with a ~."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

from srl_utils.errors import UnusableFile, UserError

LONGEST_NAME = 255  # bytes, of file systems
LOCK = ".lock"


def home_expanded(text: str) -> str:
    """Return the path with the home folder in place of a leading ~, as no shell puts it after an equals sign.

    A path that exists as it is stays as it is.
    """
    return text if os.path.exists(text) else os.path.expanduser(text)


def check_writable(target: Path) -> None:
    """Raise an OSError if no file can be written at `target`; leave no file behind."""
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder")
    with suppress(FileNotFoundError):
        os.lstat(target)  # raises an error for a name that is too long
    folder = next(parent for parent in target.parents if os.path.lexists(parent))
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that a reader sees the old file or the complete new one.

    Args:
        path: the file.
        write: writes the file at the path it is given; the file is then renamed to `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    if len(os.fsencode(aside.name)) > LONGEST_NAME:
        aside = path.with_name(f".{sha256(os.fsencode(path.name)).hexdigest()}.partial")
    try:
        write(aside)
        flush(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)  # frees the space on a full disk
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """Write text in UTF-8; bytes of file names that are not Unicode are escaped."""
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8", errors="backslashreplace"))


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, readable by whom the umask allows; safetensors itself lets the owner alone read them."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    path.chmod(mode)


def read_json(path: Path) -> Any:
    """Return what `write_text_atomically` has written as JSON.

    Raises:
        UnusableFile: an OSError, if the file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UnusableFile(f"{path} is damaged; remove it, and the same command makes it again") from None


KEY = "images"


def kept_images(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """Return the images `[N,3,H,W]` stored at `path`, on the CPU; make and store them if there are none."""

    def write() -> None:
        made = make().cpu().contiguous()
        write_atomically(path, lambda aside: save_tensors({KEY: made}, aside))

    make_once(path, write)
    return load_file(path)[KEY]


def make_once(path: Path, write: Callable[[], object]) -> None:
    """Write a file unless it exists; wait while another process writes it.

    Args:
        path: the file.
        write: writes it atomically.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}{LOCK}"):
        if not path.exists():
            write()


MANIFEST = "manifest.json"
PIECE = 2**22  # bytes read at a time


def seal(folder: Path) -> None:
    """Write the manifest of all files below `folder`, after flushing them to the disk, and flush it too."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    contents = {path.relative_to(folder).as_posix(): [path.stat().st_size, checksum(path)] for path in files}
    (folder / MANIFEST).write_text(json.dumps(contents, indent=1), encoding="utf-8")
    for path in [*files, folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        flush(path)


def fault(folder: Path) -> str | None:
    """Return what differs from the manifest, such as `optimizer.bin has 100 of 200 bytes`; None if nothing does."""
    try:
        contents = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return next(filter(None, (_fault_of(folder / name, *expected) for name, expected in contents.items())), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # damaged or unreadable
        return f"{MANIFEST} cannot be read"


def _fault_of(path: Path, size: int, digest: str) -> str | None:
    found = path.stat().st_size
    if found != size:
        return f"{path.name} has {found} of {size} bytes"
    return None if checksum(path) == digest else f"{path.name} differs from its checksum"


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Write a file, or the names in a folder, from memory to the disk, so that it survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def sole_run(output_dir: Path, *, is_main_process: bool) -> Iterator[None]:
    """Lock `output_dir` for this run within the context. The system ends the lock if the process dies.

    Args:
        output_dir: the folder of the run; created if missing.
        is_main_process: other processes of the run take no lock.

    Raises:
        UserError: at once if another run holds the lock, or if `output_dir` cannot be written to.
    """
    if not is_main_process:
        yield
        return
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output_dir / LOCK).acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another run is writing to {output_dir}; choose another folder, or start again when that run has ended",
            parameter="output_dir",
        ) from None
    except OSError as error:
        raise UnusableFile(f"cannot write to {output_dir}: {error.strerror}", parameter="output_dir") from None
    with lock:
        yield
