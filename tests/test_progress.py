"""How often the training's bar is drawn, on a terminal and in a file."""

from __future__ import annotations

import io
import re
import signal
import sys

import pytest
from conftest import Run

import train_srl_vae
from srl_utils import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(printed: str) -> list[int]:
    """Step of each time that the training's bar was drawn."""
    return [int(step) for step in re.findall(r"training: .*?\| (\d+)/", printed)]


def test_a_file_gets_few_lines_and_the_last_one(run: Run, flags: list[str]) -> None:
    """Oracle: specification; a run of a second has its first and its last line, whatever the number of steps."""
    code, printed = run(*flags, "--max_train_steps", 12)
    assert code == 0 and drawn(printed) == [0, 12], printed


def test_a_terminal_is_redrawn_once_a_step(run: Run, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: with no least time between two updates: the start, each step, and the end."""
    monkeypatch.setattr(progress, "TERMINAL_SECONDS", 0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    code, _ = run(*flags)
    assert code == 0 and drawn(sys.stderr.getvalue()) == [0, 1, 2, 3, 4, 4]


def test_a_run_that_stops_early_leaves_its_last_line(
    run: Run, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the step that the message names."""
    step = train_srl_vae.optimizer_step

    def interrupted_at_three(training: train_srl_vae.Run, *args: object, **settings: object) -> object:
        if training.progress.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(training, *args, **settings)

    monkeypatch.setattr(train_srl_vae, "optimizer_step", interrupted_at_three)
    code, printed = run(*flags, "--max_train_steps", 30)
    stopped = int(re.search(r"stopped by SIGTERM at step (\d+)", printed).group(1))
    assert code == 128 + signal.SIGTERM and drawn(printed) == [0, stopped]
