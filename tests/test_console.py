"""Progress bars: few lines that can be read in a file, one drawing a step on a terminal."""

from __future__ import annotations

import io
import re
import signal
import sys

import pytest
from helpers.runs import Run

import train_srl_vae
from srl_utils import console as progress
from srl_utils.console import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(printed: str) -> list[int]:
    """Step of each time that the training's bar was drawn."""
    return [int(step) for step in re.findall(r"training: .*?\| (\d+)/", printed)]


def test_a_log_holds_a_first_and_a_last_line(capsys: pytest.CaptureFixture) -> None:
    """Oracle: closed form. A thousand quick updates are two lines, without a carriage return or a cursor movement."""
    bar = progress_bar(1000, desc="training", unit="step")
    for number in range(1000):
        bar.set_postfix_str(f"loss {number}", refresh=False)
        bar.update()
    bar.close()
    printed = capsys.readouterr().err
    first, last = printed.splitlines()
    assert ("0/1000" in first, "1000/1000" in last, last.rstrip("]").endswith("loss 999")) == (True, True, True)
    assert not {"\r", "\x1b"} & set(printed)


def test_a_bar_within_another_takes_lines_of_its_own(capsys: pytest.CaptureFixture) -> None:
    """Oracle: closed form; two bars are four lines, whichever ends first."""
    outer = progress_bar(2, desc="outer", unit="step")
    inner = progress_bar(1, desc="inner", unit="image")
    inner.update()
    inner.close()
    outer.update(2)
    outer.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["outer", "inner", "inner", "outer"]


def test_slow_updates_are_lines(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: closed form; where enough time passes between them, every update is a line."""
    monkeypatch.setattr(progress, "FILE_SECONDS", 0.0)
    bar = progress_bar(3, desc="training", unit="step")
    for _ in range(3):
        bar.update()
    bar.close()
    assert [line.count(f" {number}/3 ") for number, line in enumerate(capsys.readouterr().err.splitlines()[:4])] == [
        1
    ] * 4


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
