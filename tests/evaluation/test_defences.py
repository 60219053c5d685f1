"""Defences: VAEs behind purifiers, what attacks on them know, and the report's choice among them."""

from __future__ import annotations

import json
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from helpers.purifying_pipelines import build_pixel_model, build_stable_diffusion, build_upscaler
from helpers.runs import draw_images, write_photos
from helpers.small_pipelines import build_pipeline
from helpers.small_text_encoder import add_text_encoders
from torch import Tensor

from srl_utils.attacks.draws import image_generators, purifying_generators
from srl_utils.errors import UserError
from srl_utils.evaluation.__main__ import main as evaluate
from srl_utils.evaluation.cells import cells_of, measure
from srl_utils.evaluation.cli.main import parse_args
from srl_utils.evaluation.cli.setup import Setup, defended
from srl_utils.evaluation.defences import Defence, defences
from srl_utils.evaluation.motion import TRAVEL, motion
from srl_utils.evaluation.perturbations import ADAPTIVE, CLEAN, TRANSFER, Perturbation, usual_attack
from srl_utils.evaluation.report.defences import BEST, defence_panels
from srl_utils.evaluation.results import Record, Setting, to_rows
from srl_utils.evaluation.study import THREAT_MODELS
from srl_utils.evaluation.tasks.base import Metrics, Reconstruction
from srl_utils.evaluation.tasks.editing import Editing, build_edits
from srl_utils.evaluation.tasks.generation import build_text_to_image
from srl_utils.evaluation.timings import Timings, kept_timings
from srl_utils.metrics.pixels import psnr
from srl_utils.purifiers import Purifier, purifier_of
from srl_utils.vae.codec import Codec, frozen_codec

EPSILON = 8 / 255
JPEG, NOISE = purifier_of("jpeg-30"), purifier_of("noise-0.1")
HIDDEN = Purifier(name="hidden", apply=lambda images, _: images.detach() / 2, differentiable=False)
TIMINGS = Timings(purifiers={"jpeg-30": 1.5}, encoders={"original": 0.0125}, device="CPU", n=2)


@pytest.fixture
def codecs(tiny_vae, other_tiny_vae) -> list[Codec]:
    return [
        frozen_codec(vae, name, device=torch.device("cpu"))
        for name, vae in (("original", tiny_vae), ("robust", other_tiny_vae))
    ]


def measured(codecs: list[Codec], images: Tensor, *, batch_size: int = 4) -> list[Record]:
    task = Reconstruction(metrics=Metrics(names=["psnr"]), baseline=codecs[0], images=images)
    attacks = [CLEAN, usual_attack(EPSILON)]
    return measure(codecs, attacks, task, images, numbers=range(len(images)), seed=0, batch_size=batch_size)


def test_attacks_are_made_on_what_they_can_differentiate(codecs: list[Codec]) -> None:
    """Oracle: specification. An attacker who cannot see through a purifier attacks the VAE alone."""
    every = defences(codecs, [JPEG, HIDDEN])
    cells = list(cells_of(usual_attack(EPSILON), every, THREAT_MODELS))
    made = {cell.source.name: {codec.name: cell.threat_models[codec.name] for codec in cell.judged} for cell in cells}
    both = (TRANSFER, ADAPTIVE)
    assert made == {
        "original": {
            "original": both, "robust": (TRANSFER,), "original + jpeg-30": (TRANSFER,), "robust + jpeg-30": (TRANSFER,),
            "original + hidden": both, "robust + hidden": (TRANSFER,),
        },
        "robust": {"robust": (ADAPTIVE,), "robust + hidden": (ADAPTIVE,)},
        "original + jpeg-30": {"original + jpeg-30": (ADAPTIVE,)},
        "robust + jpeg-30": {"robust + jpeg-30": (ADAPTIVE,)},
    }  # fmt: skip


def test_a_defence_reconstructs_the_purified_image(codecs: list[Codec]) -> None:
    """Oracle: the purifier and the VAE, one after the other."""
    images = draw_images(2, 16)
    expected = codecs[1].reconstruct(JPEG(images))
    assert torch.equal(Defence.by(codecs[1], JPEG).reconstruct(images), expected)
    values = {record.vae: record.value for record in measured(defences(codecs, [JPEG]), images[:1])[:4]}
    assert values["robust + jpeg-30"] == pytest.approx(psnr(expected, images)[0].item(), abs=1e-4)


def test_an_attack_sees_through_a_differentiable_purifier(codecs: list[Codec]) -> None:
    """Oracle: an attack that knows the purifier does more harm behind it than one that does not."""
    images, defence = draw_images(4, 16), Defence.by(codecs[0], purifier_of("resize-0.5"))
    attack = usual_attack(EPSILON)
    harm = {}
    for name, victim in (("knowing", defence), ("unknowing", codecs[0])):
        attacked = attack.apply(victim, images, image_generators(0, range(4)))
        harm[name] = psnr(defence.reconstruct(attacked), defence.reconstruct(images)).mean().item()
    assert harm["knowing"] < harm["unknowing"] - 0.5


def test_noise_does_not_depend_on_the_batch(codecs: list[Codec]) -> None:
    """Oracle: invariance: one image at a time; a second image has noise of its own."""
    images = draw_images(1, 16).repeat(3, 1, 1, 1)
    every = [codecs[0], Defence.by(codecs[0], NOISE)]
    together, alone = (
        {
            (record.vae, record.index): record.value
            for record in measured(every, images, batch_size=size)
            if record.setting.attack == "clean"
        }
        for size in (3, 1)
    )
    assert together == {key: pytest.approx(value, rel=1e-4) for key, value in alone.items()}
    assert len({value for (vae, _), value in together.items() if vae != "original"}) == 3


def test_draws_end_with_their_context(codecs: list[Codec]) -> None:
    """Oracle: invariance within the context; the attacker's draws are others; after it, the outer ones return."""
    defence, images = Defence.by(codecs[0], NOISE), draw_images(2, 16)
    judged, attackers = (
        lambda attacked=attacked: purifying_generators(0, range(2), attacked=attacked) for attacked in (False, True)
    )
    with defence.drawing(judged()):
        first = defence.purified(images)
        with defence.drawing(attackers()):
            assert not torch.equal(defence.purified(images), first)
    with defence.drawing(judged()):
        assert torch.equal(defence.purified(images), first)
    assert not torch.equal(codecs[0].purified(images), first) and torch.equal(codecs[0].purified(images), images)


@pytest.mark.parametrize("name", ["img2img-0.5", "inpainting"])
def test_edits_are_of_purified_images(name: str, tmp_path: Path) -> None:
    """Oracle: the same edit of an image that was purified beforehand, by the VAE alone."""
    pipe = add_text_encoders(build_pipeline("sd"), tmp_path)
    edit = build_edits(pipe, strengths=[0.5], num_inference_steps=4, guidance_scale=1.0)[name]
    codec = frozen_codec(pipe.vae, "original", device=torch.device("cpu"))
    images = draw_images(1, 32)
    found = edit(Defence.by(codec, JPEG), images, ["a cat"], image_generators(0, [0]))
    assert torch.equal(found, edit(codec, JPEG(images), ["a cat"], image_generators(0, [0])))
    assert not torch.equal(found, edit(codec, images, ["a cat"], image_generators(0, [0])))


def test_nothing_is_purified_for_text_to_image(tmp_path: Path) -> None:
    """Oracle: the VAE alone, which makes images of the same size; a purifier that was called would be noticed."""

    def unwanted(images: Tensor, _: object) -> Tensor:
        raise AssertionError("text-to-image sees no image")

    pipe = add_text_encoders(build_pipeline("sd"), tmp_path)
    edit = build_text_to_image(pipe, 32, num_inference_steps=2, guidance_scale=1.0)
    codec, blank = frozen_codec(pipe.vae, "original", device=torch.device("cpu")), torch.zeros(1, 3, 32, 32)
    defence = Defence.by(codec, Purifier(name="unwanted", apply=unwanted))
    found = edit(defence, blank, ["a cat"], image_generators(0, [0]))
    assert found.shape == blank.shape and torch.equal(found, edit(codec, blank, ["a cat"], image_generators(0, [0])))


def test_the_best_purifier_of_each_image(codecs: list[Codec]) -> None:
    """Oracle: by hand: of two images, one is better with the purifier and one without it."""
    every = defences(codecs[:1], [JPEG])
    setting = Setting("clean", None, "none", 0.0, "psnr")
    values = {"original": (20.0, 30.0), "original + jpeg-30": (28.0, 24.0)}
    records = [Record(vae, setting, index, value) for vae, pair in values.items() for index, value in enumerate(pair)]
    best, seconds, table = defence_panels(every, to_rows(records), records, TIMINGS)
    assert best.table[1][3:] == ["original + jpeg-30", table.table[2][2]] and table.table[2][2].startswith("26.00")
    assert table.table[3][:2] == [BEST, "PSNR (dB)"] and table.table[3][2].startswith("29.00 [28.00, 30.00]")
    assert table.title == "Defences: clean" and "What purifying costs" in table.explanation
    assert seconds.table[1:] == [["none", "0", "0.0125"], ["jpeg-30", "1.5", "1.51"]]


def test_adaptive_attacks_have_no_best_purifier(codecs: list[Codec]) -> None:
    """Oracle: specification: each purifier was shown another image, so that nobody could choose among them."""
    lines = {}
    for threat in THREAT_MODELS:
        setting = Setting("pgd-10", "mse", threat, EPSILON, "psnr")
        records = [Record(codec.name, setting, 0, 20.0) for codec in defences(codecs[:1], [JPEG])]
        *_, table = defence_panels(defences(codecs[:1], [JPEG]), to_rows(records), records, TIMINGS)
        lines[threat] = [line[0] for line in table.table]
    assert BEST in lines[TRANSFER] and BEST not in lines[ADAPTIVE]


def test_an_attack_takes_the_mean_of_draws(codecs: list[Codec]) -> None:
    """Oracle: counting the purifier's calls: ten for each of a purifier that does not draw."""
    calls = {}
    for random in (False, True):
        seen = []

        def apply(images: Tensor, _: object, seen: list = seen) -> Tensor:
            seen.append(len(images))
            return images

        defence = Defence.by(codecs[0], Purifier(name="counting", apply=apply, random=random))
        usual_attack(EPSILON).apply(defence, draw_images(2, 16), image_generators(0, range(2)))
        calls[random] = len(seen)
    assert calls[False] >= 10 and calls[True] == 10 * calls[False]


def test_what_a_purifier_draws_is_no_move_of_the_latents(codecs: list[Codec]) -> None:
    """Oracle: an unchanged image, which has not moved, whatever is drawn."""
    images, defence = draw_images(2, 16), Defence.by(codecs[0], NOISE)
    draws = partial(purifying_generators, 0, range(2))
    still, moved = (
        motion(defence, images, shown, wanted=[TRAVEL], unit=1.0, draws=draws)[TRAVEL]
        for shown in (images, images.flip(0))
    )
    assert still.tolist() == [0, 0] and moved.min() > 0
    assert motion(defence, images, images, wanted=[TRAVEL], unit=1.0)[TRAVEL].min() > 0


def test_edits_are_compared_with_those_of_images_that_nobody_purified(tmp_path: Path) -> None:
    """Oracle: the edit of the clean image by the VAE alone; so a purifier that leaves nothing of an image is no defence."""
    pipe = add_text_encoders(build_pipeline("sd"), tmp_path)
    codec = frozen_codec(pipe.vae, "original", device=torch.device("cpu"))
    grey = Defence.by(codec, Purifier(name="grey", apply=lambda images, _: torch.zeros_like(images)))
    images = draw_images(1, 32)
    task = Editing(
        metrics=Metrics(names=["psnr"]), baseline=codec, images=images, prompts=["a cat"], classifier=None, folder=tmp_path,
        edits=build_edits(pipe, strengths=[0.5], num_inference_steps=4, guidance_scale=1.0), seed=0,
    )  # fmt: skip
    (cell,) = cells_of(Perturbation(name="same", apply=lambda codec, clean, _: clean), [codec, grey])
    outcome = task.attempt(cell, grey, images, [0], "img2img-0.5")
    alone = task.edits["img2img-0.5"](codec, images, ["a cat"], image_generators(0, [0]))
    assert torch.equal(task.reference(grey, [0], "img2img-0.5"), alone)
    assert task.measure(cell, grey, outcome, [0], "img2img-0.5")["psnr"].item() == psnr(outcome, alone).item() < 60


def test_a_defence_is_timed_once(codecs: list[Codec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a clock that the purifier moves by a known time, and each look at it by 3 ms; the warm-up and the calls that
    take longer do not count. A second call reads the file.
    """
    now, extra = 0.0, iter([10.0, 1.0, 0.5, 5.0, 0.2])

    def clock() -> float:
        nonlocal now
        now += 0.003
        return now

    def slow(images: Tensor, _: object) -> Tensor:
        nonlocal now
        now += 0.05 * len(images) + next(extra, 0.0)
        return images

    monkeypatch.setattr("srl_utils.resources.time", SimpleNamespace(perf_counter=clock))

    every = defences(codecs, [Purifier(name="slow", apply=slow)])
    call = {"codecs": every, "images": draw_images(3, 16), "seed": 0, "device": "CPU"}
    timings = kept_timings(tmp_path / "timings.json", **call)
    assert timings.purifiers == {"slow": pytest.approx(0.051)}
    assert timings.encoders == {name: pytest.approx(0.001) for name in ("original", "robust")}
    assert (timings.n, timings.device) == (3, "CPU")
    assert kept_timings(tmp_path / "timings.json", **call) == timings


def test_the_command_judges_defences(codecs: list[Codec], tmp_path: Path) -> None:
    """Oracle: the real command. Every defence has rows, and both reports the panels. Clean images are judged without being
    asked for. A second call repeats the seconds. Wrong names are told at once.
    """
    write_photos(tmp_path / "photos", draw_images(2, 32))
    for codec in codecs:
        codec.vae.save_pretrained(tmp_path / codec.name)
    command = [
        "reconstruction", "--baseline", str(tmp_path / "original"), "--vae", f"robust={tmp_path / 'robust'}", "--data_dir",
        str(tmp_path / "photos"), "--resolution", "32", "--attacks", "pgd-2", "--epsilons", "8/255", "--metrics",
        "psnr", "--num_images", "2", "--output_dir", str(tmp_path / "out"), "--no_checks",
    ]  # fmt: skip
    purified = ["--purifiers", "resize-0.5+jpeg-75", "vae-loop-robust"]
    assert evaluate([*command, *purified]) == 0
    rows = json.loads((tmp_path / "out/results.json").read_text())
    assert {row["vae"] for row in rows} == {
        f"{vae}{purifier}"
        for vae in ("original", "robust")
        for purifier in ("", " + resize-0.5+jpeg-75", " + vae-loop-robust")
    }
    for report in ("report.md", "report.html"):
        assert "Which defence" in (tmp_path / "out" / report).read_text()
    before = (tmp_path / "out/report.md").read_text()
    assert "## Seconds per image" in before and "## Defences: clean\n\nWhat purifying costs" in before
    assert evaluate([*command, *purified]) == 0
    assert (tmp_path / "out/report.md").read_text() == before
    with pytest.raises(UserError, match="no purifier 'jpg-75'; choose from jpeg-QUALITY"):
        evaluate([*command, "--purifiers", "jpg-75"])


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_command_purifies_by_pipelines(
    precision: str, codecs: list[Codec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the real command with saved pipelines: every purifier changes what is measured."""
    monkeypatch.setattr("srl_utils.purifiers.diffusing.STEPS", 2)
    for state in (AcceleratorState, PartialState, GradientState):
        monkeypatch.setattr(state, "_shared_state", {})
    write_photos(tmp_path / "photos", draw_images(1, 32))
    text_to_image = build_stable_diffusion(tmp_path)
    parts = {
        "sd": text_to_image,
        "upscaler": build_upscaler(text_to_image),
        "pixels": build_pixel_model(),
        "vae": codecs[0].vae,
    }
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
    purifiers = ["img2img-0.5", "noisy-upscaling-0.1", "diffpure-3"]
    command = [
        "reconstruction", "--baseline", str(tmp_path / "vae"), "--data_dir", str(tmp_path / "photos"), "--resolution", "32",
        "--attacks", "clean", "--metrics", "psnr", "--no_checks", "--output_dir", str(tmp_path / "out"),
        "--mixed_precision", precision, "--pipeline", str(tmp_path / "sd"), "--purifiers", *purifiers,
        "--purifier_pipelines", str(tmp_path / "upscaler"), str(tmp_path / "pixels"),
    ]  # fmt: skip
    assert evaluate(command) == 0
    rows = json.loads((tmp_path / "out/results.json").read_text())
    values = {row["vae"]: row["value"] for row in rows}
    assert values.keys() == {"original", *(f"original + {name}" for name in purifiers)}
    assert len(set(values.values())) == len(values)


@pytest.mark.parametrize("again", ["resize-0.5+jpeg-75", "resize-.5+jpeg-75", "resize-0.5 + jpeg-75.0"])
def test_a_purifier_that_is_given_twice_counts_once(again: str, codecs: list[Codec]) -> None:
    """Oracle: specification. Another spelling of a number, or spaces, make no other purifier."""
    setup = Setup(
        accelerator=Accelerator(), codecs=codecs, images=draw_images(1, 16), captions=[""], names=["0.png"], pipeline=None,
        origins={}, notes=[],
    )  # fmt: skip
    args = Namespace(purifiers=["resize-0.5+jpeg-75", again], purifier_pipelines=None)
    names = [codec.name for codec in defended(setup, args, None).codecs]
    assert names == ["original", "robust", "original + resize-0.5+jpeg-75", "robust + resize-0.5+jpeg-75"]


WORDS = ["reconstruction", "--baseline", "vae", "--data_dir", "photos", "--metrics", "psnr", "--attacks", "clean"]


@pytest.mark.parametrize(
    ("flag", "purifier"),
    [("pipeline", "img2img-0.1"), ("purifier_pipelines", "gridpure"), ("classifier", "jpeg-75+impress")],
)
def test_flags_that_a_purifier_needs_have_an_effect(flag: str, purifier: str) -> None:
    """Oracle: specification: they are accepted beside such a purifier, and refused beside another one."""
    args: Namespace = parse_args([*WORDS, f"--{flag}", "place", "--purifiers", purifier])
    assert getattr(args, flag) in ("place", ["place"])
    with pytest.raises(UserError, match=f"--{flag} has no effect without"):
        parse_args([*WORDS, f"--{flag}", "place", "--purifiers", "jpeg-75"])
