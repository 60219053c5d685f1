"""Watch a long training for growing memory, open files and time per step.

    python -m benchmarks.long_run --output_dir outputs/long-run --figure docs/long-run.png

The command trains a tiny VAE for 3,000 steps with workers, validation and checkpoints, and watches from outside: resident
memory and open file handles of the process and its workers, and the processor time per step. Unlike wall-clock time,
processor time does not depend on the machine's other work. It prints the growth of each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import psutil
import torch
from diffusers import AutoencoderKL

from miniature.scenes import draw_scene

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
INTERVAL = 1.0  # seconds between two samples
TENTHS = 10


class Look(NamedTuple):
    """A sample of the training's resources.

    Attributes:
        step: number of training steps so far.
        memory: resident memory of the process and its workers, MiB.
        handles: open files, sockets and pipes of the process and its workers.
        processor: processor time of the process since its start, seconds.
    """

    step: int
    memory: float
    handles: int
    processor: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--figure", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args(arguments)
    out = args.output_dir / "run"
    looks = watch(training(prepare(args.output_dir), out, args.steps), out / "metrics.jsonl")
    (args.output_dir / "looks.json").write_text(json.dumps([look._asdict() for look in looks]))
    draw(looks, args.figure)
    print(f"{summary(looks)}, {pace(out / 'metrics.jsonl')}")
    return 0


def prepare(folder: Path) -> list[str]:
    """Make a VAE of two blocks and 64 images of 40 px in `folder`; return the flags that name them."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, sample_size=16, **blocks).save_pretrained(
        folder / "vae"
    )
    (folder / "photographs").mkdir(parents=True, exist_ok=True)
    for index in range(64):
        draw_scene(5, index, size=40).image.save(folder / "photographs" / f"{index:02d}.png")
    return [
        "--pretrained_model_name_or_path", str(folder / "vae"), "--train_data_dir", str(folder / "photographs"),
    ]  # fmt: skip


def training(flags: list[str], out: Path, steps: int) -> psutil.Popen:
    """Start the training."""
    return psutil.Popen(
        [
            sys.executable, "train_srl_vae.py", *flags, "--resolution", "16", "--train_batch_size", "4", "--pgd_steps", "2",
            "--lpips_weight", "0", "--max_train_steps", str(steps), "--dataloader_num_workers", "2",
            "--validation_steps", "100", "--num_validation_images", "2", "--checkpointing_steps", "100",
            "--checkpoints_total_limit", "2", "--output_dir", str(out),
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


def watch(process: psutil.Popen, journal: Path) -> list[Look]:
    """Return one sample per second from the first step to the last, without the evaluation after it."""
    looks = []
    while process.poll() is None:
        time.sleep(INTERVAL)
        step = steps_in(journal)
        try:
            family = [process, *process.children(recursive=True)]
            memory = sum(member.memory_info().rss for member in family) / 2**20
            handles = sum(member.num_fds() for member in family)
            times = process.cpu_times()
        except psutil.NoSuchProcess:  # a process ended between two questions
            continue
        if step:
            looks.append(Look(step, memory, handles, times.user + times.system))
    if process.returncode:
        raise SystemExit(f"the training failed with exit code {process.returncode}")
    return [look for look in looks if look.step < looks[-1].step]


def steps_in(journal: Path) -> int:
    """Return the last step in the journal."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def costs(looks: Sequence[Look]) -> np.ndarray:
    """Return the processor time per step in each tenth of the run, `[10]` milliseconds.

    It includes validation and checkpoints.
    """
    steps, seconds = np.array([(look.step, look.processor) for look in looks], dtype=float).T
    edges = np.interp(np.linspace(steps[0], steps[-1], TENTHS + 1), steps, seconds)
    return np.diff(edges) / ((steps[-1] - steps[0]) / TENTHS) * 1000


def summary(looks: Sequence[Look]) -> str:
    """Compare the second tenth of the run with the last; in the first, libraries are still starting."""
    parts = np.array_split(np.array(looks, dtype=float), TENTHS)
    (_, memory, handles, _), (_, memory_end, handles_end, _) = (
        np.median(part, axis=0) for part in (parts[1], parts[-1])
    )
    cost = costs(looks)
    return (
        f"{looks[-1].step} steps: resident memory {memory:.0f} -> {memory_end:.0f} MiB, file handles {handles:.0f} -> "
        f"{handles_end:.0f}, processor time per step {cost[1]:.1f} -> {cost[-1]:.1f} ms ({cost[-1] / cost[1] - 1:+.1%})"
    )


def pace(journal: Path) -> str:
    """Compare the steps per second of the second and the last tenth, by the training's own times."""
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    # A step has 4 images.
    seconds = np.array([4 / row["images_per_second"] for row in rows if "images_per_second" in row])
    tenths = [len(part) / part.sum() for part in np.array_split(seconds, TENTHS)]
    return f"steps a second {tenths[1]:.1f} -> {tenths[-1]:.1f} ({tenths[-1] / tenths[1] - 1:+.1%})"


def draw(looks: Sequence[Look], path: Path) -> None:
    """Plot memory, file handles and processor time against the step."""
    steps, memory, handles, _ = np.array(looks, dtype=float).T
    figure, axes = plt.subplots(3, 1, figsize=(7, 6), sharex=True, layout="constrained")
    axes[0].plot(steps, memory)
    axes[1].plot(steps, handles)
    axes[2].stairs(costs(looks), np.linspace(steps[0], steps[-1], TENTHS + 1))
    labels = ("resident memory (MiB)", "file handles", "processor time\nper step (ms)")
    for axis, label in zip(axes, labels, strict=True):
        axis.set_ylabel(label)
        axis.set_ylim(0, 1.2 * axis.dataLim.ymax)
    axes[-1].set_xlabel("step")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    sys.exit(main())
