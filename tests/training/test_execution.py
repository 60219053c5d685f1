from __future__ import annotations

import pytest
import torch

from srl_utils.errors import UserError
from srl_utils.training import execution
from srl_utils.training.execution import check_execution, choose_execution

CPU = torch.device("cpu")
LONG, SHORT = 1e18, 1e9


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with a compiler and bf16."""
    monkeypatch.setattr(execution, "can_compile", lambda kind: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)


def choose(flops: float, *, precision: str | None = None, torch_compile: bool | None = None) -> tuple[str, bool]:
    chosen = choose_execution(CPU, precision=precision, torch_compile=torch_compile, force_upcast=True, flops=flops)
    assert chosen.precision in str(chosen) or chosen.precision == "no"
    return chosen.precision, chosen.torch_compile


def test_a_long_run_is_compiled_in_bf16_and_a_short_one_is_not(able) -> None:
    """Oracle: the documented rule."""
    assert choose(LONG) == ("bf16", True)
    assert choose(SHORT) == ("no", False)


def test_what_is_asked_for_is_done(able) -> None:
    """Oracle: specification; a flag overrules the choice, and the other is made for it."""
    assert choose(LONG, torch_compile=False) == ("no", False)
    assert choose(SHORT, torch_compile=True) == ("bf16", True)
    assert choose(LONG, precision="no") == ("no", True)
    assert choose(SHORT, precision="bf16") == ("bf16", False)


def test_a_machine_that_cannot_is_not_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: specification."""
    monkeypatch.setattr(execution, "can_compile", lambda kind: False)
    assert choose(LONG) == ("no", False)
    monkeypatch.setattr(execution, "can_compile", lambda kind: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert choose(LONG) == ("no", True)


def test_the_reason_is_told(able) -> None:
    """Oracle: specification; what was chosen is said, and nothing where nothing was."""
    chosen = choose_execution(CPU, precision=None, torch_compile=None, force_upcast=True, flops=LONG)
    assert "bf16, compiled" in str(chosen) and "repay" in str(chosen)
    asked = choose_execution(CPU, precision="no", torch_compile=False, force_upcast=True, flops=LONG)
    assert str(asked) == "float32, not compiled (as asked for)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_impossible_wishes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: specification; one line that names what is missing."""
    with pytest.raises(UserError, match="needs a GPU"):
        check_execution("fp16", None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"C\+\+ compiler"):
        check_execution(None, True)
    check_execution("bf16", False)
