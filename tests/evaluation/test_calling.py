"""Evaluations from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from helpers.runs import ROOT

from srl_utils.errors import UserError
from srl_utils.evaluation import evaluate
from srl_utils.evaluation.__main__ import main
from srl_utils.evaluation.results import Row


def test_python_gives_what_the_command_gives(
    vae_folder: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the command itself, on the same VAEs and images."""
    for state in (AcceleratorState, PartialState, GradientState):
        monkeypatch.setattr(state, "_shared_state", {})
    found = evaluate(
        baseline=vae_folder, vae={"same": vae_folder}, data_dir=photographs, resolution=16, num_images=2, batch_size=2,
        attacks=["clean", "pgd-2"], epsilons=["8/255"], metrics=["psnr"], no_checks=True, pipeline=None,
        output_dir=tmp_path / "python",
    )  # fmt: skip
    words = [
        "reconstruction", "--baseline", vae_folder, "--vae", f"same={vae_folder}", "--data_dir", photographs,
        "--resolution", 16, "--num_images", 2, "--batch_size", 2, "--attacks", "clean", "pgd-2", "--epsilons", "8/255",
        "--metrics", "psnr", "--no_checks", "--output_dir", tmp_path / "command",
    ]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    expected = json.loads((tmp_path / "command/results.json").read_text())
    assert found.rows == [Row.from_json(row) for row in expected]
    assert found.report == tmp_path / "python/report.html" and "<html" in found.report.read_text()


def test_an_unknown_flag_is_a_value_error(vae_folder: Path, tmp_path: Path) -> None:
    """Oracle: the kinds of errors that Python libraries raise."""
    with pytest.raises(ValueError, match="--nonsense") as caught:
        evaluate(baseline=vae_folder, vae=vae_folder, data_dir=tmp_path, nonsense=3, output_dir=tmp_path)
    assert isinstance(caught.value, UserError)


def test_the_package_offers_its_helpers() -> None:
    """Oracle: the names of the specification, in a Python of its own; importing the package loads no diffusers."""
    program = (
        "import sys, srl_utils; assert 'diffusers' not in sys.modules\n"
        "from srl_utils import robust_vae, robustify, sanitize, swap_vae\n"
        "from srl_utils.pipelines import swap_vae as same\nassert swap_vae is same"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)
    with pytest.raises(ImportError):
        from srl_utils import nothing  # noqa: F401


def test_a_dry_run_has_no_rows(vae_folder: Path, photographs: Path, tmp_path: Path, capsys) -> None:
    """Oracle: specification; nothing is computed, and the command's description is printed."""
    found = evaluate(
        baseline=vae_folder, vae=vae_folder, data_dir=photographs, resolution=16, num_images=2, attacks=["clean"],
        metrics=["psnr"], no_checks=True, dry_run=True, output_dir=tmp_path / "dry",
    )  # fmt: skip
    assert found.rows == [] and "2 images" in capsys.readouterr().out


def test_errors_name_the_argument_of_the_call(vae_folder: Path, tmp_path: Path) -> None:
    """Oracle: specification; the name that the caller wrote, not that of the library's parameter."""
    with pytest.raises(UserError, match=r"^data_dir: there is no folder nowhere"):
        evaluate(baseline=vae_folder, vae=vae_folder, data_dir="nowhere", output_dir=tmp_path)
