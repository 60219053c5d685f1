"""The cells of an evaluation, the catalogue they come from, and the checks of a claimed robustness."""

from __future__ import annotations

import io
import json
import re
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from helpers.runs import ROOT, launch, write_photos
from helpers.small_pipelines import small_vae
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from srl_utils.attacks.corruptions import CORRUPTIONS
from srl_utils.attacks.draws import image_generators
from srl_utils.attacks.protections import PROTECTIONS
from srl_utils.command_line import exit_code
from srl_utils.errors import UserError
from srl_utils.evaluation.catalogue import PRESETS, AttackResources, select
from srl_utils.evaluation.cells import measure
from srl_utils.evaluation.cli import loading, reconstruction, running
from srl_utils.evaluation.cli import main as command
from srl_utils.evaluation.cli.setup import find_incompatible
from srl_utils.evaluation.metering import Meter
from srl_utils.evaluation.perturbations import CLEAN, MSE, attack_on, noise
from srl_utils.evaluation.report.extremes import MOST_VAES, draw_extremes, strongest_cell
from srl_utils.evaluation.results import Record, Setting
from srl_utils.evaluation.sanity import CheckSettings, check_robustness
from srl_utils.evaluation.study import Job, Study
from srl_utils.evaluation.tasks.base import Metrics, Reconstruction
from srl_utils.vae.codec import Codec

EPSILON = 8 / 255
shallow = partial(CheckSettings, steps=(4, 10, 20), queries=50)


def codec(vae: nn.Module, name: str) -> Codec:
    return Codec.of(vae, name)


@pytest.fixture
def study(tiny_vae, other_tiny_vae, images, tmp_path: Path) -> Study:
    """Two VAEs, five images, a clean cell, a noisy one, and two attacks."""
    codecs = [codec(tiny_vae, "original"), codec(other_tiny_vae, "robust")]
    metrics = Metrics(names=("psnr", "ssim", "drift"))
    return Study(
        accelerator=Accelerator(cpu=True),
        codecs=codecs,
        perturbations=select(
            ["clean", "noise", "pgd-2", "photoguard-encoder"], [EPSILON], AttackResources(max_steps=2)
        ).perturbations,
        threat_models=("transfer", "adaptive"),
        task=Reconstruction(metrics=metrics, baseline=codecs[0], images=images(5)),
        images=images(5),
        output_dir=tmp_path,
        fingerprint={"seed": 0},
        seed=0,
        batch_size=2,
    )


# --- study ----------------------------------------------------------------------------------------------


def test_adaptive_values_are_those_of_measure(study) -> None:
    """Oracle: `measure`, which keeps nothing and attacks each VAE itself, with another batch size."""
    records = study.run()
    robust = study.codecs[1]
    perturbations = [item for item in study.perturbations if item.name != "clean"]
    expected = measure([robust], perturbations, study.task, study.images, numbers=range(5), seed=0, batch_size=5)
    found = {record[:-1]: record.value for record in records}
    for record in expected:
        assert found[record[:-1]] == pytest.approx(record.value, abs=1e-3)


def test_transfer_shows_everyone_what_was_made_on_the_baseline(study) -> None:
    """Oracle: for the baseline both threat models are the same; the other VAE is shown the baseline's images."""
    values = {record[:-1]: record.value for record in study.run()}
    attack = next(item for item in study.perturbations if item.name == "pgd-2")
    for index in range(5):
        transfer, adaptive = (
            values["original", Setting("pgd-2", "mse", model, attack.epsilon, "psnr"), index]
            for model in ("transfer", "adaptive")
        )
        assert transfer == adaptive
    transferred = [
        value for key, value in values.items() if (key[0], *key[1][:3]) == ("robust", "pgd-2", "mse", "transfer")
    ]
    adapted = [
        value for key, value in values.items() if (key[0], *key[1][:3]) == ("robust", "pgd-2", "mse", "adaptive")
    ]
    assert len(transferred) == len(adapted) and transferred != adapted


def test_finished_batches_are_not_computed_again(study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the records of an undisturbed run, to the last bit; a crash within a cell costs one batch of it."""
    computed: list[tuple[str, list[int]]] = []
    compute = Study._compute

    def crashing(self: Study, job: Job, meter: Meter) -> None:
        if len(computed) == 4:  # three batches make a cell
            raise KeyboardInterrupt
        computed.append((job.cell.title, list(job.batch)))
        compute(self, job, meter)

    def counting(self: Study, job: Job, meter: Meter) -> None:
        computed.append((job.cell.title, list(job.batch)))
        compute(self, job, meter)

    monkeypatch.setattr(Study, "_compute", crashing)
    with pytest.raises(KeyboardInterrupt):
        study.run()
    monkeypatch.setattr(Study, "_compute", counting)
    resumed = study.run()
    cells = list(study.cells())
    assert computed == [(cell.title, batch) for cell in cells for batch in ([0, 1], [2, 3], [4])]
    assert resumed == replace(study, output_dir=study.output_dir / "fresh").run()
    assert all(isinstance(record, Record) for record in resumed)


def test_cells_of_like_names_stay_apart(study, tiny_vae, other_tiny_vae, tmp_path: Path) -> None:
    """Oracle: each VAE and budget alone; names that no file could have, and budgets that differ in the tenth digit."""
    names = ("original", "a/b", "a_b", "../up")
    codecs = [codec(vae, name) for vae, name in zip((tiny_vae, other_tiny_vae) * 2, names, strict=True)]
    perturbations = select(["pgd-1"], [EPSILON, EPSILON + 1e-10], AttackResources()).perturbations
    mixed = replace(study, codecs=codecs, perturbations=perturbations, output_dir=tmp_path / "mixed").run()
    for place, judged in enumerate(codecs[1:]):
        for perturbation in perturbations:
            alone = replace(
                study, codecs=[codecs[0], judged], perturbations=[perturbation],
                output_dir=tmp_path / f"alone-{place}-{perturbation.epsilon!r}",
            ).run()  # fmt: skip
            wanted = (judged.name, perturbation.epsilon)
            assert [record for record in mixed if (record.vae, record.setting.epsilon) == wanted] == [
                record for record in alone if record.vae == judged.name
            ]


def test_cells_of_an_older_version_are_refused(study) -> None:
    """Oracle: the record of a study whose values said less of an attack; their cells cannot be read as today's."""
    study.run()
    path = study.output_dir / "study.json"
    stored = json.loads(path.read_text())
    del stored["records"]
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"other settings .*records"):
        study.run()


def test_another_study_in_the_folder_is_refused(study) -> None:
    """Oracle: specification; the message names what differs, and more attacks are no other study."""
    study.run()
    replace(study, perturbations=[CLEAN, noise(1 / 255)]).run()
    with pytest.raises(UserError, match="seed"):
        replace(study, fingerprint={"seed": 1}).run()


class Overflowing(nn.Module):
    """A decoder that breaks on latents which only an attack reaches."""

    def __init__(self, decoder: nn.Module, limit: float) -> None:
        super().__init__()
        self.decoder, self.limit = decoder, limit

    def forward(self, latents: Tensor) -> Tensor:
        broken = latents.abs().amax(dim=(1, 2, 3), keepdim=True) > self.limit
        return self.decoder(latents).masked_fill(broken, float("nan"))


def test_values_that_are_not_finite_end_the_study(study) -> None:
    """Oracle: specification; one line that names VAE, images and attack, instead of a mean over the rest."""
    robust = study.codecs[1]
    largest = robust.encode(study.images).detach().abs().amax(dim=(1, 2, 3)).sort().values
    broken = replace(robust, decoder=Overflowing(robust.decoder, limit=(largest[-2] + largest[-1]).item() / 2))
    with pytest.raises(UserError, match=r"robust returns values that are not finite for the images \d under clean"):
        replace(study, codecs=[study.codecs[0], broken]).run()


def test_an_attack_that_meets_values_that_are_not_finite_ends_the_study(study) -> None:
    """Oracle: specification. The clean images pass; an attack that keeps its best would hide what broke it on its way."""
    attack = attack_on(
        MSE,
        "peek",
        lambda objective, clean, generators: clean + 0 * objective(clean * float("nan")).nan_to_num().sum(),
        epsilon=EPSILON,
        calls=1,
    )
    with pytest.raises(UserError, match=r"original returns values that are not finite for the images 0, 1 under peek"):
        replace(study, perturbations=[CLEAN, attack]).run()


def test_drift_of_the_baseline_is_zero(study) -> None:
    """Oracle: closed form; no other cell than the clean one has a drift."""
    drifts = [record for record in study.run() if record.setting.metric == "drift"]
    assert {record.setting.attack for record in drifts} == {"clean"}
    assert all((record.value == 0) == (record.vae == "original") for record in drifts)


def bars(printed: str) -> list[tuple[str, int, int]]:
    """Title, units done and units in all, of everything that a bar wrote where there is no terminal."""
    found = re.findall(r"([^\r\n|]*?):\s+\d+%\|[^|]*\| (\d+)/(\d+) ", printed)
    return [(title.strip(), int(done), int(total)) for title, done, total in found]


def test_a_log_says_what_is_being_measured(arguments, tmp_path: Path, capsys, monkeypatch) -> None:
    """Oracle: the real command without a terminal. Every bar has a first line and a last one at its end, by the cost
    model's total; titles name VAE, attack and images. Of the study: 4 x 2 clean, and 2 x (4 x (4 + 2) + 4 x (4 + 1)).
    """
    monkeypatch.setattr(reconstruction, "CheckSettings", shallow)
    assert command.main(arguments) == 0
    found = bars(capsys.readouterr().err)
    whole = [bar for bar in found if bar[2] == 96]
    assert whole[0] == ("evaluation", 0, 96) and whole[-1][1:] == (96, 96)
    assert whole[-1][0] == "robust judged, pgd-2 8/255 on robust: images 1 to 4 of 4"
    checks = [bar for bar in found if "checks of robust" in bar[0]]
    assert checks[-1] == ("checks of robust: 9 of 9", checks[0][2], checks[0][2])
    pictures = [bar for bar in found if bar[0].startswith("picture")]
    assert pictures[-1][1] == pictures[-1][2]


@pytest.mark.parametrize(
    ("attack", "passes"), [("pgd-20", 40), ("apgd-20", 40), ("square-40", 40), ("photoguard-encoder", 12)]
)
def test_the_bar_moves_evenly_through_an_attack(attack: str, passes: int, study) -> None:
    """Oracle: the cost model. In a single batch no update is more than a few of the attack's steps, and none overshoots."""
    (perturbation,) = select([attack], [EPSILON], AttackResources(max_steps=20)).perturbations
    assert perturbation.passes == passes
    with tqdm(total=2 * passes, disable=False, file=io.StringIO()) as bar:
        steps: list[int] = []
        monkeyed = bar.update
        bar.update = lambda amount: steps.append(amount) or monkeyed(amount)
        meter, clean = Meter(bar), study.images[:2]
        with meter.stage("attack", 2 * passes):
            perturbation.apply(meter.watched(study.baseline), clean, image_generators(0, [0, 1]))
        assert bar.n == 2 * passes and sum(steps) == 2 * passes
        assert max(steps) <= 2 * passes / 5 and len([step for step in steps if step]) > 8


# --- catalogue ------------------------------------------------------------------------------------------


def test_presets_hold_known_names() -> None:
    """Oracle: every name of every preset becomes a perturbation, or five of a corruption, or a note on what it needs."""
    for preset, names in PRESETS.items():
        selection = select([preset], [EPSILON], AttackResources())
        found = {item.name if item.name != "gaussian-noise" else "noise" for item in selection.perturbations}
        noted = {note.split(" ")[0] for note in selection.notes}
        severe = {f"{name}-{severity}" for name in CORRUPTIONS.keys() & set(names) for severity in range(1, 6)}
        assert set(names) - CORRUPTIONS.keys() | severe == found | noted


def test_attacks_run_at_every_epsilon_and_none_twice() -> None:
    """Oracle: counting; corruptions and clean images have no epsilon."""
    selection = select(["clean", "pgd-3", "jpeg", "quick", "pgd-3"], [1 / 255, EPSILON], AttackResources())
    found = [(item.name, round(255 * item.epsilon)) for item in selection.perturbations]
    assert len(found) == len(set(found))
    assert {epsilon for name, epsilon in found if name == "pgd-3"} == {1, 8}
    assert {name for name, epsilon in found if epsilon == 0} == {
        "clean",
        *(f"jpeg-{severity}" for severity in range(1, 6)),
    }


def test_what_cannot_run_is_said(images) -> None:
    """Oracle: specification; each protection that needs something names the parameter that gives it."""
    notes = select(list(PROTECTIONS), [EPSILON], AttackResources()).notes
    flags = {note.split(" ")[0]: note for note in notes}
    assert "give `pipeline`" in flags["advdm"]
    assert "give `target`" in flags["nightshade"]
    assert "nightshade" not in str(select(["nightshade"], [EPSILON], AttackResources(target=images(1))).notes)
    for name in ("pgd-x", "pgd-0", "pgd-2x0", "square-5x2", "jpeg-6"):
        with pytest.raises(UserError, match=f"{name} is not known"):
            select([name], [EPSILON], AttackResources())
    with pytest.raises(UserError, match="no attack is left; advdm was left out"):
        select(["advdm"], [EPSILON], AttackResources())


# --- is this robustness real? ---------------------------------------------------------------------------


class Quantised(nn.Module):
    """An encoder that sees 24 grey levels: no gradient gets through, and so every gradient attack fails."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images + ((images * 12).round() / 12 - images).detach() - (images - images.detach()))


def photographs(count: int) -> Tensor:
    from miniature.measure import tiles

    return tiles("validation", limit=count)


@pytest.mark.slow
def test_an_honest_vae_passes(miniature_vae) -> None:
    """Oracle: the shipped VAE, which does nothing to its gradients; every question is asked once."""
    honest = codec(miniature_vae, "miniature")
    checks = check_robustness(honest, honest, photographs(2), shallow(epsilon=EPSILON), seed=0)
    assert [check for check in checks if not check.passed] == []
    assert len({check.question for check in checks}) == 9


def test_masked_gradients_are_exposed(miniature_vae) -> None:
    """Oracle: an encoder made to hide its gradients, which withstands PGD and nothing else."""
    honest = codec(miniature_vae, "miniature")
    masked = replace(honest, name="masked", encoder=Quantised(honest.encoder))
    checks = check_robustness(masked, honest, photographs(2), shallow(epsilon=EPSILON), seed=0)
    failed = {check.question for check in checks if not check.passed}
    assert "Gradients do not vanish" in failed
    assert "A very large epsilon wins completely" in failed
    assert "An attack without gradients is not stronger than one with" in failed


@pytest.mark.parametrize(("epsilons", "chosen"), [((0.1, 0.2, 0.3, 0.0), 1), ((0.0, 0.0), 1), ((0.1, 0.0, 0.1), 2)])
def test_the_strongest_attack_at_the_middle_budget_is_shown(study, epsilons, chosen: int) -> None:
    """Oracle: by hand. Attack number n leaves 20 - n dB; of the middle budget the last one is shown, and those without a
    budget among the epsilons, whose is 0, only where there is nothing else.
    """
    attacks = [
        replace(study.perturbations[2], name=f"attack {n}", epsilon=epsilon) for n, epsilon in enumerate(epsilons)
    ]
    records = [
        Record("original", Setting(attack.name, attack.objective, threat_model, attack.epsilon, "psnr"), 0, 20.0 - number)
        for number, attack in enumerate(attacks) for threat_model in ("transfer", "adaptive")
    ]  # fmt: skip
    cell = strongest_cell(replace(study, perturbations=attacks), records, study.baseline)
    assert cell.perturbation.name == f"attack {chosen}"


# --- command --------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(tiny_vae, other_tiny_vae, images, tmp_path: Path) -> list[str]:
    """Two VAEs and four pictures on disk, and the smallest evaluation of them."""
    tiny_vae.save_pretrained(tmp_path / "original")
    other_tiny_vae.save_pretrained(tmp_path / "robust")
    write_photos(tmp_path / "photos", images(4))
    return [
        "reconstruction", "--baseline", str(tmp_path / "original"), "--vae", f"robust={tmp_path / 'robust'}",
        "--data_dir", str(tmp_path / "photos"), "--resolution", "16", "--attacks", "clean", "pgd-2", "glaze",
        "--epsilons", "4/255", "8/255", "--metrics", "psnr", "ssim", "drift", "--num_check_images", "1",
        "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip


def written(folder: Path) -> dict[str, bytes]:
    """Every file but the documents' last section, which tells of the machine."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in ("report.md", "report.html"):
        files[name] = files[name].split(b"How it was run")[0]
    return files


def test_command_writes_the_whole_report(arguments, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the real command; rows in the project's format, documents, figures, and the checks' verdict.

    Given again it computes nothing and writes the same.
    """
    monkeypatch.setattr(reconstruction, "CheckSettings", shallow)
    assert command.main(arguments) == 0
    rows = json.loads((tmp_path / "out/results.json").read_text())
    assert {row["vae"] for row in rows} == {"original", "robust"}
    assert {row["threat_model"] for row in rows} == {"none", "transfer", "adaptive"}
    assert {"report.md", "report.html", "results.json", "study.json", "cells", "figures"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    for figure in (tmp_path / "out/figures").iterdir():
        Image.open(figure).verify()
    printed = capsys.readouterr().out
    assert "checks of the robustness" in printed
    assert "glaze was left out" in printed
    assert "there are only 4 images, fewer than the 64 of --num_images" in printed

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(running, "check_robustness", refuse)
    monkeypatch.setattr(Study, "_compute", refuse)
    before = written(tmp_path / "out")
    assert command.main(arguments) == 0
    assert written(tmp_path / "out") == before


def test_the_baseline_alone_is_evaluated(arguments, tmp_path: Path, capsys) -> None:
    """Oracle: the same command with a second VAE; the baseline's rows are equal. A report names no other VAE."""
    assert command.main(arguments) == 0
    place = arguments.index("--vae")
    alone = [*arguments[:place], *arguments[place + 2 :], "--output_dir", str(tmp_path / "alone")]
    assert command.main(alone) == 0
    both, own = (json.loads((tmp_path / folder / "results.json").read_text()) for folder in ("out", "alone"))
    assert own == [row for row in both if row["vae"] == "original"] and own
    report = (tmp_path / "alone/report.md").read_text()
    assert "robust" not in report.split("## How it was run")[0].replace("robustness", "")


def test_a_dry_run_counts_and_computes_nothing(arguments, tmp_path: Path, capsys) -> None:
    """Oracle: by hand. Of 4 images: clean shown to 2 VAEs, and at 2 budgets pgd-2 (4 passes) made on one and shown to
    both, made on the other and shown to it: 4 x 2 + 2 x (4 x (4 + 2) + 4 x (4 + 1)).
    """
    assert command.main([*arguments, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "4 images, 2 VAEs, 96 passes through one, in 5 cells" in printed and "glaze was left out" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["cells/*/*.json", "study.json"])
@pytest.mark.parametrize("damage", [b"", b"[[", b"\xff\xfe", b"\0" * 100])
def test_a_damaged_file_is_named(study, file: str, damage: bytes) -> None:
    """Oracle: one line with the file's name and the way out, which is then taken: the records are as before."""
    before = study.run()
    path = next(study.output_dir.glob(file))
    path.write_bytes(damage)
    with pytest.raises(UserError, match=f"{path} is damaged; remove it"):
        study.run()
    path.unlink()
    assert study.run() == before


def test_no_attack_on_a_denoiser_is_made_on_other_latents(study, images) -> None:
    """Oracle: specification. The tiny VAEs have four channels, a third one eight: a note, no adaptive cell, and an error
    where it is the baseline.
    """
    eight = codec(small_vae(latent_channels=8), "eight")
    fitting, other = (
        SimpleNamespace(components={"unet": SimpleNamespace(config=SimpleNamespace(out_channels=channels))})
        for channels in (4, 8)
    )
    notes: list[str] = []
    assert find_incompatible(fitting, study.codecs, study.images, notes) == frozenset() and notes == []
    assert find_incompatible(fitting, [*study.codecs, eight], study.images, notes) == {"eight"}
    assert "not made on eight: --pipeline makes latents of 4 channels, and those of eight have 8" in notes[0]
    with pytest.raises(UserError, match="latents of 8 channels, and those of original have 4"):
        find_incompatible(other, study.codecs, study.images, notes)
    attack = replace(study.perturbations[2], impossible_on=frozenset({"eight"}))
    cells = list(replace(study, codecs=[*study.codecs, eight], perturbations=[attack]).cells())
    assert [cell.source.name for cell in cells] == ["original", "robust"]
    assert [judged.name for judged in cells[0].judged] == ["original", "robust", "eight"]  # transferred to all


def deeper_vae() -> nn.Module:
    """It divides sides by 4, where the tiny ones divide them by 2."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return small_vae(block_out_channels=(8, 8, 16), **blocks)


@pytest.mark.parametrize("metrics", [["psnr", "ssim"], ["psnr", "ssim", "drift"]])
def test_latents_of_other_shapes_are_compared_as_far_as_they_can_be(
    metrics, arguments, tmp_path: Path, monkeypatch
) -> None:
    """Oracle: the real command, with checks. Of 16 channels, and of half the side: everything but the drift, which a
    note names where it was asked for; the values are those of the same VAEs without the others.
    """
    monkeypatch.setattr(reconstruction, "CheckSettings", shallow)
    small_vae(latent_channels=16).save_pretrained(tmp_path / "sixteen")
    deeper_vae().save_pretrained(tmp_path / "deeper")
    places = [f"{name}={tmp_path / name}" for name in ("robust", "sixteen", "deeper")]
    attacks = ["--attacks", "clean", "pgd-2", "photoguard-encoder", "--max_attack_steps", "2", "--epsilons", "8/255"]
    assert command.main([*arguments, "--vae", *places, *attacks, "--metrics", *metrics]) == 0
    rows = json.loads((tmp_path / "out/results.json").read_text())
    for name in ("sixteen", "deeper"):
        own = {(row["attack"], row["threat_model"], row["metric"]) for row in rows if row["vae"] == name}
        assert ("photoguard-encoder", "adaptive", "psnr") in own and ("pgd-2", "transfer", "ssim") in own
        assert not any(metric == "drift" for _, _, metric in own)
    report = (tmp_path / "out/report.md").read_text()
    asked = "drift" in metrics
    assert (
        "drift of sixteen was left out: its latents have the shape 16 x 8 x 8, those of original 4 x 8 x 8" in report
    ) == asked
    assert ("drift of deeper was left out: its latents have the shape 4 x 4 x 4" in report) == asked
    assert any(row["metric"] == "drift" for row in rows) == asked
    assert command.main([*arguments, *attacks, "--metrics", *metrics, "--output_dir", str(tmp_path / "alone")]) == 0
    alone = json.loads((tmp_path / "alone/results.json").read_text())
    assert [row for row in rows if row["vae"] in ("original", "robust")] == alone


def test_a_vae_that_the_resolution_does_not_suit_is_left_out(arguments, tmp_path: Path, capsys) -> None:
    """Oracle: specification. 22 px can be halved and not quartered: a note, and an error if nothing else is left."""
    deeper_vae().save_pretrained(tmp_path / "deeper")
    few = ["--resolution", "22", "--attacks", "clean", "--no_checks"]
    arguments = [word for word in arguments if word not in ("--num_check_images", "1", "--epsilons", "4/255", "8/255")]
    assert command.main([*arguments, *few, "--vae", str(tmp_path / "robust"), str(tmp_path / "deeper")]) == 0
    assert {row["vae"] for row in json.loads((tmp_path / "out/results.json").read_text())} == {"original", "robust"}
    assert "deeper was left out: --resolution 22 does not suit deeper" in (tmp_path / "out/report.md").read_text()
    assert exit_code(lambda: command.main([*arguments, *few, "--vae", str(tmp_path / "deeper")])) == 2
    assert "does not suit deeper, which returns 20 px" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_and_a_kill_change_nothing(arguments, tmp_path: Path) -> None:
    """Oracle: one undisturbed process; every file is the same to the last byte.

    Two processes share out the batches. A third is killed in the middle of a cell, and the command given again.
    """
    checks = arguments.index("--num_check_images")
    arguments = [
        *arguments[:checks], *arguments[checks + 2 :],
        "--attacks", "clean", "noise", "pgd-20", "--batch_size", "1", "--no_checks",
    ]  # fmt: skip
    whole, shared, killed = (tmp_path / name for name in ("whole", "shared", "killed"))
    assert command.main([*arguments, "--output_dir", str(whole)]) == 0
    result = launch("srl_utils.evaluation", *arguments, "--output_dir", shared, processes=2, script="-m")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 x CPU" in (shared / "report.md").read_text()
    assert written(shared) == written(whole)

    process = subprocess.Popen(
        [sys.executable, "-m", "srl_utils.evaluation", *arguments, "--output_dir", str(killed)],
        cwd=ROOT, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(done := list(killed.glob("cells/pgd-*/*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, "it was not killed in time"
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert len(done) < len(list(whole.glob("cells/pgd-*/*.json"))) and not (killed / "results.json").exists()
    assert command.main([*arguments, "--output_dir", str(killed)]) == 0
    assert written(killed) == written(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--resolution", "15"], "--resolution 15 does not suit original"),
        (["--attacks", "nonsense"], "--attacks: nonsense is not known"),
        (["--vae", "a=nowhere"], "--vae: the VAE a at nowhere: "),
        (["--vae", "original=x"], "--vae: original=x: there are two VAEs of the name original"),
        (["--dataset_name", "faces", "faces"], "--dataset_name: faces and faces have the same name"),
        (["--data_dir", "nowhere"], "--data_dir: there is no folder nowhere"),
        (["--split", "val"], "--split has no effect without --dataset_name"),
        (["--resolution", "8"], "SSIM needs at least 11 px"),
        (["--output_dir", __file__], "is not a folder"),
        (["--epsilons", "300"], "outside"),
        (["--epsilons", "0"], "an attack of size 0"),
        (["--vae", "=x"], "expected NAME=PLACE"),
        (["--target", "nowhere.png"], "--target: nowhere.png cannot be read"),
    ],
)
def test_bad_input_is_one_line(arguments, change, message, capsys) -> None:
    """Oracle: specification; exit code 2 and one line that names the flag or the place, before any work."""
    assert exit_code(lambda: command.main([*arguments, *change])) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize(("parameter", "flag"), [("validation_data_dir", "data_dir"), ("image_column", "image_column")])
def test_the_command_names_its_own_flags(
    arguments: list[str], parameter: str, flag: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: specification; an error of the library about a parameter becomes one about the command's flag."""

    def refuse(*_: object, **__: object) -> None:
        raise UserError("nowhere is wrong", parameter=parameter)

    monkeypatch.setattr(loading, "load_validation_images", refuse)
    monkeypatch.setattr(sys, "argv", ["evaluation", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("srl_utils.evaluation", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: --{flag}: nowhere is wrong"


def test_pictures_show_few_vaes(study: Study, tiny_vae) -> None:
    """Oracle: counting: of eight VAEs, six have a picture, and each picture has as many columns as one of six."""
    pictures = {}
    for number in (MOST_VAES, MOST_VAES + 2):
        codecs = [codec(tiny_vae, f"vae {place}") for place in range(number)]
        many = replace(study, codecs=codecs, output_dir=study.output_dir / str(number))
        pictures[number] = draw_extremes(many, many.run())
    assert {len(paths) for paths in pictures.values()} == {MOST_VAES}
    widths = {Image.open(path).width for paths in pictures.values() for path in paths.values()}
    assert len(widths) == 1
