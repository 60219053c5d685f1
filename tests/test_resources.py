"""What the commands ask of the system's memory."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.runs import ROOT

from srl_utils.resources import device_name, explained

PROGRAM = """
import resource
import torch
from srl_utils.command_line import exit_code

def count_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(16):
        tensors = [torch.ones(2**21) for _ in range(4)]
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return 0

count_faults()
exit_code(count_faults)
exit_code(count_faults)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"
)
def test_commands_keep_the_memory_that_they_free() -> None:
    """Oracle: the kernel's count of page faults, of tensors of 8 MB that are made and freed over and over."""
    told = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    before, _, after = map(int, told.split())
    assert before > 64 * 4  # pages may be of up to 2 MB
    assert after < 0.05 * before


@pytest.mark.parametrize(
    ("device", "threads", "name"), [("cpu", 1, "CPU, 1 thread"), ("cpu", 2, "CPU, 2 threads"), ("mps", 2, "MPS")]
)
def test_the_name_of_a_device(device: str, threads: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: specification; without a GPU."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert device_name(torch.device(device)) == name


@pytest.mark.parametrize("kind", ["file", "link to nothing"])
def test_a_file_in_the_place_of_a_folder_is_explained(kind: str, tmp_path: Path) -> None:
    """Oracle: the system's own refusal of a real folder, with the place that the user named; it is bad input."""
    place = tmp_path / "out"
    place.write_text("") if kind == "file" else place.symlink_to("nowhere")
    with pytest.raises(FileExistsError) as caught:
        place.mkdir(parents=True, exist_ok=True)
    told = explained(caught.value)
    assert str(told) == f"File exists: {place}" and told.exit_code == 2
