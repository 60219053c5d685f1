"""Time the demo's training on CPU cores in three layouts, on an idle machine and beside a busy process.

    python -m benchmarks.shared_machine --output_dir outputs/shared-machine

The layouts are one process with a thread per core, one process with one thread, and one process of one thread per core.
They take turns, so the machine's other work affects all of them. The command prints the images per second of each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BATCH = 8  # images of a step, in every layout
WARM_UP = 5  # steps before the timed ones


class Layout(NamedTuple):
    """How many processes train, and how many threads each has."""

    processes: int
    threads: int

    def __str__(self) -> str:
        return f"{self.processes} process(es) of {self.threads} thread(s)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--cores", type=int, default=2, help="a divisor of the 8 images of a step")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each run")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(arguments)
    layouts = [Layout(1, args.cores), Layout(1, 1), Layout(args.cores, 1)]
    for busy in (False, True):
        rates = measure(layouts, args, busy=busy)
        print(f"{'beside a busy process' if busy else 'idle machine'}, images/s, median of {args.repeats} runs:")
        for layout, values in rates.items():
            print(
                f"  {layout!s:<36}{statistics.median(values):7.1f}  ({min(values):.1f} to {max(values):.1f})",
                flush=True,
            )
    return 0


def measure(layouts: Sequence[Layout], args: argparse.Namespace, *, busy: bool) -> dict[Layout, list[float]]:
    """Return the images per second of each run, by layout; the layouts take turns."""
    rates: dict[Layout, list[float]] = {layout: [] for layout in layouts}
    for turn in range(args.repeats):
        for layout in layouts:
            place = args.output_dir / f"{'busy' if busy else 'idle'}-{layout.processes}x{layout.threads}-{turn}"
            with busy_process(wanted=busy):
                rates[layout].append(train(layout, place, args.steps))
    return rates


@contextmanager
def busy_process(*, wanted: bool) -> Iterator[None]:
    """Keep one core busy within, if `wanted`."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def train(layout: Layout, place: Path, steps: int) -> float:
    """Train for `WARM_UP` and `steps` more updates; return the images per second of the latter."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *(["--multi_gpu"] if layout.processes > 1 else ["--cpu"]),
        "--num_processes", layout.processes, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no",
        "--num_cpu_threads_per_process", layout.threads, "train_srl_vae.py",
        "--pretrained_model_name_or_path", "miniature/weights/vae", "--dataset_name", "scikit-image", "--recipe", "fast",
        "--resolution", 64, "--train_batch_size", BATCH // layout.processes, "--max_train_steps", WARM_UP + steps,
        "--lpips_weight", 0, "--no-torch_compile", "--num_validation_images", 1, "--output_dir", place,
    ]  # fmt: skip
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(layout.threads)}
    subprocess.run([str(word) for word in command], cwd=ROOT, env=environment, check=True, capture_output=True)
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    rates = [row["images_per_second"] for row in rows if "images_per_second" in row]
    return len(rates[WARM_UP:]) / sum(1 / rate for rate in rates[WARM_UP:])


if __name__ == "__main__":
    sys.exit(main())
