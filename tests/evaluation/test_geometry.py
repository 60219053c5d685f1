"""The geometry evaluation: the real command on two tiny VAEs, its parts, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.center_smoothing import linear_bound, quantile
from helpers.runs import build_tiny_vae, write_photos
from torch import nn

from srl_utils.errors import UserError
from srl_utils.evaluation import geometry_study
from srl_utils.evaluation.cli import geometry
from srl_utils.evaluation.cli import main as command
from srl_utils.evaluation.perturbations import noise, usual_attack
from srl_utils.evaluation.results import Record
from srl_utils.evaluation.tasks.geometry import Batch, Certificate, Clusters, Smoothness, Surface
from srl_utils.geometry.certificate import CenterSmoothing
from srl_utils.vae.codec import Codec

COUNT = 10
LABELLED = ("--caption_column", "text")
SHORT = ("--attack_steps", "2", "--num_certified", "2", "--smoothing_samples", "250")
"""So many samples that the largest of four radii has a bound."""
SETTINGS = ("attack", "objective", "threat_model", "epsilon", "metric")


@pytest.fixture
def arguments(tiny_vae, other_tiny_vae, images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two VAEs and ten labelled pictures on disk, and a small evaluation of them."""
    for part, setting, value in ((Surface, "points", 3), (Surface, "places", 1), (Smoothness, "num_steps", 2)):
        monkeypatch.setitem(part.__init__.__kwdefaults__, setting, value)
    tiny_vae.save_pretrained(tmp_path / "original")
    other_tiny_vae.save_pretrained(tmp_path / "robust")
    write_photos(tmp_path / "photos", images(COUNT))
    for number in range(COUNT):
        (tmp_path / f"photos/{number}.txt").write_text(f"a {('red', 'blue')[number % 2]} thing")
    return [
        "geometry", "--baseline", str(tmp_path / "original"), "--vae", f"robust={tmp_path / 'robust'}",
        "--data_dir", str(tmp_path / "photos"), "--resolution", "16", "--batch_size", "6", "--num_images", str(COUNT),
        "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip


def rows_of(folder: Path) -> dict[tuple[str, str, str], dict]:
    rows = json.loads((folder / "results.json").read_text())
    return {(row["vae"], row["attack"], row["metric"]): row for row in rows}


def test_command_writes_rows_and_figures(arguments, tmp_path: Path) -> None:
    """Oracle: the real command; the rows of every part for both VAEs, figures, documents, and values that must be so:
    clean images are themselves, and one pass is the reconstruction.
    """
    assert command.main([*arguments, *LABELLED, *SHORT]) == 0
    rows = rows_of(tmp_path / "out")
    for vae in ("original", "robust"):
        own = {key[1:]: row for key, row in rows.items() if key[0] == vae}
        assert set(own) >= {
            ("clean", "psnr"), ("clean", "raised-area-weights"), ("apgd-2", "curvature"), ("apgd-2", "raised-area"),
            ("apgd-2", "latent-travel"), ("gaussian-noise", "own-nearest"), ("apgd-2", "image-silhouette"),
            ("clean", "label-silhouette"), ("clean", "lipschitz-encoder"), ("clean", "lipschitz-both-linf"),
            ("latents-interpolated", "path-length"), ("images-interpolated", "worst-jump"),
            ("reencoded-10", "reencoding-drift"), ("smoothed", "certified"),
        }  # fmt: skip
        assert all(set(row) == {"vae", *SETTINGS, "value", "ci95", "n"} for row in own.values())
        assert own["clean", "psnr"]["value"] == pytest.approx(own["reencoded-1", "psnr"]["value"], abs=1e-3)
        assert own["apgd-2", "psnr"]["value"] < own["clean", "psnr"]["value"]
        assert own["smoothed", "certified"]["n"] == 2 and own["clean", "lipschitz-both"]["n"] == COUNT
        assert own["latents-interpolated", "path-length"]["value"] >= 1 - 1e-6
    held = [row["value"] for key, row in rows.items() if key[1:] == ("apgd-2 in l2-ball-0.075", "certificate-held")]
    assert held and held == [1.0] * len(held)  # the smoothing may abstain for one VAE
    figures = {path.name for path in (tmp_path / "out/figures").glob("*.png")}
    assert figures >= {"surface-images.png", "surface-weights.png", "curves-number-of-passes.png"}
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "Loss surface around images" in text and "Certificates" in text
    assert ("map.png" in figures) != ("the map of latents was left out" in (tmp_path / "out/report.md").read_text())


def test_finished_parts_are_not_measured_again(
    arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Oracle: the records of an undisturbed run; a crash costs one part of one batch, and a part can be added later."""
    parts = ["--parts", "clusters", "interpolation", "--attack_steps", "2"]
    measured: list[tuple[str, int, str]] = []
    write = geometry_study.GeometryStudy._write

    def crashing(self, path: Path, codec: Codec, part, found) -> None:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append((codec.name, int(path.stem), part.name))
        write(self, path, codec, part, found)

    monkeypatch.setattr(geometry_study.GeometryStudy, "_write", crashing)
    with pytest.raises(KeyboardInterrupt):
        command.main([*arguments, *parts])
    monkeypatch.setattr(
        geometry_study.GeometryStudy, "_write",
        lambda self, path, codec, part, found: (
            measured.append((codec.name, int(path.stem), part.name)), write(self, path, codec, part, found),
        ),
    )  # fmt: skip
    command.main([*arguments, *parts])
    expected = [
        (vae, first, part)
        for vae in ("original", "robust") for first in (0, 6) for part in ("clusters", "interpolation")
    ]  # fmt: skip
    assert measured == expected
    resumed = (tmp_path / "out/per_image.csv").read_text()
    command.main([*arguments[:-1], str(tmp_path / "fresh"), *parts])
    assert resumed == (tmp_path / "fresh/per_image.csv").read_text()
    measured.clear()
    command.main([*arguments, "--parts", "clusters", "reencoding", "--attack_steps", "2"])
    assert {part for _, _, part in measured} == {"reencoding"}
    measured.clear()
    labelled = [*LABELLED, "--label_words", "red", "blue", "green"]
    command.main([*arguments, *labelled, "--parts", "clusters", "certificate", *SHORT])  # with flags that it alone has
    assert {part for _, _, part in measured} == {"certificate"}
    assert "no caption has green" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"certificate holds .* other settings \(num_certified\)"):
        command.main([*arguments, "--parts", "certificate", *SHORT, "--num_certified", "3"])
    with pytest.raises(UserError, match=r"attacked holds .* other settings \(attack_steps\)"):
        command.main([*arguments, "--parts", "clusters", "--attack_steps", "3"])


def test_another_study_in_the_folder_is_refused(arguments) -> None:
    """Oracle: specification; one line that names what differs, before any work."""
    parts = ["--parts", "interpolation"]
    command.main([*arguments, *parts])
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        command.main([*arguments, *parts, "--seed", "1"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--smoothing_samples", "99"], "at least 100 samples, got 99"),
        (["--num_images", "1"], "clusters and interpolation need at least 2 images"),
        ([*LABELLED, "--label_words", "thing"], "at least two labels"),
        (["--parts", "smoothness", "--epsilon", "4/255"], "--epsilon has no effect without surface or clusters"),
        (["--parts", "surface", "--num_certified", "9"], "--num_certified has no effect without certificate"),
    ],
)
def test_bad_input_is_refused_before_any_work(flags: list[str], message: str, arguments, monkeypatch) -> None:
    """Oracle: specification."""
    monkeypatch.setattr(geometry_study.GeometryStudy, "run", lambda self: pytest.fail("work has begun"))
    with pytest.raises(UserError, match=message):
        command.main([*arguments, *flags])


def test_half_precision_is_refused() -> None:
    """Oracle: specification."""
    setup = SimpleNamespace(accelerator=SimpleNamespace(mixed_precision="bf16"))
    with pytest.raises(UserError, match="derivatives need full precision"):
        geometry.check_setup(SimpleNamespace(), setup)


def test_dry_run_says_what_it_would_cost(arguments, tmp_path: Path, capsys) -> None:
    """Oracle: the cost model; 2 VAEs, 10 images, and for each 17 steps and 2 encodings of 0.3 passes."""
    command.main([*arguments, "--parts", "interpolation", "--dry_run"])
    assert "10 images, 2 VAEs, 352 passes through one\n  interpolation" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_labels_are_words_or_repeated_captions() -> None:
    """Oracle: specification."""
    captions = ["a red circle", "a blue ring", "a red ring"]
    assert geometry.labels_of(captions, ["ring", "circle"]) == ["circle", "ring", "ring"]
    assert geometry.labels_of(captions, ["circle"]) == ["circle", "other", "other"]
    assert geometry.labels_of(["A Red Circle.", "a red ring"], ["red circle"]) is None  # two labels of one image each
    assert geometry.labels_of(["Circle, red", "circles", "a red ring"], ["circle"]) == ["circle", "other", "other"]
    assert geometry.labels_of(captions, []) is None
    assert geometry.labels_of(["3", "3", "8"], []) == ["3", "3", "8"]
    assert geometry.labels_of(["", "", ""], []) is None


# --- parts ---


class Scaled(nn.Module):
    """A linear encoder or decoder: it multiplies; an encoder's moments have a mean and a log-variance."""

    def __init__(self, factor: float, *, moments: bool) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor), requires_grad=False)
        self.moments = moments

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        output = self.factor * given
        return torch.cat([output, output], dim=1) if self.moments else output


def linear_codec(factor: float, decoding: float = 1.0, *, scaling: float = 1.0) -> Codec:
    vae = build_tiny_vae()
    vae.register_to_config(scaling_factor=scaling)
    return Codec("linear", vae, Scaled(factor, moments=True), Scaled(decoding, moments=False))


def batch_of(codec: Codec, clean: torch.Tensor, attacked: torch.Tensor | None = None) -> Batch:
    return Batch(
        codec=codec, numbers=range(len(clean)), clean=clean, following=clean.flip(0),
        attacked=clean if attacked is None else attacked, seed=0,
    )  # fmt: skip


def means(records: list[Record]) -> dict[tuple[str, str], float]:
    values: dict[tuple[str, str], list[float]] = {}
    for record in records:
        values.setdefault((record.setting.attack, record.setting.metric), []).append(record.value)
    return {key: sum(each) / len(each) for key, each in values.items()}


def test_lipschitz_constants_have_the_stated_units(images) -> None:
    """Oracle: closed form. A change of a [0,1] image by d is one of a [-1,1] image by 2d, the encoder makes it 6d, and the
    scaling of latents 1.5d; if all values change by 1/255, all latents change by 1.5/255. Without the scaling, encoder and
    decoder together make a change 1.5 times as large.
    """
    codec = linear_codec(3.0, 0.5, scaling=0.25)
    found = means(Smoothness().measure(batch_of(codec, images(2))).records)
    expected = {"encoder": 1.5, "encoder-linf": 1.5 / 255, "both": 1.5, "both-linf": 1.5}
    assert {metric: value for (_, metric), value in found.items()} == {
        f"lipschitz-{name}": pytest.approx(value, rel=1e-4) for name, value in expected.items()
    }


def test_curvature_of_a_linear_vae_is_that_of_its_quadratic_error(images) -> None:
    """Oracle: closed form. The error of c x to x has the second derivative 2 c^2 |d|^2 / n, in grey levels."""
    clean = images(2, limit=0.5)
    attack = usual_attack(8 / 255)
    attacked = clean + torch.linspace(-0.05, 0.05, clean[0].numel()).view_as(clean[:1])
    part = Surface(attack=attack, points=3, places=2)
    found = means(part.measure(batch_of(linear_codec(0.9), clean, attacked)).records)
    expected = 2 * 0.9**2 * (127.5 * (attacked - clean)).square().flatten(1).mean(dim=1).mean()
    assert found[attack.name, "curvature"] == pytest.approx(expected.item(), rel=1e-4)


def test_clusters_of_a_linear_vae_are_those_of_the_images(images) -> None:
    """Oracle: closed form; the attack puts every image in the place of the next one."""
    clean, attack, codec = images(4), usual_attack(8 / 255), linear_codec(1.0)
    part = Clusters(attack=attack, noise=noise(1e-4), labels=[*"abab"])
    kept = part.measure(batch_of(codec, clean, clean.roll(1, dims=0))).tensors
    found = means(part.conclude(codec, kept))
    assert found[attack.name, "own-nearest"] == 0 and found["gaussian-noise", "own-nearest"] == 1
    assert found[attack.name, "latent-travel"] == pytest.approx(1, rel=0.1)
    assert found["gaussian-noise", "image-silhouette"] > 0.99 and found[attack.name, "image-silhouette"] < 0
    assert found["clean", "label-silhouette"] < 0.1


def test_certificate_holds_against_apgd_on_every_image(tiny_vae, images) -> None:
    """Oracle: counting. APGD on the smoothed outcome at the largest of four radii, 0.75 sigma, breaks no bound. The
    smoothing may abstain for one attacked image.
    """
    smoothing = CenterSmoothing(sigma=0.2, samples=300, batch_size=300)
    part = Certificate(smoothing=smoothing, num_images=3, attack_steps=3)
    codec = Codec.of(tiny_vae.requires_grad_(False), "tiny")
    records = part.measure(batch_of(codec, images(4))).records
    held = [record for record in records if record.setting.metric == "certificate-held"]
    assert [record.value for record in records if record.setting.metric == "certified"] == [1.0] * 3
    assert len(held) >= 2 and all(record.value == 1 for record in held)
    assert {record.setting.attack for record in held} == {"apgd-3 in l2-ball-0.075"}


class Side(nn.Module):
    """An encoder that shows on which side of zero the mean of an image is, in all values of the latents."""

    def __init__(self, steepness: float) -> None:
        super().__init__()
        self.steepness = steepness

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side = (self.steepness * images.mean(dim=(1, 2, 3), keepdim=True)).tanh().expand_as(images)
        return torch.cat([side, side], dim=1)


class Boastful(CenterSmoothing):
    """States a tenth of each bound."""

    def bounds(self, *arguments: Any) -> list[float | None]:
        return [bound if bound is None else bound / 10 for bound in super().bounds(*arguments)]


@pytest.mark.parametrize(
    ("smoothing", "attack_steps", "held"), [(CenterSmoothing, 5, 1), (Boastful, 5, 0), (Boastful, 0, 1)]
)
def test_the_attack_breaks_a_bound_that_is_too_small(
    smoothing: type[CenterSmoothing], attack_steps: int, held: int
) -> None:
    """Oracle: closed form. The mean of n noises of sigma has the deviation sigma / sqrt(n), of which the image is 0.3 above
    zero; a move of 0.75 sigma along the mean takes it 0.45 below, where half of the outputs and more are on the other side.
    The true bound is 3 times nearly the whole way from side to side. A tenth of it is less than the attack's move, and more
    than none.
    """
    sigma, shape = 0.2, (1, 3, 4, 4)
    deviation = sigma / math.sqrt(math.prod(shape))
    vae = build_tiny_vae()
    codec = Codec("side", vae, Side(3 / deviation), Scaled(1.0, moments=False))
    part = Certificate(smoothing=smoothing(sigma=sigma, samples=1000), num_images=1, attack_steps=attack_steps)
    records = part.measure(batch_of(codec, torch.full(shape, 0.3 * deviation))).records
    assert means(records)[f"apgd-{attack_steps} in l2-ball-0.075", "certificate-held"] == held


def test_certificate_is_the_one_computed_by_hand_in_units_of_images_from_0_to_1(images) -> None:
    """Oracle: closed form, for half of an image of one pixel. With a sigma of 0.2 in [-1,1], thus 0.1 in [0,1], the radii in
    [0,1] are 0.1, 0.25, 0.5 and 0.75 times that. The smoothed output is itself one of the noisy outputs, whose distance from
    the usual output is the recorded error: the best of 30 normal vectors, which is below 1 sigma with probability 0.999.
    """
    smoothing = CenterSmoothing(sigma=0.2, samples=40_000, batch_size=40_000)
    part = Certificate(smoothing=smoothing, num_images=1, attack_steps=1)
    found = means(part.measure(batch_of(linear_codec(0.5), images(1)[..., :1, :1])).records)
    slope = 0.5 * 0.1
    offset = found["smoothed", "smoothing-error"] / slope
    assert 0 < offset < 1
    for name, radius in (("0.01", 0.1), ("0.025", 0.25), ("0.05", 0.5), ("0.075", 0.75)):
        expected = linear_bound(slope, 3, offset, quantile(40_000, radius))
        assert found[f"l2-ball-{name}", "certified-distance"] == pytest.approx(expected, rel=0.02)
