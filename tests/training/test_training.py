"""The training script, run as users run it: in-process through its command line, and by `accelerate launch`."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from helpers.autoencoders import small_autoencoder
from helpers.runs import ROOT, Run, assert_same_weights, launch, steps
from PIL import Image
from safetensors.torch import load_file

import train_srl_vae
from srl_utils.errors import UserError
from srl_utils.evaluation.__main__ import main as evaluate
from srl_utils.evaluation.perturbations import Perturbation
from srl_utils.evaluation.results import Row, Setting, to_row
from srl_utils.hub.card import recorded_weights
from srl_utils.hub.contents import contents
from srl_utils.images.datasets import open_data
from srl_utils.images.sources import DataSource
from srl_utils.metrics.losses import PerceptualDistance
from srl_utils.training.cli import building
from srl_utils.training.cli.beginning import begin_records
from srl_utils.training.cli.listener import EXIT_NOT_FINITE
from srl_utils.training.execution import choose_execution
from srl_utils.training.step import Step
from srl_utils.training.validation import Validation
from srl_utils.vae.loading import SINGLE_FILE_NAME, UPDATES_NAME
from srl_utils.vae.single_file import save_single_file

SCRIPT = ROOT / "train_srl_vae.py"
WEIGHTS = "diffusion_pytorch_model.safetensors"
HALF = "diffusion_pytorch_model.fp16.safetensors"


# --- what a run does and leaves behind ------------------------------------------------------------------


def test_output_is_a_drop_in(run: Run, flags: list[str], vae_folder: Path, tmp_path: Path) -> None:
    """Oracle: the base. The decoder's bytes and the configuration are its own, the encoder has moved."""
    code, printed = run(*flags)
    assert code == 0, printed
    out = tmp_path / "out"
    base, tuned = load_file(vae_folder / WEIGHTS), load_file(out / WEIGHTS)
    assert base.keys() == tuned.keys()
    for name, tensor in base.items():
        frozen = name.startswith(("decoder.", "post_quant_conv."))
        same = torch.equal(tensor.view(torch.int32), tuned[name].view(torch.int32))
        assert same == frozen, name
    ours, theirs = AutoencoderKL.load_config(out), AutoencoderKL.load_config(vae_folder)
    assert {k: v for k, v in ours.items() if k[0] != "_"} == {k: v for k, v in theirs.items() if k[0] != "_"}
    assert AutoencoderKL.from_pretrained(out).dtype == torch.float32


def test_output_files(run: Run, flags: list[str], tmp_path: Path) -> None:
    """Oracle: the documented list of files and the row format."""
    code, printed = run(*flags, "--validation_steps", "2", "--report_to", "tensorboard")
    assert code == 0, printed
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json", WEIGHTS, "README.md", "training_args.json", "metrics.jsonl", "results.json", "samples", "logs",
        ".lock",
    }  # fmt: skip
    pictures = {path.name for path in (out / "samples").iterdir()}
    assert pictures == {"step-000000.png", "step-000002.png", "step-000004.png", "comparison.png"}
    assert list((out / "logs").rglob("events.out.tfevents.*"))
    rows = json.loads((out / "results.json").read_text())
    assert all(
        set(row) == {"vae", "attack", "objective", "threat_model", "epsilon", "metric", "value", "ci95", "n"}
        for row in rows
    )
    measured = {(row["vae"], row["attack"], row["metric"]) for row in rows}
    for vae in ("original", "fine-tuned"):
        for attack in ("clean", "pgd-10", "pgd-50x2", "gaussian-noise"):
            assert {(vae, attack, "psnr"), (vae, attack, "ssim")} <= measured
    assert ("fine-tuned", "clean", "drift") in measured
    assert all(row["n"] == 3 for row in rows)
    recorded = json.loads((out / "training_args.json").read_text())
    assert recorded["arguments"]["pgd_steps"] == 2
    assert "hub_token" not in recorded["arguments"]
    card = (out / "README.md").read_text()
    assert "pgd-50x2" in card
    assert str(tmp_path) not in card  # a published card tells nothing of the machine
    assert "fine-tuned" in card
    assert [row["step"] for row in steps(out)] == [1, 2, 3, 4]


def test_latent_attacks_by_flags(run: Run, flags: list[str], tmp_path: Path) -> None:
    """Oracle: the journal's terms add up to its loss, and an attack on latents alone counts no decoder."""
    latent = ["--latent_weight", "0.5", "--latent_attack_share", "1", "--originality_weight", "0.1"]
    code, printed = run(*flags, *latent)
    assert code == 0, printed
    for row in steps(tmp_path / "out"):
        assert row["latent"] > 0
        expected = row["mse"] + 0.1 * row["originality"] + 0.5 * row["latent"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
    forward, attack = r"encoder forward +([\d.]+) TFLOP", r"attack \(2 steps\) +([\d.]+) TFLOP"
    _, printed = run(*flags, *latent, "--resolution", "256", "--output_dir", str(tmp_path / "other"), "--dry_run")
    counted = [float(re.search(pattern, printed)[1]) for pattern in (forward, attack)]
    assert counted[1] == pytest.approx(2 * 2 * counted[0], abs=2e-4)


@pytest.mark.parametrize(
    ("objective", "given", "parts"),
    [
        ("feature", [], {"latent": 1.0}),
        ("trades", ["--latent_weight", "0.5"], {"mse": 1.0, "latent": 0.5}),
        ("purify", ["--latent_weight", "0.5", "--latent_attack_share", "1"], {"mse": 1.0, "latent": 0.5}),
        ("equivariance", [], {"mse": 1.0}),
        ("equivariance", ["--recipe", "latent"], {"mse": 1.0}),  # the recipe's attack has no part in it
    ],
)
def test_rival_objectives_by_flags(
    objective: str, given: list[str], parts: dict[str, float], run: Run, flags: list[str], tmp_path: Path
) -> None:
    """Oracle: the journal's terms add up to its loss; an attack takes the encoder alone."""
    rival = ["--objective", objective, *given]
    if objective == "equivariance":
        rival += ["--pgd_steps", "0"]
    code, printed = run(*flags, *rival)
    assert code == 0, printed
    alpha = 0.03 if "--recipe" in given else 0.01
    for row in steps(tmp_path / "out"):
        expected = alpha * row["originality"] + sum(weight * row[name] for name, weight in parts.items())
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
        assert "attacked_psnr" not in row
        assert ("mse" in row, "latent" in row) == (objective != "feature", objective != "equivariance")
    other = ["--resolution", "256", "--output_dir", str(tmp_path / "other"), "--dry_run", "--originality_weight", "0"]
    _, printed = run(*flags, *rival, *other)
    encoder, decoder, attack, outer = (
        float(re.search(rf"{part} +([\d.]+) TFLOP", printed)[1])
        for part in ("encoder forward", "decoder forward", r"attack \(. steps\)", "outer step")
    )
    assert attack == pytest.approx(0 if objective == "equivariance" else 4 * encoder, abs=3e-4)
    # A pass with weights' gradients is three forward ones. The attacked pass and the original's; trades has a clean pass
    # and the mirror's as well. equivariance has a clean pass alone, and decodes the mean area of its draws on 128 latents.
    area = 0.5 + 0.5 * sum((side / 128) ** 2 for side in range(32, 128)) / 96
    expected = {
        "feature": 4 * encoder, "trades": 7 * encoder + 2 * decoder, "purify": 4 * encoder + 2 * decoder,
        "equivariance": 3 * encoder + 2 * area * decoder,
    }  # fmt: skip
    assert outer == pytest.approx(expected[objective], abs=5e-4)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            ["--objective", "feature", "--lpips_weight", "0.5"],
            "--lpips_weight has no effect without an --objective other than feature",
        ),
        (
            ["--objective", "feature", "--sample_posterior"],
            "--sample_posterior has no effect without an --objective other than feature",
        ),
        (
            ["--objective", "feature", "--latent_weight", "2"],
            "--latent_weight has no effect without --objective srl, purify or",
        ),
        (["--objective", "feature", "--pgd_steps", "0"], "--objective feature needs an attack"),
        (["--objective", "purify", "--pgd_steps", "0"], "--objective purify needs an attack"),
        (
            ["--objective", "purify", "--gaussian_noise", "8/255", "--pgd_steps", "0"],
            "--objective purify needs an attack",
        ),
        (["--objective", "equivariance"], "--pgd_steps has no effect without an attack"),
        (
            ["--objective", "equivariance", "--pgd_steps", "0", "--gaussian_noise", "8/255"],
            "--gaussian_noise has no effect without an --objective other than equivariance",
        ),
        (
            ["--objective", "equivariance", "--pgd_steps", "0", "--latent_weight", "1"],
            "--latent_weight has no effect without --objective srl, purify or",
        ),
        (
            ["--objective", "equivariance", "--pgd_steps", "0", "--torch_compile"],
            "--torch_compile has no effect without an --objective other than equivariance",
        ),
        (
            ["--objective", "equivariance", "--pgd_steps", "0", "--lpips_weight", "1", "--resolution", "62"],
            "--resolution: 62 pixels are too few for --objective equivariance with LPIPS",
        ),
        (
            ["--objective", "trades", "--latent_weight", "1", "--no_pgd_random_start"],
            "--no_pgd_random_start: an attack on latents needs a random start",
        ),
        (
            ["--latent_attack_share", "0.5", "--no_pgd_random_start"],
            "--no_pgd_random_start: an attack on latents needs",
        ),
        (["--objective", "trades"], "--objective trades needs a --latent_weight above 0"),
        (
            ["--objective", "trades", "--latent_weight", "1", "--latent_attack_share", "0.5"],
            "--latent_attack_share has no effect without --objective srl or purify",
        ),
    ],
)
def test_objectives_refuse_what_they_do_not_use(given: list[str], problem: str, run: Run, flags: list[str]) -> None:
    """Oracle: specification, one line before anything is loaded."""
    code, printed = run(*flags, *given)
    assert code == 2 and problem in printed, printed


def test_the_result_rows_describe_the_saved_weights(run: Run, flags: list[str], tmp_path: Path) -> None:
    """Oracle: the clean PSNR of the saved VAE, measured here from its files on the validation images."""
    from srl_utils.metrics.pixels import psnr

    code, printed = run(*flags)
    assert code == 0, printed
    out = tmp_path / "out"
    args = train_srl_vae.parse_args(flags)
    data = open_data(
        DataSource.from_flags(args), resolution=16, seed=0, center_crop=False, random_flip=False,
        num_validation_images=3,
    )  # fmt: skip
    vae = AutoencoderKL.from_pretrained(out)
    with torch.no_grad():
        reconstruction = vae.decode(vae.encode(data.validation_images).latent_dist.mean).sample
    rows = json.loads((out / "results.json").read_text())
    (row,) = [r for r in rows if (r["vae"], r["attack"], r["metric"]) == ("fine-tuned", "clean", "psnr")]
    assert row["value"] == pytest.approx(psnr(reconstruction, data.validation_images).mean().item(), abs=1e-3)


@pytest.mark.parametrize(
    "extra",
    [
        ("--sample_posterior",),
        ("--no_pgd_random_start", "--originality_units", "scaled"),
        ("--pgd_steps", "0", "--originality_weight", "0"),
        ("--center_crop", "--random_flip", "--scale_lr", "--lr_scheduler", "cosine", "--lr_warmup_steps", "1"),
        ("--mixed_precision", "bf16", "--gradient_checkpointing", "--use_ema"),
        ("--dataloader_num_workers", "2", "--max_train_samples", "8"),
    ],
    ids=lambda extra: extra[0],
)
def test_settings_run_to_the_end(run: Run, flags: list[str], tmp_path: Path, extra: tuple[str, ...]) -> None:
    """Oracle: the run ends well, its losses are finite and its saved weights are float32."""
    code, printed = run(*flags, *extra)
    assert code == 0, printed
    assert all(row["loss"] is not None for row in steps(tmp_path / "out"))
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "out" / WEIGHTS).values())


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(run: Run, flags: list[str], tmp_path: Path) -> None:
    """Oracle: the run without it. Recomputing the same operations gives the same bits on the CPU."""
    assert run(*flags)[0] == 0
    assert run(*flags, "--gradient_checkpointing", "--output_dir", tmp_path / "checkpointed")[0] == 0
    assert_same_weights(tmp_path / "out", tmp_path / "checkpointed")


def test_lpips_reaches_attack_and_loss(
    run: Run, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_lpips: object
) -> None:
    """Oracle: the weight. With LPIPS the loss is mse + weight * lpips + alpha * originality, and LPIPS is judged."""
    monkeypatch.setattr(building, "load_perceptual_distance", lambda net: PerceptualDistance(random_lpips))
    code, printed = run(*flags, "--lpips_weight", "0.5", "--max_train_steps", "2")
    assert code == 0, printed
    for row in steps(tmp_path / "out"):
        assert row["lpips"] > 0
        expected = row["mse"] + 0.5 * row["lpips"] + 0.01 * row["originality"]
        assert row["loss"] == pytest.approx(expected, rel=1e-4)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"lpips-vgg"} <= {row["metric"] for row in rows}


def test_without_lpips_nothing_is_loaded(run: Run, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the loader itself, which must not be called when the weight is 0."""

    def refuse(net: str) -> None:
        raise AssertionError("LPIPS was loaded")

    monkeypatch.setattr(building, "load_perceptual_distance", refuse)
    assert run(*flags)[0] == 0


def test_it_learns(run: Run, tmp_path: Path) -> None:
    """Oracle: the method's claim, on the shipped VAE: the loss falls and attacked PSNR rises over 20 steps.

    Every step sees the same four images, attacked anew on the VAE as it is by then, so that steps compare.
    """
    code, printed = run(
        "--pretrained_model_name_or_path", ROOT / "miniature/weights/vae", "--dataset_name", "scikit-image",
        "--resolution", "64", "--train_batch_size", "4", "--max_train_steps", "20", "--pgd_steps", "5",
        "--max_train_samples", "4", "--center_crop", "--lpips_weight", "0", "--learning_rate", "2e-4",
        "--originality_weight", "0.001", "--num_validation_images", "1", "--report_to", "none",
        "--output_dir", tmp_path,
    )  # fmt: skip
    assert code == 0, printed
    rows = steps(tmp_path)
    means = {
        name: [sum(row[name] for row in part) / 4 for part in (rows[:4], rows[-4:])]
        for name in ("loss", "attacked_psnr")
    }
    assert means["loss"][1] < means["loss"][0]
    assert means["attacked_psnr"][1] > means["attacked_psnr"][0] + 0.3


# --- single files ---------------------------------------------------------------------------------------


def test_single_files_in_and_out(run: Run, flags: list[str], vae_folder: Path, tmp_path: Path) -> None:
    """Oracle: the run that starts from the folder, whose weights are the same to the bit; diffusers reads the written file,
    which the card and the folder for the Hub list. Other programs cannot use so small a VAE, and the card says so."""
    save_single_file(AutoencoderKL.from_pretrained(vae_folder), tmp_path / "base.safetensors")
    out = tmp_path / "out"
    code, printed = run(
        *flags, "--save_variant", "single_file", "--pretrained_model_name_or_path", tmp_path / "base.safetensors"
    )
    assert code == 0, printed
    assert json.loads((out / "config.json").read_text())["_name_or_path"] == "base.safetensors"
    single = AutoencoderKL.from_single_file(str(out / SINGLE_FILE_NAME), config=str(out)).state_dict()
    saved = load_file(out / WEIGHTS)
    assert single.keys() == saved.keys() and all(torch.equal(single[name], saved[name]) for name in saved)
    card = (out / "README.md").read_text()
    assert set(recorded_weights(card)) == {WEIGHTS, SINGLE_FILE_NAME} <= set(contents(out).names)
    assert "A1111 and Forge cannot use this VAE" in card and "models/vae" not in card
    assert run(*flags)[0] == 0
    from_the_folder = load_file(out / WEIGHTS)
    assert all(torch.equal(from_the_folder[name], saved[name]) for name in saved)
    assert not (out / SINGLE_FILE_NAME).exists()


def test_a_single_file_of_another_class_is_refused(run: Run, flags: list[str], tmp_path: Path) -> None:
    """Oracle: one line before the first step, and no output folder."""
    small_autoencoder("AutoencoderKLFlux2").save_pretrained(tmp_path / "flux2")
    code, printed = run(*flags, "--save_variant", "single_file", "--pretrained_model_name_or_path", tmp_path / "flux2")
    assert (
        code == 2 and "a single file holds an AutoencoderKL, and this VAE is of the class AutoencoderKLFlux2" in printed
    )
    assert not (tmp_path / "out").exists()


# --- low-rank updates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [[], ["--use_ema", "--save_variant", "fp16"]], ids=["plain", "ema"])
def test_low_rank_updates_give_a_drop_in(
    run: Run, flags: list[str], vae_folder: Path, tmp_path: Path, extra: list[str]
) -> None:
    """Oracle: the base. Weights of one dimension and the decoder keep their bytes, and each other weight of the encoder moves
    by a matrix of rank 2: the product of the matrices in the file beside it. Card and folder for the Hub list both files."""
    code, printed = run(*flags, "--lora_rank", "2", *extra)
    assert code == 0, printed
    out = tmp_path / "out"
    base, tuned, updates = (load_file(path) for path in (vae_folder / WEIGHTS, out / WEIGHTS, out / UPDATES_NAME))
    assert base.keys() == tuned.keys()
    for name, tensor in base.items():
        trained = name.startswith(("encoder.", "quant_conv.")) and tensor.ndim > 1
        assert torch.equal(tensor, tuned[name]) != trained, name
        layer = name.removesuffix(".weight")
        assert (f"{layer}.lora_A.weight" in updates) == trained
        if trained:
            down, up = (updates[f"{layer}.lora_{matrix}.weight"] for matrix in "AB")
            assert (len(down), up.shape[1]) == (2, 2)
            torch.testing.assert_close(tuned[name] - tensor, (up.flatten(1) @ down.flatten(1)).view_as(tensor))
    card = (out / "README.md").read_text()
    assert "updates of rank 2 (LoRA)" in card and f'weight_name="{UPDATES_NAME}"' in card
    assert UPDATES_NAME in recorded_weights(card) and UPDATES_NAME in contents(out).names


def test_the_next_run_s_folder_has_no_updates_of_this_one(run: Run, flags: list[str], tmp_path: Path) -> None:
    """Oracle: the set of files, as for half-precision weights."""
    assert run(*flags, "--lora_rank", "2", "--max_train_steps", "1")[0] == 0
    assert (tmp_path / "out" / UPDATES_NAME).exists()
    assert run(*flags, "--max_train_steps", "1")[0] == 0
    assert not (tmp_path / "out" / UPDATES_NAME).exists()


@pytest.mark.parametrize(("before", "after"), [(["--lora_rank", "2"], []), ([], ["--lora_rank", "2"])])
def test_another_rank_is_refused(
    run: Run, flags: list[str], tmp_path: Path, before: list[str], after: list[str]
) -> None:
    """Oracle: specification, one line with both values."""
    assert run(*flags, *before, "--max_train_steps", "1", "--checkpointing_steps", "1")[0] == 0
    code, printed = run(*flags, *after, "--resume_from_checkpoint", "latest")
    assert code == 2 and "--lora_rank 2" in printed and "no --lora_rank" in printed, printed


# --- stopping and continuing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("--gradient_accumulation_steps", "2", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2"),
        pytest.param(("--use_ema", "--dataloader_num_workers", "2"), marks=pytest.mark.slow),
        ("--mixed_precision", "bf16", "--sample_posterior"),
        ("--lora_rank", "2", "--use_ema"),
        ("--lora_rank", "2", "--mixed_precision", "bf16", "--objective", "purify"),
        ("--objective", "equivariance", "--pgd_steps", "0", "--sample_posterior"),
    ],
    ids=["plain", "accumulation", "ema+workers", "bf16+sampling", "lora+ema", "lora+bf16+purify", "equivariance"],
)
def test_resuming_is_exact(run: Run, flags: list[str], tmp_path: Path, extra: tuple[str, ...]) -> None:
    """Oracle: the undisturbed run, to the last bit; 20 images and 4 a pass put the stop inside an epoch."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = [*flags, *extra, "--max_train_steps", "6", "--checkpointing_steps", "3"]
    assert run(*flags, "--output_dir", whole)[0] == 0
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    code, printed = run(*flags, "--output_dir", resumed, "--resume_from_checkpoint", "latest")
    assert code == 0, printed
    assert "after step 3" in printed
    assert_same_weights(whole, resumed)
    assert_same_weights(whole / "checkpoint-6/vae", resumed / "checkpoint-6/vae")
    optimizers = [torch.load(folder / "checkpoint-6/optimizer.bin", weights_only=True) for folder in (whole, resumed)]
    for one, other in zip(*(list(o["state"].values()) for o in optimizers), strict=True):
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)
    kept = ("loss", "learning_rate", "step")
    later = [{key: row[key] for key in kept} for row in steps(whole) if row["step"] > 3]
    assert [{key: row[key] for key in kept} for row in steps(resumed)] == later


def test_checkpoint_limit_keeps_the_newest(run: Run, flags: list[str], tmp_path: Path) -> None:
    """Oracle: the exact set of folders; a checkpoint's VAE loads by itself."""
    code, printed = run(*flags, "--checkpointing_steps", "1", "--checkpoints_total_limit", "2")
    assert code == 0, printed
    assert {path.name for path in (tmp_path / "out").glob("*checkpoint*")} == {"checkpoint-3", "checkpoint-4"}
    AutoencoderKL.from_pretrained(tmp_path / "out/checkpoint-4/vae")


def test_latest_without_a_checkpoint_begins(run: Run, flags: list[str], tmp_path: Path) -> None:
    """Oracle: the fresh run; so one command serves a job that may be preempted before its first checkpoint."""
    assert run(*flags)[0] == 0
    code, printed = run(*flags, "--output_dir", tmp_path / "other", "--resume_from_checkpoint", "latest")
    assert code == 0
    assert "starting from the beginning" in printed
    assert_same_weights(tmp_path / "out", tmp_path / "other")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_says_how_to_resume(flags: list[str], run: Run, tmp_path: Path, number: int) -> None:
    """Oracle: the undisturbed run: after the signal and a resume the weights are the same to the last bit."""
    flags = [*flags, "--max_train_steps", "40", "--validation_steps", "1000"]
    out, whole = tmp_path / "out", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or len(steps(out)) < 3:
        assert time.monotonic() < deadline, "the run made no steps"
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, printed
    assert "--resume_from_checkpoint latest" in printed
    assert len(list(out.glob("checkpoint-*"))) == 1
    assert run(*flags, "--resume_from_checkpoint", "latest")[0] == 0
    assert run(*flags, "--output_dir", whole)[0] == 0
    assert_same_weights(out, whole)


def test_non_finite_steps_are_skipped(
    run: Run, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the count. Two poisoned steps change no weight, and the run goes on."""
    poison_steps(monkeypatch, {2, 3})
    code, printed = run(*flags, "--checkpointing_steps", "1")
    assert code == 0, printed
    out = tmp_path / "out"
    assert [row["skipped_steps"] for row in steps(out)] == [0, 1, 2, 2]
    assert [row["loss"] is None for row in steps(out)] == [False, True, True, False]
    assert_same_weights(out / "checkpoint-1/vae", out / "checkpoint-3/vae")


def test_ten_non_finite_steps_in_a_row_save_and_stop(
    run: Run, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the documented rule, exit code and message. The values of step 12 are heard of during step 13."""
    poison_steps(monkeypatch, set(range(3, 100)))
    code, printed = run(*flags, "--max_train_steps", "20")
    assert code == EXIT_NOT_FINITE
    assert "since step 3" in printed
    assert (tmp_path / "out/checkpoint-13").is_dir()


def poison_steps(monkeypatch: pytest.MonkeyPatch, poisoned: set[int]) -> None:
    """Makes the loss of the given steps (counted from 1) NaN."""
    honest, calls = Step.loss, []

    def poisonous(step: Step, *arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        loss, terms = honest(step, *arguments)
        calls.append(None)
        factor = float("nan") if len(calls) in poisoned else 1.0
        return loss * factor, terms * factor

    monkeypatch.setattr(Step, "loss", poisonous)


def test_too_many_bad_images_save_and_stop(
    run: Run, flags: list[str], tmp_path: Path, photographs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: the documented limit. One bad file of 25 is replaced and named; a quarter of them ends the run."""
    few, many = tmp_path / "few", tmp_path / "many"
    for folder, count in ((few, 1), (many, 8)):
        shutil.copytree(photographs, folder)
        for index in range(count):
            (folder / f"broken-{index}.png").write_text("no picture")
    code, printed = run(*flags, "--train_data_dir", few, "--max_train_steps", "12", "--output_dir", tmp_path / "a")
    assert code == 0, printed
    assert "1 unreadable images were replaced" in printed
    assert sum("broken-0.png" in message for message in caplog.messages) == 1
    code, printed = run(*flags, "--train_data_dir", many, "--max_train_steps", "30", "--output_dir", tmp_path / "b")
    assert code == 2
    assert "--max_bad_images" in printed
    assert list((tmp_path / "b").glob("checkpoint-*"))


# --- several processes ----------------------------------------------------------------------------------


CHECK_RANKS = """
import sys, torch, train_srl_vae as script
from accelerate.utils import gather

honest = script.optimizer_step

def checked(run, *arguments, **keywords):
    values = honest(run, *arguments, **keywords)
    weights = torch.cat([p.detach().flatten() for p in run.networks.encoder.parameters()])[None]
    copies = gather(weights)
    assert len(copies) == 2 and torch.equal(copies[0], copies[1]), "the ranks differ"
    run.accelerator.print("ranks agree at step", run.progress.step)  # from one rank: two would interleave
    return values

script.optimizer_step = checked
sys.exit(script.command_line())
"""


@pytest.mark.parametrize(
    "extra",
    [
        [],
        pytest.param(["--gradient_accumulation_steps", "2"], marks=pytest.mark.slow),
        ["--lora_rank", "2", "--objective", "purify", "--latent_attack_share", "0.5"],
        pytest.param(["--objective", "equivariance", "--pgd_steps", "0"], marks=pytest.mark.slow),
    ],
    ids=["plain", "accumulation", "lora+purify", "equivariance"],
)
def test_two_processes_follow_one(run: Run, flags: list[str], tmp_path: Path, extra: list[str]) -> None:
    """Oracle: one process with twice the batch. The ranks' weights are the same bits after every step.

    The sum over a batch is taken in another order, so values agree to float rounding and not exactly; the
    tolerance on weights is 1% of the distance they moved.
    """
    checker = tmp_path / "check_ranks.py"
    checker.write_text(CHECK_RANKS)
    flags = [*flags, *extra, "--adam_epsilon", "1e-4"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(*flags, "--output_dir", one)[0] == 0
    result = launch(*flags, "--train_batch_size", 2, "--output_dir", two, processes=2, script=checker)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "ranks agree at step 4" in result.stdout
    for ours, theirs in zip(steps(one), steps(two), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    base = load_file(Path(flags[1]) / WEIGHTS)
    first, second = load_file(one / WEIGHTS), load_file(two / WEIGHTS)
    moved = torch.cat([(first[name] - base[name]).flatten() for name in base])
    apart = torch.cat([(first[name] - second[name]).flatten() for name in base])
    assert apart.norm() < 0.01 * moved.norm()
    rows = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    assert [row["n"] for row in rows[0]] == [row["n"] for row in rows[1]]
    original = [[row["value"] for row in half if row["vae"] == "original"] for half in rows]
    assert original[0] == pytest.approx(original[1], rel=1e-4)


def test_accelerate_launch(flags: list[str], tmp_path: Path) -> None:
    """Oracle: the documented command, from the shell, with the table at its end."""
    result = launch(*flags, script=SCRIPT)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "| images" in result.stdout
    assert "is won back" in result.stdout
    AutoencoderKL.from_pretrained(tmp_path / "out")


# --- bad input ------------------------------------------------------------------------------------------


def test_dry_run_checks_and_writes_nothing(run: Run, flags: list[str], tmp_path: Path) -> None:
    """Oracle: the arithmetic by hand: 4 x 1 x 3 images a step; the attack is 2 steps of forward and backward."""
    code, printed = run(*flags, "--dry_run", "--gradient_accumulation_steps", "3")
    assert code == 0
    assert "= 12 images" in printed
    assert "4 steps, 48 images" in printed
    assert not (tmp_path / "out").exists()


def picture_folder(folder: Path, count: int) -> Path:
    folder.mkdir()
    for index in range(count):
        Image.new("RGB", (16, 16)).save(folder / f"{index}.png")
    return folder


BAD_INPUT = {
    "epsilon": (["--epsilon", "8"], r"--epsilon.*outside \[0,1\]"),
    "epsilon text": (["--epsilon", "large"], r"--epsilon.*8/255"),
    "negative steps": (["--pgd_steps", "-1"], r"--pgd_steps.*negative"),
    "no batch": (["--train_batch_size", "0"], r"--train_batch_size.*less than 1"),
    "unknown flag": (["--unheard_of"], r"--unheard_of"),
    "unknown net": (["--lpips_net", "resnet"], r"--lpips_net"),
    "resolution": (["--resolution", "17"], r"--resolution: 17.*try 16"),
    "no data": (["--train_data_dir", "{tmp}/nowhere"], r"nowhere"),
    "empty folder": (["--train_data_dir", "{tmp}/empty"], r"empty"),
    "no vae": (["--pretrained_model_name_or_path", "{tmp}/nothing"], r"nothing"),
    "pipeline": (["--pretrained_model_name_or_path", "{tmp}/pipeline"], r"subfolder vae"),
    "checkpoint": (["--resume_from_checkpoint", "{tmp}/empty"], r"--resume_from_checkpoint.*holds: none"),
    "output is a file": (["--output_dir", "{tmp}/file"], r"--output_dir.*is a file"),
    "fp16 on cpu": (["--mixed_precision", "fp16"], r"--mixed_precision: fp16.*bf16"),
    "wandb token": (["--push_to_hub", "--report_to", "wandb", "--hub_token", "hf_x"], r"hf auth login"),
    "wandb token among all": (["--push_to_hub", "--report_to", "all", "--hub_token", "hf_x"], r"hf auth login"),
    "name without push": (["--hub_model_id", "user/name"], r"--hub_model_id has no effect without --push_to_hub"),
    "token without push": (["--hub_token", "hf_x"], r"--hub_token has no effect without --push_to_hub"),
    "privacy without push": (["--hub_private_repo"], r"--hub_private_repo has no effect without --push_to_hub"),
    "strategy without push": (["--hub_strategy", "checkpoint"], r"--hub_strategy has no effect without --push_to_hub"),
    "unknown variant": (["--save_variant", "fp8"], r"--save_variant.*fp8"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(run: Run, flags: list[str], tmp_path: Path, case: str) -> None:
    """Oracle: exit code 2 and one line that names the flag, in seconds, with nothing written."""
    if case == "fp16 on cpu" and torch.cuda.is_available():
        pytest.skip("fp16 is fine here")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    arguments, message = BAD_INPUT[case]
    code, printed = run(*flags, *(part.format(tmp=tmp_path) for part in arguments))
    errors = [line for line in printed.splitlines() if line.startswith("error:")]
    assert code == 2, printed
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert "Traceback" not in printed
    assert not (tmp_path / "out").exists()


def test_an_earlier_run_is_not_overwritten(run: Run, flags: list[str]) -> None:
    """Oracle: the second identical command, which must refuse and name both ways out."""
    assert run(*flags, "--checkpointing_steps", "2")[0] == 0
    code, printed = run(*flags)
    assert code == 2
    assert "--resume_from_checkpoint latest" in printed


def test_a_new_run_in_the_same_folder(
    run: Run, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the files of the run before. Its weights stay until new ones are saved, its records do not.

    In between the card is that of other weights, and the folder is not published.
    """
    out = tmp_path / "out"
    code, printed = run(*flags, "--validation_steps", "3", "--report_to", "tensorboard", "--save_variant", "fp16")
    assert code == 0, printed
    assert set(recorded_weights((out / "README.md").read_text())) == {WEIGHTS, HALF} <= set(contents(out).names)
    before = {name: (out / name).read_bytes() for name in (WEIGHTS, HALF)}
    events = set((out / "logs").rglob("events.out.tfevents.*"))
    (out / "hub.log").write_text("of before")

    def interrupted(run: object) -> int:
        raise UserError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(train_srl_vae, "finish", interrupted)
        assert run(*flags, "--report_to", "tensorboard", "--seed", "7")[0] == 2
    assert {name: (out / name).read_bytes() for name in before} == before
    assert [path.name for path in (out / "samples").iterdir()] == ["step-000000.png"]
    assert not (out / "hub.log").exists()
    assert not events & set((out / "logs").rglob("events.out.tfevents.*"))
    assert "comparison.png" not in (out / "README.md").read_text()
    with pytest.raises(UserError, match=r"README\.md was written before its training ended"):
        contents(out)
    assert run(*flags, "--seed", "7")[0] == 0
    assert not (out / HALF).exists()
    assert set(recorded_weights((out / "README.md").read_text())) == {WEIGHTS}
    assert HALF not in contents(out).names


@pytest.mark.parametrize(
    ("resumed_from", "expected"),
    [(None, 0), ("latest", 2), ("checkpoint-2", 2), ("out/checkpoint-2", 2), ("elsewhere/checkpoint-2", 0)],
)
def test_records_of_another_run_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed_from: str | None, expected: int
) -> None:
    """Oracle: where the checkpoint lies. Rows and pictures up to its step are of the same run in its own folder alone."""
    monkeypatch.chdir(tmp_path)
    for folder in ("out", "elsewhere"):
        (tmp_path / folder / "checkpoint-2").mkdir(parents=True)
    begun: list[int] = []
    records = SimpleNamespace(begin=begun.append)
    args = SimpleNamespace(output_dir=Path("out"), resume_from_checkpoint=resumed_from)
    step = 2 if resumed_from else 0
    run = SimpleNamespace(
        args=args, progress=SimpleNamespace(step=step), journal=records, validation=records,
        accelerator=SimpleNamespace(is_main_process=False),
    )  # fmt: skip
    assert begin_records(run) == expected
    assert begun == [expected, expected]


@pytest.mark.parametrize(("step", "left"), [(0, {"mine.png"}), (3, {"mine.png", "step-000000.png", "step-000003.png"})])
def test_pictures_after_the_step_are_taken_back(tmp_path: Path, step: int, left: set[str]) -> None:
    """Oracle: their numbers, as the journal's rows; what the judge does not draw stays."""
    (tmp_path / "samples").mkdir()
    for name in ("mine.png", "comparison.png", *(f"step-{number:06d}.png" for number in (0, 3, 4, 1_000_000))):
        (tmp_path / "samples" / name).write_bytes(b"")
    Validation.begin(SimpleNamespace(accelerator=SimpleNamespace(is_main_process=True), output_dir=tmp_path), step)
    assert {path.name for path in (tmp_path / "samples").iterdir()} == left


def test_results_under_other_conditions_are_measured_anew(tmp_path: Path) -> None:
    """Oracle: the rows. Those of the original VAE are kept where attacks, budget and number of images are the same, and
    where tokens, if it has some, are counted."""

    class Counting(Validation):
        measured = 0

        def _measure(self, codec: object, perturbations: list[Perturbation]) -> list[Row]:
            self.measured += 1
            settings = [Setting(one.name, one.objective, "adaptive", one.epsilon, "psnr") for one in perturbations]
            return [to_row("original", setting, 20.0, n=len(self.images)) for setting in settings]

    def times_measured(epsilon: float = 8 / 255, images: int = 3, codebook: object = None) -> int:
        validation = Counting(
            SimpleNamespace(is_main_process=True), original=SimpleNamespace(name="original", codebook=codebook), current=None,
            images=torch.zeros(images, 3, 8, 8), perceptual=None, epsilon=epsilon, output_dir=tmp_path, seed=0, batch_size=1,
        )  # fmt: skip
        validation.measure_original(resumed=True)
        assert {row.n for row in validation.rows} == {images}
        return validation.measured

    larger = 16 / 255
    assert [times_measured(), times_measured()] == [1, 0]
    assert [times_measured(larger), times_measured(larger), times_measured(larger, images=2)] == [1, 0, 1]
    assert times_measured(larger, images=2, codebook="codes") == 1


def test_what_is_published_names_no_folder_of_this_machine(photographs: Path, vae_folder: Path, tmp_path: Path) -> None:
    """Oracle: a search for the folders in the card's arguments, its command and its description of the data."""
    args = train_srl_vae.parse_args(
        ["--train_data_dir", "../alice/photos", "--validation_data_dir", "~/held-out", "--output_dir", "runs/x",
         "--pretrained_model_name_or_path", str(vae_folder), "--cache_dir", "/mnt/alice/cache"]
    )  # fmt: skip
    command = train_srl_vae.published(args)
    published = command.arguments
    assert published["train_data_dir"] == "photos"
    assert published["validation_data_dir"] == "held-out"
    assert published["output_dir"] == "runs/x"
    assert not re.search(rf"alice|~|{vae_folder.parent}", command.line)
    assert command.line.startswith("accelerate launch train_srl_vae.py ")
    several = train_srl_vae.published(args, num_processes=2).line
    assert several.startswith("accelerate launch --multi_gpu --num_processes 2 train_srl_vae.py ")
    data = open_data(
        DataSource(dataset_name=str(photographs), validation_split="0.2"), resolution=16, seed=0, center_crop=False,
        random_flip=False, num_validation_images=3,
    )  # fmt: skip
    assert data.description.startswith(f"{photographs.name}: ")


def test_exit_code_of_the_script(tmp_path: Path) -> None:
    """Oracle: the shell. Run as a plain script, bad input ends with 2 and one line on stderr."""
    result = subprocess.run(
        [sys.executable, SCRIPT, "--train_data_dir", tmp_path / "nowhere"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 2
    assert [line for line in result.stderr.splitlines() if "nowhere" in line]
    assert "Traceback" not in result.stderr


# --- recipes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("fast", ["--pgd_steps", "1", "--pgd_step_size", "10/255"]),
        (
            "latent",
            ["--pgd_steps", "3", "--pgd_step_size", "4/255", "--latent_weight", "0.3", "--latent_attack_share", "0.5"],
        ),
    ],
)
def test_a_recipe_only_sets_flags(name: str, own: list[str]) -> None:
    """Oracle: the flags themselves, given one by one; each can still be given beside the recipe, before or after it."""
    parse = train_srl_vae.parse_args
    paper, recipe = vars(parse([])), vars(parse(["--recipe", name]))
    assert vars(parse(["--recipe", "paper"])) == paper
    assert {flag for flag in paper if paper[flag] != recipe[flag]} == {"recipe", *train_srl_vae.RECIPES[name]}
    by_hand = parse([
        *own, "--originality_units", "scaled", "--originality_weight", "0.03", "--lr_scheduler", "cosine",
        "--lr_warmup_steps", "10",
    ])  # fmt: skip
    assert {**vars(by_hand), "recipe": name} == recipe
    for arguments in (["--recipe", name, "--pgd_steps", "4"], ["--pgd_steps", "4", "--recipe", name]):
        assert vars(parse(arguments)) == {**recipe, "pgd_steps": 4}


# --- precision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "force_upcast", "used"),
    [("fp16", True, "no"), ("fp16", False, "fp16"), ("bf16", True, "bf16"), ("no", True, "no")],
)
def test_force_upcast_is_honoured(wanted: str, force_upcast: bool, used: str) -> None:
    """Oracle: diffusers, which runs a VAE with force_upcast in float32 instead of float16."""
    execution = choose_execution(
        torch.device("cpu"), precision=wanted, torch_compile=False, force_upcast=force_upcast, flops=1e9
    )
    assert execution.precision == used


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs a C++ compiler")
def test_compiled_follows_eager(run: Run, flags: list[str], tmp_path: Path) -> None:
    """Oracle: the eager run, to float rounding; compiled on its own it would choose bf16 on some machines."""
    flags = [*flags, "--mixed_precision", "no"]
    assert run(*flags)[0] == 0
    assert run(*flags, "--torch_compile", "--output_dir", tmp_path / "compiled")[0] == 0
    for eager, compiled in zip(steps(tmp_path / "out"), steps(tmp_path / "compiled"), strict=True):
        assert eager["loss"] == pytest.approx(compiled["loss"], rel=1e-3)


@pytest.mark.parametrize("noise", [[], ["--gaussian_noise", "8/255", "--pgd_steps", "0"]])
def test_an_attack_without_a_budget(run: Run, flags: list[str], noise: list[str], tmp_path: Path) -> None:
    """Oracle: the real command. An epsilon of 0 costs no PSNR, so that no share of it can be won back."""
    position = flags.index("--pgd_steps")
    code, printed = run(*flags[:position], *flags[position + 2 :], *noise, "--max_train_steps", "1", "--epsilon", "0")
    assert code == 0, printed
    assert "is won back" not in printed and (tmp_path / "out/README.md").exists()


@pytest.mark.parametrize("empty", [["--hub_model_id="], ["--hub_model_id", ""]])
def test_an_empty_argument_shows_no_other(run: Run, flags: list[str], empty: list[str]) -> None:
    """Oracle: a search for a token that is given beside it."""
    code, printed = run(*flags, "--push_to_hub", "--hub_token", "secret123", *empty)
    assert code == 2 and "secret123" not in printed and "--hub_model_id" in printed


def test_the_evaluation_finds_the_numbers_of_the_validation(
    run: Run, flags: list[str], photographs: Path, vae_folder: Path, tmp_path: Path
) -> None:
    """Oracle: the two commands on the same VAEs and images. What has the same name has the same value, to the last digit."""
    split = flags.index("--validation_split")
    code, printed = run(
        *flags[:split], *flags[split + 2 :], "--validation_data_dir", photographs, "--max_train_steps", "1"
    )
    assert code == 0, printed
    attacks = ["clean", "noise", "pgd-10", "pgd-50x2"]
    words = [
        "reconstruction", "--baseline", vae_folder, "--vae", f"fine-tuned={tmp_path / 'out'}", "--data_dir", photographs,
        "--resolution", 16, "--num_images", 3, "--batch_size", 4, "--attacks", *attacks, "--epsilons", "8/255",
        "--threat_models", "adaptive", "--metrics", "psnr", "ssim", "drift", "--no_checks", "--mixed_precision", "no",
        "--output_dir", tmp_path / "evaluation",
    ]  # fmt: skip
    assert evaluate([str(word) for word in words]) == 0
    validated, evaluated = (
        {(row.vae, row.setting): row for row in map(Row.from_json, json.loads((folder / "results.json").read_text()))}
        for folder in (tmp_path / "out", tmp_path / "evaluation")
    )
    assert len(validated) == 2 * (4 * 2 + 1) and validated == evaluated
