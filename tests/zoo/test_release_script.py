"""The script from training to the published row."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from helpers.hub_server import HubServer
from helpers.runs import ROOT
from helpers.warm_python import warm_python

import train_srl_vae
from experiments import hub_access, release_entry
from srl_utils.errors import UserError
from srl_utils.evaluation.cli import main as evaluation
from srl_utils.hub import __main__ as hub
from srl_utils.zoo import __main__ as zoo
from srl_utils.zoo.entries import read_entry

SCRIPT = ROOT / "experiments/release.sh"
PARSERS = {
    "srl_utils.evaluation": evaluation.parse_args, "srl_utils.hub": hub.parse_args, "srl_utils.zoo": zoo.parse_args,
    "experiments.hub_access": hub_access.parse_args, "experiments.release_entry": release_entry.main,
}  # fmt: skip
RECORDER = """#!/bin/sh
[ "$2" != experiments.release_entry ] || echo "$3/srl-sd-vae.yaml"
{{ printf '%s\\n' "{name}" "$@"; echo; }} >>"{calls}"
"""
Release = Callable[..., subprocess.CompletedProcess]
"""Runs the script with these flags and variables, with a Hub on localhost."""


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def release(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    variables = {**server.environment(tmp_path_factory.mktemp("home")), "OMP_NUM_THREADS": "1", "LONGEST_SLEEP": "0.02"}
    with warm_python(variables, "srl_utils.evaluation.calling") as python:
        path = os.pathsep.join([str(python.parent), os.environ["PATH"]])

        def run(*flags: str, **more: str) -> subprocess.CompletedProcess:
            environment = {**os.environ, **variables, "PATH": path, **more}
            return subprocess.run(["sh", SCRIPT, *flags], env=environment, capture_output=True, text=True)

        yield run


def test_the_shell_accepts_it() -> None:
    """Oracle: sh itself; a flag that it does not know is refused."""
    subprocess.run(["sh", "-n", SCRIPT], check=True)
    done = subprocess.run(["sh", SCRIPT, "--dryrun"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: --dryrun is not known; the only flag is --dry_run\n"


def test_a_dry_run_checks_every_step(
    release: Release, server: HubServer, vae_folder: Path, photographs: Path, tmp_path: Path
) -> None:
    """Oracle: each step's own words, in order; nothing is trained, measured, pushed or entered."""
    data = f"--train_data_dir {photographs} --validation_split 0.2"
    done = release(
        "--dry_run", HUB_ID="user/Small.VAE", BASE=str(vae_folder), OUTPUT_DIR=str(tmp_path / "out"), PROTOCOL="embedded",
        LAUNCH="python",
        TRAINING=f"{data} --resolution 16 --train_batch_size 4 --max_train_steps 4 --lpips_weight 0 --report_to none",
        EVALUATION=f"--data_dir {photographs} --resolution 16 --num_images 2 --attacks quick --metrics psnr",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    assert said.count("would push to") == 1
    for words in (
        "1 of 6", "user may publish to user/Small.VAE, which the push will create", "2 of 6", "TFLOP", "3 of 6",
        "passes through one", "4 of 6", "would push to user/Small.VAE", "5 of 6", "square-1000", "6 of 6",
        "small-vae: the entry and its weights are accepted",
    ):  # fmt: skip
        assert words in said, (words, done.stdout + done.stderr)
        said = said.partition(words)[2]
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"out/small-vae.yaml", "out-dry-run/Small.VAE/config.json", *(
        path for path in left if path.startswith("out-dry-run/Small.VAE/diffusion_pytorch_model")
    )}  # fmt: skip
    assert not (ROOT / "zoo/entries/small-vae.yaml").exists() and not server.repositories


@pytest.mark.parametrize("flags", [[], ["--dry_run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"HF_TOKEN": "hf_wrongwrongwrong"}, "cannot publish to user/small: "),
        (
            {"HUB_ID": "somebody/small"},
            "cannot publish to somebody/small with the token of user; choose another HUB_ID",
        ),
    ],
)
def test_without_a_right_to_publish_nothing_starts(
    release: Release, flags: list[str], variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    """Oracle: one line, before anything is made; a base that does not exist is not even looked for."""
    done = release(
        *flags, **{"HUB_ID": "user/small", "BASE": "nowhere", "OUTPUT_DIR": str(tmp_path / "out"), **variables}
    )
    assert done.returncode == 2 and "2 of 6" not in done.stdout and not list(tmp_path.iterdir())
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_the_defaults_are_accepted(tmp_path: Path) -> None:
    """Oracle: the parsers of the commands that the script runs, and the entry that one of them writes.

    Two small programs take the places of `python` and `accelerate`: they write down their arguments and do nothing else.
    """
    calls = tmp_path / "calls"
    for name in ("python", "accelerate"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(RECORDER.format(name=name, calls=calls))
        path.chmod(0o700)
    kept = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "OUTPUT_DIR": str(tmp_path / "out")}
    subprocess.run(["sh", SCRIPT], env=kept, check=True, capture_output=True)
    seen = []
    for program, *words in (call.splitlines() for call in calls.read_text().split("\n\n") if call):
        if program == "accelerate":
            launched = launch_command_parser().parse_args(words[1:])
            seen.append(launched.training_script)
            args = train_srl_vae.parse_args(launched.training_script_args, environment={})
            assert (args.resume_from_checkpoint, str(args.output_dir)) == ("latest", kept["OUTPUT_DIR"])
        elif words[0] == "-m":
            seen.append(words[1])
            PARSERS[words[1]](words[2:])
    assert seen == ["experiments.hub_access", "experiments.release_entry", "train_srl_vae.py", *(
        f"srl_utils.{name}" for name in ("evaluation", "hub", "zoo", "zoo", "zoo")
    )]  # fmt: skip
    made = read_entry(tmp_path / "out/srl-sd-vae.yaml")
    assert (made.name, made.weights, made.protocol) == ("srl-sd-vae", "user/srl-sd-vae", "full")


def test_entries_hold_any_text(tmp_path: Path) -> None:
    """Oracle: the values themselves, read back; YAML would take some for numbers, mappings or null."""
    given = {"weights": "user/123", "base": "on", "data": "COCO: val # all", "budget": "0.03", "link": "null"}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    assert release_entry.main([str(tmp_path), "--protocol", "full", *words]) == 0
    found = read_entry(tmp_path / "123.yaml")
    assert {name: getattr(found, name) for name in given} == given and found.name == "123"


def test_a_bad_value_is_known_before_the_training(tmp_path: Path) -> None:
    """Oracle: one line, and no file."""
    words = ["--weights", "user/small", "--base", "x", "--protocol", "full", "--data", "COCO", "--link", "here"]
    with pytest.raises(UserError, match="budget: 8 is outside"):
        release_entry.main([str(tmp_path), *words, "--budget", "8"])
    assert not list(tmp_path.iterdir())
