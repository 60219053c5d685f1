"""Whole autoencoders trained against attacks, denoisers that adapt to them, and what is made of the results."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from helpers.runs import build_tiny_vae
from matplotlib import image as pictures

import train_srl_vae
from experiments import adaptation, compatibility, whole_training
from experiments.claims import ORIGINAL, Results, trained_name
from miniature.scene_set import scene_set
from miniature.training import Settings
from srl_utils.attacks.gradient import PGDConfig
from srl_utils.evaluation.cli import main as evaluation
from srl_utils.evaluation.perturbations import ADAPTIVE, NO_THREAT


def trained_whole(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: object) -> AutoencoderKL:
    """The autoencoder of a training of three steps on four scenes."""
    words = ["--steps", 3, "--batch_size", 2, "--num_scenes", 4, *flags, "--output_dir", folder]
    monkeypatch.setattr(sys, "argv", ["whole_training", *map(str, words)])
    whole_training.main()
    return AutoencoderKL.from_pretrained(folder)


def test_the_whole_autoencoder_is_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: the start: both halves move; latents of the scenes have unit variance at the scale that is written; an attack
    that never begins leaves the weights of clean training, and one that does makes others."""
    start = build_tiny_vae()
    start.save_pretrained(tmp_path / "start")
    vae = trained_whole(monkeypatch, tmp_path / "attacked", "--vae", tmp_path / "start")
    for half in ("encoder", "decoder"):
        before, after = (getattr(each, half).conv_in.weight for each in (start, vae))
        assert not torch.equal(before, after)
    scenes = scene_set(tmp_path / "attacked/scenes", seed=1, count=4)
    with torch.no_grad():
        latents = vae.encode(scenes.pixels(torch.arange(4))).latent_dist.mean
    assert latents.std().item() * vae.config.scaling_factor == pytest.approx(1, rel=1e-3)
    clean = [
        trained_whole(monkeypatch, tmp_path / f"clean{steps}", "--vae", tmp_path / "start", "--clean_steps", steps)
        for steps in (3, 99)
    ]
    assert torch.equal(clean[0].encoder.conv_in.weight, clean[1].encoder.conv_in.weight)
    assert not torch.equal(clean[0].encoder.conv_in.weight, vae.encoder.conv_in.weight)


def test_the_loss_is_that_of_attacked_scenes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: the clean loss, computed plainly; the attack makes it larger."""
    torch.manual_seed(0)
    vae, scenes = build_tiny_vae(), scene_set(tmp_path, seed=1, count=4)
    settings = Settings(
        work_dir=tmp_path, steps=1, batch_size=4, learning_rate=1e-3, seed=0, device="cpu", torch_compile=False
    )
    clean, attacked = (
        whole_training.robust_loss(vae, 0, scenes=scenes, settings=settings, clean_steps=steps).item()
        for steps in (1, 0)
    )
    images = scenes.pixels(torch.arange(4))
    with torch.no_grad():
        plain = (vae(images).sample - images).square().mean().item()
    assert clean == pytest.approx(plain, rel=1e-5) and attacked > clean


@pytest.mark.parametrize("scale", [compatibility.FULL, compatibility.QUICK], ids=["full", "quick"])
def test_the_flags_parse(scale: compatibility.Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the parsers of the commands, which also refuse flags without effect; all ways have the same attack."""
    run = compatibility.Runner(tmp_path, compatibility.WEIGHTS / "vae", title="compatibility", num_calls=1)
    encoder, *whole = (compatibility.training_of(run, way, 0, scale) for way in compatibility.WAYS)
    args = train_srl_vae.parse_args([*map(str, encoder.flags)], environment={})
    attack = PGDConfig(epsilon=args.epsilon, step_size=args.pgd_step_size, num_steps=args.pgd_steps, random_start=True)
    assert attack == whole_training.ATTACK
    taught = [compatibility.adaptation_to(run, name, scale) for name in (ORIGINAL, "from nothing")]
    parsers = {whole_training.__name__: whole_training.parse_args, adaptation.__name__: adaptation.parse_args}
    for module in (*whole, *taught):
        monkeypatch.setattr(sys, "argv", [module.name, *map(str, module.flags)])
        assert parsers[module.name]().output_dir == module.done.parent
    shared = ["--baseline", "vae", "--data_dir", "data", "--num_images", "4"]
    flags = [*shared, *map(str, compatibility.reconstruction_flags(scale))]
    assert evaluation.parse_args(["reconstruction", *flags]).threat_models == ["adaptive"]
    assert evaluation.parse_args(["geometry", *shared, "--parts", "smoothness"]).parts == ["smoothness"]


def test_denoisers_are_taught_seed_by_seed() -> None:
    """Oracle: specification; encoder and decoder three times, the others once."""
    scale = replace(compatibility.FULL, seeds=2)
    first = [ORIGINAL, "encoder", "encoder and decoder", "from nothing", "from nothing, clean first"]
    assert compatibility.taught_autoencoders(scale) == [*first, "encoder and decoder (seed 1)"]


def results_of(ways: dict[str, tuple[float, list[float], list[float]]]) -> tuple[Results, Results]:
    """Results with the attacked PSNR of each way, and both FIDs after each number of steps."""
    scale = compatibility.FULL
    reconstruction = {(way, "apgd-50", ADAPTIVE, "psnr"): value for way, (value, *_) in ways.items()}
    taught = {
        (way, f"{start}-{steps}", NO_THREAT, metric): value
        for way, (_, *fids) in ways.items()
        for metric, values in zip(compatibility.FIDS, fids, strict=True)
        for start, numbers in (("adapted", scale.adapted), ("anew", scale.anew))
        for steps, value in zip(numbers, values, strict=False)
    }
    return Results(reconstruction), Results(taught)


def test_the_price_of_compatibility(tmp_path: Path) -> None:
    """Oracle: made-up values: the first number of steps whose FIDs are both within a tenth of the original's; a picture."""
    nothing = list(compatibility.WAYS)[2:]
    ways = {
        ORIGINAL: (19.0, [5.0, 5.0, 5.0, 5.0], [9.0, 9.0, 9.0, 9.0]),
        "encoder": (25.0, [5.4, 5.3, 5.2, 5.1], [12.0, 9.5, 9.0, 9.0]),
        "encoder and decoder": (26.0, [60.0, 20.0, 8.0, 5.5], [9.0, 9.0, 9.0, 9.0]),
        nothing[0]: (24.0, [90.0, 80.0, 40.0, 20.0], [9.0, 9.0, 9.0, 9.0]),
        nothing[1]: (25.0, [90.0, 80.0, 5.4, 5.3], [90.0, 9.9, 9.0, 9.0]),
    }
    reconstruction, taught = results_of(ways)
    needed = [compatibility.steps_needed(taught, way, compatibility.FULL) for way in ways]
    assert needed == [0, 30, 300, None, 100]
    compatibility.draw_price(reconstruction, taught, compatibility.FULL, tmp_path / "price.png")
    assert pictures.imread(tmp_path / "price.png").std() > 0.05
    table = compatibility.adaptation_table(taught, compatibility.FULL)
    line = next(line for line in table.splitlines() if "encoder and decoder" in line)
    assert [cell.strip() for cell in line.split("|")[4:-1]] == ["60", "20", "8", "", "5.5", ""]


def test_what_denoisers_generate_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the files of two autoencoders, read as results."""
    run = compatibility.Runner(tmp_path, compatibility.WEIGHTS / "vae", title="compatibility", num_calls=1)
    for name, fid in ((ORIGINAL, 5.0), (trained_name("encoder", 1), 6.0)):
        folder = compatibility.adaptation_folder(run, name)
        folder.mkdir(parents=True)
        (folder / "adapted-30.json").write_text(json.dumps({"fid": fid, "shown": 0.9}))
    compatibility.keep_adaptation(run, [ORIGINAL, "encoder", trained_name("encoder", 1)])
    kept = Results.read(tmp_path / "adaptation/results.json")
    assert kept.of(ORIGINAL, "adapted-30", NO_THREAT, "fid") == [5.0]
    assert kept.of("encoder", "adapted-30", NO_THREAT, "fid") == [6.0]


@pytest.mark.parametrize("start", [adaptation.ADAPTED, adaptation.ANEW])
def test_a_denoiser_is_taught(start: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: the real command on the miniature: a file of measures for each number of steps; a second run measures nothing."""
    words = [
        "--vae", compatibility.WEIGHTS / "vae", "--steps", *([0, 1] if start == adaptation.ADAPTED else []), "--steps_anew",
        *([0, 1] if start == adaptation.ANEW else []), "--num_scenes", 4, "--num_images", 4, "--batch_size", 2,
        "--work_dir", tmp_path / "scenes", "--output_dir", tmp_path / "out",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["adaptation", *map(str, words)])
    monkeypatch.setattr(adaptation, "INFERENCE_STEPS", 2)
    adaptation.main()
    untaught, taught = (json.loads((tmp_path / f"out/{start}-{steps}.json").read_text()) for steps in (0, 1))
    assert untaught != taught
    for values in (untaught, taught):
        assert values.keys() == {"fid", "edited-fid", "shown"} and 0 <= values["shown"] <= 1
        assert min(values["fid"], values["edited-fid"]) >= 0
    monkeypatch.setattr(adaptation, "generated_and_edited", lambda *_, **__: pytest.fail("measured again"))
    adaptation.main()
