"""Images that take long to make are made once, and are there when an interrupted evaluation goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from srl_utils.checkpoints import write_atomically

KEY = "images"


def kept_images(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """`[N,3,H,W]` on the CPU: those at `path`, or else what `make` returns, which is put there.

    Processes that need the same ones at a time may all make them: they are to depend on `path` alone.
    """
    if not path.exists():
        made = make().cpu().contiguous()
        write_atomically(path, lambda aside: save_file({KEY: made}, aside))
    return load_file(path)[KEY]
