"""How far attacks move latents, and the table of what they do to the original VAE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from srl_utils.attacks.draws import image_generators
from srl_utils.evaluation.catalogue import AttackResources, select
from srl_utils.evaluation.motion import MOTION_METRICS, SHARE, TRAVEL, motion, usual_distance
from srl_utils.evaluation.perturbations import GAUSSIAN_NOISE
from srl_utils.evaluation.report.effects import GRIP, NO_GRIP, effects_on
from srl_utils.evaluation.results import Record, Setting, to_rows
from srl_utils.evaluation.study import Study
from srl_utils.evaluation.tasks.base import Metrics, Reconstruction
from srl_utils.vae.codec import Codec

EPSILON = 8 / 255
WANTED = ("psnr", *MOTION_METRICS)


class Doubling(nn.Module):
    """An encoder whose latents are twice the image, with a variance."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([2 * images, torch.zeros_like(images)], dim=1)


@pytest.fixture
def doubling() -> Codec:
    decoder = nn.Conv2d(3, 3, 1)
    return Codec("doubling", decoder, Doubling(), decoder)


def flat(*greys: float) -> Tensor:
    """Images `[N,3,2,2]` of one grey each: 12 numbers, so two of them are sqrt(12) times their greys' distance apart."""
    return torch.tensor(greys)[:, None, None, None].expand(-1, 3, 2, 2)


def test_travel_is_in_units_of_the_distance_of_two_images(doubling: Codec) -> None:
    """Oracle: closed form, for an encoder that doubles: the medians are those of the greys, for any batch size."""
    greys = (0.0, 0.1, 0.3, 0.9)
    middle = sorted(abs(a - b) for a, b in combinations(greys, 2))[2]  # torch takes the lower one of two
    unit = usual_distance(doubling, flat(*greys), batch_size=3)
    assert unit == pytest.approx(2 * 12**0.5 * middle)
    found = motion(doubling, flat(0.0, 0.5), flat(0.15, 0.5), unit=unit, wanted=MOTION_METRICS)
    assert found.keys() == {TRAVEL} and found[TRAVEL].tolist() == pytest.approx([0.15 / middle, 0.0])


@pytest.mark.parametrize("greys", [(0.5,), (0.5, 0.5, 0.5)])
def test_without_two_different_images_the_unit_is_a_length(greys: Sequence[float], doubling: Codec) -> None:
    """Oracle: closed form."""
    assert usual_distance(doubling, flat(*greys), batch_size=2) == pytest.approx(12**0.5)


def test_share_of_the_way(doubling: Codec) -> None:
    """Oracle: closed form: at the start, a quarter gone, there, beyond, away; and an image that is its own target."""
    clean, shown, goals = flat(*[0.0] * 5, 0.3), flat(0.0, 0.1, 0.4, 0.5, -0.2, 0.3), flat(*[0.4] * 5, 0.3)
    goal = doubling.encode(goals)
    found = motion(doubling, clean, shown, unit=1.0, wanted=[SHARE], goal=goal)
    assert found[SHARE].tolist() == pytest.approx([0, 0.25, 1, 0.75, -0.5, 1], abs=1e-6)


@pytest.fixture
def study(tiny_vae, other_tiny_vae, images, tmp_path: Path) -> Study:
    codecs = [Codec.of(tiny_vae, "original"), Codec.of(other_tiny_vae, "robust")]
    names = ["clean", "noise", "pgd-2", "photoguard-encoder", "photoguard-encoder-grey"]
    return Study(
        accelerator=Accelerator(cpu=True),
        codecs=codecs,
        perturbations=select(names, [EPSILON], AttackResources(max_steps=10)).perturbations,
        threat_models=("transfer", "adaptive"),
        task=TwoWays(metrics=Metrics(names=WANTED), baseline=codecs[0], images=images(5)),
        images=images(5),
        output_dir=tmp_path,
        fingerprint={},
        seed=0,
        batch_size=2,
    )


class TwoWays(Reconstruction):
    """A task with two variants."""

    @property
    def variants(self) -> Sequence[str]:
        return ("first", "second")

    @variants.setter
    def variants(self, value: Sequence[str]) -> None:
        """Ignore the field of the base class."""


def of_metric(records: Sequence[Record], metric: str) -> dict[tuple[str, str, str], list[float]]:
    found: dict[tuple[str, str, str], list[float]] = {}
    for record in records:
        if record.setting.metric == metric:
            found.setdefault((record.vae, record.setting.attack, record.setting.threat_model), []).append(record.value)
    return found


def test_a_study_measures_it_once_for_all_variants(study: Study) -> None:
    """Oracle: specification: one value per image, VAE and threat model, by the attack's bare name; a share where there
    is a target, of latents of 0 or of an image."""
    records = study.run()
    travels, shares = of_metric(records, TRAVEL), of_metric(records, SHARE)
    models = {"pgd-2": 2, "photoguard-encoder": 2, "photoguard-encoder-grey": 2, GAUSSIAN_NOISE: 1}
    assert {key[1] for key in travels} == models.keys() and {len(values) for values in travels.values()} == {5}
    assert len(travels) == 2 * sum(models.values())
    assert {key[1] for key in shares} == {"photoguard-encoder", "photoguard-encoder-grey"}
    assert all(0 < share < 1 for key, values in shares.items() if key[2] == "adaptive" for share in values)


def test_the_share_is_that_of_the_attacked_images(study: Study) -> None:
    """Oracle: the images themselves, attacked and encoded again; latents of 0 make it 1 - |z'| / |z|."""
    attack = next(each for each in study.perturbations if each.name == "photoguard-encoder")
    robust = study.codecs[1]
    alone = replace(study, perturbations=[attack], batch_size=5)
    found = of_metric(alone.run(), SHARE)["robust", attack.name, "adaptive"]
    shown = attack.apply(robust, study.images, image_generators(0, range(5)))
    with torch.no_grad():
        lengths = [robust.encode(batch).flatten(1).norm(dim=1) for batch in (shown, study.images)]
    assert found == pytest.approx((1 - lengths[0] / lengths[1]).tolist(), rel=1e-4)


# --- the table of the report ---


def records_of(
    attack: str, objective: str | None, epsilon: float, metric: str, values: Sequence[float]
) -> list[Record]:
    models = ("none",) if objective is None else ("transfer", "adaptive")
    return [
        Record("original", Setting(attack, objective, model, epsilon, metric), index, value)
        for model in models
        for index, value in enumerate(values)
    ]


def example(**psnr: Sequence[float]) -> list[Record]:
    """Two edits of four images, under noise and under attacks of the given PSNR in the second edit."""
    records = []
    for attack, seconds in {GAUSSIAN_NOISE: [25.0, 24.0, 26.0, 25.0], **psnr}.items():
        objective = None if attack == GAUSSIAN_NOISE else "as published"
        name = attack.replace("_", "-")
        records += records_of(name, objective, EPSILON, TRAVEL, [0.1] * 4)
        records += records_of(f"{name}, first", objective, EPSILON, "psnr", [20.0 - 5 * (objective is not None)] * 4)
        records += records_of(f"{name}, second", objective, EPSILON, "psnr", seconds)
    return records


def test_an_attack_without_grip_is_told_from_one_with_it() -> None:
    """Oracle: paired differences by hand: one is 3 dB below noise on each image, one above it on one image; a third
    moves the latents further than noise, whatever the outcome."""
    records = example(strong=[22.0, 21.0, 23.0, 22.0], weak=[25.0, 24.5, 25.0, 25.5])
    records += records_of("far", "as published", EPSILON, TRAVEL, [0.2, 0.3, 0.2, 0.3])
    records += records_of("far, second", "as published", EPSILON, "psnr", [25.0, 24.5, 25.0, 25.5])
    records += records_of("clean, second", None, 0.0, "psnr", [30.0] * 4)
    effects = effects_on("original", to_rows(records), records)
    assert effects is not None and effects.title == "What the attacks do to original"
    titles, *lines = effects.table
    assert titles == ["images", "epsilon", "latents moved", "share of the way to the target", "PSNR (dB)", "verdict"]
    verdicts = {line[0]: line[-1] for line in lines}
    assert verdicts == {
        "gaussian-noise, first": "", "gaussian-noise, second": "", "strong, first": GRIP, "strong, second": GRIP,
        "weak, first": GRIP, "weak, second": NO_GRIP, "far, second": GRIP, "clean, second": "",
    }  # fmt: skip
    _, *values, mean, _ = next(line for line in lines if line[0] == "strong, second")
    assert values == ["8/255", "0.100 [0.100, 0.100]", ""] and mean.startswith("22.00 [")


def test_without_noise_there_is_no_verdict_and_without_attacks_no_table() -> None:
    """Oracle: specification."""
    records = [record for record in example(strong=[22.0] * 4) if not record.setting.attack.startswith(GAUSSIAN_NOISE)]
    effects = effects_on("original", to_rows(records), records)
    assert effects is not None and effects.table[0][-1] == "PSNR (dB)"
    noise = example()
    assert effects_on("original", to_rows(noise), noise) is None
