"""Check values from YAML and JSON files against the fields of a dataclass."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from srl_utils.errors import UserError

WORDS = {str: "text", int: "a whole number", float: "a number", types.NoneType: "null"}
"""Names of types for readers; all others are lists or have fields."""
LONGEST = 60
"""Characters of a wrong value that are shown."""
Kind = TypeVar("Kind")


def checked(kind: type[Kind], given: Any) -> Kind:
    """Return a mapping as an instance of a dataclass.

    Its fields are text, finite numbers, None, dataclasses, lists of these, or tuples of a fixed length. Text is not empty.

    Raises:
        UserError: if a field is missing, unknown or of another type.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"expected fields such as {fields(kind)[0].name}, got {type(given).__name__}")  # type: ignore[arg-type]
    types_of = get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := [str(name) for name in given if name not in known]:
        raise UserError(f"{unknown[0]}: no such field; the fields are {', '.join(known)}")
    if missing := [name for name, field in known.items() if field.default is MISSING and name not in given]:
        raise UserError(f"{missing[0]}: this field is missing")
    return kind(**{name: _value(name, types_of[name], value) for name, value in given.items()})


def _value(name: str, wanted: Any, value: Any) -> Any:
    """Return the value of a field as one of the wanted types."""
    kinds = get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else (wanted,)
    for kind in kinds:
        if is_dataclass(kind) and value is not None:
            return _part(name, kind, value)
        if get_origin(kind) is not None and isinstance(value, list):
            return _items(name, kind, value)
        if kind is float and (number := _finite(value)) is not None:
            return number
        if kind is not float and type(value) is kind and not (kind is str and not value.strip()):
            return value
    expected = " or ".join(WORDS.get(kind, "a list" if get_origin(kind) else "fields") for kind in kinds)
    shown = repr(value)[:LONGEST]
    raise UserError(f"{name}: expected {expected}, got {shown}{'; put it in quotes' if str in kinds else ''}")


def _part(name: str, kind: Any, value: Any) -> Any:
    """Return a field that has fields of its own; errors name both."""
    try:
        return checked(kind, value)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _items(name: str, kind: Any, values: Sequence[Any]) -> Sequence[Any]:
    """Return the values of a list, or of a tuple of a fixed length."""
    types_of = get_args(kind)
    if get_origin(kind) is not tuple:
        return [_value(f"{name}, {number}", types_of[0], value) for number, value in enumerate(values)]
    if len(values) != len(types_of):
        raise UserError(f"{name}: expected {len(types_of)} values, got {len(values)}")
    return tuple(_value(name, each, value) for each, value in zip(types_of, values, strict=True))


def _finite(value: Any) -> float | None:
    """Return a number as a float; None for everything else, and for what is not finite or too large."""
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
