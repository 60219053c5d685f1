"""One run at a time in an output folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from srl_utils.errors import UnusableFile, UserError

LOCK = ".lock"


@contextmanager
def sole_run(output_dir: Path, *, is_main_process: bool) -> Iterator[None]:
    """Within, no other run is in such a context for `output_dir`; the system ends it when the main process dies.

    Raises:
        UserError: at once if another one is, or if there is no writing in `output_dir`.
    """
    if not is_main_process:
        yield
        return
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output_dir / LOCK).acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another run is writing to {output_dir}, and this one does not wait for it; choose another --output_dir, "
            "or start again when that run has ended"
        ) from None
    except OSError as error:
        raise UnusableFile(f"--output_dir {output_dir} cannot be written to: {error.strerror}") from None
    with lock:
        yield
