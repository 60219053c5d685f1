"""Evaluate from Python, with the flags of the command as arguments."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from srl_utils.evaluation.cli.main import main
from srl_utils.evaluation.results import Row


class Evaluation(NamedTuple):
    """Results of an evaluation."""

    rows: list[Row]
    """Make a table of them with `pandas.DataFrame(row.to_json() for row in rows)`."""
    report: Path
    """The HTML report; the other files are in the same folder."""


def evaluate(task: str = "reconstruction", *, output_dir: str | PathLike[str], **flags: Any) -> Evaluation:
    """Compare VAEs under attack, as `python -m srl_utils.evaluation TASK` does.

        found = evaluate(
            baseline="stabilityai/sd-vae-ft-mse", vae={"robust": "outputs/my-robust-vae"}, data_dir="photos",
            attacks=["clean", "pgd-10"], epsilons=["8/255"], output_dir="outputs/evaluation",
        )

    Args:
        task: name of a command, such as `reconstruction` or `editing`.
        output_dir: gets the report; an interrupted evaluation continues from what it holds.
        flags: those of the command, without dashes. A list gives several values, a mapping gives NAME=VALUE pairs, and
            True gives a flag without a value. None and False leave a flag out. `dry_run=True` computes no rows.

    Raises:
        UserError: a ValueError, if a flag is wrong, or if something cannot be loaded or measured.
    """
    words = [task, *_words({**flags, "output_dir": output_dir})]
    main(words)
    if flags.get("dry_run"):
        return Evaluation([], Path(output_dir, "report.html"))
    rows = json.loads(Path(output_dir, "results.json").read_text(encoding="utf-8"))
    return Evaluation([Row.from_json(row) for row in rows], Path(output_dir, "report.html"))


def _words(flags: Mapping[str, Any]) -> Iterator[str]:
    """Yield the words of a command line with these flags."""
    for name, value in flags.items():
        if value is None or value is False:
            continue
        yield f"--{name}"
        if isinstance(value, Mapping):
            yield from (f"{key}={part}" for key, part in value.items())
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield from map(str, value)
        elif value is not True:
            yield str(value)
