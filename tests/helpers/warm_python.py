"""A Python that has its imports behind it: every program that it runs is a process, forked from one that waits.

    with warm_python(environment) as python:
        subprocess.run([python, "-m", "srl_utils.hub", "push", "out", "--repo_id", "user/model"])

`python` starts programs in milliseconds instead of seconds, and these start theirs with it, for it is their
`sys.executable`. Arguments, environment, folder, streams and exit code are as with any Python; of the signals, one
that ends it ends the program.

Two variables of a program's environment save more time: no `time.sleep` lasts longer than LONGEST_SLEEP seconds, and
PUBLISHING, a JSON object, replaces constants of srl_utils.hub.publishing. A third one, PID_FILE, is where the program
writes its process id, for a test that means to kill it.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from helpers.runs import ROOT

# Imported beforehand. Not the modules that are run as programs, lest they be there twice.
MODULES = (
    "accelerate", "diffusers.optimization", "diffusers.training_utils", "srl_utils.training.checkpoints", "srl_utils.images.datasets",
    "srl_utils.training.validation", "srl_utils.hub.card", "srl_utils.hub.publishing", "srl_utils.training.journal",
)  # fmt: skip

STAND_IN = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as line:
    line.connect({address!r})
    socket.send_fds(line, [b"."], [0, 1, 2])
    line.sendall(json.dumps([sys.argv, dict(os.environ), os.getcwd()]).encode() + b"\\n")
    sys.exit(int(line.makefile().readline() or 70))
"""


@contextmanager
def warm_python(environment: dict[str, str], *modules: str) -> Iterator[Path]:
    """The path of an executable `python`.

    Args:
        environment: what the imports see, beside this process's own.
        modules: imported beforehand, beside `MODULES`.
    """
    with TemporaryDirectory(prefix="warm-python-") as folder:
        address, stand_in = f"{folder}/socket", Path(folder, "python")
        process = subprocess.Popen(
            [sys.executable, __file__, address, *modules],
            cwd=ROOT,
            env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
            stdout=subprocess.PIPE,
        )
        try:
            if process.stdout.readline() != b"ready\n":
                raise RuntimeError("the imports failed")
            stand_in.write_text(STAND_IN.format(python=sys.executable, address=address))
            stand_in.chmod(0o700)
            yield stand_in
        finally:
            process.terminate()
            process.wait()


def serve(address: str, *modules: str) -> int:
    """Imports the modules, waits for stand-ins to call; returns, with the exit code, in the programs alone."""
    limit_sleeps()
    for name in (*MODULES, *modules):
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the programs
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen()
        print("ready", flush=True)
        while True:
            line, _ = door.accept()
            if os.fork() == 0:
                break
            line.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return run_for(line)


def limit_sleeps() -> None:
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, float(os.environ.get("LONGEST_SLEEP", "inf"))))


def run_for(line: socket.socket) -> int:
    """Runs the program that the stand-in at the other end of `line` stands for, and tells it the exit code."""
    _, streams, _, _ = socket.recv_fds(line, 1, 3)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    orders = line.makefile()
    (sys.executable, *arguments), environment, folder = json.loads(orders.readline())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if "PID_FILE" in os.environ:
        Path(os.environ["PID_FILE"]).write_text(str(os.getpid()))
    publishing = importlib.import_module("srl_utils.hub.publishing")
    for name, value in json.loads(os.environ.get("PUBLISHING", "{}")).items():
        setattr(publishing, name, value)
    # The line closes when the stand-in is ended.
    threading.Thread(target=lambda: (orders.readline(), os._exit(1)), daemon=True).start()
    code = execute(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    line.sendall(b"%d\n" % code)
    return code


def execute(arguments: list[str]) -> int:
    """What the command line `python *arguments` does, and its exit code."""
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "-c", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(serve(*sys.argv[1:]))
