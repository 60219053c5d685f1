"""Runs killed at random moments, alone and in pairs: what a resume then makes of them."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.runs import ROOT, smallest_training
from helpers.warm_python import warm_python

from srl_utils.files import fault
from srl_utils.training.checkpoints import Checkpoints

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

WEIGHTS = "diffusion_pytorch_model.safetensors"
SEED, KILLS = 0, 25
DEADLINE = 240  # seconds that any run here may take
PATIENCE = 10  # seconds that a launcher may take to see that a process has ended
STEPS = 6
NEVER = 10**9  # beyond the number of any file operation

# Ends the process by SIGKILL in the middle of the file operation of that number. What has been written so far stands.
KILLED_WHILE_WRITING = """
import io, json, os, runpy, shutil, signal, sys
number, done = int(sys.argv.pop(1)), []

def counted(owner, name):
    honest = getattr(owner, name)
    def operation(*arguments, **keywords):
        done.append(" ".join([name, *map(str, arguments)]))
        if len(done) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(*arguments, **keywords)
    setattr(owner, name, operation)

for owner, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (io, "open"), (os, "mkdir")):
    counted(owner, name)
sys.argv[0] = "train_srl_vae.py"
try:
    runpy.run_path("train_srl_vae.py", run_name="__main__")
finally:
    print("operations", json.dumps(done))
"""


@pytest.fixture(scope="module")
def python() -> Iterator[Path]:
    with warm_python({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}) as python:
        yield python


@pytest.fixture(scope="module")
def flags(vae_folder: Path, photographs: Path) -> list[str]:
    """Six steps, a checkpoint after each, two of them kept."""
    return [
        *smallest_training(vae_folder, photographs, Path()), "--max_train_steps", str(STEPS), "--validation_steps", "3",
        "--num_validation_images", "2", "--checkpointing_steps", "1", "--checkpoints_total_limit", "2",
        "--resume_from_checkpoint", "latest",
    ]  # fmt: skip


class Job:
    """One command, as one process or as two that train together."""

    def __init__(self, python: Path, processes: int, arguments: list[object], place: Path, *, number: int = 0) -> None:
        """With a `number`, the file operations of rank 0 are counted, and the one of that number is its last."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pid_files = [place.with_name(f"{place.name}-pid-{rank}") for rank in range(processes)]
        self.logs = [place.with_name(f"{place.name}-log-{rank}") for rank in range(processes)]
        self.processes, self.killed = [], 0 < number < NEVER
        for rank, (pid_file, log) in enumerate(zip(self.pid_files, self.logs, strict=True)):
            pid_file.unlink(missing_ok=True)
            group = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
            }  # fmt: skip
            program = ["-c", KILLED_WHILE_WRITING, number] if number and rank == 0 else ["train_srl_vae.py"]
            environment = {**os.environ, "PID_FILE": pid_file, **(group if processes > 1 else {})}
            self.processes.append(
                subprocess.Popen(
                    [str(part) for part in (python, *program, *arguments, "--output_dir", place)],
                    cwd=ROOT,
                    env={name: str(value) for name, value in environment.items()},
                    stdout=log.open("w"),
                    stderr=subprocess.STDOUT,
                )
            )

    def kill(self, rank: int) -> None:
        self.killed = True
        pid = int(wait_for(lambda: self.pid_files[rank].exists() and self.pid_files[rank].read_text()))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def wait(self) -> list[int]:
        """The exit codes; a stand-in whose program was killed has 70, the one of a killed program's partner is not 0.

        A partner that waits for the other to come at all is ended, as the launcher ends it.
        """
        return [self._wait_for(rank) for rank in range(len(self.processes))]

    def _wait_for(self, rank: int) -> int:
        with suppress(subprocess.TimeoutExpired):
            return self.processes[rank].wait(PATIENCE if self.killed and "steps:" not in self.printed() else DEADLINE)
        assert self.killed and "steps:" not in self.printed(), "a rank that had begun to train outlived the other"
        self.kill(rank)
        return self.processes[rank].wait(DEADLINE)

    def printed(self) -> str:
        return "".join(log.read_text() for log in self.logs)


def wait_for(condition: Callable[[], object]) -> object:
    deadline = time.monotonic() + DEADLINE
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
    return value


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def undisturbed(
    request: pytest.FixtureRequest, python: Path, flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path, float, dict[str, list[int]]]:
    """How many processes, the folder of a run that was left in peace, its seconds, and its file operations."""
    processes = request.param
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    started = time.monotonic()
    job = Job(python, processes, flags, folder)
    assert job.wait() == [0] * processes, job.printed()
    seconds = time.monotonic() - started
    counted = Job(python, processes, flags, folder.with_name("counted"), number=NEVER)
    assert counted.wait() == [0] * processes, counted.printed()
    told = counted.logs[0].read_text().rsplit("operations ", 1)[1].splitlines()[0]
    return processes, folder, seconds, moments(json.loads(told))


def moments(operations: list[str]) -> dict[str, list[int]]:
    """The numbers of those of a checkpoint's writing, of pruning, of the final save, and of all up to it.

    After it comes what the other processes need not wait for.
    """
    pruning, pruned = [], False
    for number, operation in enumerate(operations, start=1):
        if pruned:
            pruning.append(number)
        if ".pruned" in operation:
            pruned = operation.startswith("replace")
    writing, saving = (
        [number for number, operation in enumerate(operations, start=1) if all(word in operation for word in words)]
        for words in ((".checkpoint-", ".partial"), (".drop-in.partial",))
    )
    assert pruning and writing and saving
    return {"writing": writing, "pruning": pruning, "saving": saving, "any": list(range(1, saving[-1] + 1))}


def assert_same_result(folder: Path, expected: Path) -> None:
    """Weights and results to the last bit; every step in the journal, once."""
    for name in (WEIGHTS, "results.json", "config.json", f"checkpoint-{STEPS}/vae/{WEIGHTS}"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert not list(folder.glob(".checkpoint-*")) and not list(folder.glob("*.partial"))
    assert {path.name for path in folder.glob("checkpoint-*")} == {f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"}


@pytest.mark.parametrize("kill", range(KILLS))
def test_a_killed_run_ends_as_if_nothing_had_been(
    kill: int,
    undisturbed: tuple[int, Path, float, dict[str, list[int]]],
    python: Path,
    flags: list[str],
    tmp_path: Path,
) -> None:
    """Oracle: the undisturbed run, to the last bit, after a SIGKILL and the same command again.

    Half of the moments are drawn from the time that the run takes, half from the file operations of the process that
    writes: in turns those of a checkpoint, of pruning, of the final save, and all. What stands after the kill under the
    name of a checkpoint is whole.
    """
    processes, expected, seconds, operations = undisturbed
    draw = random.Random(f"{SEED}-{processes}-{kill}")
    out = tmp_path / "out"
    if kill % 2:
        kind = list(operations)[kill // 2 % len(operations)]
        job = Job(python, processes, flags, out, number=draw.choice(operations[kind]))
    else:
        job = Job(python, processes, flags, out)
        time.sleep(draw.uniform(0, seconds))
        job.kill(draw.randrange(processes))
    codes = job.wait()
    assert not [fault(folder) for folder in Checkpoints(out).found() if fault(folder)]
    assert processes == 1 or all(codes) or not any(codes), "one rank went on without the other"
    assert "Traceback" not in job.printed(), job.printed()
    again = Job(python, processes, flags, out)
    assert again.wait() == [0] * processes, again.printed()
    assert_same_result(out, expected)
