"""What the command lines share: one-line errors with exit code 2, and the types of arguments."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping
from io import TextIOWrapper
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch

from srl_utils.errors import PARAMETER, UserError, one_line, without_tokens
from srl_utils.files import home_expanded
from srl_utils.images.pixels import parse_pixel_distance
from srl_utils.resources import explained, keep_freed_memory

LARGEST_SIDE = 2**12  # pixels; 16 images of that side take 3 GB as numbers
LARGEST_SEED = 2**63 - 1  # what torch takes
EMPTY_VALUE = re.compile(r"--\w+=")


Effects = Mapping[str, tuple[Any, ...]]
"""By the name of a flag: whether it has an effect beside the other flags, what it needs to have one, and then the values
that ask for what happens anyway. The flag's default is always one of them."""


class Parser(argparse.ArgumentParser):
    """Reports a bad argument as a `UserError`, in one line; takes no abbreviations, which would change with new flags."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        for before, word in pairwise(["", *words]):
            if EMPTY_VALUE.fullmatch(word) or not word.strip():  # the other words may hold a token
                place = f" after {before}" if before.startswith("--") else ""
                raise UserError(f"an empty argument: {word!r}{place}")
        self._given = {word.partition("=")[0] for word in words}
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def given(self, name: str) -> bool:
        """Return whether the command line has the flag of this name, or its `--no-` form."""
        return not self._given.isdisjoint((f"--{name}", f"--no-{name}"))

    def refuse_without_effect(self, args: argparse.Namespace, effects: Effects) -> None:
        """Refuse a given flag that has no effect, unless its value asks for what happens anyway.

        Raises:
            UserError: at the first such flag.
        """
        for flag, (effective, need, *neutral) in effects.items():
            idle = not effective and self.given(flag)
            if idle and getattr(args, flag) not in (self.get_default(flag), *neutral):
                raise UserError(f"--{flag} has no effect without {need}")


def exit_code(command: Callable[[], int]) -> int:
    """Run a command and return its exit code; print an error that the user can mend in one line."""
    if isinstance(sys.stdout, TextIOWrapper):  # as stderr is: names need not be what a terminal can show
        sys.stdout.reconfigure(errors="backslashreplace")
    keep_freed_memory()
    try:
        return command()
    except Exception as error:
        told = error if isinstance(error, UserError) else explained(error)
        if told is None:
            raise
        print(f"error: {without_tokens(one_line(message_of(told)))}", file=sys.stderr)
        return told.exit_code


def message_of(error: UserError) -> str:
    """Return the message of an error, with flags in place of parameters."""
    problem = PARAMETER.sub(r"--\1", error.problem)
    return problem if error.parameter is None else f"--{error.parameter}: {problem}"


def expanded_path(text: str) -> Path:
    """Return the path, with the home folder in place of a leading ~."""
    return Path(home_expanded(text))


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


def image_side(text: str) -> int:
    value = positive_int(text)
    if value > LARGEST_SIDE:
        raise argparse.ArgumentTypeError(f"{text} is more than {LARGEST_SIDE} pixels")
    return value


def seed(text: str) -> int:
    value = non_negative_int(text)
    if value > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{text} is more than {LARGEST_SEED}")
    return value


def decay(text: str) -> float:
    value = fraction(text)
    if value == 1:
        raise argparse.ArgumentTypeError("1 would never forget; it must be below")
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


def device(text: str) -> torch.device:
    """Parse the name of a device of this machine."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be used: {str(error).splitlines()[0]}") from None


def checked(check: Callable[[str], None]) -> Callable[[str], str]:
    """Return a type of texts that `check` accepts; it raises a UserError for others."""

    def accepted(text: str) -> str:
        try:
            check(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(error.problem) from None
        return text

    return accepted
