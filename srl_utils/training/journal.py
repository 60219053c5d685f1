"""What happened at each step, as lines of JSON and in the trackers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from srl_utils.files import write_text_atomically


class Journal:
    """`metrics.jsonl`, one object per line, and accelerate's trackers; only the main process writes."""

    def __init__(self, accelerator: Accelerator, path: Path) -> None:
        self.accelerator = accelerator
        self.path = path

    def begin(self, step: int) -> None:
        """Takes back the rows of steps after `step`, which an interrupted run made after its last checkpoint."""
        if self.accelerator.is_main_process:
            kept = [row for row in self._rows() if row["step"] <= step] if step else []
            write_text_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Values that are not finite become null in the file, which JSON has no word for."""
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            row = {name: value if math.isfinite(value) else None for name, value in values.items()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **row}) + "\n")

    def _rows(self) -> list[dict[str, Any]]:
        """Whole lines: a run that was killed, or whose disk was full, may have left part of one at the end."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []
        return [row for row in map(_row, lines) if row is not None]


def _row(line: str) -> dict[str, Any] | None:
    """What a line holds; None if it was cut or damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
