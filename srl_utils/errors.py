"""Errors that a user can put right: each has one clear line that says what is wrong and what to do.

All are a `UserError` and a `ValueError`. Their subclasses are built-in kinds as well, those that Python's libraries raise in
such cases, so that `except FileNotFoundError` or `except OSError` around a call of this package works as expected.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

TOKEN = re.compile(r"hf_\w{4,}")  # of the Hub
PARAMETER = re.compile(r"`([a-z]\w*)`")  # in messages
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class UserError(ValueError):
    """Bad input or a bad setting. Command lines print its message without a traceback and exit with `exit_code`.

    Args:
        problem: what is wrong and what to do. Parameters in it stand in backticks, as a Python call has them; a command
            line shows its flags instead.
        parameter: whose value is wrong, if it is one parameter's. The message starts with it; a command line names
            the flag instead.
    """

    exit_code = 2

    def __init__(self, problem: str, *, parameter: str | None = None) -> None:
        super().__init__(problem)
        self.problem, self.parameter = problem, parameter

    def rename(self, names: Mapping[str, str]) -> None:
        """Replace the names of parameters by those that the caller knows, where they differ."""
        self.problem = PARAMETER.sub(lambda match: f"`{names.get(match[1], match[1])}`", self.problem)
        self.parameter = names.get(self.parameter or "", self.parameter)

    def __str__(self) -> str:
        return self.problem if self.parameter is None else f"{self.parameter}: {self.problem}"


class UnusableFile(UserError, OSError):
    """A file, folder or model that is there but damaged, of another kind, or not to be read or written."""


class MissingFile(UnusableFile, FileNotFoundError):
    """A file, folder or model that is not there."""


class WrongType(UserError, TypeError):
    """An object of another class than the call takes."""


class MissingPackage(UserError, ImportError):
    """A package that has to be installed first."""


class HubRefusal(UserError, PermissionError):
    """The Hub does not allow it."""


class ResourceError(UserError, OSError):
    """What the machine lacks in the middle of a run: memory, room on the disk, another process of the run."""

    exit_code = 5


@contextmanager
def errors_about(parameter: str) -> Iterator[None]:
    """Name `parameter` in the errors raised within: a command prints its flag."""
    try:
        yield
    except UserError as error:
        error.parameter = parameter
        raise


def one_line(text: str) -> str:
    """`text` with control characters, line ends and the bytes of names that are no Unicode as escapes such as `\\n`.

    Names come from datasets and disks: what is printed or written must be one line that any file can hold.
    """
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def without_tokens(text: str) -> str:
    """`text` without tokens of the Hub, which stand in mistyped arguments and in what a server says of them."""
    return TOKEN.sub("hf_***", text)
