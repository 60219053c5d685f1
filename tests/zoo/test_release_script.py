"""The script from training to the published row."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from helpers.runs import ROOT
from helpers.warm_python import warm_python

SCRIPT = ROOT / "experiments/release.sh"
WITHOUT_NETWORK = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def test_the_shell_accepts_it() -> None:
    """Oracle: sh itself; a flag that it does not know is refused."""
    subprocess.run(["sh", "-n", SCRIPT], check=True)
    done = subprocess.run(["sh", SCRIPT, "--dryrun"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: --dryrun is not known; the only flag is --dry_run\n"


def test_a_dry_run_checks_every_step(vae_folder: Path, photographs: Path, tmp_path: Path) -> None:
    """Oracle: each step's own words, in order; nothing is trained, measured, pushed or entered."""
    data = f"--train_data_dir {photographs} --validation_split 0.2"
    variables = {
        "HUB_ID": "user/Small.VAE", "BASE": str(vae_folder), "OUTPUT_DIR": str(tmp_path / "out"), "PROTOCOL": "embedded",
        "LAUNCH": "python",
        "TRAINING": f"{data} --resolution 16 --train_batch_size 4 --max_train_steps 4 --lpips_weight 0 --report_to none",
        "EVALUATION": f"--data_dir {photographs} --resolution 16 --num_images 2 --attacks quick --metrics psnr",
    }  # fmt: skip
    with warm_python(WITHOUT_NETWORK, "srl_utils.evaluation.calling") as python:
        path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
        environment = {**os.environ, **WITHOUT_NETWORK, **variables, "PATH": path}
        done = subprocess.run(["sh", SCRIPT, "--dry_run"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    for words in (
        "1 of 6", "TFLOP", "2 of 6", "passes through one", "3 of 6", "would push to user/Small.VAE", "4 of 6",
        "would push to user/Small.VAE", "5 of 6", "square-1000", "6 of 6", "small-vae: the entry and its weights are accepted",
    ):  # fmt: skip
        assert words in said, (words, done.stdout + done.stderr)
        said = said.partition(words)[2]
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"out/small-vae.yaml", "out-dry-run/Small.VAE/config.json", *(
        path for path in left if path.startswith("out-dry-run/Small.VAE/diffusion_pytorch_model")
    )}  # fmt: skip
    assert not (ROOT / "zoo/entries/small-vae.yaml").exists()
