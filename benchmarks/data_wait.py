"""Measure the share of a training's time spent waiting for images, for several loaders and device speeds.

    python -m benchmarks.data_wait --figure benchmarks/data-wait.png

A pause stands for the device's step: like a GPU, it needs no CPU cores. In a real training, `data_wait` in
`metrics.jsonl` is the same share.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from matplotlib.figure import Figure

from srl_utils.command_line import Parser, exit_code, image_side, non_negative_int, positive_int
from srl_utils.evaluation.report.tables import markdown_table
from srl_utils.images.datasets import open_data
from srl_utils.images.loading import Batch, training_batches
from srl_utils.images.photographs import load_photographs
from srl_utils.images.sources import DataSource

FULL_SIZE = 10_000  # pixels; no photograph is larger
FIRST_BATCHES = 4  # not measured: the loader's queue is still filling


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = parse_args(arguments)
    with TemporaryDirectory() as folder:
        if args.train_data_dir is None:
            args.train_data_dir = write_photographs(Path(folder))
        shares = {
            workers: [share_of_waiting(args, workers, speed) for speed in args.images_per_second]
            for workers in args.workers
        }
    header = ["loader", *(f"{speed} images/s" for speed in args.images_per_second)]
    rows = [[name_of(workers), *(f"{share:.1%}" for share in row)] for workers, row in shares.items()]
    print(markdown_table([header, *rows]))
    draw(args.images_per_second, shares).savefig(args.figure, dpi=110)
    return 0


def write_photographs(folder: Path) -> str:
    """Write scikit-image's training photographs as JPEG files of their full size; return the folder."""
    for index, photograph in enumerate(load_photographs("train", short_side=FULL_SIZE)):
        photograph.save(folder / f"{index:02d}.jpg", quality=92)
    return str(folder)


def share_of_waiting(args: argparse.Namespace, workers: int, speed: int) -> float:
    """Return the share of time spent waiting, in [0,1], for a device that takes `speed` images per second."""
    batches, step_seconds = open_batches(args, workers), args.batch_size / speed
    for _ in islice(batches, FIRST_BATCHES):
        time.sleep(step_seconds)
    waited, started = 0.0, time.perf_counter()
    for _ in range(args.steps):
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
        time.sleep(step_seconds)
    return waited / (time.perf_counter() - started)


def open_batches(args: argparse.Namespace, workers: int) -> Iterator[Batch]:
    """Return the batches of a training with this number of loader processes."""
    data = open_data(
        DataSource(train_data_dir=args.train_data_dir),
        resolution=args.resolution,
        seed=0,
        center_crop=False,
        random_flip=True,
        num_validation_images=1,
    )
    return training_batches(data, batch_size=args.batch_size, num_workers=workers)


def name_of(workers: int) -> str:
    """Return the loader's name in the report."""
    return f"{workers} worker{'s' * (workers > 1)}" if workers else "the training's own thread"


def draw(speeds: Sequence[int], shares: dict[int, list[float]]) -> Figure:
    """Plot the shares against the device's speed, one line per loader."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for workers, row in shares.items():
        axes.plot(speeds, [100 * share for share in row], marker="o", label=name_of(workers))
    axes.set(
        xlabel="images per second that the device could take", ylabel="time spent waiting for images (%)", xscale="log"
    )
    axes.set_xticks(speeds, [str(speed) for speed in speeds], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.data_wait", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--figure", type=Path, required=True)
    add("--train_data_dir", default=None, help="a folder of images instead of scikit-image's photographs as JPEG files")
    add("--resolution", type=image_side, default=256)
    add("--batch_size", type=positive_int, default=8)
    add(
        "--workers", nargs="+", type=non_negative_int, default=[0, 1, 2], help="--dataloader_num_workers of each loader"
    )
    add("--images_per_second", nargs="+", type=positive_int, default=[10, 20, 40, 80, 160, 320])
    add("--steps", type=positive_int, default=16, help="measured steps of each combination")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
