"""Which splits of a dataset are trained on and judged on, whatever their names."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import pytest
from helpers.runs import Run
from PIL import Image

from srl_utils.errors import UserError
from srl_utils.evaluation.__main__ import main as evaluate
from srl_utils.images.datasets import DataSource, load_validation_images
from srl_utils.images.sources import open_images

KINDS = ("parquet", "parquet stream", "saved")


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(numbers: range, split: str | None = None) -> datasets.Dataset:
    """A row for each number, a flat picture of that gray level."""
    contents = []
    for number in numbers:
        file = io.BytesIO()
        Image.new("RGB", (24, 24), (number,) * 3).save(file, "PNG")
        contents.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict(
        {"image": contents}, features=features, split=split and datasets.NamedSplit(split)
    )


def source(kind: str, folder: Path, splits: dict[str, range], **flags: object) -> DataSource:
    """A dataset of these splits, the gray levels of each."""
    if kind == "saved":
        datasets.DatasetDict({name: table(numbers) for name, numbers in splits.items()}).save_to_disk(folder)
    else:
        folder.mkdir()
        files = "".join(f"  - split: {name}\n    path: {name}.parquet\n" for name in splits)
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
        for name, numbers in splits.items():
            table(numbers).to_parquet(folder / f"{name}.parquet")
    return DataSource(dataset_name=str(folder), streaming="stream" in kind, **flags)


def judged(data: DataSource) -> list[int]:
    images = load_validation_images(data, num_images=100, resolution=8).images
    return [round(float(image.mean() + 1) * 127.5) for image in images]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["test", "validation", "dev", "images"])
def test_the_only_split_is_judged_whole(kind: str, name: str, tmp_path: Path) -> None:
    """Oracle: its images, whether it is named or not."""
    splits = {name: range(10, 15)}
    assert judged(source(kind, tmp_path / "a", splits)) == [10, 11, 12, 13, 14]
    assert judged(source(kind, tmp_path / "b", splits, validation_split=name)) == [10, 11, 12, 13, 14]


def test_of_a_training_split_alone_the_held_out_images_are_judged(tmp_path: Path) -> None:
    """Oracle: those that the training with this seed does not see; named, the split is judged whole."""
    data = source("saved", tmp_path / "a", {"train": range(40)})
    held_out = judged(data)
    training = open_images(data, 8, 0).training
    assert len(held_out) == 2 and len(training) == 38 and len({*held_out} | {*training.indices}) == 40
    assert judged(DataSource(dataset_name=data.dataset_name, validation_split="train")) == list(range(40))


def test_a_saved_table_remembers_its_split(tmp_path: Path) -> None:
    """Oracle: one that was the test split is judged whole, and can still be trained on."""
    table(range(10, 20), "test").save_to_disk(tmp_path / "a")
    data = DataSource(dataset_name=str(tmp_path / "a"))
    assert (
        judged(data) == judged(DataSource(dataset_name=data.dataset_name, validation_split="test")) == [*range(10, 20)]
    )
    opened = open_images(data, 8, 0)
    assert (len(opened.training), len(opened.validation)) == (9, 1)


def test_several_splits_without_a_training_one(tmp_path: Path) -> None:
    """Oracle: the usual names first; if there is none, the line lists what there is."""
    splits = {"a": range(3), "test": range(10, 12), "val": range(20, 23)}
    assert judged(source("parquet", tmp_path / "a", splits)) == [20, 21, 22]
    with pytest.raises(
        UserError, match=r"^validation_split: .* no split for validation; name one of its splits: a, b$"
    ):
        judged(source("parquet", tmp_path / "b", {"a": range(3), "b": range(3)}))
    with pytest.raises(UserError, match=r"^validation_split: 'c' is neither a split of the dataset \(it has a, b\)"):
        judged(source("parquet", tmp_path / "c", {"a": range(3), "b": range(3)}, validation_split="c"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_training_split_can_be_named(kind: str, tmp_path: Path) -> None:
    """Oracle: its images; another split is validated on, and never the one that is trained on."""
    splits = {"test": range(10, 15), "validation": range(20, 23), "extra": range(30, 34)}
    opened = open_images(source(kind, tmp_path / "a", splits, train_split="validation"), 8, 0)
    assert (sum(1 for _ in opened.training), sum(1 for _ in opened.validation)) == (3, 5)
    with pytest.raises(UserError, match=r"^train_split: .* no split 'train'; name one of its splits: test, "):
        open_images(source(kind, tmp_path / "b", splits), 8, 0)
    with pytest.raises(UserError, match=r"no split 'tset'; name one of its splits: test"):
        open_images(source(kind, tmp_path / "c", splits, train_split="tset"), 8, 0)


def test_of_the_only_split_images_are_held_out(tmp_path: Path) -> None:
    """Oracle: sizes; nothing is both trained and validated on."""
    opened = open_images(source("saved", tmp_path / "a", {"test": range(40)}, train_split="test"), 8, 0)
    assert (len(opened.training), len(opened.validation)) == (38, 2)
    assert not {*opened.training.indices} & {*opened.validation.indices}
    assert len(judged(DataSource(dataset_name=str(tmp_path / "a"), validation_split="0.25"))) == 10


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("train[:25%]", [0, 1]), ("train[-3:]", [5, 6, 7]), ("train[2:4]", [2, 3]),
        ("train[:1]+test", [0, 20, 21]), ("test+train[7:]", [20, 21, 7]),
    ],
)  # fmt: skip
def test_parts_and_sums_of_splits(part: str, expected: list[int], tmp_path: Path) -> None:
    """Oracle: the datasets library's own notation, which `datasets.load_dataset(..., split=...)` takes."""
    data = source("parquet", tmp_path / "a", {"train": range(8), "test": range(20, 22)}, validation_split=part)
    assert judged(data) == expected
    library = datasets.load_dataset(data.dataset_name, split=part)
    assert len(library) == len(expected)


def test_a_part_is_trained_on(tmp_path: Path) -> None:
    """Oracle: the first three quarters, and the rest where that is named."""
    data = {"train_split": "train[:75%]", "validation_split": "train[75%:]"}
    opened = open_images(source("saved", tmp_path / "a", {"train": range(8)}, **data), 8, 0)
    assert [*opened.training.indices] == [0, 1, 2, 3, 4, 5] and [*opened.validation.indices] == [6, 7]


@pytest.mark.parametrize("part", ["train[:10%", "train[a:b]", "other[:10%]", "train++test", "train[:1%1]"])
def test_parts_that_are_none_are_one_line(part: str, tmp_path: Path) -> None:
    """Oracle: the line says which splits there are."""
    with pytest.raises(UserError, match="it has train"):
        judged(source("saved", tmp_path / "a", {"train": range(8)}, validation_split=part))


def test_parts_of_streamed_splits_are_one_line(tmp_path: Path) -> None:
    """Oracle: the line says that it is the streaming that has no parts."""
    data = source("parquet stream", tmp_path / "a", {"train": range(8)}, train_split="train[:50%]")
    with pytest.raises(UserError, match=r"^train\[:50%\]: parts and sums of splits cannot be streamed"):
        open_images(data, 8, 0)


def test_commands_take_the_splits(run: Run, flags: list[str], vae_folder: Path, tmp_path: Path, capfd) -> None:
    """Oracle: a training on a split of another name, an evaluation on the only one, and lines that name their own flags."""
    folder = source("saved", tmp_path / "a", {"test": range(40)}).dataset_name
    without_folder = [*flags[:2], *flags[4:]]
    code, printed = run(*without_folder, "--dataset_name", folder, "--train_split", "test", "--dry_run")
    assert code == 0 and "a: 32 training images" in printed, printed
    code, printed = run(*without_folder, "--dataset_name", folder, "--dry_run")
    assert code == 2 and "error: --train_split: " in printed
    code, printed = run(*flags, "--train_split", "test", "--dry_run")
    assert code == 2 and "--train_split has no effect" in printed
    arguments = [
        "reconstruction", "--baseline", vae_folder, "--vae", f"same={vae_folder}", "--dataset_name", folder,
        "--resolution", "16", "--num_images", "9", "--attacks", "clean", "--metrics", "psnr", "--no_checks", "--dry_run",
    ]  # fmt: skip
    assert evaluate([str(argument) for argument in arguments]) == 0
    assert "9 images" in capfd.readouterr().out
    with pytest.raises(UserError, match=r"'nope' is neither a split"):
        evaluate([str(argument) for argument in [*arguments, "--split", "nope"]])
