"""The notebook, run from top to bottom."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from helpers.runs import ROOT

NOTEBOOK = ROOT / "examples/robust_vae.ipynb"


def test_the_notebook_runs(tmp_path: Path) -> None:
    """Oracle: its own cells, as one program in the repository's root; a few steps take the place of many.

    A copy of the embedded VAE stands in for the robust one. Each attack is made on the VAE itself and has to cost it
    PSNR; the pipeline edits with both VAEs.
    """
    shutil.copytree(ROOT / "miniature/weights/vae", tmp_path / "robust")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    program = "\n\n".join("".join(cell["source"]) for cell in cells)
    few = {
        "STEPS": "2",
        "ATTACK_STEPS": "3",
        "EDIT_STEPS": "4",
        "ROBUST_VAE": str(tmp_path / "robust"),
        "MPLBACKEND": "Agg",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=280,
        env={**os.environ, **few, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = re.findall(r"(\w+): ([\d.]+) dB on the photograph, ([\d.]+) dB under attack", done.stdout)
    assert [name for name, *_ in measured] == ["original", "robust"]
    assert all(float(broken) < float(clean) - 1 for _, clean, broken in measured)
    assert len(re.findall(r"VAE: the edit of the attacked photograph is [\d.]+ dB", done.stdout)) == 2
