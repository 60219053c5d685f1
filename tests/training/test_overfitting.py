from __future__ import annotations

import json

import pytest

from srl_utils.training.overfitting import OverfittingGuard


def warnings(curve: list[tuple[float, float]], guard: OverfittingGuard | None = None) -> list[str | None]:
    """What the guard says at each validation of (training PSNR, held-out PSNR)."""
    guard = guard or OverfittingGuard()
    said = []
    for trained, validated in curve:
        guard.count(trained)
        said.append(guard.judge(validated))
    return said


@pytest.mark.parametrize(
    ("curve", "warned"),
    [
        # Both rise: healthy.
        ([(20, 19), (22, 21), (23, 22)], [False, False, False]),
        # The textbook case: the training finds nothing any more while held-out images collapse.
        ([(20, 19), (22, 21), (27, 17)], [False, False, True]),
        # Harder training images: both fall, the attack is as good as it was.
        ([(20, 19), (22, 21), (19, 18)], [False, False, False]),
        # The gap grows because the training images become easier, and held-out ones do not suffer.
        ([(20, 19), (26, 21), (28, 20.5)], [False, False, False]),
    ],
)
def test_only_collapse_is_reported(curve, warned) -> None:
    """Oracle: the definition: held-out images fall while the training's attack finds less and less."""
    assert [warning is not None for warning in warnings(curve)] == warned


def test_the_warning_has_the_figures() -> None:
    """Oracle: the figures that were put in."""
    warning = warnings([(22, 21), (27, 17)])[-1]
    assert "17.00 dB" in warning and "21.00 dB" in warning and "27.00 dB" in warning and "pgd_steps" in warning


def test_the_training_is_averaged_since_the_last_validation() -> None:
    """Oracle: closed form; steps before the last validation do not count."""
    guard = OverfittingGuard()
    for psnr in (40.0, 40.0):
        guard.count(psnr)
    guard.judge(21.0)
    for psnr in (25.0, 27.0):
        guard.count(psnr)
    assert guard.judge(17.0) is None, "the gap has shrunk from 19 dB to 9 dB"


def test_a_resumed_guard_goes_on() -> None:
    """Oracle: invariance; through JSON, as a checkpoint keeps it."""
    guard, other = OverfittingGuard(), OverfittingGuard()
    assert warnings([(22, 21)], guard) == [None]
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert warnings([(27, 17)], other)[0] is not None


def test_before_the_first_step_nothing_is_said() -> None:
    """Oracle: specification; a run validates once before it trains."""
    assert OverfittingGuard().judge(17.0) is None
