"""Read what `accelerate launch` and `accelerate config` set in the environment, and make an Accelerator of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, GradientAccumulationPlugin

from srl_utils.errors import UserError, one_line

Environment = Mapping[str, str]

TRUE, FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")
USE_CPU = "ACCELERATE_USE_CPU"
AFFINITY = "ACCELERATE_CPU_AFFINITY"
SWITCHES = (USE_CPU, "ACCELERATE_DEBUG_MODE", AFFINITY)
"""Variables that accelerate obeys itself."""
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
SAGEMAKER = ("ACCELERATE_USE_SAGEMAKER", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE")
DEVICE = "ACCELERATE_TORCH_DEVICE"
PRECISIONS = ("no", "fp16", "bf16")
DYNAMO = "ACCELERATE_DYNAMO_"
DYNAMO_SWITCHES = ("FULLGRAPH", "DYNAMIC", "REGIONAL_COMPILATION")
RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which launchers such as mpirun give a process its number and the number of processes."""
WITHOUT = "change it with `accelerate config`, or unset the variable"


class Setting(NamedTuple):
    """A variable of accelerate with the meaning of a flag of the training.

    Attributes:
        variable: name of the environment variable.
        flag: name of the flag.
        read: returns the flag's value, or None if the environment does not set it. Raises a UserError.
    """

    variable: str
    flag: str
    read: Callable[[Environment], Any]


def launched_steps(environment: Environment) -> int | None:
    """Return the passes per update that accelerate is configured for, or None."""
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    text = environment.get(name)
    if text is None:
        return None
    if not text.strip().isdecimal() or int(text) < 1:
        raise UserError(_refusal(name, text, "a whole number of 1 or more"))
    return int(text)


def launched_precision(environment: Environment) -> str | None:
    """Return the half precision that accelerate is configured for, or None.

    Accelerate's `no` is its default, so it counts as not configured.
    """
    name = "ACCELERATE_MIXED_PRECISION"
    text = environment.get(name, "no").strip().lower()
    if text not in PRECISIONS:
        raise UserError(f"{_refusal(name, text, ', '.join(PRECISIONS))}, or give --mixed_precision")
    return None if text == "no" else text


def launched_compiling(environment: Environment) -> bool | None:
    """Return True where accelerate is configured for torch.compile with its usual settings, else None."""
    backend = environment.get(f"{DYNAMO}BACKEND", "no").strip().lower()
    if backend.upper() not in DynamoBackend.list():
        raise UserError(_refusal(f"{DYNAMO}BACKEND", backend, "no or inductor"))
    if backend == "no":
        return None
    wishes = [name for name in DYNAMO_SWITCHES if _is_on(environment, f"{DYNAMO}USE_{name}")]
    mode = environment.get(f"{DYNAMO}MODE", "default").strip().lower()
    if backend != "inductor" or mode != "default" or wishes:
        wanted = [f"{DYNAMO}BACKEND={backend}", f"{DYNAMO}MODE={mode}", *(f"{DYNAMO}USE_{name}" for name in wishes)]
        raise UserError(
            f"accelerate is configured for {one_line(' '.join(wanted))}; the training supports inductor in its default mode: "
            "change it with `accelerate config`, or give --torch_compile or --no-torch_compile"
        )
    return True


SETTINGS = (
    Setting("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps", launched_steps),
    Setting("ACCELERATE_MIXED_PRECISION", "mixed_precision", launched_precision),
    Setting(f"{DYNAMO}BACKEND", "torch_compile", launched_compiling),
)


def launched_arguments(environment: Environment, given: Callable[[str], bool]) -> dict[str, Any]:
    """Return the values that accelerate's environment has for flags of the training.

    Args:
        given: whether the command line has a flag, which then wins.

    Raises:
        UserError: if a value cannot be honoured.
    """
    values = {setting.flag: setting.read(environment) for setting in SETTINGS if not given(setting.flag)}
    return {flag: value for flag, value in values.items() if value is not None}


def check_launch(environment: Environment) -> None:
    """Refuse configurations of accelerate that this project does not support or that accelerate cannot read.

    Raises:
        UserError: in one line, with the variable and its value.
    """
    for name, what in UNSUPPORTED.items():
        if _is_on(environment, name):
            raise UserError(f"accelerate is configured for {what} ({name}), which is not supported; {WITHOUT}")
    if _is_on(environment, SAGEMAKER[0]) and environment.get(SAGEMAKER[1]) != "NO":
        raise UserError(
            f"accelerate is configured for SageMaker's data parallelism ({SAGEMAKER[0]}), which is not supported; {WITHOUT}"
        )
    for name in (*SWITCHES, *(f"{DYNAMO}USE_{name}" for name in DYNAMO_SWITCHES)):
        _is_on(environment, name)
    for name in (*RANKS, *SIZES, "RANK"):
        text = environment.get(name, "0").strip()
        if not text.removeprefix("-").isdecimal():
            raise UserError(_refusal(name, text, "a whole number"))
    if DEVICE in environment:
        _check_device(environment[DEVICE])


def joined_on_cpu(environment: Environment) -> bool:
    """Return whether this is one of several processes without a GPU.

    Accelerate must be told so, and then connects them by gloo. Otherwise each process would work alone.
    """
    launched = any(name in environment for name in RANKS) or any(environment.get(name, "1") != "1" for name in SIZES)
    return launched and not torch.accelerator.is_available()


def launched_accelerator(
    environment: Environment, *, precision: str | None, steps: int = 1, **settings: Any
) -> Accelerator:
    """Return an Accelerator with devices and processes from the environment, and all else from the arguments.

    Args:
        environment: environment variables.
        precision: `no`, `fp16` or `bf16`; None means `no`, or the precision of an earlier Accelerator of this process.
        steps: forward and backward passes per update. The environment would override a plain argument.
        settings: further arguments of `Accelerator`.

    Raises:
        UserError: in one line, if accelerate cannot start with this environment.
    """
    try:
        return Accelerator(
            cpu=joined_on_cpu(environment),
            mixed_precision=precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=steps),
            dynamo_backend="no",
            **settings,
        )
    except Exception as error:  # torch and accelerate raise many kinds of errors for a bad environment
        raise UserError(
            f"accelerate cannot start as its environment asks: {one_line(str(error))}; start processes with `accelerate launch`, "
            "or unset what another launcher has set"
        ) from error


def on_cpu(environment: Environment) -> bool:
    """Return whether accelerate is configured to use the CPU only."""
    device = environment.get(DEVICE)
    return _is_on(environment, USE_CPU) if device is None else device.startswith("cpu")


def note_on_compiling(environment: Environment) -> list[str]:
    """Return a line that evaluations are not compiled, if accelerate is configured to compile; else no line."""
    backend = environment.get(f"{DYNAMO}BACKEND", "no")
    idle = backend.strip().lower() == "no"
    return [] if idle else [f"{DYNAMO}BACKEND={one_line(backend)}: without effect, evaluations are not compiled"]


def launch_notes(environment: Environment, args: argparse.Namespace) -> list[str]:
    """Return a line on each configured variable of accelerate, and whether it is obeyed."""
    notes = []
    for setting in SETTINGS:
        text = environment.get(setting.variable, "no")
        if text.strip().lower() != "no":
            value = getattr(args, setting.flag)
            fate = "honoured" if _asks_for(setting, environment, value) else "overruled by the command line"
            notes.append(f"{setting.variable}={one_line(text)}: {fate}, {setting.flag} is {value}")
    alone = not any(name in environment for name in RANKS)
    for name in SWITCHES:
        if _is_on(environment, name):
            idle = alone and name == AFFINITY
            notes.append(
                f"{name}={environment[name]}: {'without effect on one process' if idle else 'honoured by accelerate'}"
            )
    return notes + ([f"{DEVICE}={environment[DEVICE]}: honoured by accelerate"] if DEVICE in environment else [])


def _asks_for(setting: Setting, environment: Environment, value: Any) -> bool:
    try:
        return setting.read(environment) == value
    except UserError:  # a value that the command line has overruled
        return False


def _is_on(environment: Environment, name: str) -> bool:
    text = environment.get(name, "no")
    if text.lower() not in TRUE + FALSE:
        raise UserError(_refusal(name, text, "true or false"))
    return text.lower() in TRUE


def _check_device(text: str) -> None:
    try:
        device = torch.device(text)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"{_refusal(DEVICE, text, 'a device of this machine')}: {str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise UserError(_refusal(DEVICE, text, "a device that computes"))


def _refusal(name: str, text: str, expected: str) -> str:
    return f"{name}={one_line(text)!r} in the environment cannot be honoured; set it to {expected}"
