"""The machine's memory and disk: how memory is kept, what ran out, and which flags need less of it."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import sys

import torch

from srl_utils.errors import ResourceError, UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
# safetensors and torch tell of a failed write in words of their own.
TOLD_ERRNO = re.compile(r"os error (\d+)")
TORCH_WRITE = re.compile(r"PytorchStreamWriter|inline_container|iostream error")
MEMORY = re.compile(r"out of memory|can't allocate memory|DefaultCPUAllocator|Cannot allocate memory")
WANTED = re.compile(r"allocate ([\d.]+ (?:bytes|[KMGTPE]iB))")
LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|Connection was likely closed|gloo|NCCL|Broken pipe",
    re.IGNORECASE,
)
WHOLE = (
    "everything saved before is intact: run the same command again, for a training with resume_from_checkpoint latest"
)
LOST_WORKER = (
    "a worker process that reads images has ended, perhaps because memory ran out; a smaller dataloader_num_workers needs "
    f"less memory. {WHOLE[0].upper()}{WHOLE[1:]}"
)
LESS_MEMORY = (
    "use less memory by a smaller train_batch_size with more gradient_accumulation_steps, by gradient_checkpointing, by "
    "mixed_precision bf16 or by a smaller resolution (in an evaluation by a smaller batch_size or resolution, in sanitize by "
    "a smaller tile_above)"
)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_THRESHOLD = 2**25  # bytes, as glibc takes it


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, for work that asks for the same sizes at every step.

    By default glibc hands much of it back to the system, which clears it page by page when it is wanted again: up to a fifth of a
    training step on the CPU (benchmarks/RESULTS.md). Pieces of over 32 MB go back still. Does nothing where there is no glibc.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
        set_option(M_TRIM_THRESHOLD, -1)


def explained(error: BaseException) -> UserError | None:
    """What the user can do about `error`: bad input where the system refuses a name, else what the machine lacks.

    None if `error` is of another kind.
    """
    if isinstance(error, OSError) and error.errno in REFUSED:
        return UserError(f"{os.strerror(error.errno)}: {error.filename}")
    if reason := out_of_memory(error):
        return ResourceError(reason)
    if reason := failed_write(error):
        return ResourceError(f"{reason}; {WHOLE}")
    if isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
        return ResourceError(f"another process of this run has ended or cannot be reached; {WHOLE}")
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid"):
        return ResourceError(LOST_WORKER)
    return None


def out_of_memory(error: BaseException) -> str | None:
    """One line on an allocation that failed, with its size where it is told and the flags that help; else None."""
    text = str(error)
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not (
        isinstance(error, RuntimeError) and MEMORY.search(text)
    ):
        return None
    wanted = WANTED.search(text)
    return f"out of memory{f' (for {wanted[1]} more)' if wanted else ''}: {LESS_MEMORY}"


def failed_write(error: BaseException) -> str | None:
    """Why the disk did not take it, such as `No space left on device`; None if `error` is of another kind."""
    number = error.errno if isinstance(error, OSError) else None
    if told := TOLD_ERRNO.search(str(error)):
        number = int(told[1])
    if number in FULL:
        return os.strerror(number)
    return "writing failed, as on a full disk" if TORCH_WRITE.search(str(error)) else None


def gigabytes(num_bytes: int) -> str:
    """Such as `1.25 GB`."""
    return f"{num_bytes / 1e9:.3g} GB"
