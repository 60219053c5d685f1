"""Runs the project's commands as a user would on the miniature world, and keeps their output and their times."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import MappingProxyType

import torch

from experiments.claims import ORIGINAL
from srl_utils.console import progress_bar
from srl_utils.files import write_text_atomically
from srl_utils.vae.loading import CONFIG_NAME, WEIGHTS_NAME

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "miniature/weights"
BATCH = 8
"""Images of a training step, and the largest number of processes; on a CPU, each needs about 2 GB."""
LONGEST_LINE = 60
"""Characters of a command's output beside the progress bar."""


@dataclass(frozen=True)
class Module:
    """A module of the repository that is run.

    Attributes:
        title: of the bar.
        name: of the module.
        flags: of its command.
        done: file that it writes last; if it exists, nothing is run.
    """

    title: str
    name: str
    flags: Sequence[object]
    done: Path


class Runner:
    """Runs commands whose results are in `folder`."""

    def __init__(self, folder: Path, original: Path, *, title: str, num_calls: int) -> None:
        """Make the folder and a progress bar.

        Args:
            folder: of all results.
            original: the VAE that is fine-tuned.
            title: of the bar, before the first command.
            num_calls: number of commands.

        Raises:
            SystemExit: if there is no such VAE.
        """
        if not (original / CONFIG_NAME).exists():
            raise SystemExit(f"{original} holds no VAE; build it first: python -m miniature.build {original.name}")
        self.folder, self.original = folder, original
        self._lock = Lock()  # of the file with times: modules run side by side
        folder.mkdir(parents=True, exist_ok=True)
        self.bar = progress_bar(num_calls, desc=title, unit="part")

    def leaves(self, name: str, count: int, *, seed: int) -> None:
        """Draw dead leaves into the folder `name`, unless they exist."""
        self._draw(name, count, ["--kind", "dead-leaves", "--seed", seed], last=f"{count - 1:05d}.png")

    def scenes(self, name: str, count: int, *, seed: int, num_frames: int = 1, pair_share: float = 0.0) -> None:
        """Draw scenes, or clips of moving ones, into the folder `name`, unless they exist; a share has two objects."""
        last = "metadata.jsonl" if num_frames == 1 else f"{count - 1:05d}/{num_frames - 1:03d}.png"
        flags = ["--num_frames", num_frames, "--pair_share", pair_share, "--seed", seed]
        self._draw(name, count, flags, last=last)

    def _draw(self, name: str, count: int, flags: Sequence[object], *, last: str) -> None:
        if (self.folder / name / last).exists():
            self.bar.update()
            return
        self._call(
            name, "-m", "miniature.draw", "--num_images", count, *flags, "--output_dir", self.folder / name
        )  # fmt: skip

    def modules(self, modules: Sequence[Module]) -> None:
        """Run modules side by side: on the CPU as many as there are cores, with one thread each, else one.

        Raises:
            SystemExit: if one fails; those that run then are finished, and no further ones are started.
        """
        at_once = 1 if torch.cuda.is_available() else num_processes(len(modules))
        with ThreadPoolExecutor(at_once) as pool:
            running = [pool.submit(self._module, module) for module in modules]
            try:
                for each in as_completed(running):
                    each.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _module(self, module: Module) -> None:
        if module.done.exists():
            self.bar.update()
        else:
            self._call(module.title, "-m", module.name, *module.flags, environment={"OMP_NUM_THREADS": "1"})

    def training(
        self, name: str, flags: Sequence[object], *, batch_size: int = BATCH, num_validation: int = 2
    ) -> Module:
        """Return the training of the VAE `name` at 64 px.

        Args:
            name: of the VAE.
            flags: what is not the same for all trainings.
            batch_size: images or clips of a step.
            num_validation: images or clips of the training's own validation.
        """
        output_dir = self.vae(name)
        shared = [
            "--pretrained_model_name_or_path", self.original, "--resolution", 64, "--train_batch_size", batch_size,
            "--learning_rate", "5e-4", "--lpips_weight", 0, "--random_flip", "--no-torch_compile",
            "--num_validation_images", num_validation, "--validation_steps", 10_000, "--report_to", "none",
        ]  # fmt: skip
        flags = [*shared, *flags, "--output_dir", output_dir, "--resume_from_checkpoint", "latest"]
        return Module(f"train {name}", "train_srl_vae", flags, output_dir / WEIGHTS_NAME)

    def evaluate(
        self, name: str, command: str, vaes: Sequence[str], flags: Sequence[object], *, baseline: str = ORIGINAL
    ) -> None:
        """Evaluate the baseline and other trained VAEs; finished parts are kept.

        Args:
            name: of the results' folder.
            command: of `srl_utils.evaluation`.
            vaes: names of the VAEs.
            flags: of the command, beside those for VAEs and folder.
            baseline: name of the VAE with which the others are compared.
        """
        compared = ["--vae", *(f"{vae}={self.vae(vae)}" for vae in vaes)] if vaes else []
        self._call(
            name, *launched(num_processes(BATCH)), "-m", "srl_utils.evaluation", command, "--baseline", self.vae(baseline),
            *compared, "--resolution", 64, *flags, "--output_dir", self.folder / name,
        )  # fmt: skip

    def seconds(self) -> dict[str, int]:
        """Return how long each command took, by its title, those of earlier runs included."""
        return json.loads(self._times.read_text()) if self._times.exists() else {}

    def minutes(self) -> float:
        """Return how long all commands took, those of earlier runs included."""
        return sum(self.seconds().values()) / 60

    def vae(self, name: str) -> Path:
        """Return the folder of a VAE."""
        return self.original if name == ORIGINAL else self.folder / "vaes" / re.sub(r"\W+", "-", name)

    def _call(self, title: str, *command: object, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        started = time.time()
        self.bar.set_description_str(title)
        try:
            code = self._run([sys.executable, *map(str, command)], environment)
        finally:
            self._add_time(title, started)  # of interrupted commands too, which later go on where they were
        self.bar.set_postfix_str("", refresh=False)
        self.bar.update()
        if code:
            raise SystemExit(f"{title} failed with exit code {code}; see {self.folder / 'log.txt'}")

    def _run(self, words: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run a command, show its last line beside the bar, and return its exit code."""
        with (
            (self.folder / "log.txt").open("a", buffering=1, encoding="utf-8") as log,  # a line at a time
            subprocess.Popen(
                words,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
            ) as child,
        ):
            for line in child.stdout:  # each update of a progress bar is a line
                log.write(line)
                self.bar.set_postfix_str(line.strip()[:LONGEST_LINE], refresh=False)
                self.bar.update(0)
            return child.wait()

    def _add_time(self, title: str, started: float) -> None:
        with self._lock:
            seconds = self.seconds()
            seconds[title] = seconds.get(title, 0) + round(time.time() - started)
            write_text_atomically(self._times, json.dumps(seconds, indent=1))

    @property
    def _times(self) -> Path:
        return self.folder / "seconds.json"


def experiment_parser(name: str, description: str, *, quick: bool = False) -> argparse.ArgumentParser:
    """Return the parser of an experiment's command.

    Args:
        name: of its folder in `outputs`.
        description: of the command; its first line is shown.
        quick: whether it has `--quick`, which has a folder of its own: nothing that it makes is taken for the whole.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs", name))
    if quick:
        parser.add_argument(
            "--quick",
            action=_Quick,
            nargs=0,
            default=False,
            help="run every command once on few images; the numbers mean little",
        )
    return parser


class _Quick(argparse.Action):
    """Sets a flag, and the folder to `NAME-quick` if none was given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: object = None,
    ) -> None:
        setattr(namespace, self.dest, True)
        default = parser.get_default("output_dir")
        if namespace.output_dir == default:
            namespace.output_dir = default.with_name(f"{default.name}-quick")


def machine() -> str:
    """Return the processor and the version of torch, for reports."""
    return f"{platform.processor() or platform.machine()}, torch {torch.__version__}"


def num_processes(most: int) -> int:
    """Return one process per GPU, or per core that may be used, up to `most`: networks this small gain little from threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    available = min(most, torch.cuda.device_count() or cores)
    return max(count for count in (1, 2, 4, 8) if count <= available)


def launched(processes: int) -> list[object]:
    """Return arguments for Python that run what follows in a number of processes."""
    if processes == 1:
        return []
    return [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes, "--num_machines", 1,
        "--main_process_port", 0, "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", 1,
    ]  # fmt: skip
