"""Two runs in one folder, and readers of a folder that is being written."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from helpers.runs import ROOT, Run

from srl_utils.errors import UserError
from srl_utils.evaluation.__main__ import main as evaluate
from srl_utils.files import kept_images, save_tensors, sole_run
from srl_utils.training.checkpoints import save_drop_in
from srl_utils.vae.loading import AutoencoderSource, load_autoencoder


@pytest.mark.parametrize("resume", [(), ("--resume_from_checkpoint", "latest")], ids=["anew", "resuming"])
def test_a_second_training_refuses_at_once(resume: tuple[str, ...], run: Run, flags: list[str], tmp_path: Path) -> None:
    """Oracle: the promise: exit code 2, one line that says what to do, and no file changed."""
    with sole_run(tmp_path / "out", is_main_process=True):
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
        code, printed = run(*flags, *resume)
        assert code == 2 and "--output_dir: another run is writing to" in printed and "start again" in printed, printed
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_second_evaluation_refuses_at_once(vae_folder: Path, tmp_path: Path) -> None:
    """Oracle: as above."""
    with sole_run(tmp_path, is_main_process=True), pytest.raises(UserError, match="another run is writing"):
        evaluate([
            "reconstruction", "--baseline", str(vae_folder), "--vae", f"same={vae_folder}", "--dataset_name",
            "scikit-image", "--resolution", "16", "--num_images", "1", "--attacks", "clean", "--metrics", "psnr",
            "--output_dir", str(tmp_path),
        ])  # fmt: skip


def test_the_lock_ends_with_its_context_and_with_its_process(tmp_path: Path) -> None:
    """Oracle: the lock can be had again after the context, after an error in it, and after a SIGKILL of its holder."""
    with pytest.raises(ZeroDivisionError), sole_run(tmp_path, is_main_process=True):
        raise ZeroDivisionError
    program = (
        "import sys\nfrom pathlib import Path\nfrom srl_utils.files import sole_run\n"
        "with sole_run(Path(sys.argv[1]), is_main_process=True):\n    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="another run"), sole_run(tmp_path, is_main_process=True):
        pass
    holder.kill()
    holder.wait()
    with sole_run(tmp_path, is_main_process=True):
        pass


def test_other_processes_of_a_run_need_no_lock(tmp_path: Path) -> None:
    """Oracle: the rank beside the main one goes on while the lock is held."""
    with sole_run(tmp_path, is_main_process=True), sole_run(tmp_path, is_main_process=False):
        pass


def test_a_reader_sees_whole_files_while_they_are_written(
    tiny_vae: AutoencoderKL, other_tiny_vae: AutoencoderKL, tmp_path: Path
) -> None:
    """Oracle: each VAE loaded while two are saved in turns is one of the two, whole.

    They are saved 20 times, and on a busy machine until the reader has met both.
    """
    save_drop_in(tiny_vae, tmp_path)
    ended = threading.Event()
    seen: set[int] = set()

    def write() -> None:
        for number in range(1000):
            save_drop_in((tiny_vae, other_tiny_vae)[number % 2], tmp_path, variants=["fp16"])
            if number >= 19 and len(seen) == 2:
                break
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    known = [vae.state_dict() for vae in (tiny_vae, other_tiny_vae)]
    while not ended.is_set():
        loaded = load_autoencoder(AutoencoderSource(pretrained_model_name_or_path=str(tmp_path))).state_dict()
        which = [all(torch.equal(loaded[name], vae[name]) for name in vae) for vae in known]
        assert sum(which) == 1
        seen.add(which.index(True))
    writer.join()
    assert seen == {0, 1}
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_whoever_may_read_other_files_may_read_weights(tmp_path: Path) -> None:
    """Oracle: the mode of a file that Python itself makes under the same umask."""
    before = os.umask(0o027)
    try:
        (tmp_path / "usual").touch()
        save_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_several_at_a_time_make_a_file_once(tmp_path: Path) -> None:
    """Oracle: counting. Of two that want the same images at the same time, one makes them and both have them."""
    made = []

    def make() -> torch.Tensor:
        made.append(torch.rand(1, 3, 4, 4))
        time.sleep(0.3)
        return made[-1]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: kept_images(tmp_path / "of/images.safetensors", make), range(2))
    assert len(made) == 1 and torch.equal(first, made[0]) and torch.equal(second, made[0])
