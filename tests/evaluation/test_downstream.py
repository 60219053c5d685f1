"""Editing, generation, poisoned fine-tuning and personalisation with diffusion pipelines: the tasks, and the commands that run them."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel
from helpers.runs import ROOT, build_tiny_vae
from helpers.small_pipelines import SIZE, build_pipeline, small_vae
from helpers.small_text_encoder import add_text_encoders
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from srl_utils.attacks.draws import image_generators
from srl_utils.attacks.gradient import Objective
from srl_utils.attacks.protections import PROTECTIONS, ProtectedBatch, style_transfer
from srl_utils.attacks.protections.surrogates import SurrogateLoss
from srl_utils.command_line import exit_code
from srl_utils.errors import UserError
from srl_utils.evaluation.catalogue import AttackResources, select
from srl_utils.evaluation.cli import main as command
from srl_utils.evaluation.cli.editing import read_prompts
from srl_utils.evaluation.metering import Meter
from srl_utils.evaluation.perturbations import CLEAN
from srl_utils.evaluation.sanity import Check, CheckSettings
from srl_utils.evaluation.tasks import editing
from srl_utils.evaluation.tasks.editing import (
    INPAINTING,
    INSTRUCTION,
    build_edits,
    check_steps,
    replace_words,
)
from srl_utils.evaluation.tasks.finetuning import FinetuningConfig, finetune
from srl_utils.evaluation.tasks.generation import largest_difference
from srl_utils.evaluation.tasks.learning import changed_weights
from srl_utils.evaluation.tasks.personalisation import learnt_with
from srl_utils.evaluation.tasks.poisoning import Poison, divide, doses, poisoning
from srl_utils.images.pixels import from_pil, to_model_range, to_pil, to_unit_range
from srl_utils.metrics.features import FEATURE_SIMILARITY
from srl_utils.metrics.losses import PerceptualDistance
from srl_utils.pipelines.loading import as_image_to_image
from srl_utils.vae.codec import Codec, load_codec
from srl_utils.vae.loading import AutoencoderSource

PROMPTS = ["a b", "c"]
SETTINGS = {"num_inference_steps": 4, "guidance_scale": 3.0}


@pytest.fixture
def pipe(tmp_path: Path) -> StableDiffusionPipeline:
    """Stable Diffusion of random weights that reads prompts of letters, in latents of 4 channels."""
    return add_text_encoders(build_pipeline("sd"), tmp_path)


@pytest.fixture
def codec(tmp_path: Path) -> Codec:
    """A VAE other than the pipeline's own."""
    return saved_codec("other", tmp_path, seed=3)


def saved_codec(name: str, folder: Path, *, seed: int) -> Codec:
    build_tiny_vae(seed=seed).save_pretrained(folder / name)
    source = AutoencoderSource(pretrained_model_name_or_path=str(folder / name))
    return load_codec(name, source, device=torch.device("cpu"))


# --- edits ----------------------------------------------------------------------------------------------


def test_image_to_image_is_that_of_diffusers(pipe, codec, images) -> None:
    """Oracle: the library's pipeline, called with the same VAE, images and noise; its own VAE is back afterwards."""
    own = pipe.vae
    shown = images(2, SIZE)
    edit = build_edits(pipe, strengths=[0.5], **SETTINGS)["img2img-0.5"]
    result = edit(codec, shown, PROMPTS, image_generators(0, [4, 5]))
    parts = {**pipe.components, "vae": codec.vae, "requires_safety_checker": False}
    expected = StableDiffusionImg2ImgPipeline(**parts)(
        PROMPTS,
        image=to_unit_range(shown),
        strength=0.5,
        generator=image_generators(0, [4, 5]),
        output_type="pt",
        **SETTINGS,
    )
    torch.testing.assert_close(result, to_model_range(expected.images))
    assert pipe.vae is own and edit.pipeline.vae is own


def test_an_edit_does_not_depend_on_its_batch(pipe, codec, images) -> None:
    """Oracle: invariance, an image alone, with its own prompt and generator."""
    shown = images(2, SIZE)
    for edit in build_edits(pipe, strengths=[0.6], **SETTINGS).values():
        both = edit(codec, shown, PROMPTS, image_generators(0, [0, 1]))
        alone = edit(codec, shown[1:], PROMPTS[1:], image_generators(0, [1]))
        torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=0)


def test_inpainting_keeps_what_is_around_the_hole(pipe, codec, images, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: without a hole the VAE's own reconstruction; with one of the whole image, image-to-image at strength 1."""
    shown = images(2, SIZE)
    edits = build_edits(pipe, strengths=[1.0], **SETTINGS)

    def inpainted(mask: float) -> Tensor:
        monkeypatch.setattr(editing, "central_mask", lambda given: torch.full_like(given[:, :1], mask))
        return edits[INPAINTING](codec, shown, PROMPTS, image_generators(0, [0, 1]))

    with torch.no_grad():
        torch.testing.assert_close(inpainted(0.0), codec.reconstruct(shown).clamp(-1, 1), atol=1e-4, rtol=0)
    whole = edits["img2img-1"](codec, shown, PROMPTS, image_generators(0, [0, 1]))
    torch.testing.assert_close(inpainted(1.0), whole)


def test_every_pipeline_edits_in_its_own_way() -> None:
    """Oracle: specification; what has no image to start from edits nothing."""
    settings = {"strengths": [0.3, 0.7], **SETTINGS}
    assert list(build_edits(build_pipeline("sd2"), **settings)) == ["img2img-0.3", "img2img-0.7", INPAINTING]
    assert list(build_edits(build_pipeline("sdxl"), **settings)) == ["img2img-0.3", "img2img-0.7", INPAINTING]
    assert list(build_edits(build_pipeline("sd inpaint"), **settings)) == [INPAINTING]
    assert list(build_edits(build_pipeline("sd instruct"), **settings)) == [INSTRUCTION]


def test_glaze_heads_for_what_the_pipeline_draws(pipe, codec, images, random_lpips) -> None:
    """Oracle: the attack on the targets that `style_transfer` draws from the same generators, given by hand."""
    shown, target_pipeline = images(2, SIZE), as_image_to_image(pipe)
    resources = AttackResources(bound=PerceptualDistance(random_lpips), max_steps=2)

    def glazed(generators: list[torch.Generator], **further) -> Tensor:
        (glaze,) = select(["glaze"], [8 / 255], replace(resources, **further)).perturbations
        return glaze.apply(codec, shown, generators)

    generators = image_generators(0, [0, 1])
    target = style_transfer(target_pipeline, shown, generators=generators)
    expected = glazed(generators, target=target)
    torch.testing.assert_close(glazed(image_generators(0, [0, 1]), target_pipeline=target_pipeline), expected)
    assert not torch.allclose(glazed(image_generators(0, [0, 1]), target=shown), expected, atol=1e-3)


@pytest.mark.parametrize("kind", ["sd inpaint", "sd instruct"])
def test_models_made_for_editing_draw_no_targets(kind: str) -> None:
    """Oracle: specification; a message, and not the library's error in the middle of an attack."""
    with pytest.raises(UserError, match="cannot start from an image alone"):
        as_image_to_image(build_pipeline(kind))


def test_a_strength_that_leaves_no_step_is_refused() -> None:
    """Oracle: specification; three tenths of three steps are none, and a third of them is one."""
    few = {"num_inference_steps": 3, "guidance_scale": 2.0}
    check_steps(build_edits(build_pipeline("sd2"), strengths=[0.34], **few))
    with pytest.raises(UserError, match=r"img2img-0\.3 takes none of the 3 steps"):
        check_steps(build_edits(build_pipeline("sd2"), strengths=[0.5, 0.3], **few))


@pytest.mark.parametrize("kind", ["sd inpaint", "sd instruct"])
def test_models_made_for_editing_run(kind: str, codec, images, tmp_path: Path) -> None:
    """Oracle: another prompt gives another image, and the same one the same."""
    pipe = add_text_encoders(build_pipeline(kind), tmp_path)
    (edit,) = build_edits(pipe, strengths=[], **SETTINGS).values()
    first, again, other = (
        edit(codec, images(1, SIZE), [prompt], image_generators(0, [0])) for prompt in ("a b", "a b", "c d e")
    )
    assert first.shape == (1, 3, SIZE, SIZE) and torch.equal(first, again) and not torch.equal(first, other)


def test_words_are_exchanged_at_once() -> None:
    """Oracle: closed form."""
    assert replace_words("a red ring on red", {"red": "blue", "blue": "red"}) == "a blue ring on blue"
    assert replace_words("a redder ring", {"red": "blue"}) == "a redder ring"


def test_punctuation_around_a_word_is_kept() -> None:
    """Oracle: closed form; what names a word with its punctuation means it so."""
    assert (
        replace_words('a (red) ring, "red", 红。 - red.', {"red": "blue", "红": "蓝"})
        == 'a (blue) ring, "blue", 蓝。 - blue.'
    )
    assert replace_words("red, red", {"red,": "blue;"}) == "blue; red"
    assert replace_words("a red-hot ring's", {"red": "blue", "ring": "star"}) == "a red-hot ring's"


def test_prompts_of_a_file(tmp_path: Path) -> None:
    """Oracle: specification; a line for each, or one for all."""
    path = tmp_path / "prompts.txt"
    path.write_text("a b\n\n c d \n")
    assert read_prompts(path, 2) == ["a b", "c d"]
    with pytest.raises(UserError, match="has 2 lines; 3 images"):
        read_prompts(path, 3)
    path.write_text("a b\n")
    assert read_prompts(path, 3) == ["a b"] * 3
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path, 3)


def test_largest_difference_is_of_visible_pixels() -> None:
    """Oracle: closed form; beyond white there is nothing to see."""
    first, second = torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    first[0, 0, 0, 0] = 1.5
    second[1, 2, 3, 3] = 0.5
    assert largest_difference(first, second).tolist() == [0.0, 0.25]


def test_the_bar_moves_with_every_step_of_a_denoiser(pipe, codec, images) -> None:
    """Oracle: the cost model, exact. Guided edits of 2 images show the UNet 4 latents in each of 4 steps, at 0.2 passes; a
    fine-tuning trains a copy of it, on 2 latents forth and back in each of 3 steps.
    """
    (edit,) = (edit for name, edit in build_edits(pipe, strengths=[1.0], **SETTINGS).items() if name != INPAINTING)
    with tqdm(total=100, file=io.StringIO()) as bar:
        meter = Meter(bar)
        with meter.watching([codec], pipe.unet), meter.stage("edits", 50):
            edit(codec, images(2, SIZE), PROMPTS, image_generators(0, [0, 1]))
            assert pytest.approx(2 * edit.passes) == 4 * 4 * 0.2 and bar.n == round(2 * edit.passes)
            trained(pipe)
            assert bar.n == round(2 * edit.passes + 3 * 2 * 2 * 0.2)
        assert bar.n == 50 and not pipe.unet._forward_hooks


# --- fine-tuning and poisons ----------------------------------------------------------------------------


def trained(pipe: StableDiffusionPipeline, *, after_step=lambda step, unet: None, **config) -> dict[str, Tensor]:
    settings = {"num_steps": 3, "batch_size": 2, "learning_rate": 1e-3, **config}
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    unet = finetune(pipe, latents, ["a", "b", "c"], FinetuningConfig(**settings), seed=0, after_step=after_step)
    return unet.state_dict()


def test_finetuning_leaves_the_pipeline_alone(pipe) -> None:
    """Oracle: the pipeline's weights before; the copy's differ, and repeat themselves to the last bit."""
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    first, again = trained(pipe), trained(pipe)
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.unet.state_dict().items())
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())
    assert sum(not torch.equal(weight, before[name]) for name, weight in first.items()) > 0.9 * len(before)
    assert all(torch.equal(weight, before[name]) for name, weight in trained(pipe, learning_rate=0.0).items())


def test_a_denoiser_on_the_way_is_that_of_a_shorter_training(pipe) -> None:
    """Oracle: trainings of as many steps, to the last bit; looking changes nothing."""
    seen = {}

    def look(step: int, unet: UNet2DConditionModel) -> None:
        torch.rand(1)
        seen[step] = {name: weight.clone() for name, weight in unet.state_dict().items()}

    last = trained(pipe, after_step=look)
    for steps, weights in seen.items():
        alone = trained(pipe, num_steps=steps)
        assert all(torch.equal(weight, alone[name]) for name, weight in weights.items())
    assert list(seen) == [1, 2, 3] and all(torch.equal(weight, last[name]) for name, weight in seen[3].items())


def test_adapters_change_the_attention_alone(pipe) -> None:
    """Oracle: the names of the weights; merged, they are those of a plain UNet again."""
    pytest.importorskip("peft")
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    after = trained(pipe, lora_rank=2, learning_rate=1e-1)
    assert after.keys() == before.keys()
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed and all(any(part in name for part in ("to_q", "to_k", "to_v", "to_out.0")) for name in changed)


def test_weights_that_did_not_change_are_not_stored(pipe) -> None:
    """Oracle: the fine-tuned UNet, which the original's weights and the stored ones make up again."""
    pytest.importorskip("peft")
    config = FinetuningConfig(num_steps=2, batch_size=2, learning_rate=1e-1, lora_rank=2)
    unet = finetune(pipe, torch.randn(2, 4, 8, 8), ["a", "b"], config, seed=0)
    stored = changed_weights(unet, pipe.unet)
    assert 0 < len(stored) < len(unet.state_dict()) / 2
    again = pipe.unet.state_dict() | stored
    assert all(torch.equal(weight, again[name]) for name, weight in unet.state_dict().items())


def test_finetuning_learns(pipe) -> None:
    """Oracle: the training loss on what it learnt from, which falls."""
    from srl_utils.attacks.denoiser import Denoiser, encode_prompts

    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    unet = finetune(pipe, latents, ["a", "b"], FinetuningConfig(num_steps=40, batch_size=2, learning_rate=3e-3), seed=0)
    denoiser = Denoiser.from_pipeline(pipe, encode_prompts(pipe, ["a", "b"]))
    before, after = (
        torch.stack([each.loss(latents, image_generators(5, [n, n + 1])) for n in range(8)]).mean()
        for each in (denoiser, replace(denoiser, unet=unet))
    )
    assert after < 0.9 * before


def test_division_of_a_data_set() -> None:
    """Oracle: closed form on ten captions; no other image names the concept; words count, not their pieces, case or punctuation."""
    captions = [
        "a ring",
        "a star",
        "a ring",
        "a ringlet",
        "a star ring",
        "a ring",
        "a star",
        "a box",
        "a ring",
        "a ring",
    ]
    parts = divide(captions, concept="ring", target="star", num_poisons=2, num_held_out=2)
    assert (parts.poisonable, parts.held_out, parts.targets) == ([0, 2], [8, 9], [1, 6])
    assert parts.others == [1, 3, 6, 7]
    similar = ["a red ring", "a blue ring", "a blue star", "A star, red.", "a red star", "a red ring", "a ring"]
    parts = divide(similar, concept="ring", target="star", num_poisons=3, num_held_out=1)
    assert (parts.poisonable, parts.targets) == ([0, 1, 5], [3, 2, 4])
    with pytest.raises(UserError, match="5 captions name 'ring' and 2 'star'; 4 poisons and 2 held-out"):
        divide(captions, concept="ring", target="star", num_poisons=4, num_held_out=2)


def test_no_poison_and_a_control_are_no_threat() -> None:
    """Oracle: specification; attacks have threat models, and no poison is the same for all."""
    attack = Poison(name="nightshade", attack=lambda targets: CLEAN, epsilon=8 / 255)
    control = Poison(name="interpolated-50", share=0.5)
    given = [poisoning(dose) for dose in doses([attack, control], [5, 0, 2, 5])]
    assert [(each.name, each.adversarial, each.epsilon) for each in given] == [
        ("no poison", False, 0.0), ("nightshade-2", True, 8 / 255), ("nightshade-5", True, 8 / 255),
        ("interpolated-50-2", False, 0.0), ("interpolated-50-5", False, 0.0),
    ]  # fmt: skip


# --- commands -------------------------------------------------------------------------------------------

CAPTIONS = ["a ring", "a star", "a ring b", "a star c", "a ring d", "a ring e"]


@pytest.fixture
def world(pipe, images, tmp_path: Path) -> list[str]:
    """A pipeline, two VAEs and six captioned pictures on disk, and the flags that name them."""
    pipe.save_pretrained(tmp_path / "sd")
    pipe.vae.save_pretrained(tmp_path / "original")
    build_tiny_vae(seed=1).save_pretrained(tmp_path / "robust")
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(images(len(CAPTIONS), SIZE)):
        to_pil(image).save(folder / f"{number}.png")
    lines = [json.dumps({"file_name": f"{n}.png", "text": caption}) for n, caption in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return [
        "--baseline", str(tmp_path / "original"), "--vae", f"robust={tmp_path / 'robust'}", "--data_dir", str(folder),
        "--caption_column", "text", "--pipeline", str(tmp_path / "sd"), "--resolution", str(SIZE), "--num_images", "6",
        "--num_inference_steps", "3", "--guidance_scale", "2", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip


def rows_of(folder: Path) -> dict[tuple[str, str, str, str], float]:
    rows = json.loads((folder / "results.json").read_text())
    return {(row["vae"], row["attack"], row["threat_model"], row["metric"]): row["value"] for row in rows}


def test_generation_command(world, tmp_path: Path) -> None:
    """Oracle: the same VAE under another name has the same values throughout; the encoder has no part in images from text."""
    extra = ["--metrics", "psnr", "denoising-loss", "difference", "--strengths", "0.5"]
    arguments = [
        "generation",
        *world,
        *extra,
        "--vae",
        f"robust={tmp_path / 'robust'}",
        f"twin={tmp_path / 'original'}",
    ]
    assert command.main(arguments) == 0
    rows = rows_of(tmp_path / "out")
    assert {key[1] for key in rows} == {"clean, text-to-image", "clean, reconstructed", "clean, img2img-0.5"}
    for (vae, *rest), value in rows.items():
        if vae == "original":
            assert rows[("twin", *rest)] == value
    assert rows["original", "clean, text-to-image", "none", "difference"] == 0
    decoders_differ = rows["robust", "clean, text-to-image", "none", "difference"]
    assert decoders_differ > 0  # this one is no fine-tuned encoder but another VAE
    loss = [rows[vae, "clean, reconstructed", "none", "denoising-loss"] for vae in ("original", "robust")]
    assert loss[0] != loss[1]


def test_editing_command(world, tmp_path: Path) -> None:
    """Oracle: specification of rows and references, and a second call, which computes nothing and writes the same."""
    arguments = [
        "editing", *world, "--replace", "ring=box", "star=cup", "--attacks", "clean", "pgd-2", "--strengths", "0.6",
        "--metrics", "psnr", "ssim", "--no_checks",
    ]  # fmt: skip
    assert command.main(arguments) == 0
    rows = rows_of(tmp_path / "out")
    edits = ("img2img-0.6", INPAINTING)
    for edit in edits:
        assert ("original", f"clean, {edit}", "none", "psnr") not in rows  # it is what others are held against
        assert rows["robust", f"clean, {edit}", "none", "psnr"] < 60
        for vae in ("original", "robust"):
            assert {("transfer", "psnr"), ("adaptive", "ssim")} <= {
                key[2:] for key in rows if key[:2] == (vae, f"pgd-2, {edit}")
            }
    before = (tmp_path / "out/report.md").read_text()
    references = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/clean-edits").rglob("*.safetensors")}
    assert len(references) == 2 * len(edits) * len(CAPTIONS)
    assert command.main(arguments) == 0
    assert (tmp_path / "out/report.md").read_text() == before
    assert {path: path.stat().st_mtime_ns for path in references} == references


def test_glaze_is_bounded_by_the_classifier_where_lpips_is_missing(world, tmp_path: Path, monkeypatch) -> None:
    """Oracle: specification; the report says so. Without a classifier too, Glaze is left out."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    flags = ["--replace", "ring=box", "star=cup", "--edits", INPAINTING, "--metrics", "psnr", "--no_checks"]
    glazed = [*flags, "--attacks", "clean", "glaze", "--max_attack_steps", "1"]
    assert command.main(["editing", *world, *glazed, "--classifier", str(ROOT / "miniature/weights/classifier")]) == 0
    assert ("original", f"glaze, {INPAINTING}", "transfer", "psnr") in rows_of(tmp_path / "out")
    assert "Glaze is bounded by the distance of the classifier's features" in (tmp_path / "out/report.md").read_text()
    assert command.main(["editing", *world, *glazed, "--output_dir", str(tmp_path / "without")]) == 0
    assert "glaze was left out" in (tmp_path / "without/report.md").read_text()


def test_images_that_replace_changes_nothing_in_are_left_out(world, tmp_path: Path) -> None:
    """Oracle: the same command on the four other pictures alone, whose numbers as images differ and whose means are over
    as many; the note counts and names the two images and their captions.
    """
    few = ["--replace", "ring=box", "--attacks", "clean", "--edits", INPAINTING, "--metrics", "psnr", "--no_checks"]
    assert command.main(["editing", *world, *few]) == 0
    rows = json.loads((tmp_path / "out/results.json").read_text())
    assert {row["n"] for row in rows} == {4}
    told = "--replace changes nothing in 2 of 6 captions ('a star', 'a star c'); these images were left out: "
    names = ", ".join(str(tmp_path / f"photos/{number}.png") for number in (1, 3))
    assert told + names in (tmp_path / "out/report.md").read_text()
    metadata = tmp_path / "photos/metadata.jsonl"
    for number, line in enumerate(metadata.read_text().splitlines()):
        if "star" in line:
            (tmp_path / f"photos/{number}.png").unlink()
    metadata.write_text("\n".join(line for line in metadata.read_text().splitlines() if "ring" in line))
    assert command.main(["editing", *world, *few, "--num_images", "4", "--output_dir", str(tmp_path / "alone")]) == 0
    assert json.loads((tmp_path / "alone/results.json").read_text()) == rows


def test_a_vae_that_the_pipeline_cannot_take_is_left_out(world, tmp_path: Path, capsys) -> None:
    """Oracle: specification; other channels, another scale: a note for each, and an error where none is left."""
    small_vae(latent_channels=8).save_pretrained(tmp_path / "eight")
    AutoencoderTiny(latent_channels=4).save_pretrained(tmp_path / "taesd")
    few = ["--metrics", "psnr", "--strengths", "0.5", "--num_images", "2"]
    others = [str(tmp_path / name) for name in ("eight", "taesd")]
    assert command.main(["generation", *world, *few, "--vae", str(tmp_path / "robust"), *others]) == 0
    assert {key[0] for key in rows_of(tmp_path / "out")} == {"original", "robust"}
    report = (tmp_path / "out/report.md").read_text()
    assert "eight was left out: --pipeline cannot work with eight: this VAE does not fit" in report
    assert "cannot work with taesd: this VAE does not fit the pipeline: scaling_factor 1.0 instead of" in report
    assert exit_code(lambda: command.main(["generation", *world, *few, "--vae", *others])) == 2
    assert "eight was left out" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "edit"), [("sd inpaint", INPAINTING), ("sd instruct", INSTRUCTION)])
def test_pipelines_made_for_editing_are_taken(kind: str, edit: str, world, tmp_path: Path, capsys) -> None:
    """Oracle: specification; more goes into their UNets than latents. From text alone they make nothing, and it is said."""
    add_text_encoders(build_pipeline(kind), tmp_path).save_pretrained(tmp_path / "sd")
    few = ["--num_images", "2", "--metrics", "psnr", "--no_checks", "--max_attack_steps", "1"]
    attacks = ["clean", "pgd-2", "advdm", "diffusionguard"]
    assert command.main(["editing", *world, "--replace", "ring=box", "star=cup", *few, "--attacks", *attacks]) == 0
    made = {"clean", "pgd-2"} | ({"diffusionguard"} if kind == "sd inpaint" else set())
    assert {key[1] for key in rows_of(tmp_path / "out")} == {f"{name}, {edit}" for name in made}
    printed = capsys.readouterr().out
    for name in {*attacks} - made:
        assert f"{name} was left out: it attacks text-to-image models; give one as `pipeline`" in printed
    assert exit_code(lambda: command.main(["generation", *world])) == 2
    assert "makes no images from text alone" in capsys.readouterr().err


def test_poisoning_command(world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: with a learning rate of 0 no poison has an effect; with one it has, and poisons are made on their source.

    What was fine-tuned is kept, and given again the command trains nothing.
    """
    arguments = [
        "poisoning", *world, "--concept", "ring", "--target_concept", "star", "--num_poisons", "0", "2", "--num_generated", "2",
        "--max_attack_steps", "2", "--finetuning_steps", "2", "--finetuning_batch_size", "2", "--metrics", "psnr",
        "--num_check_images", "1",
    ]  # fmt: skip

    def checked(codec: Codec, baseline: Codec, images: Tensor, settings: CheckSettings, *, seed: int) -> list[Check]:
        return [Check(f"{codec.name} on {len(images)} image at {settings.epsilon}", passed=True, figures="")]

    monkeypatch.setattr("srl_utils.evaluation.cli.running.check_robustness", checked)
    assert command.main([*arguments, "--learning_rate", "0", "--output_dir", str(tmp_path / "still")]) == 0
    still = rows_of(tmp_path / "still")
    for vae in ("original", "robust"):
        assert len({value for key, value in still.items() if key[0] == vae}) == 1
    assert command.main([*arguments, "--learning_rate", "1e-2"]) == 0
    rows = rows_of(tmp_path / "out")
    assert "robust on 1 image at 0.04" in (tmp_path / "out/report.md").read_text()
    assert rows["robust", "no poison", "none", "psnr"] != rows["robust", "nightshade-2", "adaptive", "psnr"]
    assert rows["robust", "nightshade-2", "transfer", "psnr"] != rows["robust", "nightshade-2", "adaptive", "psnr"]
    assert rows["original", "nightshade-2", "transfer", "psnr"] == rows["original", "nightshade-2", "adaptive", "psnr"]
    assert (tmp_path / "out/figures/curves-number-of-poisons-nightshade.png").exists() and (
        tmp_path / "out/figures/generated.png"
    ).exists()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("srl_utils.evaluation.tasks.learning.finetune", refuse)
    assert command.main([*arguments, "--learning_rate", "1e-2"]) == 0
    assert rows_of(tmp_path / "out") == rows


PERSONAL = ["--concept", "ring", "--num_protected", "2", "--num_generated", "3", "--attacks", "pgd-2", "anti-dreambooth-aspl",
            "--max_attack_steps", "1", "--finetuning_steps", "2", "--lora_rank", "0"]  # fmt: skip


def test_the_fine_tuning_must_suit_the_pipeline(world, tmp_path: Path, capsys) -> None:
    """Oracle: specification; a model that learns no concept is refused before any attack is made."""
    add_text_encoders(build_pipeline("sd inpaint"), tmp_path).save_pretrained(tmp_path / "sd")
    assert exit_code(lambda: command.main(["personalisation", *world, *PERSONAL])) == 2
    assert "--pipeline: a StableDiffusionInpaintPipeline makes no images from text alone" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_personalisation_command(world, pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what the models learn: the latents of the first two of the concept's images, protected on the attack's
    source, and one caption. With a learning rate of 0 they generate what they did before; given again, the command trains
    nothing and writes the same rows.
    """
    metrics = [
        "--metrics",
        FEATURE_SIMILARITY,
        "shown",
        "fid",
        "--classifier",
        str(ROOT / "miniature/weights/classifier"),
    ]
    arguments = ["personalisation", *world, *PERSONAL, *metrics, "--num_check_images", "1"]
    learnt: list[tuple[Tensor, list[str]]] = []

    def keep(pipeline, latents: Tensor, captions: list[str], config, *, seed: int):
        learnt.append((latents, captions))
        return finetune(pipeline, latents, captions, config, seed=seed)

    def checked(codec: Codec, baseline: Codec, images: Tensor, settings: CheckSettings, *, seed: int) -> list[Check]:
        return [Check(f"{codec.name} on {len(images)} image", passed=True, figures="")]

    monkeypatch.setattr("srl_utils.evaluation.cli.running.check_robustness", checked)
    monkeypatch.setattr("srl_utils.evaluation.tasks.learning.finetune", keep)
    assert command.main([*arguments, "--learning_rate", "0", "--output_dir", str(tmp_path / "still")]) == 0
    for vae in ("original", "robust"):
        rows = {key: value for key, value in rows_of(tmp_path / "still").items() if key[0] == vae}
        for metric in (FEATURE_SIMILARITY, "shown", "fid"):
            values = [value for key, value in rows.items() if key[3] == metric]
            assert values == pytest.approx([values[0]] * 6, abs=1e-4)
    models = [path for path in (tmp_path / "still/finetuning/models").iterdir() if path.suffix != ".lock"]
    assert models and all(not load_file(path) for path in models)
    assert {captions[0] for _, captions in learnt} == {"a photo of sks ring"}
    assert len(learnt) == 2 * (1 + 2) + 2  # the baseline is attacked once, and the other VAE twice
    pictures = torch.stack([from_pil(Image.open(tmp_path / f"photos/{number}.png")) for number in (0, 2)])
    codec = saved_codec("original", tmp_path, seed=0)
    with torch.no_grad():
        clean = codec.scale(codec.encode(pictures), pipe)
    assert torch.allclose(learnt[0][0], clean, atol=1e-5)
    attacked = select(["pgd-2"], [8 / 255], AttackResources()).perturbations[0]
    shown = attacked.apply(codec, pictures, image_generators(0, [0, 1]))
    with torch.no_grad():
        protected = codec.scale(codec.encode(shown), pipe)
    assert any(torch.allclose(latents, protected, atol=1e-4) for latents, _ in learnt)

    assert command.main([*arguments, "--learning_rate", "1e-2"]) == 0
    rows = rows_of(tmp_path / "out")
    similar = [rows[("robust", *key, FEATURE_SIMILARITY)] for key in (
        ("not fine-tuned", "none"), ("clean", "none"), ("pgd-2", "transfer"), ("pgd-2", "adaptive"),
    )]  # fmt: skip
    assert len(set(similar)) == 4
    report = (tmp_path / "out/report.md").read_text()
    assert "robust on 1 image" in report and "compared with 2 clean images" in report
    for name in ("generated", f"{FEATURE_SIMILARITY}-by-attack-transfer", "shown-by-attack-adaptive"):
        assert (tmp_path / f"out/figures/{name}.png").exists()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("srl_utils.evaluation.tasks.learning.finetune", refuse)
    assert command.main([*arguments, "--learning_rate", "1e-2"]) == 0
    assert rows_of(tmp_path / "out") == rows


def test_a_joint_protection_is_made_on_all_images_of_the_concept(world, tmp_path: Path, monkeypatch) -> None:
    """Oracle: the numbers of images that ASPL is given, with batches of one; what stands for it in the generation is not
    joint, so that images are generated in batches."""
    given: list[int] = []

    def keep(batch: ProtectedBatch) -> Objective:
        given.append(len(batch.clean))
        return SurrogateLoss(batch)

    aspl = replace(PROTECTIONS["anti-dreambooth-aspl"], loss=keep)
    monkeypatch.setitem(PROTECTIONS, "anti-dreambooth-aspl", aspl)
    flags = ["--batch_size", "1", "--metrics", "shown", "--classifier", str(ROOT / "miniature/weights/classifier")]
    assert command.main(["personalisation", *world, *PERSONAL, *flags, "--no_checks"]) == 0
    assert given == [2, 2]  # on the baseline and on the other VAE
    assert not learnt_with(replace(CLEAN, joint=True), passes=0).joint


def test_all_images_show_the_concept_without_its_name(world, tmp_path: Path, capsys) -> None:
    """Oracle: specification; the prompt names no concept, and with one image left none is held out."""
    place = world.index("--caption_column")
    flags = [*world[:place], *world[place + 2 :], "--num_protected", "5", "--attacks", "clean", "--dry_run", "--no_checks",
             "--metrics", "clip-text", "--clip_model", str(ROOT / "miniature/weights/clip")]  # fmt: skip
    assert command.main(["personalisation", *flags]) == 0
    printed = capsys.readouterr().out
    assert "learn 5 images with the caption 'a photo of sks'; 16 images" in printed
    assert "compared with the clean originals" in printed and "not fine-tuned" in printed


PSNR = ["--metrics", "psnr"]


@pytest.mark.parametrize(
    "task",
    [
        ["generation", "--strengths", "0.5", *PSNR],
        ["editing", "--replace", "ring=box", "star=cup", "--strengths", "0.5", "--attacks", "clean", "photoguard-encoder",
         "--max_attack_steps", "2", "--no_checks", *PSNR],
        ["poisoning", "--concept", "ring", "--target_concept", "star", "--num_poisons", "0", "2", "--num_generated", "2",
         "--max_attack_steps", "2", "--finetuning_steps", "2", "--finetuning_batch_size", "2", "--no_checks", *PSNR],
        ["personalisation", "--concept", "ring", "--num_protected", "2", "--num_generated", "2", "--attacks", "clean", "pgd-2",
         "--finetuning_steps", "2", "--lora_rank", "0", "--no_checks", "--metrics", "shown", "feature-similarity",
         "--classifier", str(ROOT / "miniature/weights/classifier")],
    ],
    ids=lambda task: task[0],
)  # fmt: skip
def test_every_task_takes_purifiers(task: list[str], world, tmp_path: Path) -> None:
    """Oracle: invariance: the same rows from one image at a time, with a purifier that draws; a defence has rows of its own."""
    found = []
    for size in ("4", "1"):
        out = ["--output_dir", str(tmp_path / size), "--batch_size", size]
        assert command.main([*task, *world, *out, "--purifiers", "noise-0.1", "jpeg-30"]) == 0
        found.append(rows_of(tmp_path / size))
    assert found[0] == {key: pytest.approx(value, abs=0.05) for key, value in found[1].items()}
    names = {key[0] for key in found[0]}
    assert names == {f"{vae}{end}" for vae in ("original", "robust") for end in ("", " + noise-0.1", " + jpeg-30")}


def test_interpolated_latents(world, pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the latents that the model learns: those of the two images, mixed, at the scale of the denoiser."""
    learnt: dict[str, Tensor] = {}

    def keep(pipeline, latents: Tensor, captions, config, *, seed: int):
        learnt[f"{len(learnt)}"] = latents
        return finetune(pipeline, latents, captions, config, seed=seed)

    monkeypatch.setattr("srl_utils.evaluation.tasks.learning.finetune", keep)
    arguments = [
        "poisoning", *world, "--concept", "ring", "--target_concept", "star", "--num_poisons", "0", "2", "--num_generated", "2",
        "--protection", "interpolated-25", "interpolated-100", "--finetuning_steps", "1", "--finetuning_batch_size", "2",
        "--metrics", "psnr", "--no_checks",
    ]  # fmt: skip
    assert command.main(arguments) == 0
    assert {key[1:3] for key in rows_of(tmp_path / "out")} == {
        ("no poison", "none"), ("interpolated-25-2", "none"), ("interpolated-100-2", "none"),
    }  # fmt: skip
    clean, quarter, whole = (learnt[name] for name in ("0", "2", "4"))  # those between are of the other VAE
    assert len(clean) > 0 and quarter[2:].equal(clean) and whole[2:].equal(clean)
    pictures = torch.stack([from_pil(Image.open(tmp_path / f"photos/{number}.png")) for number in (0, 2)])
    codec = saved_codec("original", tmp_path, seed=0)
    with torch.no_grad():
        own = codec.scale(codec.encode(pictures), pipe)
    assert torch.allclose(quarter[:2], own + (whole[:2] - own) / 4, atol=1e-5)
    assert not whole[:2].allclose(own)
    assert len(list((tmp_path / "out/figures").glob("curves-*.png"))) == 3  # for each control, and against the way


def test_without_poisons_none_are_made(world, tmp_path: Path) -> None:
    """Oracle: what is kept; the control alone is a fine-tuning like any other."""
    arguments = [
        "poisoning", *world, "--concept", "ring", "--target_concept", "star", "--num_poisons", "0", "--num_generated", "2",
        "--finetuning_steps", "1", "--finetuning_batch_size", "2", "--metrics", "psnr",
    ]  # fmt: skip
    assert command.main(arguments) == 0
    assert {key[1:3] for key in rows_of(tmp_path / "out")} == {("no poison", "none")}
    assert not (tmp_path / "out/finetuning/poisons").exists()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("editing", ["--replace", "cube=box"], "changes nothing in 6 of 6 captions ('a ring', 'a star', 'a ring b', ...)"),
        ("editing", [], "one of the arguments --prompts --replace is required"),
        ("editing", ["--replace", "a=b", "--prompts", "p.txt"], "--prompts: not allowed with argument --replace"),
        ("editing", ["--replace", "ring"], "expected OLD=NEW"),
        ("editing", ["--replace", "a=b", "--metrics", "shown"], "--metrics: shown needs --classifier"),
        ("editing", ["--replace", "a=b", "--attacks", "clean", "--classifier", "none", "--metrics", "psnr"], "--classifier has no effect"),
        ("editing", ["--replace", "a=b", "--edits", "img2img-0.9"], "this pipeline has img2img-0.3, "),
        ("generation", ["--strengths", "0"], "0 would change nothing"),
        ("generation", ["--strengths", "0.5", "0.3"], "--num_inference_steps: img2img-0.3 takes none of the 3 steps"),
        ("editing", ["--replace", "ring=box", "star=cup", "--strengths", "0.3"], "--num_inference_steps: img2img-0.3 takes none of the 3 steps"),
        ("generation", ["--caption_column", "title"], "title"),
        ("poisoning", ["--concept", "ring", "--target_concept", "star"], "100 poisons and 32 held-out"),
        ("poisoning", ["--concept", "ring", "--target_concept", "star", "--num_poisons", "0", "--epsilon", "8/255"], "--epsilon has no effect"),
        ("personalisation", ["--concept", "star"], "there are 2 images whose captions name 'star', and 4 are to be protected"),
        ("personalisation", ["--concept", "ring", "--num_protected", "7"], "--num_protected: there are 4 images"),
        ("personalisation", [], "--caption_column has no effect"),
        ("personalisation", ["--concept", "ring", "--pipeline", "nowhere"], "--pipeline"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(name: str, change: list[str], message: str, world, tmp_path: Path, capsys) -> None:
    """Oracle: specification, exit code 2 and nothing written."""
    assert exit_code(lambda: command.main([name, *world, *change])) == 2
    *_, told = capsys.readouterr().err.splitlines()  # above it, diffusers' bar of what it loads
    assert told.startswith("error: ") and message in told
    assert not (tmp_path / "out").exists()


def test_captions_of_a_folder_need_their_file(world, tmp_path: Path, capsys) -> None:
    """Oracle: specification; the line says what the file must hold."""
    (tmp_path / "photos/metadata.jsonl").unlink()
    assert exit_code(lambda: command.main(["generation", *world])) == 2
    assert re.search(r"metadata\.jsonl,? with a line such as", capsys.readouterr().err)
    (tmp_path / "photos/metadata.jsonl").write_text("{}")
    assert exit_code(lambda: command.main(["generation", *world])) == 2
    assert "metadata.jsonl: row 1 has no file_name" in capsys.readouterr().err


def test_images_without_a_caption_are_left_out_and_named(world, tmp_path: Path, capsys) -> None:
    """Oracle: specification; what is left of the six images, and the name of the one that is not."""
    path = tmp_path / "photos/metadata.jsonl"
    first, *others = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(others), encoding="utf-8")
    assert command.main(["generation", *world, "--strengths", "0.6", "--metrics", "psnr", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    name = str(tmp_path / "photos" / json.loads(first)["file_name"])
    assert f"1 images without a caption were left out: {name}" in printed
    assert f"{len(CAPTIONS) - 1} images, 2 VAEs" in printed


def test_text_files_beside_the_images_are_captions(world, tmp_path: Path, capsys) -> None:
    """Oracle: the same images and captions in the other form, so nothing is left out."""
    path = tmp_path / "photos/metadata.jsonl"
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        (tmp_path / "photos" / row["file_name"]).with_suffix(".txt").write_text(row["text"], encoding="utf-8")
    path.unlink()
    few = ["--strengths", "0.6", "--metrics", "psnr", "--attacks", "clean", "--no_checks", "--dry_run"]
    assert command.main(["editing", *world, "--replace", "ring=box", "star=cup", *few]) == 0
    printed = capsys.readouterr().out
    assert f"{len(CAPTIONS)} images, 2 VAEs" in printed and "without a caption" not in printed
