"""A resume obeys its flags or refuses them, and says which: in the card, in the records and on the terminal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Run
from diffusers import AutoencoderKL

import train_srl_vae
from srl_utils.integrity import MANIFEST, seal
from srl_utils.resuming import APPLIED, BASE, FREE, REFUSED, TRAINING_DATA, VALIDATION_DATA, Change, told


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test that needs it leaves the output of two steps."""
    return tmp_path_factory.mktemp("trained") / "out"


@pytest.fixture
def half(run: Run, flags: list[str], tmp_path: Path, trained: Path) -> list[str]:
    """The flags that resume a run after step 2 of 4, in an output folder of its own."""
    if not trained.exists():
        code, printed = run(*flags, "--max_train_steps", "2", "--checkpointing_steps", "1", "--adam_beta1", "0.8",
                            "--output_dir", trained)  # fmt: skip
        assert code == 0, printed
    shutil.copytree(trained, tmp_path / "out")
    return [*flags, "--checkpointing_steps", "1", "--adam_beta1", "0.8", "--resume_from_checkpoint", "checkpoint-2"]


def rates(output_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["learning_rate"] for row in rows if "loss" in row]


def test_every_flag_has_its_rule() -> None:
    """Oracle: the parser. Each flag is in one of the classes."""
    classes = [FREE, REFUSED, BASE, VALIDATION_DATA, APPLIED]
    assert sum(map(len, classes)) == len(frozenset().union(*classes)) and TRAINING_DATA <= APPLIED
    assert set(vars(train_srl_vae.parse_args([]))) <= frozenset().union(*classes)


def test_new_values_hold_from_the_resumed_step_on(run: Run, half: list[str], tmp_path: Path) -> None:
    """Oracle: the optimizer's own record of each hyperparameter, the journal, and the words of the card."""
    out = tmp_path / "out"
    code, printed = run(*half, "--learning_rate", "5e-4", "--adam_weight_decay", "0.3", "--adam_beta1", "0.7",
                        "--adam_beta2", "0.9", "--adam_epsilon", "1e-6")  # fmt: skip
    assert code == 0, printed
    assert rates(out) == [1e-3, 1e-3, 5e-4, 5e-4]
    (group,) = torch.load(out / "checkpoint-4/optimizer.bin", weights_only=True)["param_groups"]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (5e-4, 0.3, (0.7, 0.9), 1e-6)
    change = "--learning_rate 0.001 until step 2, then 0.0005"
    assert change in printed and change in (out / "README.md").read_text()
    recorded = json.loads((out / "training_args.json").read_text())["changes"]
    assert {"name": "learning_rate", "step": 2, "before": 1e-3, "after": 5e-4} in recorded
    assert json.loads((out / "checkpoint-4/settings.json").read_text())["changes"] == recorded


def test_the_schedule_gets_its_new_shape(run: Run, half: list[str], tmp_path: Path) -> None:
    """Oracle: the formula of a linear schedule over 4 steps without warm-up, from step 2 on."""
    code, printed = run(*half, "--lr_scheduler", "linear", "--lr_warmup_steps", "0")
    assert code == 0, printed
    assert rates(tmp_path / "out") == pytest.approx([1e-3, 1e-3, 1e-3 * 1 / 4, 0])
    assert "--lr_scheduler constant until step 2, then linear" in printed
    assert "--max_train_steps 2 until step 2, then 4" in printed


def test_another_batch_goes_on_at_the_same_sample(run: Run, half: list[str], tmp_path: Path) -> None:
    """Oracle: counting. 2 steps of 4 samples and 2 of 6 are 20, and the card says so."""
    code, printed = run(*half, "--train_batch_size", "2", "--gradient_accumulation_steps", "3")
    assert code == 0, printed
    state = json.loads((tmp_path / "out/checkpoint-4/trainer_state.json").read_text())
    assert state["progress"]["samples"] == 20
    assert "4 steps with 20 images in all" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("flag", "there"),
    [
        (["--seed", "1"], "--seed 0"), (["--use_ema"], "no --use_ema"), (["--num_validation_images", "2"], "images 3"),
        (["--validation_split", "0.3"], "--validation_split 0.2"), (["--resolution", "18"], "--resolution 16"),
    ],
    ids=lambda part: part[0],
)  # fmt: skip
def test_what_cannot_change_is_refused_with_both_values(
    run: Run, half: list[str], tmp_path: Path, flag: list[str], there: str
) -> None:
    """Oracle: the two commands; nothing that is published has changed."""
    before = {name: (tmp_path / "out" / name).read_bytes() for name in ("training_args.json", "README.md", "results.json")}
    code, printed = run(*half, *flag)
    (error,) = [line for line in printed.splitlines() if line.startswith("error:")]
    assert code == 2 and there in error and " ".join(flag) in error, error
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before


def test_other_weights_of_the_same_name_are_refused(
    run: Run, half: list[str], vae_folder: Path, other_vae_folder: Path, tmp_path: Path
) -> None:
    """Oracle: the weights. A copy in another place goes on; other weights are refused, with both names."""
    copy = tmp_path / "copy"
    shutil.copytree(vae_folder, copy)
    assert run(*half, "--pretrained_model_name_or_path", copy, "--dry_run")[0] == 0
    code, printed = run(*half, "--pretrained_model_name_or_path", other_vae_folder)
    assert code == 2 and str(vae_folder) in printed and str(other_vae_folder) in printed


@pytest.fixture
def other_vae_folder(vae_folder: Path, tmp_path: Path) -> Path:
    vae = AutoencoderKL.from_pretrained(vae_folder)
    vae.encoder.conv_in.weight.data += 0.01
    vae.save_pretrained(tmp_path / "other-vae")
    return tmp_path / "other-vae"


def test_the_original_is_measured_again_where_its_results_would_differ(
    run: Run, half: list[str], tmp_path: Path
) -> None:
    """Oracle: the budget in each row. With another epsilon, both VAEs are judged with the new one."""
    code, printed = run(*half, "--epsilon", "4/255")
    assert code == 0, printed
    rows = json.loads((tmp_path / "out/results.json").read_text())
    assert all(row["epsilon"] == pytest.approx(4 / 255) for row in rows if row["attack"] == "pgd-10")
    assert {row["vae"] for row in rows} == {"original", "fine-tuned"}


def test_fewer_steps_than_were_made_are_refused(run: Run, half: list[str]) -> None:
    """Oracle: 2 steps were made, and 1 is asked for."""
    code, printed = run(*half, "--max_train_steps", "1")
    assert code == 2 and "--max_train_steps" in printed


@pytest.mark.parametrize("record", ["training_args.json", None])
def test_checkpoints_of_older_versions(run: Run, half: list[str], tmp_path: Path, record: str | None) -> None:
    """Oracle: the record beside the checkpoint, where there is one; without any, the run goes on."""
    out = tmp_path / "out"
    (out / "checkpoint-2/settings.json").unlink()
    (out / "checkpoint-2" / MANIFEST).unlink()
    seal(out / "checkpoint-2")
    arguments = json.loads((out / "training_args.json").read_text())["arguments"]
    (out / "training_args.json").unlink()
    if record:
        (out / record).write_text(json.dumps({"arguments": arguments}))
        assert run(*half, "--seed", "1")[0] == 2
        assert run(*half, "--num_validation_images", "2")[0] == 2
    code, printed = run(*half, "--learning_rate", "5e-4")
    assert code == 0, printed
    assert rates(out)[2:] == [5e-4, 5e-4]
    assert ("until step 2" in printed) == bool(record)


def test_a_history_is_one_line_a_flag_without_folders_of_this_machine() -> None:
    """Oracle: the three values by hand."""
    changes = [
        Change("learning_rate", 2, 1e-4, 5e-5), Change("train_data_dir", 2, "/home/me/a", "/home/me/b"),
        Change("learning_rate", 4, 5e-5, 1e-5), Change("train_data_dir", 4, "/home/me/b", "/other/b"),
        Change("random_flip", 4, False, True), Change("max_train_samples", 4, None, 8),
    ]  # fmt: skip
    assert told(changes) == [
        "--learning_rate 0.0001 until step 2, then 5e-05 until step 4, then 1e-05",
        "--train_data_dir a until step 2, then b",
        "no --random_flip until step 4, then on",
        "no --max_train_samples until step 4, then 8",
    ]
