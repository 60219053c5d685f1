"""The values of each step, as lines of JSON and in accelerate's trackers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from srl_utils.files import write_text_atomically


class Journal:
    """Writes values to `metrics.jsonl`, one object a line, and to accelerate's trackers, in the main process."""

    def __init__(self, accelerator: Accelerator, path: Path) -> None:
        self.accelerator = accelerator
        self.path = path

    def begin(self, step: int) -> None:
        """Remove the rows of steps after `step`, written after the checkpoint that a run resumes from."""
        if self.accelerator.is_main_process:
            kept = [row for row in self._rows() if row["step"] <= step] if step else []
            write_text_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the values of a step; values that are not finite become null, since JSON has no word for them."""
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            row = {name: value if math.isfinite(value) else None for name, value in values.items()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **row}) + "\n")

    def _rows(self) -> list[dict[str, Any]]:
        """Return the rows of whole lines; a killed run or a full disk may leave part of a line."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []
        return [row for row in map(_row, lines) if row is not None]


def _row(line: str) -> dict[str, Any] | None:
    """Return the row of a line, or None if the line is cut or damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
