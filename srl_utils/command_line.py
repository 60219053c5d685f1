"""What the command lines share: one-line errors with exit code 2, and the types of arguments."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable

import torch

from srl_utils.errors import UserError, one_line
from srl_utils.images import parse_pixel_distance

EXIT_BAD_INPUT = 2


def joined_on_cpu() -> bool:
    """Whether this is one of several processes without a GPU: told so, accelerate joins them by gloo.

    Else each would work alone.
    """
    return not torch.accelerator.is_available() and "LOCAL_RANK" in os.environ


class Parser(argparse.ArgumentParser):
    """Reports a bad argument as a `UserError`, in one line."""

    def error(self, message: str) -> None:
        raise UserError(message)


def exit_code(command: Callable[[], int]) -> int:
    """What `command` returns; if the user can put right what stopped it, the reason in one line and 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: names need not be what a terminal can show
    try:
        return command()
    except UserError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return EXIT_BAD_INPUT


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def non_negative_int(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def non_negative_float(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of 0 or more")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is outside [0,1]")
    return value


def pixel_distance(text: str) -> float:
    try:
        return parse_pixel_distance(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
