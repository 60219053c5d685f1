"""Disks that fill, folders that may not be written to, and memory that does not suffice."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils.other import TORCH_SAFE_GLOBALS
from diffusers import AutoencoderKL
from helpers.runs import ROOT, Run, smallest_training
from helpers.warm_python import warm_python
from safetensors.torch import load_file

import train_srl_vae
from srl_utils.errors import ResourceError, UserError
from srl_utils.files import fault, sole_run
from srl_utils.resources import explained
from srl_utils.training.checkpoints import Checkpoints, save_drop_in, state_bytes
from srl_utils.training.journal import Journal

WEIGHTS = "diffusion_pytorch_model.safetensors"
NOBODY = 65534
# No file of the program may grow beyond so many bytes.
RESTRICTED = """
import resource, runpy, sys
largest, program = int(sys.argv.pop(1)), sys.argv.pop(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
sys.argv[0] = program
runpy.run_path(program, run_name="__main__")
"""
UNLIMITED = 2**60


class Machine:
    """Runs the project's programs in a process of their own, with limits."""

    def __init__(self, python: Path, flags: list[str]) -> None:
        self.python, self.flags = python, flags

    def train(self, output_dir: Path, *, largest: int = UNLIMITED) -> tuple[int, str]:
        """The exit code and all that was printed."""
        return self.run("train_srl_vae.py", *self.flags, "--output_dir", output_dir, largest=largest)

    def run(self, program: str, *arguments: object, largest: int = UNLIMITED) -> tuple[int, str]:
        words = [self.python, "-c", RESTRICTED, largest, program, *arguments]
        ended = subprocess.run(
            [str(word) for word in words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=280,
        )
        return ended.returncode, ended.stdout


@pytest.fixture(scope="module")
def machine(vae_folder: Path, photographs: Path) -> Iterator[Machine]:
    """Four steps, a checkpoint after each, two kept."""
    with warm_python({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}) as python:
        yield Machine(python, [
            *smallest_training(vae_folder, photographs, Path()), "--checkpointing_steps", "1", "--num_validation_images",
            "2", "--checkpoints_total_limit", "2", "--resume_from_checkpoint", "latest",
        ])  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that has room enough."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    code, printed = machine.train(out)
    assert code == 0, printed
    return out


def assert_stopped_clearly(code: int, printed: str, out: Path) -> None:
    """One line, its exit code, no traceback, and all checkpoints that are there are whole."""
    assert code == ResourceError.exit_code and printed.count("error: ") == 1, printed  # it may follow a progress bar
    assert "Traceback" not in printed, printed
    assert not [fault(folder) for folder in Checkpoints(out).found() if fault(folder)]
    assert not list(out.glob("*.partial")) and not list(out.glob(".checkpoint-*"))


def assert_goes_on(machine: Machine, out: Path, undisturbed: Path) -> None:
    """The same command, with room, ends with the weights of the undisturbed run."""
    code, printed = machine.train(out)
    assert code == 0, printed
    ours, theirs = load_file(out / WEIGHTS), load_file(undisturbed / WEIGHTS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.faults
@pytest.mark.parametrize("share", [0.0001, 0.003, 0.02, 0.1, 0.5, 0.9, 1.1])
def test_a_file_that_may_not_grow(share: float, machine: Machine, undisturbed: Path, tmp_path: Path) -> None:
    """Oracle: the promise, for whatever write fails first: settings, card, pictures, journal, weights or moments."""
    largest = int(share * (undisturbed / WEIGHTS).stat().st_size)
    code, printed = machine.train(tmp_path / "out", largest=largest)
    assert_stopped_clearly(code, printed, tmp_path / "out")
    assert_goes_on(machine, tmp_path / "out", undisturbed)


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A mounted file system of so many kilobytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", disk]).returncode:
        pytest.skip("mounting needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.faults
@pytest.mark.parametrize("small_disk", [8, 60, 150, 250, 350, 450, 550], indirect=True)
def test_a_disk_that_fills(small_disk: Path, machine: Machine, undisturbed: Path) -> None:
    """Oracle: the promise, on a real full file system; with more room the same command ends as if undisturbed."""
    out = small_disk / "out"
    code, printed = machine.train(out)
    assert_stopped_clearly(code, printed, out)
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    assert_goes_on(machine, out, undisturbed)


EVALUATION, SANITIZE = "srl_utils/evaluation/__main__.py", "srl_utils/pipelines/__main__.py"


@pytest.fixture(scope="module")
def evaluation(vae_folder: Path, photographs: Path) -> list[object]:
    """The smallest one that writes everything but Inception's features."""
    return [
        "reconstruction", "--baseline", vae_folder, "--vae", f"same={vae_folder}", "--data_dir", photographs,
        "--resolution", "16", "--num_images", "2", "--attacks", "quick", "--epsilons", "8/255", "--metrics", "psnr",
        "--num_check_images", "1", "--output_dir",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed_evaluation(
    machine: Machine, evaluation: list[object], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "evaluation"
    code, printed = machine.run(EVALUATION, *evaluation, out)
    assert code == 0, printed
    return out


@pytest.mark.faults
@pytest.mark.parametrize(
    "file", ["study.json", "cells/*/*.json", "checks/*.json", "per_image.csv", "figures/*.png", "report.html"]
)
def test_an_evaluation_s_file_that_may_not_grow(
    file: str, machine: Machine, evaluation: list[object], undisturbed_evaluation: Path, tmp_path: Path
) -> None:
    """Oracle: one line, exit code 5, no half file; with room the same command writes what an undisturbed one has."""
    largest = max(path.stat().st_size for path in undisturbed_evaluation.glob(file)) - 1
    code, printed = machine.run(EVALUATION, *evaluation, tmp_path / "out", largest=largest)
    assert_stopped_clearly(code, printed, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith(".partial")]
    code, printed = machine.run(EVALUATION, *evaluation, tmp_path / "out")
    assert code == 0, printed
    for name in ("results.json", "per_image.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (undisturbed_evaluation / name).read_bytes()


@pytest.mark.faults
def test_sanitized_images_that_may_not_grow(
    machine: Machine, vae_folder: Path, photographs: Path, tmp_path: Path
) -> None:
    """Oracle: one line, exit code 5, which names the image; no half file."""
    code, printed = machine.run(SANITIZE, "sanitize", photographs, tmp_path / "out", "--vae", vae_folder, largest=100)
    assert_stopped_clearly(code, printed, tmp_path / "out")
    assert "00.png: File too large" in printed and not [
        path for path in (tmp_path / "out").rglob("*") if path.is_file()
    ]


def test_a_drop_in_that_cannot_be_written_leaves_the_one_before_it(
    tiny_vae: AutoencoderKL, other_tiny_vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the files before. Neither half a drop-in nor what was written aside is there."""
    save_drop_in(tiny_vae, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*")}

    monkeypatch.setattr("srl_utils.training.checkpoints.save_variant", fill_disk)
    with pytest.raises(OSError):
        save_drop_in(other_tiny_vae, tmp_path, variants=["fp16"])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_disk_that_fills_during_a_push_is_one_line(
    run: Run, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: exit code 5 and one line; the checkpoint before it is there and whole."""
    publisher = SimpleNamespace(repo_id="somebody/vae", publish_snapshot=fill_disk, close=lambda: None)
    monkeypatch.setattr(train_srl_vae, "open_repository", lambda *_: publisher)
    code, printed = run(
        *flags, "--push_to_hub", "--hub_strategy", "checkpoint", "--validation_steps", "2", "--checkpointing_steps", "1"
    )
    assert code == ResourceError.exit_code and printed.count("error: No space left on device") == 1, printed
    assert [path.name for path in Checkpoints(tmp_path / "out").found()] == ["checkpoint-1"]
    assert fault(tmp_path / "out/checkpoint-1") is None


def fill_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_too_little_room_is_known_at_once(
    run: Run, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a disk with less room than two checkpoints is refused before the first step, with both figures."""
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    code, printed = run(*flags)
    assert code == ResourceError.exit_code and "1e-06 GB are free" in printed and "two checkpoints" in printed
    assert not (tmp_path / "out/metrics.jsonl").exists()


def bytes_of(state: object) -> int:
    """Of all tensors of more than one number in nested dictionaries and lists."""
    if isinstance(state, torch.Tensor):
        return state.nbytes if state.numel() > 1 else 0
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(bytes_of, parts))


def test_what_a_checkpoint_takes_and_that_it_needs_no_unpickling(run: Run, flags: list[str], tmp_path: Path) -> None:
    """Oracle: torch's loader of nothing but tensors, and the bytes of those that a real checkpoint holds."""
    assert run(*flags, "--checkpointing_steps", "4", "--use_ema")[0] == 0
    folder = tmp_path / "out/checkpoint-4"
    with torch.serialization.safe_globals(TORCH_SAFE_GLOBALS):
        pickled = {
            path.name: torch.load(path, weights_only=True)
            for path in folder.iterdir()
            if path.suffix in (".bin", ".pt", ".pkl")
        }
    assert set(pickled) == {"optimizer.bin", "ema.pt", "random_states_0.pkl"}
    held = (
        bytes_of(load_file(folder / "vae" / WEIGHTS)) + bytes_of(pickled["optimizer.bin"]) + bytes_of(pickled["ema.pt"])
    )
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    assert state_bytes(vae, [*vae.encoder.parameters(), *vae.quant_conv.parameters()], object()) == held


@pytest.fixture
def closed_folder() -> Iterator[Path]:
    """A folder that nobody may write to."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        yield Path(folder)


@pytest.mark.parametrize("place", ["", "new/folder"])
def test_a_folder_that_may_not_be_written_to(place: str, closed_folder: Path) -> None:
    """Oracle: the system's refusal, as bad input, by what the command enters before it computes anything."""
    privileged = os.geteuid() == 0
    if privileged:
        os.seteuid(NOBODY)
    try:
        with (
            pytest.raises(UserError, match=r"output_dir: cannot write to .*: Permission denied"),
            sole_run(closed_folder / place, is_main_process=True),
        ):
            pass
    finally:
        if privileged:
            os.seteuid(0)


def test_a_folder_below_a_file(run: Run, flags: list[str], tmp_path: Path) -> None:
    """Oracle: as above; there can be no folder there."""
    (tmp_path / "file").write_text("")
    code, printed = run(*flags, "--output_dir", tmp_path / "file/out")
    assert code == 2 and "error: --output_dir: cannot write to" in printed and ": Not a directory" in printed


# --- memory and words -----------------------------------------------------------------------------------


def numbers_of(num_bytes: int) -> object:
    return np.empty(num_bytes, dtype=np.uint8)


def tensor_of(num_bytes: int) -> object:
    return torch.empty(num_bytes, dtype=torch.uint8)


def memory_of_a_gpu(num_bytes: int) -> object:
    raise torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {num_bytes / 2**60:.2f} EiB. GPU 0 has 79.11 GiB"
    )


@pytest.mark.parametrize("allocate", [numbers_of, tensor_of, memory_of_a_gpu])
def test_out_of_memory_names_the_flags_that_help(
    allocate: object, run: Run, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a real allocation of an exbibyte in the middle of a run: exit code 5 and flags that the parser knows.

    That of a GPU is one in its words alone.
    """
    monkeypatch.setattr(train_srl_vae, "optimizer_step", lambda *_, **__: allocate(2**60))
    code, printed = run(*flags)
    line = printed.split("error: ")[1]
    assert code == ResourceError.exit_code and line.startswith("out of memory"), printed
    assert str(2**60) in line or "1.00 EiB" in line
    for flag in ("train_batch_size", "gradient_checkpointing", "mixed_precision", "resolution"):
        assert flag in line


def test_the_words_of_torch() -> None:
    """Oracle: torch's own messages, whose figure is repeated; a bug is not taken for a fault of the machine."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 79 GiB")
    assert "for 20.00 MiB more" in str(explained(error))
    assert explained(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    for words in (
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]",
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    ):
        assert "another process of this run has ended" in str(explained(RuntimeError(words)))
    timed_out = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 1800000ms"
    )
    assert "cannot be reached" in str(explained(timed_out))
    assert explained(FileNotFoundError(2, "No such file or directory")) is None


def test_a_journal_cut_in_the_middle_of_a_line(tmp_path: Path) -> None:
    """Oracle: the whole lines, whatever a kill or a full disk has left behind them."""

    class Alone:
        is_main_process = True

    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    Journal(Alone(), path).begin(2)
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n'
