"""Progress bars in a log file: lines that can be read, and no more of them than a reader wants."""

from __future__ import annotations

import pytest

from srl_utils import progress
from srl_utils.progress import progress_bar


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
    assert [line.count(f" {number}/3 ") for number, line in enumerate(capsys.readouterr().err.splitlines()[:4])] == [1] * 4
