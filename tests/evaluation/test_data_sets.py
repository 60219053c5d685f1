"""Evaluations on several data sets: flags, verdicts, and the report that compares them."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import pytest
from helpers.runs import write_photos

from srl_utils.errors import UserError
from srl_utils.evaluation.cli import main as command
from srl_utils.evaluation.cli.data_sets import data_sets
from srl_utils.evaluation.report.data_sets import (
    CARRIES_OVER,
    LOST,
    NOTHING_LOST,
    NOTHING_WON,
    UNCLEAR,
    verdict,
    won_back,
)
from srl_utils.evaluation.results import Row
from srl_utils.evaluation.study import Study


def of_all(value: float, spread: float = 0.0) -> dict[int, float]:
    """Twenty images with this mean."""
    return {index: value + spread * (-1) ** index for index in range(20)}


# --- is it judged well? ---


def test_share_won_back_is_a_ratio_of_means() -> None:
    """Oracle: closed form; of 8 dB lost, 6 dB are won back in every image. An image that lacks a value is left out."""
    found = won_back({**of_all(30.0), 20: 99.0}, of_all(22.0), of_all(28.0))
    assert found is not None and found.value == pytest.approx(0.75)
    assert found.interval == pytest.approx((0.75, 0.75)) and found.text == "75% [75%, 75%]"
    assert won_back({0: 30.0}, {1: 20.0}, {0: 25.0}) is None


@pytest.mark.parametrize(
    ("gain", "spread", "loss", "expected"),
    [
        (4.0, 0.0, 8.0, LOST),  # 50% of the loss, and 75% of 80% are 60%
        (5.2, 0.0, 8.0, CARRIES_OVER),  # 65%
        (4.8, 3.0, 8.0, UNCLEAR),  # 60% on average
        (4.0, 0.0, 0.0, ""),  # nothing was lost there
    ],
)
def test_verdict_compares_with_three_quarters_of_the_first_share(
    gain: float, spread: float, loss: float, expected: str
) -> None:
    """Oracle: by hand; the first share is 80%."""
    first = won_back(of_all(30.0), of_all(20.0), of_all(28.0))
    other = won_back(of_all(30.0), of_all(30.0 - loss), of_all(30.0 - loss + gain, spread))
    assert first is not None and other is not None
    assert verdict(first, other) == expected
    assert (other.text == NOTHING_LOST) == (loss == 0)


def test_a_vae_that_wins_nothing_has_nothing_to_carry_over() -> None:
    """Oracle: specification; it is no verdict on the other data set."""
    first = won_back(of_all(30.0), of_all(20.0), of_all(20.0, 1.0))
    other = won_back(of_all(30.0), of_all(20.0), of_all(28.0))
    assert first is not None and other is not None
    assert verdict(first, other) == NOTHING_WON


# --- flags ---


def flags(**changes: object) -> argparse.Namespace:
    given = {
        "dataset_name": None, "data_dir": None, "split": None, "image_column": "image", "streaming": False,
        "output_dir": Path("out"), "reference": None,
    }  # fmt: skip
    return argparse.Namespace(**{**given, **changes})


def test_a_single_data_set_keeps_its_folder() -> None:
    """Oracle: specification; folders of results that exist stay valid."""
    (part,) = data_sets(flags(data_dir=["photos/val"])).values()
    assert part == flags(data_dir="photos/val")


def test_splits_and_columns_are_shared_out() -> None:
    """Oracle: specification; one for each data set or one for all, and none for folders beside data sets."""
    parts = data_sets(
        flags(dataset_name=["a/x", "b/y"], split=["val", "test"], streaming=True, image_column="img", data_dir=["z"])
    )
    chosen = [(part.split, part.image_column, part.streaming, part.output_dir.name) for part in parts.values()]
    assert chosen == [("val", "img", True, "a-x"), ("test", "img", True, "b-y"), (None, "image", False, "z")]


def test_the_reference_comes_first() -> None:
    """Oracle: specification; by the last part of its path, and the others keep their order."""
    parts = data_sets(flags(dataset_name=["digits", "pages"], data_dir=["own/scenes"], reference="scenes"))
    assert list(parts) == ["scenes", "digits", "pages"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_dir": ["a", "b"], "reference": "c"}, "c is none of a, b"),
        ({}, "give `dataset_name` or `data_dir`"),
        ({"dataset_name": ["digits", "digits"]}, "digits and digits have the same name"),
        ({"data_dir": ["a/val", "b/val"]}, "val and val have the same name"),
        ({"dataset_name": ["a", "b", "c"], "split": ["x", "y"]}, "2 values for 3 data sets"),
    ],
)
def test_bad_flags_are_refused(changes: dict, message: str) -> None:
    """Oracle: specification; before anything is loaded."""
    with pytest.raises(UserError, match=message):
        data_sets(flags(**changes))


# --- the command ---


@pytest.fixture
def words(tiny_vae, other_tiny_vae, images, tmp_path: Path) -> list[str]:
    """The smallest evaluation of two VAEs, without its data sets and output folder."""
    tiny_vae.save_pretrained(tmp_path / "original")
    other_tiny_vae.save_pretrained(tmp_path / "robust")
    write_photos(tmp_path / "photos", images(3))
    return [
        "reconstruction", "--baseline", str(tmp_path / "original"), "--vae", f"robust={tmp_path / 'robust'}",
        "--resolution", "16", "--num_images", "3", "--attacks", "clean", "jpeg", "pgd-1", "--epsilons", "8/255",
        "--metrics", "psnr", "ssim", "--no_checks",
    ]  # fmt: skip


def test_each_data_set_has_the_values_of_an_evaluation_on_it_alone(words, tmp_path: Path, capsys) -> None:
    """Oracle: the command on each data set alone; rows and images of the two together are theirs, with a name.

    The report has a table for each data set, the two panels that compare them, and the note on enlarged digits.
    """
    both = ["--dataset_name", "digits", "--data_dir", str(tmp_path / "photos"), "--output_dir", str(tmp_path / "both")]
    assert command.main([*words, *both]) == 0
    assert "Data set digits" in capsys.readouterr().out
    alone = tmp_path / "alone"
    assert command.main([*words, "--data_dir", str(tmp_path / "photos"), "--output_dir", str(alone)]) == 0

    rows = json.loads((tmp_path / "both/results.json").read_text())
    own = json.loads((alone / "results.json").read_text())
    assert own == json.loads((tmp_path / "both/photos/results.json").read_text())
    assert not any("dataset" in row for row in own)
    assert [row for row in rows if row["dataset"] == "photos"] == [{**row, "dataset": "photos"} for row in own]
    assert {row["dataset"] for row in rows} == {"digits", "photos"}
    assert [Row.from_json(row).dataset for row in rows] == [row["dataset"] for row in rows]

    with (tmp_path / "both/per_image.csv").open() as lines, (alone / "per_image.csv").open() as alone_lines:
        named = [line for line in csv.DictReader(lines) if line["dataset"] == "photos"]
        assert named == [{"dataset": "photos", **line} for line in csv.DictReader(alone_lines)]

    report = (tmp_path / "both/report.md").read_text()
    for title in (
        "Does the robustness carry over?", "Which images are served worse?", "digits: Adaptive attacks",
        "photos: Adaptive attacks", "PSNR on each data set, pgd-1",
    ):  # fmt: skip
        assert title in report
    assert "digits: 3 images were enlarged to 16 px: their short sides have 8 px" in report
    assert "PSNR against severity" in (alone / "report.md").read_text()
    assert (tmp_path / "both/figures/psnr-by-data-set-pgd-1.png").is_file()


def test_data_sets_can_be_added(words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: counting; given again with one more, it computes that one alone."""
    words += ["--data_dir", str(tmp_path / "photos"), "--output_dir", str(tmp_path / "out")]
    assert command.main([*words, "--dataset_name", "digits"]) == 0
    computed, compute = set(), Study._compute

    def counted(study: Study, *others: object) -> None:
        computed.add(study.output_dir.name)
        compute(study, *others)

    monkeypatch.setattr(Study, "_compute", counted)
    assert command.main([*words, "--dataset_name", "text", "digits"]) == 0
    assert computed == {"text"}


@pytest.mark.parametrize("attacks", [["jpeg", "pgd-1"], ["clean", "jpeg"]], ids=["without clean", "without an attack"])
def test_a_missing_verdict_has_a_reason(attacks: list[str], words, tmp_path: Path) -> None:
    """Oracle: specification; without an attack, there is nothing to judge."""
    place = words.index("--attacks")
    words[place + 1 : place + 4] = attacks
    words += ["--dataset_name", "digits", "--data_dir", str(tmp_path / "photos"), "--output_dir", str(tmp_path / "out")]
    if "pgd-1" not in attacks:
        words = [word for word in words if word not in ("--epsilons", "8/255")]
    assert command.main(words) == 0
    report = (tmp_path / "out/report.md").read_text()
    assert ("whether the robustness carries over was left out" in report) == ("pgd-1" in attacks)


def test_one_that_cannot_be_read_ends_it_before_any_work(words, tmp_path: Path) -> None:
    """Oracle: specification; nothing is computed for the first data set."""
    with pytest.raises(UserError, match="there is no folder nowhere"):
        command.main(
            [*words, "--dataset_name", "faces", "--data_dir", "nowhere", "--output_dir", str(tmp_path / "out")]
        )
    assert not (tmp_path / "out").exists()
