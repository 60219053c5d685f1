"""Describe what an attack does by its settings, wherever they are: in fields, in arguments, in what functions capture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from inspect import getclosurevars
from types import FunctionType
from typing import Any

from torch import nn

ESTIMATES = ("passes", "passes_per_step")
"""Fields that only estimate the cost."""


def described(value: Any) -> Any:
    """Return the settings in a value as JSON values.

    Settings that are off or empty are left out, so that the description stays the same when an attack gets a new option
    that it does not use. A function stands for its name and the settings that it captures; one inside a function has no
    name of its own.

    Raises:
        TypeError: if a setting is of a kind without a description, such as a tensor.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [described(part) for part in value]
    if isinstance(value, set | frozenset):
        return sorted(map(described, value))
    if isinstance(value, partial):
        return _used({"function": value.func, "arguments": value.args, **value.keywords})
    if isinstance(value, FunctionType):
        own = {} if "<locals>" in value.__qualname__ else {"function": value.__name__}
        return {**own, **_used(getclosurevars(value).nonlocals)}
    if isinstance(value, nn.Module):
        own = {name: each for name, each in vars(value).items() if not name.startswith("_") and name != "training"}
        return {"class": type(value).__name__, **_used(own)}
    if is_dataclass(value):
        named = {field.name: getattr(value, field.name) for field in fields(value)}
        return {"class": type(value).__name__, **_used(named)}
    raise TypeError(f"a {type(value).__name__} has no description")


def _used(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the descriptions of the settings that are neither off nor empty nor estimates."""
    found = {name: described(value) for name, value in settings.items() if name not in ESTIMATES}
    return {name: value for name, value in found.items() if value not in (None, [], {}) and value is not False}
