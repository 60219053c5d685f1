"""Measure how soon trainings of the same VAE become robust, in seconds of training.

    python -m experiments.time_to_robustness --train_flags "--dataset_name scikit-image ..." \\
        --arms paper="--recipe paper --max_train_steps 120" fast="--recipe fast --max_train_steps 200" --textbook --seeds 0 1 2

Every arm is a run of `train_srl_vae.py` with its own flags. The VAE of each of its checkpoints is measured on held-out
photographs: on clean ones, and under APGD on that VAE. For each seed, the attacked PSNR of the first arm's last
checkpoint is the mark. The report has the time at which each arm reaches the mark, and its clean PSNR and latent drift
then. Warm-ups are reported separately. Finished trainings and measurements are kept, so the command can be interrupted
and repeated.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor

from srl_utils.command_line import Parser, exit_code, non_negative_int, pixel_distance, positive_int
from srl_utils.evaluation.catalogue import AttackResources, select
from srl_utils.evaluation.cells import measure
from srl_utils.evaluation.perturbations import CLEAN, Perturbation
from srl_utils.evaluation.report.tables import markdown_table
from srl_utils.evaluation.tasks.base import DRIFT, Metrics, Reconstruction
from srl_utils.files import write_text_atomically
from srl_utils.images.datasets import load_validation_images
from srl_utils.images.sources import DataSource
from srl_utils.metrics.losses import ReconstructionLoss
from srl_utils.training.checkpoints import STATE_FILE, Checkpoints, step_of
from srl_utils.training.execution import can_compile
from srl_utils.training.step import Networks, build_networks
from srl_utils.vae.codec import Codec
from srl_utils.vae.loading import WEIGHTS_NAME, AutoencoderSource, load_autoencoder

SCRIPT = Path(__file__).parents[1] / "train_srl_vae.py"
TEXTBOOK = "textbook"
COLUMNS = [
    "arm", "seconds to the mark", "ratio", "clean (dB)", "drift", "steps", "first step (s)", "at the end: attacked (dB)",
    "clean (dB)", "drift", "seconds",
]  # fmt: skip
MEASURES = ("clean", "attacked", "drift")


@dataclass(frozen=True)
class Point:
    """The measurements of a checkpoint.

    Attributes:
        step: number of training steps.
        seconds: training time without the first step.
        warm_up: time of the first step, in seconds.
        clean: PSNR of clean images, dB.
        attacked: PSNR under the attack, dB.
        drift: latent drift.
    """

    step: int
    seconds: float
    warm_up: float
    clean: float
    attacked: float
    drift: float


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = parse_args(arguments)
    evaluator = CheckpointEvaluator(args, load_images(args))
    arms = dict(arm.split("=", 1) for arm in args.arms)
    curves: dict[str, dict[int, list[Point]]] = {name: {} for name in [*arms, *([TEXTBOOK] if args.textbook else [])]}
    for seed in args.seeds:
        folders = {name: args.output_dir / f"{name}-seed{seed}" for name in curves}
        for name, flags in arms.items():  # alternated, so that a slower hour of the machine slows all arms
            train(args, folders[name], flags, seed)
        if args.textbook:
            train_textbook(args, folders[TEXTBOOK], like=folders[next(iter(arms))])
        for name, folder in folders.items():
            curves[name][seed] = evaluator.curve(folder)
    start = evaluator.original()
    report = describe(args, arms, start, curves)
    write_text_atomically(args.output_dir / "report.md", report)
    draw(curves, start).savefig(args.output_dir / "time-to-robustness.png", dpi=120)
    print(report)
    return 0


def train(args: argparse.Namespace, folder: Path, flags: str, seed: int) -> None:
    """Run a training or finish it, with a minimal validation of its own."""
    run_to_the_end(folder, [
        SCRIPT, "--pretrained_model_name_or_path", args.model, *shlex.split(args.train_flags),
        "--validation_steps", "100000", "--num_validation_images", "1", "--report_to", "none",
        *shlex.split(flags), "--seed", seed, "--output_dir", folder, "--resume_from_checkpoint", "latest",
    ])  # fmt: skip


def train_textbook(args: argparse.Namespace, folder: Path, like: Path) -> None:
    """Repeat the training in `like` with the textbook's step."""
    run_to_the_end(
        folder, ["-m", "experiments.textbook_training", "--like", like, "--output_dir", folder, "--device", args.device]
    )


def run_to_the_end(folder: Path, command: list[object]) -> None:
    """Run Python with the arguments `command`, unless the VAE that it writes into `folder` exists."""
    if (folder / WEIGHTS_NAME).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        subprocess.run(
            [sys.executable, *map(str, command)], check=True, stdout=log, stderr=subprocess.STDOUT, cwd=SCRIPT.parent
        )


# --- measuring ------------------------------------------------------------------------------------------


class CheckpointEvaluator:
    """Measures checkpoints with one compiled network, into which it loads their weights."""

    def __init__(self, args: argparse.Namespace, images: Tensor) -> None:
        self.args, self.images = args, images
        vae = load_autoencoder(AutoencoderSource(pretrained_model_name_or_path=args.model)).to(args.device)
        # In float32, whatever the training's precision.
        self.networks: Networks = build_networks(vae, ReconstructionLoss(), torch_compile=can_compile(args.device))
        self.reference = Codec("original", vae, self.networks.reference, self.networks.decoder)
        self.attack = strongest(args)

    def original(self) -> Point:
        """Return the measurements of the VAE that all arms start from."""
        return self._cached(self.args.output_dir / "original.json", self.reference, step=0, seconds=0.0, warm_up=0.0)

    def curve(self, folder: Path) -> list[Point]:
        """Return the measurements of the checkpoints in `folder`, in order."""
        return [self._point(folder, checkpoint) for checkpoint in Checkpoints(folder).found()]

    def _point(self, folder: Path, checkpoint: Path) -> Point:
        progress = json.loads((checkpoint / STATE_FILE).read_text())["progress"]
        self.networks.vae.load_state_dict(load_file(checkpoint / "vae" / WEIGHTS_NAME))
        self.networks.mirror.refresh()
        codec = Codec("current", self.networks.vae, self.networks.mirror.encoder, self.networks.decoder)
        seconds = progress["seconds"] - progress["first_steps"]
        return self._cached(
            folder / f"{checkpoint.name}-{self.attack.name}.json",
            codec, step=step_of(checkpoint), seconds=seconds, warm_up=progress["first_steps"],
        )  # fmt: skip

    def _cached(self, path: Path, codec: Codec, **facts: float) -> Point:
        if not path.exists():
            write_text_atomically(path, json.dumps({**facts, **self._measure(codec)}))
        return Point(**json.loads(path.read_text()))

    def _measure(self, codec: Codec) -> dict[str, float]:
        metrics = Metrics(names=["psnr", DRIFT])
        task = Reconstruction(metrics=metrics, baseline=self.reference, images=self.images)
        records = measure(
            [codec], [CLEAN, self.attack], task, self.images, numbers=range(len(self.images)), seed=1,
            batch_size=self.args.judge_batch_size,
        )  # fmt: skip
        by_measure = {("clean", "psnr"): "clean", (self.attack.name, "psnr"): "attacked", ("clean", "drift"): "drift"}
        return {
            name: fmean(record.value for record in records if (record.setting.attack, record.setting.metric) == key)
            for key, name in by_measure.items()
        }


def strongest(args: argparse.Namespace) -> Perturbation:
    """Return the attack."""
    name = f"apgd-{args.apgd_steps}x{args.apgd_restarts}"
    return select([name], [args.epsilon], AttackResources()).perturbations[0]


def load_images(args: argparse.Namespace) -> Tensor:
    """Return the held-out images, `[N,3,R,R]` in [-1,1]."""
    name = args.dataset_name if args.data_dir is None else None
    source = DataSource(dataset_name=name, validation_data_dir=args.data_dir)
    return load_validation_images(source, num_images=args.num_images, resolution=args.resolution, seed=0).images


# --- the report -----------------------------------------------------------------------------------------


def reach(curve: Sequence[Point], start: Point, mark: float) -> Point | None:
    """Return the point where `curve` first reaches an attacked PSNR of `mark`, by linear interpolation; None if never."""
    if start.attacked >= mark:
        return start
    before = start
    for point in curve:
        if point.attacked >= mark:
            share = (mark - before.attacked) / (point.attacked - before.attacked)
            blend = {
                name: getattr(before, name) + share * (getattr(point, name) - getattr(before, name))
                for name in ("step", "seconds", *MEASURES)
            }
            return Point(**blend, warm_up=point.warm_up)
        before = point
    return None


def describe(
    args: argparse.Namespace, arms: dict[str, str], start: Point, curves: dict[str, dict[int, list[Point]]]
) -> str:
    """Return the report as Markdown."""
    first = next(iter(curves))
    marks = {seed: curve[-1].attacked for seed, curve in curves[first].items()}
    lines = [
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{date.today().isoformat()}; {len(args.seeds)} seeds; attack {strongest(args).name} at "
        f"{255 * args.epsilon:.3g}/255 on {args.num_images} held-out images.",
        f"Before training: clean {start.clean:.2f} dB, attacked {start.attacked:.2f} dB.",
        f"The mark is the attacked PSNR of '{first}' at the end of its training with the same seed, "
        f"{fmean(marks.values()):.2f} dB in the mean.",
        "",
        markdown_table([COLUMNS, *table_rows(curves, start, marks)]),
        "",
        *(f"- {name}: `{flags}`" for name, flags in arms.items()),
        "",
    ]
    return "\n".join(lines)


def table_rows(curves: dict[str, dict[int, list[Point]]], start: Point, marks: dict[int, float]) -> Iterator[list[str]]:
    """Yield the table's rows, one per arm."""
    reference: list[float] = []
    for name, by_seed in curves.items():
        reached = [reach(curve, start, marks[seed]) for seed, curve in by_seed.items()]
        last = [curve[-1] for curve in by_seed.values()]
        ends = [
            spread([getattr(point, part) for point in last], digits)
            for part, digits in (("attacked", 2), ("clean", 2), ("drift", 4), ("seconds", 1))
        ]
        if None in reached:
            missed = sum(point is None for point in reached)
            yield [name, f"not reached by {missed} of {len(reached)} seeds", "", "", "", "", "", *ends]
            continue
        seconds = [point.seconds for point in reached]
        reference = reference or seconds
        yield [
            name,
            spread(seconds, 1),
            f"{fmean(reference) / fmean(seconds):.2f}" if fmean(seconds) else "",
            spread([point.clean for point in reached], 2),
            spread([point.drift for point in reached], 4),
            spread([point.step for point in reached], 0),
            spread([point.warm_up for point in reached], 1),
            *ends,
        ]


def spread(values: Sequence[float], digits: int) -> str:
    """Return the mean over seeds and the standard deviation of one seed, as text."""
    if len(values) < 2:
        return f"{fmean(values):.{digits}f}"
    return f"{fmean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def draw(curves: dict[str, dict[int, list[Point]]], start: Point) -> Figure:
    """Plot attacked PSNR, clean PSNR and drift against seconds of training, one line per seed."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    titles = {"attacked": "PSNR under APGD (dB)", "clean": "PSNR of clean images (dB)", "drift": "latent drift"}
    for axes, (name_of_value, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for number, (name, by_seed) in enumerate(curves.items()):
            for index, curve in enumerate(by_seed.values()):
                points = [start, *curve]
                axes.plot(
                    [point.seconds for point in points],
                    [getattr(point, name_of_value) for point in points],
                    color=f"C{number}", alpha=0.8, linewidth=1.3, label=name if index == 0 else None,
                )  # fmt: skip
        axes.set(xlabel="seconds of training", title=title)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False)
    return figure


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m experiments.time_to_robustness", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="miniature/weights/vae", help="the VAE that all trainings start from")
    add("--train_flags", required=True, help="flags of train_srl_vae.py that all arms share")
    add("--arms", nargs="+", required=True, metavar='NAME="FLAGS"', help="trainings; the first one sets the mark")
    add("--textbook", action="store_true", help="repeat the first training with the textbook's step as well")
    add("--seeds", nargs="+", type=non_negative_int, default=[0, 1, 2])
    add("--output_dir", type=Path, default=Path("outputs/time-to-robustness"))
    add("--dataset_name", default="scikit-image", help="its held-out images are measured on")
    add("--data_dir", default=None, help="a folder of images to measure on instead")
    add("--resolution", type=positive_int, default=64)
    add("--num_images", type=positive_int, default=32)
    add("--judge_batch_size", type=positive_int, default=16)
    add("--epsilon", type=pixel_distance, default=8 / 255)
    add("--apgd_steps", type=positive_int, default=100)
    add("--apgd_restarts", type=positive_int, default=2)
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
