"""Handle the limits of the machine: memory and disk, what ran out, which settings need less, and how long work takes."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import sys
import time
from collections.abc import Callable

import torch

from srl_utils.errors import ResourceError, UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EEXIST,
}  # fmt: skip
# safetensors and torch have their own messages for a failed write.
TOLD_ERRNO = re.compile(r"os error (\d+)")
TORCH_WRITE = re.compile(r"PytorchStreamWriter|inline_container|iostream error")
MEMORY = re.compile(r"out of memory|can't allocate memory|DefaultCPUAllocator|Cannot allocate memory")
WANTED = re.compile(r"allocate ([\d.]+ (?:bytes|[KMGTPE]iB))")
LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|Connection was likely closed|gloo|NCCL|Broken pipe",
    re.IGNORECASE,
)
WHOLE = (
    "everything saved before is intact: run the same command again, for a training with `resume_from_checkpoint` latest"
)
LOST_WORKER = (
    "a worker process that reads images has ended, perhaps because memory ran out; a smaller `dataloader_num_workers` needs "
    f"less memory. {WHOLE[0].upper()}{WHOLE[1:]}"
)
LESS_MEMORY = (
    "use less memory by a smaller `train_batch_size` with more `gradient_accumulation_steps`, by "
    "`gradient_checkpointing`, by "
    "`mixed_precision` bf16 or by a smaller `resolution` (in an evaluation by a smaller `batch_size` or "
    "`resolution`, in sanitize by a smaller `tile_above`)"
)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_THRESHOLD = 2**25  # bytes, as glibc takes it


def keep_freed_memory() -> None:
    """Keep freed memory in this process, for work that allocates the same sizes at every step.

    By default glibc returns much of it to the system, which clears it page by page when it is allocated again: up to a
    fifth of a training step on the CPU (benchmarks/RESULTS.md). Pieces of over 32 MB are still returned. Without glibc
    this does nothing.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
        set_option(M_TRIM_THRESHOLD, -1)


def explained(error: BaseException) -> UserError | None:
    """Return a UserError that says what the user can do about `error`; None if it is of another kind.

    The error is bad input if the system refuses a file name, else a ResourceError on what the machine lacks.
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
    """Return a line on a failed allocation and the settings that help; None for other errors."""
    text = str(error)
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not (
        isinstance(error, RuntimeError) and MEMORY.search(text)
    ):
        return None
    wanted = WANTED.search(text)
    return f"out of memory{f' (for {wanted[1]} more)' if wanted else ''}: {LESS_MEMORY}"


def failed_write(error: BaseException) -> str | None:
    """Return why the disk did not take a file, such as `No space left on device`; None for other errors."""
    number = error.errno if isinstance(error, OSError) else None
    if told := TOLD_ERRNO.search(str(error)):
        number = int(told[1])
    if number in FULL:
        return os.strerror(number)
    return "writing failed, as on a full disk" if TORCH_WRITE.search(str(error)) else None


def gigabytes(num_bytes: int) -> str:
    """Return a number of bytes as text, such as `1.25 GB`."""
    return f"{num_bytes / 1e9:.3g} GB"


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the number of threads of the CPU, for readers."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type.upper()
    threads = torch.get_num_threads()
    return "CPU, 1 thread" if threads == 1 else f"CPU, {threads} threads"


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `work` takes, its work on the device included."""
    _await(device)
    started = time.perf_counter()
    work()
    _await(device)
    return time.perf_counter() - started


def _await(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
