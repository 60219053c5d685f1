"""Choose the precision of the networks and whether they are compiled, as requested or for the device."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass

import torch

from srl_utils.errors import UserError
from srl_utils.vae.loading import HALF_PRECISION

EAGER_FLOPS = {"cuda": 50e12, "cpu": 100e9}
"""Operations per second of a convolutional network in eager float32, on a GPU and on one core of a CPU."""
REPAYS_COMPILING = 180.0
"""Seconds of eager work from which torch.compile saves more time than it takes, a minute or two."""


@dataclass(frozen=True)
class Execution:
    """How the networks run.

    Attributes:
        precision: `no`, `bf16` or `fp16`.
        torch_compile: whether they are compiled.
        reason: what was chosen and why, for the user.
    """

    precision: str
    torch_compile: bool
    reason: str

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
    """Refuse settings that this machine cannot run.

    Args:
        mixed_precision: `no`, `bf16`, `fp16` or None.
        torch_compile: whether to compile, or None.
        leave_gpu: whether the run stays on the CPU although there may be a GPU.

    Raises:
        UserError: in one line, with the parameter.
    """
    on_gpu = torch.cuda.is_available() and not leave_gpu
    if mixed_precision == "fp16" and not on_gpu:
        raise UserError("fp16 needs a GPU; on the CPU take bf16 or no", parameter="mixed_precision")
    if torch_compile and not can_compile("cuda" if on_gpu else "cpu"):
        missing = "Triton" if on_gpu else "a C++ compiler (g++)"
        raise UserError(f"compiling needs {missing}; install it, or do not compile", parameter="torch_compile")


def runs_in_fp16(precision: str | None, force_upcast: bool) -> bool:
    """Return whether the networks run in fp16.

    A VAE with `force_upcast` does not, since it overflows there, as diffusers knows.
    """
    return precision == "fp16" and not force_upcast


def choose_execution(
    device: torch.device, *, precision: str | None, torch_compile: bool | None, force_upcast: bool, flops: float
) -> Execution:
    """Use the requested precision and compiling; choose those that are not given.

    Args:
        device: a GPU, or the CPU with all the threads of torch.
        precision: `no`, `bf16`, `fp16`, or None to choose.
        torch_compile: whether to compile, or None to choose.
        force_upcast: from the VAE's configuration: it overflows in fp16, and runs in float32 if fp16 is requested.
        flops: floating-point operations of the whole run on this device.
    """
    reasons = []
    if torch_compile is None:
        torch_compile, reason = _choose_compiling(device, flops)
        reasons.append(reason)
    if precision is None:
        precision, reason = choose_precision(device, torch_compile)
        reasons.append(reason)
    elif precision == "fp16" and not runs_in_fp16(precision, force_upcast):
        precision = "no"
        reasons.append("the VAE's configuration has force_upcast: float32 instead of fp16; bf16 would be faster")
    return Execution(precision, torch_compile, "; ".join(reasons) or "as asked for")


def can_compile(kind: str) -> bool:
    """Return whether torch.compile has the compiler that it needs on this kind of device."""
    if kind == "cuda":
        return importlib.util.find_spec("triton") is not None
    return kind == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is not None


def _choose_compiling(device: torch.device, flops: float) -> tuple[bool, str]:
    if not can_compile(device.type):
        return False, f"no compiler for {device.type}"
    lanes = torch.get_num_threads() if device.type == "cpu" else 1
    pays = flops / (EAGER_FLOPS[device.type] * lanes) > REPAYS_COMPILING
    return pays, "long enough to repay compiling" if pays else "too short to repay compiling"


def choose_precision(device: torch.device, compiled: bool) -> tuple[str, str]:
    """Return the precision that is fastest on a device, `bf16` or `no`, and the reason."""
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "the GPU computes in bf16") if able else ("no", "the GPU lacks bf16")
    if device.type != "cpu":
        return "no", f"float32 on {device.type}"
    # torch 2.7 has no public query for bf16; `torch.cpu.get_capabilities` came later.
    if not torch.cpu._is_avx512_bf16_supported():
        return "no", "the CPU lacks bf16"
    # Measured (benchmarks/RESULTS.md): on the CPU bf16 is faster with compiling, and hardly without.
    return ("bf16", "the CPU computes in bf16") if compiled else ("no", "on the CPU bf16 pays only when compiled")
