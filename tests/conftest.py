"""Networks small enough for a test, and images to show them."""

from __future__ import annotations

import os
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
from helpers.runs import ROOT, Run, build_tiny_vae, draw_images, smallest_training
from torch import Tensor

import train_srl_vae
from miniature.scenes import draw_scene

MINIATURE_VAE = ROOT / "miniature/weights/vae"
QUANTISERS = {"with quant_conv": True, "without quant_conv": False}


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


@pytest.fixture
def flags(photographs: Path, vae_folder: Path, tmp_path: Path) -> list[str]:
    """The smallest complete training, which writes to `tmp_path / "out"`."""
    return smallest_training(vae_folder, photographs, tmp_path / "out")


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
