"""The training and the evaluation of every supported class of autoencoder, on small random instances."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, ModelMixin
from helpers.autoencoders import small_autoencoder
from helpers.runs import ROOT, Run, assert_same_weights, launch, steps
from safetensors.torch import load_file
from torch import Tensor

from miniature.scenes import draw_clip
from srl_utils.evaluation.__main__ import main as evaluate
from srl_utils.images.datasets import load_validation_images
from srl_utils.images.pixels import frames_of
from srl_utils.images.sources import DataSource
from srl_utils.metrics.features import changes_of_clips, frechet_distance, load_image_classifier
from srl_utils.vae.codec import Codec
from srl_utils.vae.families import FAMILIES
from srl_utils.vae.loading import WEIGHTS_NAME, AutoencoderSource, load_autoencoder
from srl_utils.vae.networks import LatentDecoder, LatentEncoder, split_moments

CLASSIFIER = ROOT / "miniature/weights/classifier"
EVERY_CLASS = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def flags(name: str, photographs: Path, tmp_path: Path) -> list[object]:
    """A training of 20 steps on 32 px, whose result is in `tmp_path / "out"`."""
    small_autoencoder(name).save_pretrained(tmp_path / "vae")
    return [
        "--pretrained_model_name_or_path", tmp_path / "vae", "--train_data_dir", photographs, "--resolution", 32,
        "--output_dir", tmp_path / "out", "--train_batch_size", 2, "--max_train_steps", 20, "--lpips_weight", 0,
        "--recipe", "fast", "--learning_rate", "1e-2", "--num_validation_images", 2, "--report_to", "none",
        "--no-torch_compile", "--mixed_precision", "no",
    ]  # fmt: skip


@EVERY_CLASS
def test_training(name: str, run: Run, flags: list[object], tmp_path: Path) -> None:
    """Oracle: attacked PSNR rises; the encoder's side alone changes, the rest keeps its bytes; both loaders take it."""
    code, printed = run(*flags)
    assert code == 0, printed
    base, tuned = load_file(tmp_path / "vae" / WEIGHTS_NAME), load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert base.keys() == tuned.keys()
    changed = {key.partition(".")[0] for key in base if not torch.equal(base[key], tuned[key])}
    assert "encoder" in changed and changed <= set(FAMILIES[name].trained)
    source = AutoencoderSource(pretrained_model_name_or_path=str(tmp_path / "out"))
    loaded = load_autoencoder(source), AutoModel.from_pretrained(str(tmp_path / "out"))
    assert {type(vae) for vae in loaded} == {FAMILIES[name].kind}
    rows = json.loads((tmp_path / "out/results.json").read_text())
    attacked = {row["vae"]: row["value"] for row in rows if (row["attack"], row["metric"]) == ("pgd-50x2", "psnr")}
    assert attacked["fine-tuned"] > attacked["original"]
    assert f"{name}.from_pretrained(" in (tmp_path / "out/README.md").read_text()


def gradients(vae: ModelMixin, images: Tensor) -> list[Tensor]:
    """Those of the images and of the encoder's side, through encoder and decoder."""
    vae.zero_grad()
    encoder, shown = LatentEncoder(vae), images.clone().requires_grad_(True)
    LatentDecoder(vae)(split_moments(encoder(shown)).mean).square().sum().backward()
    return [shown.grad, *(each.grad for each in encoder.parameters() if each.grad is not None)]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.checkpointing])
def test_gradients_with_checkpointing(name: str, images) -> None:
    """Oracle: the gradients without it, of two batches in turn."""
    plain, checkpointed = small_autoencoder(name), small_autoencoder(name)
    checkpointed.enable_gradient_checkpointing()
    assert checkpointed.is_gradient_checkpointing
    for batch in images(4, 32).split(2):
        torch.testing.assert_close(gradients(checkpointed, batch), gradients(plain, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["AutoencoderKL", *(name for name, family in FAMILIES.items() if not family.checkpointing)]
)
def test_gradient_checkpointing(name: str, run: Run, flags: list[object], tmp_path: Path) -> None:
    """Oracle: the losses without it, or one line for the classes where diffusers has none or a wrong one."""
    flags += ["--max_train_steps", 1]
    code, printed = run(*flags, "--gradient_checkpointing", "--output_dir", tmp_path / "checkpointed")
    if not FAMILIES[name].checkpointing:
        assert code == 2 and f"--gradient_checkpointing: diffusers has none that works for {name}" in printed
        return
    assert code == 0, printed
    assert run(*flags)[0] == 0
    for one, other in zip(steps(tmp_path / "out"), steps(tmp_path / "checkpointed"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.slow
@EVERY_CLASS
def test_resuming_is_exact(name: str, run: Run, flags: list[object], tmp_path: Path) -> None:
    """Oracle: the undisturbed run, to the last bit."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags += ["--max_train_steps", 4, "--checkpointing_steps", 2]
    assert run(*flags, "--output_dir", whole)[0] == 0
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    code, printed = run(*flags, "--output_dir", resumed, "--resume_from_checkpoint", "latest")
    assert code == 0, printed
    assert_same_weights(whole, resumed)


@pytest.mark.slow
@EVERY_CLASS
def test_two_processes_follow_one(name: str, run: Run, flags: list[object], tmp_path: Path) -> None:
    """Oracle: one process with twice the batch, to float rounding."""
    flags += ["--max_train_steps", 3, "--recipe", "latent", "--adam_epsilon", "1e-4", "--learning_rate", "1e-3"]
    assert run(*flags)[0] == 0
    two = [*flags, "--train_batch_size", 1, "--output_dir", tmp_path / "two"]
    result = launch(*two, processes=2, script=ROOT / "train_srl_vae.py")
    assert result.returncode == 0, result.stderr[-3000:]
    for ours, theirs in zip(steps(tmp_path / "out"), steps(tmp_path / "two"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)  # signs of gradients near 0 differ


@pytest.mark.slow
@EVERY_CLASS
@pytest.mark.parametrize("execution", [["--mixed_precision", "bf16"], ["--torch_compile"]], ids=["bf16", "compiled"])
def test_other_executions_follow(
    name: str, run: Run, flags: list[object], execution: list[str], tmp_path: Path
) -> None:
    """Oracle: float32 that is not compiled, to the rounding of the precision."""
    flags += ["--max_train_steps", 2, "--learning_rate", "1e-4"]
    assert run(*flags)[0] == 0
    code, printed = run(*flags, *execution, "--output_dir", tmp_path / "other")
    assert code == 0, printed
    for one, other in zip(steps(tmp_path / "out"), steps(tmp_path / "other"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=3e-2 if "bf16" in execution else 1e-3)


@pytest.mark.parametrize(
    "name", [name if name == "VQModel" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_every_check_and_attack_of_the_evaluation(name: str, photographs: Path, tmp_path: Path) -> None:
    """Oracle: the real command: every attack of the strong preset is measured, on the VAE itself too, and each check."""
    for seed, folder in enumerate(("base", "robust")):
        small_autoencoder(name, seed=seed).save_pretrained(tmp_path / folder)
    code = evaluate([
        "reconstruction", "--baseline", str(tmp_path / "base"), "--vae", f"robust={tmp_path / 'robust'}",
        "--data_dir", str(photographs), "--resolution", "32", "--num_images", "2", "--attacks", "strong",
        "--epsilons", "8/255", "--max_attack_steps", "2", "--num_check_images", "2", "--metrics", "psnr", "drift",
        "latent-travel", "--output_dir", str(tmp_path / "out"),
    ])  # fmt: skip
    assert code == 0
    rows = json.loads((tmp_path / "out/results.json").read_text())
    attacks = {row["attack"] for row in rows if row["vae"] == "robust" and row["threat_model"] == "adaptive"}
    assert {"pgd-10", "apgd-100", "square-1000", "photoguard-encoder", "mist-textural", "pid"} <= attacks
    assert all(isinstance(row["value"], float) for row in rows)
    assert "checks" in (tmp_path / "out/report.html").read_text().lower()


def classes_of_clips(*by_default: str) -> pytest.MarkDecorator:
    """Parametrise a test over the classes of videos and one of images; all but those `by_default` are slow."""
    names = ["AutoencoderKL", "VQModel", *(name for name, family in FAMILIES.items() if family.video)]
    marked = [name if name in by_default else pytest.param(name, marks=pytest.mark.slow) for name in names]
    return pytest.mark.parametrize("name", marked)


@pytest.fixture
def clips(name: str, tmp_path: Path) -> tuple[Path, int]:
    """Six folders of frames of moving scenes, and the least number of frames above 1 that a class takes."""
    family = FAMILIES[name]
    count = 3 if family.frames is None else 1 + family.frames(small_autoencoder(name).config)
    for number in range(6):
        folder = tmp_path / "clips" / f"{number}"
        folder.mkdir(parents=True)
        for time, frame in enumerate(draw_clip(1, number, frames=count + 2, size=32)):
            frame.save(folder / f"{time}.png")
    return tmp_path / "clips", count


@classes_of_clips("AutoencoderKL", "AutoencoderKLWan")
def test_training_on_clips(name: str, run: Run, flags: list[object], clips: tuple[Path, int], tmp_path: Path) -> None:
    """Oracle: the PSNR of attacked training clips, the same in every fourth step, rises; a resumed run has the weights of
    the undisturbed one."""
    folder, count = clips
    flags += ["--train_data_dir", folder, "--num_frames", count, "--center_crop", "--checkpointing_steps", 10]
    code, printed = run(*flags)
    assert code == 0, printed
    attacked = [row["attacked_psnr"] for row in steps(tmp_path / "out")]
    assert sum(attacked[-4:]) > sum(attacked[:4]) + 0.1
    judged = {row["metric"] for row in json.loads((tmp_path / "out/results.json").read_text())}
    assert {"psnr", "ssim", "warping-error", "flicker"} <= judged
    assert "flicker are lower when a clip is steadier" in (tmp_path / "out/README.md").read_text()
    shutil.copytree(tmp_path / "out/checkpoint-10", tmp_path / "resumed/checkpoint-10")
    code, printed = run(*flags, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", "latest")
    assert code == 0, printed
    assert_same_weights(tmp_path / "out", tmp_path / "resumed")


@pytest.mark.parametrize("name", ["AutoencoderKLWan"])
def test_clips_that_do_not_suit_are_refused(name: str, run: Run, flags: list[object], clips: tuple[Path, int]) -> None:
    """Oracle: specification, one line: a number of frames that the VAE does not give back, and images instead of clips."""
    folder, _ = clips
    code, printed = run(*flags, "--train_data_dir", folder, "--num_frames", 4)
    assert code == 2 and "--num_frames: 4 frames do not suit this VAE" in printed and "try 5" in printed, printed
    code, printed = run(*flags, "--train_data_dir", folder / "0", "--num_frames", 5)
    assert code == 2 and "holds no clips, but --num_frames is 5" in printed, printed
    videos = folder.parent / "videos"
    videos.mkdir()
    (videos / "walk.mp4").write_bytes(b"")
    code, printed = run(*flags, "--train_data_dir", videos)
    assert code == 2 and "take clips of videos with --num_frames" in printed, printed


@pytest.mark.parametrize("name", ["AutoencoderDC", "AutoencoderTiny", "VQModel"])
def test_a_point_is_not_sampled(name: str, run: Run, flags: list[object]) -> None:
    """Oracle: specification, one line: an encoder that gives a point has no posterior to sample."""
    code, printed = run(*flags, "--sample_posterior")
    assert code == 2 and f"--sample_posterior: the encoder of {name} has no posterior" in printed, printed
    assert not FAMILIES[name].posterior


@classes_of_clips("AutoencoderKL")
def test_evaluation_of_clips(name: str, clips: tuple[Path, int], tmp_path: Path) -> None:
    """Oracle: the real command: every attack on clips is measured, with the metrics of clips and each check; attacks on
    the first frame do no more than those on all; one with a clip as its target pulls latents towards that clip's; attacks on
    denoisers are left out with a note. The Fréchet distance of frame changes is that of the classifier's features."""
    folder, count = clips
    for seed, place in enumerate(("base", "robust")):
        small_autoencoder(name, seed=seed).save_pretrained(tmp_path / place)
    attacks = [
        "clean", "noise", "jpeg-3", "gaussian-blur-1", "pgd-10", "pgd-10-first", "apgd-10-latents", "square-20",
        "photoguard-encoder", "mist-textural", "pid", "uvcg", "posterior-collapse-minus",
        "editshield", "blurguard", "sds",
    ]  # fmt: skip
    code = evaluate([
        "reconstruction", "--baseline", str(tmp_path / "base"), "--vae", f"robust={tmp_path / 'robust'}",
        "--data_dir", str(folder), "--resolution", "32", "--num_frames", str(count), "--num_images", "2",
        "--attacks", *attacks, "--epsilons", "8/255", "--max_attack_steps", "2", "--num_check_images", "2",
        "--metrics", "psnr", "ssim", "drift", "latent-travel", "latent-share", "warping-error", "flicker", "rfid",
        "rfid-changes", "--classifier", str(CLASSIFIER), "--target", str(folder / "1"), "--output_dir", str(tmp_path / "out"),
    ])  # fmt: skip
    assert code == 0
    rows = json.loads((tmp_path / "out/results.json").read_text())
    measured = {(row["attack"], row["metric"]): row["value"] for row in rows if row["vae"] == "original"}
    assert {attack for attack, _ in measured} == {*(set(attacks) - {"noise", "sds"}), "gaussian-noise"}
    assert {"warping-error", "flicker", "latent-travel", "rfid"} <= {metric for _, metric in measured}
    assert measured["uvcg", "latent-share"] > 0
    assert measured["pgd-10", "psnr"] < measured["clean", "psnr"]
    # Two steps in a random network: those on one frame may do nothing, and those on all reach no further.
    assert measured["pgd-10", "psnr"] - 0.1 < measured["pgd-10-first", "psnr"] < measured["clean", "psnr"] + 0.1
    report = (tmp_path / "out/report.md").read_text()
    clip = load_validation_images(
        DataSource(validation_data_dir=str(folder), num_frames=count), num_images=2, resolution=32
    ).images
    pool = load_image_classifier(str(CLASSIFIER)).features
    changes = [
        changes_of_clips(pool(frames_of(each))["pool"], 2)
        for each in (
            clip,
            Codec.of(
                load_autoencoder(AutoencoderSource(pretrained_model_name_or_path=str(tmp_path / "base"))), "base"
            ).reconstruct(clip),
        )
    ]
    assert measured["clean", "rfid-changes"] == pytest.approx(frechet_distance(*changes), rel=1e-2)
    flat = (clip - clip.flatten(2).mean(dim=2)[..., None, None, None]).square().mean()
    assert f"a flat colour: {10 * torch.log10(4 / flat):.2f} dB" in report
    assert "sds was left out: " in report and f"2 clips of {count} frames from clips, 32 px" in report
