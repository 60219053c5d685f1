from __future__ import annotations

import torch

from srl_utils.training.readback import Readback


def test_values_come_one_push_late_and_in_order() -> None:
    """Oracle: specification. Each value comes out once, with its own label."""
    readback: Readback[str] = Readback()
    assert readback.push("first", torch.tensor([1.0, 2.0])) == []
    assert readback.push("second", torch.tensor([3.0])) == [("first", [1.0, 2.0])]
    assert readback.drain() == [("second", [3.0])]
    assert readback.drain() == []
    assert readback.push("third", torch.tensor([4.0])) == []
