"""The benchmarks, in miniature: that they measure what they say, not how fast this machine is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from benchmarks import data_wait, memory, train_step
from benchmarks.memory import LiveBytes
from experiments import time_to_robustness
from experiments.time_to_robustness import Point, reach

SMALL = ["--resolution", "16", "--batch_size", "2", "--pgd_steps", "1", "--repeats", "2", "--no-torch_compile"]


def test_train_step_tells_both_times(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the command run end to end; the ratio and the rates are those of the times it tells.

    The products whose peak speed it measures are small: a processor without bf16 takes minutes for large ones.
    """
    monkeypatch.setitem(train_step.MATMUL_SIDE, "cpu", 128)
    monkeypatch.setitem(train_step.CONV_SIDE, "cpu", (1, 16, 16))
    assert train_step.main([*SMALL, "--device", "cpu", "--mixed_precision", "no", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    textbook, ours = report["steps"]["textbook"], report["steps"]["ours"]
    assert 0.1 < report["ratio"] < 10
    assert ours["images/s"] == pytest.approx(2 / ours["seconds"])
    assert textbook["TFLOP/s"] == pytest.approx(report["TFLOP per step"] / textbook["seconds"])
    assert all(peak > 0 for peaks in report["peak TFLOP/s"].values() for peak in peaks.values())


@pytest.mark.parametrize("name", train_step.SHAPES)
def test_full_size_shapes_have_the_known_size(name: str) -> None:
    """Oracle: the published VAE of Stable Diffusion has 83.65 million parameters, 34.2 of them in the encoder."""
    with torch.device("meta"):
        vae = AutoencoderKL(**train_step.SHAPES[name])
    assert vae.num_parameters() == 83_653_863
    assert sum(parameter.numel() for parameter in vae.encoder.parameters()) == pytest.approx(34.2e6, rel=0.01)


def test_live_bytes_are_those_of_tensors_in_use() -> None:
    """Oracle: closed form; a view is no new memory, and what nobody refers to is free again."""
    with LiveBytes() as live:
        first = torch.zeros(1000)
        second = first + 1
        view = second[10:]
        assert live.now == live.peak == 8000
        del second
        assert live.now == 8000, "the view still needs it"
        del view
        first.mul(2).add(1)
        assert live.now == 4000
    assert live.peak == 12000


@pytest.mark.slow
def test_memory_of_a_step_grows_with_the_batch_and_falls_with_checkpointing() -> None:
    """Oracle: monotonicity, on the full-size shape at a size that is quick to count."""
    args = memory.parse_args(["--resolution", "64", "--lpips_weight", "0"])
    one, two, checkpointed = (
        memory.step_bytes(args, size, checkpointing=checkpointing, attack_batch_size=None)
        for size, checkpointing in ((1, False), (2, False), (2, True))
    )
    weights = 4 * 83_653_863
    assert weights < one < two
    assert checkpointed < two


def test_a_slow_device_waits_less_than_a_fast_one(photographs: Path, tmp_path: Path, capsys) -> None:
    """Oracle: monotonicity; a batch is made within half a second, and not in a microsecond."""
    arguments = [
        "--figure", str(tmp_path / "figure.png"), "--train_data_dir", str(photographs), "--resolution", "16",
        "--batch_size", "1", "--workers", "0", "--images_per_second", "2", "1000000", "--steps", "2",
    ]  # fmt: skip
    assert data_wait.main(arguments) == 0
    slow, fast = (float(cell.strip(" %")) for cell in capsys.readouterr().out.splitlines()[-1].split("|")[2:4])
    assert slow < fast
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def point(step: int, seconds: float, attacked: float, clean: float = 25.0, drift: float = 0.0) -> Point:
    return Point(step=step, seconds=seconds, warm_up=1.0, clean=clean, attacked=attacked, drift=drift)


def test_the_mark_is_reached_between_checkpoints() -> None:
    """Oracle: closed form, linear interpolation of everything that is told of that moment."""
    start = point(0, 0.0, 17.0)
    curve = [point(10, 20.0, 19.0, clean=26.0, drift=0.02), point(20, 40.0, 21.0, clean=27.0, drift=0.04)]
    reached = reach(curve, start, 20.0)
    assert (reached.step, reached.seconds, reached.attacked) == (15, 30.0, 20.0)
    assert (reached.clean, reached.drift) == pytest.approx((26.5, 0.03))
    assert reach(curve, start, 18.0).seconds == pytest.approx(10.0)
    assert reach(curve, start, 21.0) == curve[-1]
    assert reach(curve, start, 21.1) is None
    assert reach(curve, start, 16.0) == start


@pytest.mark.slow
def test_time_to_robustness_end_to_end(vae_folder: Path, photographs: Path, tmp_path: Path, capsys) -> None:
    """Oracle: the command run end to end, and again: what is there is not computed anew, and the report is the same.

    The textbook's training, which shares no code with ours for the step, ends where the one that it repeats does: in float32
    to what rounding makes of two steps.
    """
    arguments = [
        "--model", str(vae_folder), "--data_dir", str(photographs), "--resolution", "16", "--num_images", "2",
        "--apgd_steps", "2", "--apgd_restarts", "1", "--seeds", "0", "--output_dir", str(tmp_path / "out"),
        "--train_flags", f"--train_data_dir {photographs} --resolution 16 --lpips_weight 0 --checkpointing_steps 1 "
        "--mixed_precision no --learning_rate 1e-3",
        "--arms", "paper=--max_train_steps 2 --pgd_steps 2", "fast=--recipe fast --max_train_steps 3", "--textbook",
    ]  # fmt: skip
    assert time_to_robustness.main(arguments) == 0
    first = capsys.readouterr().out
    assert all(f"| {arm}" in first for arm in ("paper", "fast", "textbook"))
    assert (tmp_path / "out/time-to-robustness.png").stat().st_size > 10_000
    assert len(list((tmp_path / "out/fast-seed0").glob("checkpoint-*-apgd-2x1.json"))) == 3
    ours, textbooks = (
        json.loads((tmp_path / f"out/{arm}-seed0/checkpoint-2-apgd-2x1.json").read_text())
        for arm in ("paper", "textbook")
    )
    assert ours["drift"] > 1e-6
    assert all(textbooks[measure] == pytest.approx(ours[measure], rel=1e-3) for measure in time_to_robustness.MEASURES)
    assert time_to_robustness.main(arguments) == 0
    assert capsys.readouterr().out == first
