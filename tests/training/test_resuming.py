"""A resume obeys its flags or refuses them, and says which: in the card, in the records and on the terminal."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from helpers.runs import Run

import train_srl_vae
from srl_utils.errors import UserError
from srl_utils.files import MANIFEST, seal
from srl_utils.training.checkpoints import load_checkpoint
from srl_utils.training.cli.planning import count_steps
from srl_utils.training.resuming import (
    APPLIED,
    BASE,
    FREE,
    REFUSED,
    TRAINING_DATA,
    VALIDATION_DATA,
    Change,
    Earlier,
    Settings,
    own_hyperparameters,
    told,
)


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
    """Oracle: the parser. Each flag is in exactly one of the classes, which hold nothing else but accelerate's flag."""
    classes = Counter(chain(FREE, REFUSED, BASE, VALIDATION_DATA, APPLIED))
    assert set(classes.values()) == {1} and TRAINING_DATA <= APPLIED
    assert set(classes) == {*vars(train_srl_vae.parse_args([])), "num_processes", "execution"}


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
    """Oracle: the formula of a linear schedule over 4 steps without warm-up, at the steps 3 and 4."""
    code, printed = run(*half, "--lr_scheduler", "linear", "--lr_warmup_steps", "0")
    assert code == 0, printed
    assert rates(tmp_path / "out") == pytest.approx([1e-3, 1e-3, 1e-3 * 2 / 4, 1e-3 * 1 / 4])
    assert "--lr_scheduler constant until step 2, then linear" in printed
    assert "--max_train_steps 2 until step 2, then 4" in printed


def schedule(
    rate: float, decay: float, **settings: object
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """An optimizer with one weight and a schedule of 6 steps."""
    weight = torch.ones(1, requires_grad=True)
    weight.grad = torch.ones(1)
    optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=decay)
    return optimizer, get_scheduler(optimizer=optimizer, num_training_steps=6, **settings)


def rates_of(optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LambdaLR, steps: int) -> list[float]:
    """The rate that the optimizer has at each step."""
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "constant"}, {"name": "constant_with_warmup", "num_warmup_steps": 5},
        {"name": "linear", "num_warmup_steps": 1}, {"name": "cosine", "num_warmup_steps": 4},
        {"name": "cosine_with_restarts", "num_warmup_steps": 1, "num_cycles": 2},
        {"name": "polynomial", "num_warmup_steps": 0, "power": 2},
    ],
    ids=lambda settings: settings["name"],
)  # fmt: skip
def test_every_schedule_replaces_every_other(settings: dict) -> None:
    """Oracle: a schedule of diffusers that had the new flags from the beginning; moments are the earlier ones."""
    expected = rates_of(*schedule(2e-3, 0.1, **settings), 6)
    for before in ("constant", "cosine", "polynomial"):
        earlier = schedule(1e-3, 0.2, name=before, num_warmup_steps=2)
        rates_of(*earlier, 3)
        states = [json.loads(json.dumps(earlier[1].state_dict())), earlier[0].state_dict()]
        resumed, scheduler = schedule(2e-3, 0.1, **settings)
        with own_hyperparameters(resumed, scheduler):
            scheduler.load_state_dict(states[0])
            resumed.load_state_dict(states[1])
        assert scheduler.get_last_lr() == [resumed.param_groups[0]["lr"]]
        assert resumed.param_groups[0]["weight_decay"] == 0.1
        assert [state["step"] for state in resumed.state.values()] == [3]
        assert rates_of(resumed, scheduler, 3) == expected[3:]


def test_flags_outside_the_state_change_the_steps(run: Run, half: list[str], tmp_path: Path) -> None:
    """Oracle: the resume without the flags, which ends with other weights; the card names each flag."""
    ends = []
    for flags in ((), ("--max_grad_norm", "0.001"), ("--sample_posterior", "--random_flip")):
        code, printed = run(*half, *flags, "--max_train_steps", "3")
        assert code == 0, printed
        ends.append((tmp_path / "out/checkpoint-3/vae/diffusion_pytorch_model.safetensors").read_bytes())
        card = (tmp_path / "out/README.md").read_text()
        assert all(f"{flag} 1.0 until" in card or f"no {flag} until" in card
                   for flag in flags if flag.startswith("--"))  # fmt: skip
    assert len(set(ends)) == 3


def test_unchanged_flags_leave_no_trace(run: Run, half: list[str], tmp_path: Path) -> None:
    """Oracle: the words of a change, which no text has; flags that train nothing may be others."""
    code, printed = run(*half, "--max_train_steps", "2", "--validation_steps", "1", "--save_variant", "fp16")
    assert code == 0, printed
    assert (
        "changed by this command" not in printed
        and "resumed with other" not in (tmp_path / "out/README.md").read_text()
    )
    assert json.loads((tmp_path / "out/training_args.json").read_text())["changes"] == []


def test_more_steps_are_said(run: Run, half: list[str], tmp_path: Path) -> None:
    """Oracle: the journal's steps, and the words on the terminal and in the card; twice extended, one line."""
    assert run(*half, "--max_train_steps", "3")[0] == 0
    code, printed = run(*half, "--max_train_steps", "5", "--resume_from_checkpoint", "latest")
    assert code == 0, printed
    assert len(rates(tmp_path / "out")) == 5
    line = "--max_train_steps 2 until step 2, then 3 until step 3, then 5"
    assert line in (tmp_path / "out/README.md").read_text()
    assert "--max_train_steps 3 until step 3, then 5" in printed


def test_epochs_count_the_samples_that_were_seen() -> None:
    """Oracle: arithmetic. Of 20 images 8 were seen in two steps: 12 are left, and 40 are two epochs and not one."""
    earlier = Earlier(Path("checkpoint-2"), step=2, samples=8, settings=Settings({}))
    count = count_steps
    assert [count(1, 20, size, None) for size in (4, 3)] == [5, 7]
    assert [count(1, 20, size, earlier) for size in (4, 2, 3, 100)] == [5, 8, 6, 3]
    done = Earlier(Path("checkpoint-7"), step=7, samples=21, settings=Settings({}))
    assert count(1, 20, 3, done) == 7
    with pytest.raises(UserError, match=r"^num_train_epochs: 1 x 20 images are fewer than the 40 that"):
        count(1, 20, 4, Earlier(Path("checkpoint-10"), step=10, samples=40, settings=Settings({})))


def test_bad_images_of_other_data_do_not_count(run: Run, half: list[str], tmp_path: Path, photographs: Path) -> None:
    """Oracle: the folders. The checkpoint knows of bad images, and those of the new folder can all be read."""
    held_out = tmp_path / "held-out"
    shutil.copytree(photographs, held_out)
    start = ["--validation_data_dir", held_out, "--output_dir", tmp_path / "other"]
    without = [flag for pair in zip(half[::2], half[1::2], strict=True) if pair[0] not in
               ("--validation_split", "--resume_from_checkpoint") for flag in pair]  # fmt: skip
    bad = tmp_path / "bad"
    shutil.copytree(photographs, bad)
    for index in range(8):
        (bad / f"broken-{index}.png").write_text("no picture")
    code, printed = run(*without, *start, "--train_data_dir", bad, "--max_bad_images", "0.5", "--max_train_steps", "8")
    assert code == 0 and "unreadable images were replaced" in printed
    code, printed = run(*without, *start, "--max_train_steps", "9", "--resume_from_checkpoint", "latest",
                        "--max_bad_images", "0")  # fmt: skip
    assert code == 0, printed
    assert "--train_data_dir bad until step 8, then photographs" in printed


def test_another_batch_goes_on_at_the_same_sample(run: Run, half: list[str], tmp_path: Path) -> None:
    """Oracle: counting. 2 steps of 4 samples and 2 of 6 are 20, and the card says so; the rate is that of 6."""
    code, printed = run(*half, "--train_batch_size", "2", "--gradient_accumulation_steps", "3", "--scale_lr")
    assert code == 0, printed
    assert rates(tmp_path / "out") == pytest.approx([1e-3, 1e-3, 6e-3, 6e-3])
    state = json.loads((tmp_path / "out/checkpoint-4/trainer_state.json").read_text())
    assert state["progress"]["samples"] == 20
    assert "4 steps with 20 images in all" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("flag", "there"),
    [
        (["--seed", "1"], "--seed 0"), (["--use_ema"], "no --use_ema"), (["--num_validation_images", "2"], "images 3"),
        (["--use_8bit_adam"], "no --use_8bit_adam"),
        (["--validation_split", "0.3"], "--validation_split 0.2"), (["--resolution", "18"], "--resolution 16"),
    ],
    ids=lambda part: part[0],
)  # fmt: skip
def test_what_cannot_change_is_refused_with_both_values(
    run: Run, half: list[str], tmp_path: Path, flag: list[str], there: str
) -> None:
    """Oracle: the two commands; nothing that is published has changed."""
    before = {
        name: (tmp_path / "out" / name).read_bytes() for name in ("training_args.json", "README.md", "results.json")
    }
    code, printed = run(*half, *flag)
    (error,) = [line for line in printed.splitlines() if line.startswith("error:")]
    assert code == 2 and there in error and " ".join(flag) in error, error
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before


def test_the_average_cannot_be_dropped(run: Run, flags: list[str]) -> None:
    """Oracle: the two commands, the other way round than above."""
    stop = ["--max_train_steps", "1", "--checkpointing_steps", "1"]
    assert run(*flags, *stop, "--use_ema")[0] == 0
    code, printed = run(*flags, *stop, "--resume_from_checkpoint", "latest")
    assert code == 2 and "was trained with --use_ema, and this command says no --use_ema" in printed


@pytest.mark.parametrize("saved", [True, False])
def test_fp16_may_begin_at_a_resume(tmp_path: Path, saved: bool) -> None:
    """Oracle: the scaler that accelerate is asked to load: none where the checkpoint holds none, and it is there after."""
    accelerator = SimpleNamespace(scaler="scaler", load_state=lambda folder: asked.append(accelerator.scaler))
    asked: list[str | None] = []
    if saved:
        (tmp_path / "scaler.pt").touch()
    load_checkpoint(accelerator, tmp_path)
    assert asked == ["scaler" if saved else None] and accelerator.scaler == "scaler"


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


def test_latest_follows_the_branch_that_was_worked_on_last(run: Run, half: list[str], tmp_path: Path) -> None:
    """Oracle: the journal's steps and rates. A run that goes back to step 1 leaves step 2 behind, which stays in the folder."""
    out = tmp_path / "out"
    back = [*half, "--learning_rate", "5e-4", "--resume_from_checkpoint"]
    code, printed = run(*back, "checkpoint-1", "--max_train_steps", "1")
    assert code == 0, printed
    assert "abandoned-checkpoint-2" in printed and (out / "abandoned-checkpoint-2/vae").is_dir()
    code, printed = run(*back, "latest", "--max_train_steps", "3")
    assert code == 0, printed
    assert rates(out) == [1e-3, 5e-4, 5e-4]
    assert "--learning_rate 0.001 until step 1, then 0.0005" in (out / "README.md").read_text()


def test_other_validation_images_under_the_same_flags_are_refused(
    run: Run, flags: list[str], photographs: Path, tmp_path: Path
) -> None:
    """Oracle: the pictures. Training images may become more, which is told; validation images must stay."""
    training, validation = tmp_path / "training", tmp_path / "validation"
    for folder in (training, validation):
        shutil.copytree(photographs, folder)
    split = flags.index("--validation_split")
    command = [*flags[:split], *flags[split + 2 :], "--train_data_dir", training, "--validation_data_dir", validation]
    assert run(*command, "--max_train_steps", "1", "--checkpointing_steps", "1")[0] == 0
    shutil.copy(training / "00.png", training / "more.png")
    command += ["--max_train_steps", "2", "--resume_from_checkpoint", "latest"]
    code, printed = run(*command)
    assert code == 0 and "24 training images until step 1, then 25" in printed, printed
    for path in validation.rglob("*.png"):
        shutil.copy(training / "02.png", path)
    code, printed = run(*command, "--max_train_steps", "3")
    assert code == 2 and "the validation images are not those that" in printed, printed


def test_without_steps_left_nothing_changes(run: Run, half: list[str], tmp_path: Path) -> None:
    """Oracle: the record of a command that makes no step."""
    code, printed = run(*half, "--max_train_steps", "2", "--learning_rate", "5e-4")
    assert code == 0, printed
    assert json.loads((tmp_path / "out/training_args.json").read_text())["changes"] == []


def test_a_dry_run_counts_the_images_of_both_parts(run: Run, half: list[str]) -> None:
    """Oracle: two steps of 4 images each before, and two of 5 now."""
    code, printed = run(*half, "--train_batch_size", "5", "--dry_run")
    assert code == 0, printed
    assert "Run: 4 steps, 18 images" in printed


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
    assert "no --use_ema" in run(*half, "--use_ema")[1]
    if record:
        assert run(*half, "--num_validation_images", "2")[0] == 2
    code, printed = run(*half, "--learning_rate", "5e-4")
    assert code == 0, printed
    assert rates(out)[2:] == [5e-4, 5e-4]
    assert ("until step 2" in printed) == bool(record)


def test_a_history_is_one_line_a_flag_without_folders_of_this_machine() -> None:
    """Oracle: the three values by hand."""
    changes = [
        Change("learning_rate", 2, 1e-4, 5e-5), Change("train_data_dir", 2, "/home/me/a", "/home/me/b"),
        Change("learning_rate", 4, 5e-5, 1e-5), Change("train_data_dir", 4, "/home/me/b", "../other/b"),
        Change("random_flip", 4, False, True), Change("max_train_samples", 4, None, 8),
        Change("execution", 4, "float32, not compiled", "bf16, compiled"), Change("dataset_name", 4, "/a/set", "/b/set"),
    ]  # fmt: skip
    assert told(changes) == [
        "--learning_rate 0.0001 until step 2, then 5e-05 until step 4, then 1e-05",
        "--train_data_dir a until step 2, then b until step 4, then another b",
        "no --random_flip until step 4, then on",
        "no --max_train_samples until step 4, then 8",
        "float32, not compiled until step 4, then bf16, compiled",
        "--dataset_name set until step 4, then another set",
    ]
