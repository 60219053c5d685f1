"""Evaluate VAEs under attack: `python -m srl_utils.evaluation`, or `evaluate` from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srl_utils.evaluation.calling import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]


def __getattr__(name: str) -> Any:
    """Import a name on first use: its module imports modules of this package, which import the package first."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from srl_utils.evaluation import calling

    return getattr(calling, name)
