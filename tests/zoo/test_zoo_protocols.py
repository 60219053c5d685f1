"""Protocols: their digest changes with what is measured, and with nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from srl_utils.attacks.corruptions import CORRUPTIONS
from srl_utils.attacks.gradient import PGDConfig
from srl_utils.attacks.protections import PROTECTIONS
from srl_utils.evaluation import catalogue
from srl_utils.zoo import protocols
from srl_utils.zoo.describing import described
from srl_utils.zoo.protocols import PROTOCOLS, Protocol

EMBEDDED = PROTOCOLS["embedded"]
PID = PROTECTIONS["pid"]


def with_flag(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    given = Protocol.flags
    monkeypatch.setattr(Protocol, "flags", lambda self, zoo: {**given(self, zoo), name: value})


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setitem(PROTECTIONS, "pid", replace(PID, config=replace(PID.config, num_steps=10))),
        lambda patch: patch.setitem(PROTECTIONS, "pid", replace(PID, minimise=True)),
        lambda patch: patch.setitem(CORRUPTIONS, "jpeg", replace(CORRUPTIONS["jpeg"], severities=(90, 80, 70, 60, 50))),
        lambda patch: patch.setattr(
            catalogue, "settling_pgd", lambda epsilon, steps, restarts: PGDConfig(epsilon=epsilon, num_steps=steps)
        ),
        lambda patch: patch.setitem(catalogue.PRESETS, "strong", catalogue.PRESETS["strong"][:-2]),
        lambda patch: patch.setattr(protocols, "QUALITIES", ("psnr",)),
        lambda patch: with_flag(patch, "seed", 1),
        lambda patch: with_flag(patch, "mixed_precision", "bf16"),
    ],
    ids=["steps", "objective", "severities", "step size", "preset", "metrics", "seed", "precision"],
)  # fmt: skip
def test_changed_settings_are_another_protocol(change: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the digest before the change."""
    before = EMBEDDED.fingerprint
    change(monkeypatch)
    assert EMBEDDED.fingerprint != before


@pytest.mark.parametrize("changes", [{"epsilon": "4/255"}, {"check_images": 1}, {"num_images": 8}, {"resolution": 32}])
def test_changed_fields_are_another_protocol(changes: dict[str, object]) -> None:
    """Oracle: the digest before the change."""
    assert replace(EMBEDDED, **changes).fingerprint != EMBEDDED.fingerprint


def test_what_no_number_depends_on_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the digest before the change; estimates of the cost and the words for readers are not settings."""
    before = EMBEDDED.fingerprint
    monkeypatch.setitem(PROTECTIONS, "pid", replace(PID, passes_per_step=7))
    assert replace(EMBEDDED, title="x", images="y", batch_size=3).fingerprint == before
    assert str(EMBEDDED.flags(Path("elsewhere"))["data_dir"]) == str(Path("elsewhere/images/embedded"))


def test_what_has_no_description_is_no_silent_gap() -> None:
    """Oracle: an error; a digest that left it out would stay the same when it changes."""
    with pytest.raises(TypeError, match="a Tensor has no description"):
        described([torch.zeros(1)])


def test_options_that_are_off_are_left_out() -> None:
    """Oracle: closed form."""
    assert described(PGDConfig(epsilon=0.1, random_start=False)) == {
        "class": "PGDConfig", "epsilon": 0.1, "norm": "linf", "step_size": 0.02, "num_steps": 10, "num_restarts": 1,
        "schedule": "constant",
    }  # fmt: skip
