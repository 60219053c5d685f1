"""Sources of images, the order of samples and batches, validation images, and the ledger of bad images."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import pickle
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import datasets
import numpy as np
import pytest
import torch
from helpers.batches import first_batches, joined
from helpers.runs import ROOT
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from srl_utils.errors import ResourceError, UnusableFile, UserError
from srl_utils.images.datasets import DataSource, TrainingData, load_validation_images, open_data
from srl_utils.images.framing import Sample
from srl_utils.images.ledger import ImageLedger
from srl_utils.images.loading import Batch, training_batches
from srl_utils.resources import explained

COUNT = 12
RESOLUTION = 8


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps prepared datasets out of the home folder, and leaves out a pause that follows each shuffled stream."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01, raising=False)


def picture(identity: int) -> Image.Image:
    """A flat picture whose gray level tells which one it is, whatever its crop."""
    return Image.new("RGB", (12, 10), (10 * identity,) * 3)


def png(identity: int) -> bytes:
    file = io.BytesIO()
    picture(identity).save(file, "PNG")
    return file.getvalue()


def identities(images: Tensor) -> list[int]:
    return (((images.mean((1, 2, 3)) + 1) * 127.5) / 10).round().int().tolist()


def write_folder(folder: Path, numbers: range = range(COUNT)) -> Path:
    for number in numbers:
        path = folder / f"part{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return folder


def write_parquet(folder: Path, contents: list[bytes] | None = None, split: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    contents = contents or [png(number) for number in range(COUNT)]
    table = {"image": [{"bytes": content, "path": None} for content in contents], "text": ["a"] * len(contents)}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(table, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def write_tar(folder: Path) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for number in range(COUNT):
            for suffix, content in (("png", png(number)), ("json", json.dumps({"n": number}).encode())):
                member = tarfile.TarInfo(f"key{number}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def write_saved(folder: Path, *, splits: bool) -> Path:
    table = datasets.Dataset.from_dict({"image": [picture(number) for number in range(COUNT)]})
    (datasets.DatasetDict(train=table) if splits else table).save_to_disk(folder)
    return folder


def opened(source: DataSource, **changes) -> TrainingData:
    settings = {
        "resolution": RESOLUTION,
        "seed": 0,
        "center_crop": False,
        "random_flip": True,
        "num_validation_images": 4,
    }
    return open_data(source, **(settings | changes))


def folder_data(tmp_path: Path, **changes) -> TrainingData:
    """All twelve images for training, one more for validation."""
    validation = write_folder(tmp_path / "val", range(20, 21))
    train = tmp_path / "train"
    if not train.exists():
        write_folder(train)
    return opened(DataSource(train_data_dir=str(train), validation_data_dir=str(validation)), **changes)


def stream_data(tmp_path: Path, **changes) -> TrainingData:
    folder = tmp_path / "parquet"
    write_parquet(write_parquet(folder), [png(20)], "validation")
    return opened(DataSource(dataset_name=str(folder), streaming=True), **changes)


KINDS = {"map": folder_data, "stream": stream_data}


# Sources


def sources(tmp_path: Path) -> dict[str, DataSource]:
    """The same twelve images in every form."""
    parquet = str(write_parquet(tmp_path / "parquet"))
    tar = str(write_tar(tmp_path / "tar"))
    folder = str(write_folder(tmp_path / "images"))
    return {
        "folder": DataSource(train_data_dir=folder),
        "imagefolder": DataSource(dataset_name=folder),
        "parquet": DataSource(dataset_name=parquet),
        "parquet stream": DataSource(dataset_name=parquet, streaming=True),
        "tar": DataSource(train_data_dir=tar, image_column="png"),
        "tar stream": DataSource(train_data_dir=tar, image_column="png", streaming=True),
        "tar as a dataset": DataSource(dataset_name=tar, image_column="png"),
        "saved": DataSource(dataset_name=str(write_saved(tmp_path / "saved", splits=False))),
        "saved splits": DataSource(dataset_name=str(write_saved(tmp_path / "splits", splits=True))),
    }


def test_every_source_yields_the_same_images(tmp_path: Path) -> None:
    """Oracle: the twelve images written; training and held-out ones together, or a stream's first epoch."""
    validation = str(write_folder(tmp_path / "val", range(20, 23)))
    for name, source in sources(tmp_path).items():
        data = opened(DataSource(**(vars(source) | {"validation_data_dir": validation})))
        _, images = joined(first_batches(data, 3))
        assert sorted(identities(images)) == list(range(COUNT)), name
        assert images.shape == (COUNT, 3, RESOLUTION, RESOLUTION) and images.dtype == torch.float32
        assert sorted(identities(data.validation_images)) == [20, 21, 22]
        assert data.num_images == (None if source.streaming else COUNT)
        assert str(COUNT) in data.description or source.streaming


def test_columns_of_bytes_and_paths(tmp_path: Path) -> None:
    """Oracle: the images written, with no Image feature in the dataset."""
    paths = sorted(str(path) for path in write_folder(tmp_path / "images").rglob("*.png"))
    for column in ([png(number) for number in range(COUNT)], paths):
        folder = tmp_path / type(column[0]).__name__
        datasets.Dataset.from_dict({"image": column}).save_to_disk(folder)
        data = opened(DataSource(dataset_name=str(folder), validation_split="0.25"))
        assert data.num_images == 9


def test_streams_without_known_features(tmp_path: Path) -> None:
    """Oracle: the images written; the reader of JSON lines learns its columns from the first row only."""
    paths = sorted(str(path) for path in write_folder(tmp_path / "images").rglob("*.png"))
    folder = tmp_path / "lines"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"picture": path}) + "\n" for path in paths))
    validation = str(write_folder(tmp_path / "val", range(1)))
    source = DataSource(dataset_name=str(folder), streaming=True, validation_data_dir=validation)
    data = opened(DataSource(**(vars(source) | {"image_column": "picture"})))
    assert sorted(identities(joined(first_batches(data, 3))[1])) == list(range(COUNT))
    with pytest.raises(UserError, match="the columns are picture"):
        opened(source)


@pytest.mark.parametrize("resolution", [64, 512])
def test_embedded_photographs(resolution: int) -> None:
    """Oracle: the shapes asked for; tiles exist even at a resolution above that of the photographs."""
    data = opened(DataSource(dataset_name="scikit-image"), resolution=resolution, num_validation_images=2)
    (batch,) = first_batches(data, 1)
    assert batch.images.shape == (4, 3, resolution, resolution)
    assert data.validation_images.shape == (2, 3, resolution, resolution)
    assert batch.images.std() > 0.1 and batch.images.min() >= -1 and batch.images.max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_max_train_samples(kind: str, tmp_path: Path) -> None:
    """Oracle: the first five images, five per epoch, in any order."""
    unlimited = KINDS[kind](tmp_path)
    if kind == "map":
        flags = {"train_data_dir": str(tmp_path / "train"), "validation_data_dir": str(tmp_path / "val")}
    else:
        flags = {"dataset_name": str(tmp_path / "parquet"), "streaming": True}
    data = opened(DataSource(**flags, max_train_samples=5))
    limited = identities(joined(first_batches(data, 2, batch_size=5))[1])
    first_five = {0, 2, 4, 6, 8} if kind == "map" else set(range(5))
    assert set(limited[:5]) == set(limited[5:]) == first_five
    assert (unlimited.num_images, data.num_images) == ((COUNT, 5) if kind == "map" else (None, None))


# Errors


def assert_one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({}, ["exactly one of `dataset_name` and `train_data_dir`"]),
        ({"dataset_name": "a", "train_data_dir": "b"}, ["exactly one of `dataset_name` and `train_data_dir`"]),
        ({"train_data_dir": "missing"}, ["train_data_dir: there is no folder missing"]),
        ({"train_data_dir": "empty"}, ["train_data_dir: empty", "no image files"]),
        (
            {"train_data_dir": "images", "validation_data_dir": "missing"},
            ["validation_data_dir: there is no folder missing"],
        ),
        ({"train_data_dir": "images", "validation_data_dir": "images", "validation_split": "x"}, ["not both"]),
        ({"train_data_dir": "images", "validation_split": "1.5"}, ["validation_split: '1.5'", "train", "0.05"]),
        ({"train_data_dir": "one"}, ["a single image leaves none", "folder of validation images"]),
        ({"train_data_dir": "images", "max_train_samples": 0}, ["no images", "max_train_samples"]),
        ({"train_data_dir": "tar", "image_column": "depth.png"}, ["image_column: ", "'depth.png'", "png, json"]),
        ({"train_data_dir": "broken"}, ["training images tried can be read", "broken", "no image of a known format"]),
        (
            {"dataset_name": "./parquet", "image_column": "img"},
            ["image_column: there is no column 'img'", "image, text"],
        ),
        ({"dataset_name": "./parquet", "validation_split": "dev"}, ["validation_split: 'dev'", "train"]),
        (
            {"dataset_name": "./parquet", "dataset_config_name": "large"},
            ["dataset_name: ", "large", "check its name, its configuration"],
        ),
        (
            {"dataset_name": "./parquet", "streaming": True},
            ["held out of a streamed dataset", "folder of validation images"],
        ),
        (
            {"dataset_name": "./parquet", "streaming": True, "validation_split": "0.1"},
            ["held out of a streamed dataset"],
        ),
        ({"dataset_name": "./tests", "streaming": True}, ["no split 'train'", "test"]),
        ({"dataset_name": "./empty"}, ["./empty"]),
        ({"dataset_name": "nobody/nothing"}, ["nobody/nothing", "connection"]),
    ],
)
def test_every_mistake_has_one_clear_line(
    flags: dict, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the message names the parameter or the folder, and what exists instead."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "images")
    write_folder(tmp_path / "one", range(1))
    write_parquet(tmp_path / "parquet")
    write_parquet(tmp_path / "tests", split="test")
    write_tar(tmp_path / "tar")
    write_folder(tmp_path / "broken", range(2))
    for path in (tmp_path / "broken").rglob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(UserError) as error:
        opened(DataSource(**flags))
    assert_one_line(error, *parts)


def test_bad_neighbours_do_not_condemn_the_rest(tmp_path: Path) -> None:
    """Oracle: twenty bad files stand first in the alphabet, before a good one of each two."""
    for number in range(20):
        (write_folder(tmp_path / "train") / f"0-bad-{number}.png").write_bytes(b"broken")
    assert folder_data(tmp_path).num_images == COUNT + 20


def test_an_empty_stream_ends(tmp_path: Path) -> None:
    """Oracle: an error instead of an endless search for a first image, also when it is met while training."""
    data = stream_data(tmp_path)
    with pytest.raises(UserError) as error:
        opened(DataSource(dataset_name=str(tmp_path / "parquet"), streaming=True, max_train_samples=0))
    assert_one_line(error, "no images")
    object.__setattr__(data.samples.images, "dataset", data.samples.images.dataset.take(0))
    for num_workers in (0, 1):
        with pytest.raises(UserError) as error:
            first_batches(data, 1, num_workers=num_workers)
        assert_one_line(error, "no images")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_worker_still_names_its_parameter(num_workers: int, tmp_path: Path) -> None:
    """Oracle: the error as raised, by the main process and by a worker, of which torch sends the text alone."""
    data = stream_data(tmp_path)
    data = replace(data, samples=replace(data.samples, images=Refused()))
    with pytest.raises(UnusableFile) as error:
        first_batches(data, 1, num_workers=num_workers)
    assert (error.value.parameter, error.value.problem) == ("image_column", "'depth: of it' holds no image")


class Refused:
    """A stream that fails at its first image."""

    def shuffled(self, seed: int, epoch: int) -> NoReturn:
        raise UnusableFile("'depth: of it' holds no image", parameter="image_column")


# Order


@pytest.mark.parametrize("kind", KINDS)
def test_every_image_once_per_epoch_in_a_new_order(kind: str, tmp_path: Path) -> None:
    """Oracle: each epoch is a permutation, and two epochs or two seeds have different ones."""
    orders = [identities(joined(first_batches(KINDS[kind](tmp_path, seed=seed), 6))[1]) for seed in (0, 1)]
    epochs = [order[start : start + COUNT] for order in orders for start in (0, COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_workers_change_nothing(kind: str, num_workers: int, tmp_path: Path) -> None:
    """Oracle: invariance; batches by worker processes are those of the main process, bit by bit."""
    data = KINDS[kind](tmp_path)
    positions, images = joined(first_batches(data, 5))
    other_positions, other_images = joined(first_batches(data, 5, num_workers=num_workers))
    assert positions == other_positions == list(range(20))
    assert images.equal(other_images)


def test_batches_are_made_ahead_of_their_use(tmp_path: Path) -> None:
    """Oracle: the samples that were asked for; while one batch is in use, the next ones are made."""
    data, asked = folder_data(tmp_path), []
    batches = training_batches(replace(data, samples=Watched(data.samples, asked)), batch_size=2)
    assert next(batches).positions == [0, 1]
    deadline = time.monotonic() + 10
    while len(asked) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert asked == [0, 1, 2, 3, 4, 5]
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


class Stalling(Dataset):
    """The same samples; that of the sixth position never comes."""

    def __init__(self, samples: Dataset) -> None:
        self.samples = samples

    def __getitem__(self, position: int) -> Sample:
        if position == 5:
            threading.Event().wait()
        return self.samples[position]


def test_data_that_stall_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the batches before, then an error in about the time that a stall may last."""
    monkeypatch.setattr("srl_utils.images.loading.LONGEST_STALL", 1)
    monkeypatch.setattr("srl_utils.images.loading.LONGEST_LAST_BATCH", 0.1)
    data = folder_data(tmp_path)
    batches = training_batches(replace(data, samples=Stalling(data.samples)), batch_size=2)
    assert [next(batches).positions, next(batches).positions] == [[0, 1], [2, 3]]
    started = time.monotonic()
    with pytest.raises(UserError, match="no training image has come for 1 s"):
        next(batches)
    assert time.monotonic() - started < 10


@pytest.mark.faults
@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_that_stall_keep_no_program_alive(num_workers: int, tmp_path: Path) -> None:
    """Oracle: the exit status of a program that gives up, whose thread or worker is still waiting."""
    program = f"""
import sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(Path(__file__).parent)!r}]
import srl_utils.images.loading
from dataclasses import replace
from pathlib import Path
from test_datasets import Stalling, folder_data
srl_utils.images.loading.LONGEST_STALL = 2
data = folder_data(Path({str(tmp_path)!r}))
batches = srl_utils.images.loading.training_batches(
    replace(data, samples=Stalling(data.samples)), batch_size=2, num_workers={num_workers}
)
try:
    list(batches)
except srl_utils.images.loading.UserError as error:
    print(error)
    raise SystemExit(7)
"""
    outcome = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert outcome.returncode == 7, outcome.stderr
    assert "has come for 2 s" in outcome.stdout and "Traceback" not in outcome.stderr


@pytest.mark.filterwarnings("ignore")  # torch also tells of it where nobody can catch it
def test_a_worker_that_is_killed_is_one_line(tmp_path: Path) -> None:
    """Oracle: a SIGKILL, as a system without memory sends it: exit code 5 and the flag that helps.

    torch notices by a signal, in the midst of anything, or by the channel on which the worker sends.
    """
    batches = training_batches(folder_data(tmp_path), batch_size=2, num_workers=1)
    next(batches)
    with pytest.raises((RuntimeError, ResourceError)) as caught:
        multiprocessing.active_children()[0].kill()
        for _ in range(1000):
            next(batches)
    told = caught.value if isinstance(caught.value, ResourceError) else explained(caught.value)
    assert isinstance(told, ResourceError) and "dataloader_num_workers" in str(told)


class Watched(Dataset):
    """The same samples; notes which are asked for."""

    def __init__(self, samples: Dataset, asked: list[int]) -> None:
        self.samples, self.asked = samples, asked

    def __getitem__(self, position: int) -> Sample:
        self.asked.append(position)
        return self.samples[position]


@pytest.mark.parametrize("kind", KINDS)
def test_number_of_processes_does_not_change_the_order(kind: str, tmp_path: Path) -> None:
    """Oracle: invariance; two processes with batches of 2 read what one reads in batches of 4."""
    data = KINDS[kind](tmp_path)
    ranks = [first_batches(data, 5, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    positions, images = joined([batch for pair in zip(*ranks, strict=True) for batch in pair])
    assert positions == list(range(20))
    assert images.equal(joined(first_batches(data, 5))[1])


@pytest.mark.parametrize("skipped", [1, 3, 4, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_the_tail_of_an_undisturbed_run(kind: str, skipped: int, tmp_path: Path) -> None:
    """Oracle: invariance; inside an epoch (3 batches each), at its end, and several epochs later."""
    whole = first_batches(KINDS[kind](tmp_path), skipped + 4)
    resumed = first_batches(KINDS[kind](tmp_path), 4, first_position=4 * skipped)
    positions, images = joined(whole[skipped:])
    assert joined(resumed)[0] == positions
    assert joined(resumed)[1].equal(images)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_can_be_sent_to_spawned_workers(kind: str, tmp_path: Path) -> None:
    """Oracle: pickling, which the spawn and forkserver start methods need, keeps the batches."""
    data = KINDS[kind](tmp_path)
    copy = pickle.loads(pickle.dumps(data))
    assert joined(first_batches(copy, 2))[1].equal(joined(first_batches(data, 2))[1])


def test_batches_leave_the_global_generator_alone(tmp_path: Path) -> None:
    """Oracle: torch's generator state before and after."""
    data = folder_data(tmp_path)
    state = torch.get_rng_state()
    first_batches(data, 2)
    assert torch.get_rng_state().equal(state)


def test_augmentation_follows_the_flags(tmp_path: Path) -> None:
    """Oracle: a centre crop without flips equals the validation image; the others differ between epochs."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    (tmp_path / "train").mkdir()
    Image.fromarray(noise).save(tmp_path / "train" / "noise.png")
    source = DataSource(train_data_dir=str(tmp_path / "train"), validation_data_dir=str(tmp_path / "train"))
    fixed = opened(source, center_crop=True, random_flip=False)
    assert joined(first_batches(fixed, 1))[1].equal(fixed.validation_images.expand(4, -1, -1, -1))
    _, flipped = joined(first_batches(opened(source, center_crop=True, random_flip=True), 4))
    mirrored = (flipped == fixed.validation_images.flip(-1)).flatten(1).all(1)
    assert 0 < mirrored.sum() < 16 and ((flipped == fixed.validation_images).flatten(1).all(1) | mirrored).all()
    _, cropped = joined(first_batches(opened(source), 1))
    assert len({image.numpy().tobytes() for image in cropped}) == 4


# Validation images


def test_validation_split_of_the_data_set(tmp_path: Path) -> None:
    """Oracle: the split named, or else the first of validation, val and test that exists."""
    folder = write_parquet(write_parquet(tmp_path / "d"), [png(20), png(21)], "test")
    assert identities(opened(DataSource(dataset_name=str(folder))).validation_images) == [20, 21]
    write_parquet(folder, [png(22), png(23)], "validation")
    assert identities(opened(DataSource(dataset_name=str(folder))).validation_images) == [22, 23]
    named = DataSource(dataset_name=str(folder), validation_split="test", streaming=True)
    assert identities(opened(named, num_validation_images=1).validation_images) == [20]


@pytest.mark.parametrize(("split", "held_out"), [(None, 1), ("0.25", 3), ("0.99", 11)])
def test_held_out_images_are_not_trained_on(split: str | None, held_out: int, tmp_path: Path) -> None:
    """Oracle: the two sets are disjoint, together complete, the same for a seed and another for another one."""
    source = DataSource(train_data_dir=str(write_folder(tmp_path / "train")), validation_split=split)
    data = opened(source, num_validation_images=COUNT)
    validation = identities(data.validation_images)
    training = identities(joined(first_batches(data, data.num_images, batch_size=1))[1])
    assert len(validation) == held_out
    assert sorted(validation + training) == list(range(COUNT))
    again, names, *_ = load_validation_images(source, num_images=COUNT, resolution=RESOLUTION)
    assert again.equal(data.validation_images) and names == []
    others = [opened(source, seed=seed, num_validation_images=COUNT).validation_images for seed in range(1, 5)]
    assert any(identities(other) != validation for other in others)


def test_validation_images_are_spread_evenly(tmp_path: Path) -> None:
    """Oracle: every third of twelve; an unreadable pick makes room for its successor."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for number in range(COUNT):
        (folder / f"{number:02d}.png").write_bytes(png(number) if number != 3 else b"broken")
    source = DataSource(validation_data_dir=str(folder))
    images, unreadable, *_ = load_validation_images(source, num_images=4, resolution=RESOLUTION)
    assert identities(images) == [0, 4, 6, 9]
    assert unreadable == [str(folder / "03.png")]
    assert images.shape == (4, 3, RESOLUTION, RESOLUTION)


def test_captions_stay_with_their_images(tmp_path: Path) -> None:
    """Oracle: each caption names the number that its image shows; in a folder, a table and a stream of it alike.

    Of several captions it is the first, and an image skipped takes its own with it.
    """
    folder = tmp_path / "flat"
    (folder / "nested").mkdir(parents=True)
    names = [f"nested/{number:02d}.png" for number in range(COUNT)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(png(number) if number != 3 else b"broken")
    lines = [json.dumps({"file_name": name, "text": f"number {number}"}) for number, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(reversed(lines)))
    table = tmp_path / "table"
    table.mkdir()
    rows = {
        "image": [png(number) for number in range(4)],
        "text": [[f"number {number}", "other"] for number in range(4)],
    }
    datasets.Dataset.from_dict(rows).to_parquet(table / "validation.parquet")
    datasets.Dataset.from_dict(rows).to_parquet(table / "train.parquet")
    for source in (
        DataSource(validation_data_dir=str(folder), caption_column="text"),
        DataSource(dataset_name=str(table), caption_column="text"),
        DataSource(dataset_name=str(table), caption_column="text", streaming=True),
    ):
        loaded = load_validation_images(source, num_images=4, resolution=RESOLUTION)
        assert loaded.captions == [f"number {number}" for number in identities(loaded.images)]
        assert len(loaded.captions) == 4
    for change in ({"caption_column": "title"}, {"caption_column": "title", "streaming": True}):
        with pytest.raises(UserError, match="caption_column: there is no column 'title'"):
            load_validation_images(DataSource(dataset_name=str(table), **change), num_images=4, resolution=RESOLUTION)


def test_unreadable_validation_images(tmp_path: Path) -> None:
    """Oracle: an error when none is left, for a folder and for a stream; a stream skips the bad ones."""
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"broken")
    with pytest.raises(UserError) as error:
        source = DataSource(validation_data_dir=str(tmp_path / "bad"))
        load_validation_images(source, num_images=4, resolution=RESOLUTION)
    assert_one_line(error, "none of 1 validation images")
    folder = write_parquet(tmp_path / "stream")
    source = DataSource(dataset_name=str(folder), streaming=True)
    write_parquet(folder, [b"x", png(1), b"y", png(2)], "validation")
    images, unreadable, *_ = load_validation_images(source, num_images=4, resolution=RESOLUTION)
    assert identities(images) == [1, 2] and len(unreadable) == 2
    write_parquet(folder, [b"x", b"y"], "validation")
    with pytest.raises(UserError, match="none of 2"):
        load_validation_images(source, num_images=4, resolution=RESOLUTION)


# Bad and small images


def break_files(folder: Path, number: int) -> list[str]:
    paths = sorted(folder.rglob("*.png"))[:number]
    for path in paths:
        file = io.BytesIO()
        Image.effect_noise((64, 64), 60).save(file, "JPEG")
        path.write_bytes(file.getvalue()[:-300])
    return [str(path) for path in paths]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_truncated_files_are_replaced_and_named_once(
    num_workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: full batches of the ten good images; two names in the log after three epochs."""
    names = break_files(write_folder(tmp_path / "train"), 2)
    data = folder_data(tmp_path)
    caplog.clear()
    ledger = ImageLedger(data.num_images)
    with caplog.at_level(logging.WARNING):
        for batch in first_batches(data, 9, num_workers=num_workers):
            assert batch.images.shape[0] == 4 and not {0, 2} & set(identities(batch.images))
            ledger.update(batch)
    assert sorted(ledger.bad_images) == names
    assert sorted(record.args[0] for record in caplog.records) == names
    assert ledger.share == 2 / COUNT and ledger.read == 36
    ledger.check(0.17)
    with pytest.raises(UserError) as error:
        ledger.check(0.1)
    assert_one_line(error, "2 of 12", names[0], "max_bad_images: ", "a share of 0.1")


def test_bad_images_of_a_stream(tmp_path: Path) -> None:
    """Oracle: invariances of the order hold with replacements, and a nameless image has one name in all epochs."""
    contents = [png(number) if number % 5 else b"broken%d" % number for number in range(COUNT)]
    folder = write_parquet(write_parquet(tmp_path / "parquet", contents), [png(20)], "validation")
    data = opened(DataSource(dataset_name=str(folder), streaming=True))
    whole = first_batches(data, 9)
    ranks = [first_batches(data, 9, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    assert joined([b for pair in zip(*ranks, strict=True) for b in pair])[1].equal(joined(whole)[1])
    assert joined(first_batches(data, 5, first_position=16))[1].equal(joined(whole[4:])[1])
    assert not {0, 5, 10} & set(identities(joined(whole)[1]))
    ledger = ImageLedger(None)
    for batch in whole:
        ledger.update(batch)
    assert len(ledger.bad_images) == 3 and all("SHA-256" in name for name in ledger.bad_images)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_images_in_a_row(num_workers: int, tmp_path: Path) -> None:
    """Oracle: one line that names a file, without the traceback of a worker."""
    data = folder_data(tmp_path)
    break_files(tmp_path / "train", COUNT)
    with pytest.raises(UserError) as error:
        first_batches(data, 1, num_workers=num_workers)
    assert_one_line(error, "20 training images in a row", ".png")
    assert str(error.value).startswith("20 training")
    assert not multiprocessing.active_children()


def test_workers_do_not_keep_a_failing_program_alive(tmp_path: Path) -> None:
    """Oracle: the exit status of a program that fails while its worker, deaf to signals, waits for work."""
    program = f"""
from srl_utils.images.datasets import DataSource, open_data
from srl_utils.images.loading import training_batches
source = DataSource(train_data_dir={str(write_folder(tmp_path / "train"))!r})
flags = dict(center_crop=False, random_flip=False, num_validation_images=1)
batches = training_batches(open_data(source, resolution=8, seed=0, **flags), batch_size=2, num_workers=1)
next(batches)
raise SystemExit(7)
"""
    outcome = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert (outcome.returncode, outcome.stderr) == (7, "")


def test_rows_and_keys_name_bad_images(tmp_path: Path) -> None:
    """Oracle: the row of a table, counted in the whole split, and the tar and the name there of a WebDataset member."""
    contents = [png(0), b"broken", png(2), png(3)]
    datasets.Dataset.from_dict({"image": contents}).save_to_disk(tmp_path / "saved")
    validation = str(write_folder(tmp_path / "val", range(1)))
    data = opened(DataSource(dataset_name=str(tmp_path / "saved"), validation_data_dir=validation))
    assert first_batches(data, 1)[0].bad_images == ["row 1"]
    (tmp_path / "tar").mkdir()
    with tarfile.open(tmp_path / "tar" / "a.tar", "w") as tar:
        for number, content in enumerate(contents):
            member = tarfile.TarInfo(f"key{number}.png")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    source = DataSource(train_data_dir=str(tmp_path / "tar"), validation_data_dir=validation, image_column="png")
    name = f"{tmp_path / 'tar' / 'a.tar'}: key1.png"
    assert first_batches(opened(source), 1)[0].bad_images == [name]
    stream = opened(DataSource(**(vars(source) | {"streaming": True})))
    assert set(first_batches(stream, 1)[0].bad_images) == {name}


def test_small_images_are_scaled_up_and_counted(tmp_path: Path) -> None:
    """Oracle: all pictures are 12 x 10, so at resolution 11 each one is scaled up and at 10 none."""
    counts = [first_batches(folder_data(tmp_path, resolution=side), 1)[0].upscaled for side in (10, 11)]
    assert counts == [0, 4]


def batch_of(size: int, bad: list[str]) -> Batch:
    return Batch(images=torch.zeros(size, 3, 1, 1), positions=list(range(size)), bad_images=bad, upscaled=1)


def test_ledger_of_a_stream_waits_for_a_meaningful_share() -> None:
    """Oracle: closed form; 3 of 199 images raise nothing, 3 of 200 are above 1% and not above 2%."""
    ledger = ImageLedger(None)
    ledger.update(batch_of(199, ["a", "b", "a", "c"]))
    ledger.check(0.0)
    ledger.update(batch_of(1, ["c"]))
    ledger.check(0.02)
    with pytest.raises(UserError, match="3 of the 200 images read so far"):
        ledger.check(0.01)


def test_ledger_survives_a_resume(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: round trip through JSON; a name known before the resume is not logged again."""
    ledger, resumed = ImageLedger(10), ImageLedger(10)
    ledger.update(batch_of(4, ["a"]))
    resumed.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    caplog.clear()
    resumed.update(batch_of(4, ["a"]))
    assert not caplog.records
    assert (resumed.read, resumed.upscaled, resumed.share) == (8, 2, 0.1)


def test_ledger_of_several_processes(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: counting by hand. Two processes read twice as much; a name that both met counts and is logged once."""
    ledger = ImageLedger(None, world_size=2)
    images = torch.zeros(4, 3, 8, 8)
    ledger.update(Batch(images, [0, 1, 2, 3], ["a.png"], 1))
    ledger.add(["a.png", "b.png"])
    assert (ledger.read, ledger.upscaled, ledger.share) == (8, 1, 2 / 8)
    assert sum("a.png" in message for message in caplog.messages) == 1
    assert ledger.summary() == (
        "2 unreadable images were replaced by others; images smaller than the resolution were scaled up 1 times"
    )
    assert ImageLedger(3).summary() == ""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (DataSource(), "exactly one of `dataset_name` and `train_data_dir`"),
        (DataSource(dataset_name="a", train_data_dir="b"), "exactly one"),
        (DataSource(dataset_name="a", validation_data_dir="b", validation_split="c"), "not both"),
        (DataSource(train_data_dir="there/is/none"), "^train_data_dir: there is no folder there/is/none"),
        (
            DataSource(dataset_name="a", validation_data_dir="there/is/none"),
            "^validation_data_dir: there is no folder there/is/none",
        ),
    ],
)
def test_flags_are_checked_before_anything_is_opened(source: DataSource, message: str) -> None:
    """Oracle: the rule, in one line that names the parameter."""
    with pytest.raises(UserError, match=message):
        source.check()
