"""In what precision the networks run and whether they are compiled: asked for, or chosen for the device."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass

import torch

from srl_utils.errors import UserError
from srl_utils.vae.loading import HALF_PRECISION

EAGER_FLOPS = {"cuda": 50e12, "cpu": 100e9}
"""Operations per second, of a GPU and of a CPU's core, that a convolutional network in eager float32 may reach."""
REPAYS_COMPILING = 180.0
"""Seconds of eager work from which on torch.compile, which takes a minute or two at first, saves more than it costs."""


@dataclass(frozen=True)
class Execution:
    """How the networks run; `precision` is one of no, bf16 and fp16."""

    precision: str
    torch_compile: bool
    reason: str
    """For the user: what was chosen, and why."""

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return HALF_PRECISION.get(self.precision)

    @property
    def summary(self) -> str:
        """Return precision and compiling, such as `bf16, compiled`."""
        precision = "float32" if self.precision == "no" else self.precision
        return f"{precision}, {'compiled' if self.torch_compile else 'not compiled'}"

    def __str__(self) -> str:
        return f"{self.summary} ({self.reason})"


def check_execution(mixed_precision: str | None, torch_compile: bool | None, *, leave_gpu: bool = False) -> None:
    """Refuse what this machine cannot do.

    Args:
        leave_gpu: whether the run stays on the CPU although there may be a GPU.

    Raises:
        UserError: in one line, with the flag.
    """
    on_gpu = torch.cuda.is_available() and not leave_gpu
    if mixed_precision == "fp16" and not on_gpu:
        raise UserError("fp16 needs a GPU; on the CPU take bf16 or no", parameter="mixed_precision")
    if torch_compile and not can_compile("cuda" if on_gpu else "cpu"):
        missing = "Triton" if on_gpu else "a C++ compiler (g++)"
        raise UserError(f"compiling needs {missing}; install it, or do not compile", parameter="torch_compile")


def runs_in_fp16(precision: str | None, force_upcast: bool) -> bool:
    """Whether fp16 is asked for and not overruled: a VAE with `force_upcast` overflows in it, as diffusers knows."""
    return precision == "fp16" and not force_upcast


def choose_execution(
    device: torch.device, *, precision: str | None, torch_compile: bool | None, force_upcast: bool, flops: float
) -> Execution:
    """What is asked for, and for what is not (None) a good choice for the device.

    Args:
        device: a GPU, or the CPU with all the threads torch has been given.
        precision: `no`, `bf16`, `fp16` or None.
        torch_compile: whether to compile, or None.
        force_upcast: of the VAE's configuration: it overflows in fp16, and runs in float32 where that is asked for.
        flops: of the whole run on this device.
    """
    reasons = []
    if torch_compile is None:
        torch_compile, reason = _choose_compiling(device, flops)
        reasons.append(reason)
    if precision is None:
        precision, reason = _choose_precision(device, torch_compile)
        reasons.append(reason)
    elif precision == "fp16" and not runs_in_fp16(precision, force_upcast):
        precision = "no"
        reasons.append("the VAE's configuration has force_upcast: float32 instead of fp16; bf16 would be faster")
    return Execution(precision, torch_compile, "; ".join(reasons) or "as asked for")


def can_compile(kind: str) -> bool:
    """Whether torch.compile has what it needs on a device of this kind."""
    if kind == "cuda":
        return importlib.util.find_spec("triton") is not None
    return kind == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is not None


def _choose_compiling(device: torch.device, flops: float) -> tuple[bool, str]:
    if not can_compile(device.type):
        return False, f"no compiler for {device.type}"
    lanes = torch.get_num_threads() if device.type == "cpu" else 1
    pays = flops / (EAGER_FLOPS[device.type] * lanes) > REPAYS_COMPILING
    return pays, "long enough to repay compiling" if pays else "too short to repay compiling"


def _choose_precision(device: torch.device, compiled: bool) -> tuple[str, str]:
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "the GPU computes in bf16") if able else ("no", "the GPU lacks bf16")
    if device.type != "cpu":
        return "no", f"float32 on {device.type}"
    # torch 2.7 has no public query for bf16; `torch.cpu.get_capabilities` came later.
    if not torch.cpu._is_avx512_bf16_supported():
        return "no", "the CPU lacks bf16"
    # Measured (benchmarks/RESULTS.md): bf16 pays on the CPU together with compiling, and hardly without.
    return ("bf16", "the CPU computes in bf16") if compiled else ("no", "on the CPU bf16 pays only when compiled")
