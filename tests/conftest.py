"""Networks small enough for a test, and images to show them."""

from __future__ import annotations

import os
import subprocess
import sys

# Before any Hugging Face library is imported: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is: tensors this small gain nothing from a second thread, and on a busy machine two that wait for each
# other take many times as long. Nor may a sum round differently in processes that were given another number of threads.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable
from pathlib import Path

import lpips
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import AutoencoderKL
from torch import Tensor

import train_srl_vae
from miniature.scenes import draw_scene

Run = Callable[..., tuple[int, str]]

ROOT = Path(__file__).parents[1]
MINIATURE_VAE = ROOT / "miniature/weights/vae"
QUANTISERS = {"with quant_conv": True, "without quant_conv": False}


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


@pytest.fixture
def images() -> Callable[..., Tensor]:
    """Seeded images in [-1,1]: `images(count, size, seed=0, limit=1.0)`."""
    return draw_images


@pytest.fixture
def generators() -> Callable[..., list[torch.Generator]]:
    """A fresh CPU generator for each seed given."""
    return lambda *seeds: [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def tiny_vae() -> AutoencoderKL:
    return build_tiny_vae()


@pytest.fixture
def other_tiny_vae() -> AutoencoderKL:
    """The same architecture as `tiny_vae` with other weights."""
    return build_tiny_vae(seed=1)


@pytest.fixture(params=QUANTISERS.values(), ids=QUANTISERS.keys())
def either_tiny_vae(request: pytest.FixtureRequest) -> AutoencoderKL:
    """Both kinds of AutoencoderKL: with and without the 1x1 convolutions around the latent."""
    return build_tiny_vae(quant_conv=request.param)


@pytest.fixture(scope="session")
def random_lpips() -> lpips.LPIPS:
    """LPIPS as the package computes it, with a random trunk: everything but the values of the real one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)


@pytest.fixture(scope="session")
def miniature_vae() -> AutoencoderKL:
    """The trained autoencoder that ships with the project."""
    return AutoencoderKL.from_pretrained(MINIATURE_VAE).eval()


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nested folder of 24 pictures of 40 px."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "nested").mkdir()
    for index in range(24):
        place = folder / "nested" if index % 2 else folder
        draw_scene(5, index, size=40).image.save(place / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random AutoencoderKL on disk, down-sampling by 2, with a configuration unlike the defaults."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.7,
        shift_factor=0.1,
        latents_mean=(0.1, 0.2, 0.3, 0.4),
        force_upcast=False,
    )
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


def smallest_training(vae_folder: Path, photographs: Path, output_dir: Path) -> list[str]:
    """The flags of four steps of four 16 px images."""
    return [
        "--pretrained_model_name_or_path", str(vae_folder), "--train_data_dir", str(photographs),
        "--resolution", "16", "--train_batch_size", "4", "--max_train_steps", "4", "--pgd_steps", "2",
        "--lpips_weight", "0", "--learning_rate", "1e-3", "--num_validation_images", "3",
        "--validation_split", "0.2", "--report_to", "none", "--output_dir", str(output_dir),
    ]  # fmt: skip


@pytest.fixture
def flags(photographs: Path, vae_folder: Path, tmp_path: Path) -> list[str]:
    """The smallest complete training, which writes to `tmp_path / "out"`."""
    return smallest_training(vae_folder, photographs, tmp_path / "out")


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


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Run:
    """Runs the training's command line in this process; returns its exit code and all it printed."""

    def call(*arguments: object) -> tuple[int, str]:
        for state in (AcceleratorState, PartialState, GradientState):
            state._shared_state.clear()
        monkeypatch.setattr(sys, "argv", ["train_srl_vae.py", *map(str, arguments)])
        code = train_srl_vae.command_line()
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return call
