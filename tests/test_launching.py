"""Accelerate's settings, from its environment and its configuration file: honoured and shown, or refused in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from helpers.runs import ROOT, Run
from safetensors.torch import load_file

import train_srl_vae
from srl_utils.command_line import exit_code
from srl_utils.errors import UserError
from srl_utils.evaluation.cli import main as evaluation
from srl_utils.launching import launch_notes, launched_arguments, note_on_compiling, on_cpu

STEPS, PRECISION, BACKEND = (
    f"ACCELERATE_{name}" for name in ("GRADIENT_ACCUMULATION_STEPS", "MIXED_PRECISION", "DYNAMO_BACKEND")
)
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
@ON_CPU
def test_accumulation_of_the_environment_is_that_of_the_flag(
    run: Run, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same run with the flag in place of the variable; and the flag wins where both are given."""
    flags = [*flags[:-2], "--max_train_steps", "2", "--output_dir"]
    assert run(*flags, tmp_path / "flag", "--gradient_accumulation_steps", 2)[0] == 0
    monkeypatch.setenv(STEPS, "2")
    code, printed = run(*flags, tmp_path / "variable")
    assert code == 0, printed
    monkeypatch.setenv(STEPS, "5")
    assert run(*flags, tmp_path / "both", "--gradient_accumulation_steps", 2)[0] == 0
    expected = weights(tmp_path / "flag")
    for name in ("variable", "both"):
        torch.testing.assert_close(weights(tmp_path / name), expected, rtol=0, atol=0)
        arguments = json.loads((tmp_path / name / "training_args.json").read_text())["arguments"]
        assert arguments["gradient_accumulation_steps"] == 2
        assert "--gradient_accumulation_steps 2" in (tmp_path / name / "README.md").read_text()


@pytest.mark.parametrize(
    ("environment", "words", "shown"),
    [
        ({STEPS: "4"}, [], ["gradient_accumulation_steps     4", "x 4 accumulated", f"{STEPS}=4: honoured"]),
        (
            {STEPS: "4"},
            ["--gradient_accumulation_steps=1"],
            ["x 1 accumulated", f"{STEPS}=4: overruled by the command line"],
        ),
        ({STEPS: "many"}, ["--gradient_accumulation_steps=3"], ["x 3 accumulated", "overruled"]),
        ({PRECISION: "bf16"}, [], ["mixed_precision                 bf16", "bf16, not compiled", "honoured"]),
        ({PRECISION: "bf16"}, ["--mixed_precision=no"], ["float32, not compiled", "overruled"]),
        ({PRECISION: "fp8"}, ["--mixed_precision", "no"], ["float32, not compiled", "overruled"]),
        ({BACKEND: "inductor"}, ["--no-torch_compile"], ["not compiled", "overruled"]),
        ({BACKEND: "aot_eager"}, ["--no-torch_compile"], ["not compiled", "overruled"]),
        ({"ACCELERATE_USE_CPU": "True"}, [], ["Device cpu", "ACCELERATE_USE_CPU=True: honoured"]),
        ({"ACCELERATE_TORCH_DEVICE": "cpu"}, [], ["Device cpu", "ACCELERATE_TORCH_DEVICE=cpu: honoured"]),
        ({PRECISION: "no", BACKEND: "NO", "ACCELERATE_USE_FSDP": "false"}, [], ["x 1 accumulated"]),
    ],
)
def test_the_dry_run_shows_what_accelerate_asks_for(
    run: Run, flags: list[str], environment: dict[str, str], words: list[str], shown: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Oracle: specification; the flag wins, else the environment."""
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    code, printed = run(*flags, "--dry_run", *words)
    assert code == 0, printed
    assert all(text in printed for text in shown), printed


REFUSED = {
    STEPS: ["0", "-1", "two", "", "1.5"],
    PRECISION: ["fp8", "bf61", ""],
    BACKEND: ["onnxrt", "aot_eager", "nonsense"],
    "ACCELERATE_USE_DEEPSPEED": ["true"],
    "ACCELERATE_USE_FSDP": ["1"],
    "ACCELERATE_USE_MEGATRON_LM": ["True"],
    "ACCELERATE_USE_PARALLELISM_CONFIG": ["true"],
    "ACCELERATE_USE_SAGEMAKER": ["true"],
    "ACCELERATE_USE_CPU": ["perhaps"],
    "ACCELERATE_DEBUG_MODE": ["perhaps"],
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": ["perhaps"],
    "ACCELERATE_TORCH_DEVICE": ["warp:9", "meta", ""],
    "LOCAL_RANK": ["first"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in REFUSED.items() for text in texts])
def test_the_training_refuses_what_it_does_not_support(
    run: Run, flags: list[str], tmp_path: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: exit code 2 and one line with the variable's name, before anything is written."""
    monkeypatch.setenv(name, text)
    code, printed = run(*flags)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and name in errors[0], printed
    assert "Traceback" not in printed and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [(PRECISION, "fp8", 2), ("ACCELERATE_USE_FSDP", "true", 2), ("ACCELERATE_USE_DEEPSPEED", "true", 2),
     (STEPS, "many", 0), (BACKEND, "inductor", 0), (PRECISION, "BF16", 0)],
)  # fmt: skip
def test_an_evaluation_takes_its_precision_or_refuses(
    vae_folder: Path, photographs: Path, tmp_path: Path, capfd: pytest.CaptureFixture, name: str, text: str, code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Oracle: specification; what concerns training alone does not disturb an evaluation."""
    for state in (AcceleratorState, PartialState, GradientState):
        monkeypatch.setattr(state, "_shared_state", {})
    monkeypatch.setenv(name, text)
    words = ["reconstruction", "--baseline", vae_folder, "--vae", f"same={vae_folder}", "--data_dir", photographs,
             "--resolution", 16, "--num_images", 2, "--output_dir", tmp_path / "out", "--metrics", "psnr", "--dry_run"]  # fmt: skip
    assert exit_code(lambda: evaluation.main([str(word) for word in words])) == code
    assert code == 0 or name in capfd.readouterr().err


@pytest.mark.slow
@ON_CPU
def test_accelerate_launch_with_a_configuration_file(flags: list[str], tmp_path: Path) -> None:
    """Oracle: the real launcher; its file asks for bf16, the environment for three passes, and both are what runs."""
    settings = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "mixed_precision": "bf16", "use_cpu": True,
        "num_processes": 1, "num_machines": 1, "machine_rank": 0, "dynamo_config": {"dynamo_backend": "NO"},
    }  # fmt: skip
    (tmp_path / "accelerate.yaml").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "accelerate.yaml"),
               "train_srl_vae.py", *flags, "--max_train_steps", "1"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), STEPS: "3"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    arguments = json.loads((tmp_path / "out/training_args.json").read_text())["arguments"]
    assert (arguments["gradient_accumulation_steps"], arguments["mixed_precision"]) == (3, "bf16")
    assert re.search(r"Running on cpu in bf16", done.stdout)


def test_the_recipe_is_not_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a command is published so that it repeats the run on a machine that is configured otherwise."""
    train_srl_vae.recipe_arguments.cache_clear()
    monkeypatch.setenv(STEPS, "4")
    args = train_srl_vae.parse_args(["--train_data_dir", "photographs"])
    train_srl_vae.recipe_arguments.cache_clear()
    assert "--gradient_accumulation_steps 4" in train_srl_vae.published(args).line


@pytest.mark.parametrize(
    ("launched", "expected"),
    [({PRECISION: "bf16"}, {"mixed_precision": "bf16"}), ({PRECISION: "no"}, {}), ({}, {}),
     ({BACKEND: "INDUCTOR"}, {"torch_compile": True}), ({STEPS: "1"}, {"gradient_accumulation_steps": 1})],
)  # fmt: skip
def test_whose_wish_counts(launched: dict[str, str], expected: dict[str, object]) -> None:
    """Oracle: specification; accelerate's `no` is its default and no wish."""
    assert launched_arguments(launched, lambda flag: False) == expected
    assert launched_arguments(launched, lambda flag: True) == {}


def test_dynamo_settings_beyond_the_usual_are_refused() -> None:
    """Oracle: specification; the training compiles in one way."""
    for name, text in (("MODE", "max-autotune"), ("USE_FULLGRAPH", "true"), ("USE_DYNAMIC", "1")):
        with pytest.raises(UserError, match=name):
            launched_arguments({BACKEND: "inductor", f"ACCELERATE_DYNAMO_{name}": text}, lambda flag: False)


def test_a_run_told_to_stay_on_the_cpu_does() -> None:
    """Oracle: specification of accelerate's two variables, of which the device's name decides."""
    assert on_cpu({"ACCELERATE_USE_CPU": "true"}) and on_cpu({"ACCELERATE_TORCH_DEVICE": "cpu"})
    assert not on_cpu({}) and not on_cpu({"ACCELERATE_USE_CPU": "true", "ACCELERATE_TORCH_DEVICE": "cuda:0"})


@ON_CPU
@pytest.mark.parametrize(
    "environment",
    [
        {"LOCAL_RANK": "0"},
        {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "abc"},
        {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "4"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
        {"ACCELERATE_USE_CPU": "true", "PMI_SIZE": "abc"},
        {"ACCELERATE_FP8_BACKEND": "nonsense"},
    ],
    ids=" ".join,
)
def test_what_accelerate_cannot_start_with_is_one_line(
    run: Run, flags: list[str], tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: exit code 2 and one line, of a launcher without an address for instance, before anything is written."""
    monkeypatch.setattr(os, "environ", os.environ.copy())  # accelerate writes what it finds under other names
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    code, printed = run(*flags)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "environment" in errors[0], printed
    assert "Traceback" not in printed and not (tmp_path / "out").exists()


def test_notes_say_what_is_without_effect() -> None:
    """Oracle: accelerate's code, which pins processes to cores only where there are several."""
    args = train_srl_vae.parse_args(["--train_data_dir", "photographs"], {})
    affinity = "ACCELERATE_CPU_AFFINITY"
    assert launch_notes({affinity: "1"}, args) == [f"{affinity}=1: without effect on one process"]
    assert launch_notes({affinity: "1", "LOCAL_RANK": "0"}, args) == [f"{affinity}=1: honoured by accelerate"]
    assert note_on_compiling({BACKEND: "inductor"}) == [
        f"{BACKEND}=inductor: without effect, evaluations are not compiled"
    ]
    assert note_on_compiling({BACKEND: "NO"}) == note_on_compiling({}) == []
