"""Networks small enough for a test, images to show them, and runs of the training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from srl_utils.images.pixels import to_pil
from srl_utils.vae.loading import WEIGHTS_NAME

Run = Callable[..., tuple[int, str]]
"""Runs a command line in this process; returns its exit code and all it printed."""

ROOT = Path(__file__).parents[2]


def build_tiny_vae(*, quant_conv: bool = True, seed: int = 0) -> AutoencoderKL:
    """Two levels of 8 and 16 channels, about 50 thousand random weights; sides are divided by 2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
            use_quant_conv=quant_conv,
            use_post_quant_conv=quant_conv,
        )
    return vae.eval()


def draw_images(count: int, size: int = 16, *, seed: int = 0, limit: float = 1.0) -> Tensor:
    """`[count,3,size,size]` in [-limit,limit], uniform noise."""
    noise = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return (2 * noise - 1) * limit


def write_photos(folder: Path, images: Iterable[Tensor]) -> None:
    """Write images `[3,H,W]` in [-1,1] as `0.png`, `1.png` and so on into a new folder."""
    folder.mkdir()
    for number, image in enumerate(images):
        to_pil(image).save(folder / f"{number}.png")


def smallest_training(vae_folder: Path, photographs: Path, output_dir: Path) -> list[str]:
    """The flags of four steps of four 16 px images."""
    return [
        "--pretrained_model_name_or_path", str(vae_folder), "--train_data_dir", str(photographs),
        "--resolution", "16", "--train_batch_size", "4", "--max_train_steps", "4", "--pgd_steps", "2",
        "--lpips_weight", "0", "--learning_rate", "1e-3", "--num_validation_images", "3",
        "--validation_split", "0.2", "--report_to", "none", "--output_dir", str(output_dir),
    ]  # fmt: skip


def launch(*arguments: object, processes: int = 1, script: object) -> subprocess.CompletedProcess:
    """`accelerate launch` on the CPU, of a file or, with `-m` for the script, a module; for several processes it must be told, or it starts a single one there."""
    several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", processes,
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--num_cpu_threads_per_process", "1", script, *arguments,
    ]  # fmt: skip
    return subprocess.run(
        [str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def steps(output_dir: Path) -> list[dict]:
    """The rows of `metrics.jsonl` that training steps wrote."""
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def assert_same_weights(first: Path, second: Path) -> None:
    one, other = load_file(first / WEIGHTS_NAME), load_file(second / WEIGHTS_NAME)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different
