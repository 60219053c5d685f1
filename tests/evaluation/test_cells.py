from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from helpers.runs import Run
from torch import Tensor

from srl_utils.attacks.draws import image_generators
from srl_utils.attacks.gradient import PGDConfig
from srl_utils.evaluation.cells import measure
from srl_utils.evaluation.perturbations import (
    CLEAN,
    noise,
    pgd_attack,
    strong_attack,
    usual_attack,
)
from srl_utils.evaluation.report.grids import comparison_picture, reconstruction_picture
from srl_utils.evaluation.report.tables import comparison_table, won_back
from srl_utils.evaluation.results import Record, Row, Setting, to_row, to_rows
from srl_utils.evaluation.tasks.base import DRIFT, Metrics, Reconstruction
from srl_utils.metrics.losses import PerceptualDistance, ReconstructionLoss
from srl_utils.vae.codec import Codec

EPSILON = 8 / 255
ATTACK = PGDConfig(epsilon=EPSILON, num_steps=3)
PERTURBATIONS = [CLEAN, noise(EPSILON), pgd_attack(ATTACK)]
ROW_KEYS = {"vae", "attack", "objective", "threat_model", "epsilon", "metric", "value", "ci95", "n"}


def make_codec(vae, name: str = "tiny") -> Codec:
    return Codec.of(vae, name)


@pytest.fixture
def codec(tiny_vae) -> Codec:
    return make_codec(tiny_vae)


@pytest.fixture
def other_codec(other_tiny_vae) -> Codec:
    return make_codec(other_tiny_vae, "other")


def run(
    codec: Codec,
    images: Tensor,
    *,
    perturbations=PERTURBATIONS,
    numbers: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 2,
    reference: Codec | None = None,
    perceptual: Sequence[PerceptualDistance] = (),
) -> list[Record]:
    """PSNR, SSIM, LPIPS where it is given, and the drift from `reference` where there is one."""
    names = ["psnr", "ssim", *(each.name for each in perceptual), *([DRIFT] if reference else [])]
    task = Reconstruction(
        metrics=Metrics(names=names, perceptual=perceptual), baseline=reference or codec, images=images
    )
    return measure(
        [codec], perturbations, task, images,
        numbers=range(len(images)) if numbers is None else numbers, seed=seed, batch_size=batch_size,
    )  # fmt: skip


def by_key(records: list[Record]) -> dict[tuple, float]:
    return {record[:-1]: record.value for record in records}


def example_row(vae: str, attack: str, metric: str, value: float, epsilon: float = 0.0) -> Row:
    setting = Setting(attack, "mse" if epsilon else None, "adaptive" if epsilon else "none", epsilon, metric)
    return to_row(vae, setting, value, n=4, ci95=(value - 1, value + 2))


# --- measuring ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_records_do_not_depend_on_the_batch_size(batch_size, codec, images) -> None:
    """Oracle: invariance, up to convolutions that round differently in batches and flip a sign near 0 of the attack."""
    expected = by_key(run(codec, images(5), batch_size=2))
    found = by_key(run(codec, images(5), batch_size=batch_size))
    assert len(expected) == 5 * 3 * 2
    assert found == {key: pytest.approx(value, rel=1e-3) for key, value in expected.items()}


def test_seed_fixes_what_is_random(codec, images) -> None:
    """Oracle: invariance, exact; another seed changes the noise and the attack but not the clean images."""
    first, same, other = (run(codec, images(2), seed=seed) for seed in (0, 0, 1))
    assert first == same
    changed = {record.setting.attack for record, moved in zip(first, other, strict=True) if record != moved}
    assert changed == {"gaussian-noise", "pgd-3"}


def test_shards_merge_to_the_rows_of_one_run(codec, images) -> None:
    """Oracle: invariance. Exact with one image at a time, in any order, and where shards share an image."""
    everything = run(codec, images(5), batch_size=1, reference=codec)
    shards = [[1, 3, 0], [0, 2, 4]]
    parts = [run(codec, images(5), numbers=indices, batch_size=1, reference=codec) for indices in shards]
    assert to_rows(parts[1] + parts[0]) == to_rows(everything)


def test_generators_follow_image_number_and_seed() -> None:
    """Oracle: specification; the same (seed, number) draws the same, any other draws something else."""

    def draws(seed: int, indices: list[int]) -> list[float]:
        return [torch.rand((), generator=generator).item() for generator in image_generators(seed, indices)]

    assert draws(3, [7, 8]) == [*draws(3, [7]), *draws(3, [8])]
    assert len(set(draws(0, [0, 1, 2]) + draws(1, [0, 1, 2]))) == 6


def test_strong_attack_is_not_weaker(codec, images) -> None:
    """Oracle: bound, the mean squared error under 50 steps and 2 restarts is at least that under 10 steps.

    A longer search with smaller steps may lose on one image: 1% of the mean is allowed.
    """
    clean, loss = images(3), ReconstructionLoss()
    target, error = loss.target(clean), {}
    for attack in (CLEAN, usual_attack(EPSILON), strong_attack(EPSILON)):
        attacked = attack.apply(codec, clean, image_generators(0, range(3)))
        assert (attacked - clean).abs().max() <= 2 * EPSILON + 1.2e-7  # one rounding near 1
        with torch.no_grad():
            error[attack.name] = loss(codec.reconstruct(attacked), target).mean().item()
    assert set(error) == {"clean", "pgd-10", "pgd-50x2"}
    assert error["pgd-10"] > error["clean"]
    assert error["pgd-50x2"] >= 0.99 * error["pgd-10"]


def test_attack_leaves_the_encoder_trainable(codec, images) -> None:
    """Oracle: invariance, evaluation in the middle of a training changes no gradient and no flag."""
    run(codec, images(1))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in codec.encoder.parameters())


def test_drift_is_measured_on_clean_images_against_the_reference(codec, other_codec, images) -> None:
    """Oracle: closed form, exactly 0 for the reference itself, hand computation for another VAE."""
    own = [record.value for record in run(codec, images(2), reference=codec) if record.setting.metric == "drift"]
    assert own == [0.0, 0.0]
    moved = [record for record in run(other_codec, images(2), reference=codec) if record.setting.metric == "drift"]
    with torch.no_grad():
        latents, reference = other_codec.encode(images(2)).double(), codec.encode(images(2)).double()
    expected = (latents - reference).pow(2).sum((1, 2, 3)) / reference.pow(2).sum((1, 2, 3))
    assert {record.setting.attack for record in moved} == {"clean"}
    # float32 sums; channels-last convolutions round differently.
    assert [record.value for record in moved] == pytest.approx(expected.tolist(), rel=1e-4)
    assert not any(record.setting.metric == "drift" for record in run(codec, images(1)))


def test_lpips_is_measured_under_the_name_of_its_trunk(codec, random_lpips, images) -> None:
    """Oracle: the lpips package on the clean reconstruction; tolerance as in test_losses.py."""
    clean = images(2, 32)
    records = run(codec, clean, perturbations=[CLEAN], perceptual=[PerceptualDistance(random_lpips)])
    values = [record.value for record in records if record.setting.metric == "lpips-vgg"]
    with torch.no_grad():
        expected = random_lpips(codec.reconstruct(clean), clean).flatten()
    assert values == pytest.approx(expected.tolist(), rel=1e-3)


def test_rows_have_the_project_s_format(codec, images) -> None:
    """Oracle: golden keys; means and counts recomputed from the records."""
    records = run(codec, images(3), reference=codec)
    rows = to_rows(records)
    groups = defaultdict(list)
    for record in records:
        groups[record.setting.attack, record.setting.metric].append(record.value)
    assert len(rows) == len(groups) == 3 * 2 + 1
    for row in rows:
        values = groups[row.attack, row.metric]
        assert set(row.to_json()) == ROW_KEYS and Row.from_json(json.loads(json.dumps(row.to_json()))) == row
        assert row.n == 3
        assert row.value == pytest.approx(sum(values) / 3, rel=1e-12)
        assert min(values) <= row.ci95[0] <= row.value <= row.ci95[1] <= max(values)
    described = {row.attack: (row.objective, row.threat_model, row.epsilon) for row in rows}
    assert described == {
        "clean": (None, "none", 0.0), "gaussian-noise": (None, "none", EPSILON), "pgd-3": ("mse", "adaptive", EPSILON)
    }  # fmt: skip


def test_a_training_says_what_it_judges(run: Run, flags: list[str]) -> None:
    """Oracle: the real command without a terminal. The original VAE, the fine-tuned one and the picture have a bar each,
    which ends at the cost of 3 images under clean, pgd-10, pgd-50x2 and noise: 3 x (20 + 200 + 4) passes.
    """
    code, printed = run(*flags)
    assert code == 0, printed
    titles = dict(re.findall(r"([^\r\n|]*?):\s+100%\|[^|]*\| (\d+/\d+) ", printed))
    assert titles["original judged, gaussian-noise 8/255: images 1 to 3 of 3"] == "672/672"
    assert titles["fine-tuned judged, gaussian-noise 8/255: images 1 to 3 of 3"] == "672/672"
    assert titles["picture, pgd-50x2 on fine-tuned"] == "1200/1200"


# --- reporting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("robust", "share"), [(20.0, 0.0), (25.0, 0.5), (30.0, 1.0), (19.0, -0.1)])
def test_won_back_share(robust, share) -> None:
    """Oracle: closed form; the attack costs the original 10 dB of 30, SSIM rows do not count."""
    values = {("original", "clean"): 30.0, ("original", "pgd"): 20.0, ("new", "clean"): 35.0, ("new", "pgd"): robust}
    rows = [example_row(vae, attack, "psnr", value) for (vae, attack), value in values.items()]
    rows += [example_row(vae, attack, "ssim", 0.5) for vae, attack in values]
    assert won_back(rows, "pgd", "original", "new") == pytest.approx(share)


def test_table_shows_every_cell() -> None:
    """Oracle: the table parsed back: a line per attack and metric, a column per VAE, every value and interval."""
    rows = [
        example_row(vae, attack, metric, value, epsilon)
        for vae, shift in (("original", 0.0), ("robust", 3.25))
        for attack, epsilon in (("clean", 0.0), ("pgd-10", EPSILON))
        for metric, value in (("psnr", 20.0 + shift), ("ssim", 0.5 + shift), ("lpips-vgg", 0.125 + shift))
    ]
    rows.append(example_row("robust", "clean", "drift", 0.0625))
    head, rule, *lines = comparison_table(rows, ["original", "robust"]).splitlines()
    assert len({len(line) for line in (head, rule, *lines)}) == 1, "columns are meant to be aligned"
    assert set(rule) == {"|", "-"}
    parsed = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    assert parsed == [
        ["images", "metric", "original", "robust"],
        ["clean", "PSNR (dB)", "20.00 [19.00, 22.00]", "23.25 [22.25, 25.25]"],
        ["clean", "SSIM", "0.5000 [-0.5000, 2.5000]", "3.7500 [2.7500, 5.7500]"],
        ["clean", "LPIPS (VGG)", "0.1250 [-0.8750, 2.1250]", "3.3750 [2.3750, 5.3750]"],
        ["pgd-10, 8/255", "PSNR (dB)", "20.00 [19.00, 22.00]", "23.25 [22.25, 25.25]"],
        ["pgd-10, 8/255", "SSIM", "0.5000 [-0.5000, 2.5000]", "3.7500 [2.7500, 5.7500]"],
        ["pgd-10, 8/255", "LPIPS (VGG)", "0.1250 [-0.8750, 2.1250]", "3.3750 [2.3750, 5.3750]"],
        ["clean", "latent drift", "", "0.0625 [-0.9375, 2.0625]"],
    ]


def test_measured_rows_fit_the_table_and_the_share(codec, other_codec, images) -> None:
    """Oracle: the rows themselves; what `measure` returns is what the report reads."""
    rows = to_rows(run(codec, images(2), reference=codec) + run(other_codec, images(2), reference=codec))
    table = comparison_table(rows, ["tiny", "other"])
    assert len(table.splitlines()) == 2 + 3 * 2 + 1
    decimals = {"psnr": 2, "ssim": 4, "drift": 4}
    assert all(f"{row.value:.{decimals[row.metric]}f}" in table for row in rows)
    psnr = {(row.vae, row.attack): row.value for row in rows if row.metric == "psnr"}
    attacked = psnr["tiny", "pgd-3"]
    expected = (psnr["other", "pgd-3"] - attacked) / (psnr["tiny", "clean"] - attacked)
    assert won_back(rows, "pgd-3", "tiny", "other") == pytest.approx(expected)


def test_comparison_picture_shows_the_images(codec, other_codec, images) -> None:
    """Oracle: closed form. Four cells of 40 px with gaps of 6 across, two lines per image of 40 + 18 + 6 below a
    title of 18; the first column holds the images' own colours."""
    clean = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]])[:, :, None, None].expand(2, 3, 16, 16)
    picture = comparison_picture(codec, other_codec, clean, pgd_attack(ATTACK), seed=0, cell=40)
    assert picture.mode == "RGB" and picture.size == (4 * 46 + 6, 24 + 4 * 64)
    shown = [picture.getpixel((26, 24 + 64 * row + 20)) for row in range(4)]
    assert shown == [(255, 0, 0)] * 2 + [(0, 0, 255)] * 2
    attacked = [picture.getpixel((26 + 46, 24 + 64 * row + 20)) for row in range(4)]
    for pixel, original in zip(attacked, shown, strict=True):
        # 8 of 255 levels, and one for rounding to bytes.
        assert max(abs(a - b) for a, b in zip(pixel, original, strict=True)) <= 9


def test_reconstruction_picture_shows_the_images(codec) -> None:
    """Oracle: closed form as above, a column per image and two lines; photographs above."""
    clean = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]])[:, :, None, None]
    picture = reconstruction_picture(codec, clean.expand(3, 3, 16, 16), cell=40)
    assert picture.size == (3 * 46 + 6, 24 + 2 * 64)
    shown = [picture.getpixel((26 + 46 * column, 44)) for column in range(3)]
    assert shown == [(255, 0, 0), (0, 0, 255), (0, 255, 0)]


def test_each_image_is_a_set_of_its_own_to_a_joint_perturbation(codec, images) -> None:
    """Oracle: counting, and the rows of single images; what belongs together is not left to the size of a batch."""
    seen: list[int] = []

    def average(codec: Codec, clean: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        seen.append(len(clean))
        return clean.mean(dim=0, keepdim=True).expand_as(clean)

    joint = replace(CLEAN, name="average", apply=average, joint=True)
    assert run(codec, images(3), perturbations=[joint], batch_size=2) == [
        record
        for number in range(3)
        for record in run(codec, images(3), perturbations=[joint], numbers=[number], batch_size=1)
    ]
    assert seen == [1] * 6
