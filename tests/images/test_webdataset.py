"""Tars of samples (WebDataset): which members are images, whatever the samples have in common."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import logging
import lzma
import os
import pickle
import tarfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
from PIL import Image

from srl_utils.errors import UserError
from srl_utils.images import listing
from srl_utils.images.datasets import DataSource, TrainingData, load_validation_images, open_data
from srl_utils.images.ledger import ImageLedger
from srl_utils.images.loading import training_batches
from srl_utils.images.sources import open_images
from srl_utils.images.webdataset import OTHER_IMAGE

Files = Sequence[tuple[str, bytes]]
MODES = {"map": False, "stream": True}
every_mode = pytest.mark.parametrize("streaming", MODES.values(), ids=MODES.keys())


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01, raising=False)


def picture(identity: int, file_format: str = "PNG") -> bytes:
    """A flat picture whose gray level tells which one it is."""
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (10 * identity,) * 3).save(file, file_format)
    return file.getvalue()


def write_tar(path: Path, files: Files, *, tar_format: int = tarfile.GNU_FORMAT, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format, encoding=encoding, errors="surrogateescape") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def read(folder: Path, **flags: object) -> list[tuple[int, str]]:
    """The identity and the caption of each image, as an evaluation reads them."""
    source = DataSource(validation_data_dir=str(folder), **flags)
    loaded = load_validation_images(source, num_images=100, resolution=8)
    assert loaded.unreadable == []
    numbers = [round(float(image.mean() + 1) * 12.75) for image in loaded.images]
    return list(zip(numbers, loaded.captions, strict=True))


def numbers(folder: Path, **flags: object) -> list[int]:
    return [number for number, _ in read(folder, **flags)]


KINDS: dict[str, list[Files]] = {
    "png in one tar, jpg in the other": [
        [(f"{n}.jpg", picture(n, "JPEG")) for n in range(3)],
        [(f"{n}.png", picture(n)) for n in range(3, 6)],
    ],
    "mixed within one tar": [
        [
            ("0.jpg", picture(0, "JPEG")),
            ("1.png", picture(1)),
            ("2.webp", picture(2, "WEBP")),
            ("3.gif", picture(3, "GIF")),
        ]
    ],
    "jpg beside jpeg": [[("0.jpg", picture(0, "JPEG")), ("1.jpeg", picture(1, "JPEG")), ("2.JPG", picture(2, "JPEG"))]],
    "other members that differ": [
        [("0.png", picture(0)), ("0.json", b'{"a": 1}'), ("1.png", picture(1)), ("1.cls", b"5"), ("2.png", picture(2))],
        [
            ("3.txt", b"three"),
            ("3.png", picture(3)),
            ("4.json", b'{"a": "x"}'),
            ("4.png", picture(4)),
            ("5.png", picture(5)),
        ],
    ],
    "types of one key that differ": [
        [("0.png", picture(0)), ("0.json", b'{"a": 1}'), ("1.png", picture(1)), ("1.json", b'{"a": [1, "b"]}')]
    ],
    "dots in names": [[(f"photo.v1.{n}.png", picture(n)) for n in range(4)]],
    "subfolders and ./": [[(f"./a/b.c/{n}.png", picture(n)) for n in range(2)], [("/b/2.png", picture(2))]],
    "one key in two folders": [[("a/x.png", picture(0)), ("b/x.png", picture(1))]],
    "one key twice in a row": [[("x.png", picture(0)), ("x.png", picture(1))]],
    "what systems add": [
        [
            ("._0.png", b"\0\5\x16\7"),
            ("0.png", picture(0)),
            ("__MACOSX/._0.png", b"\0"),
            (".DS_Store", b"\0"),
            ("1.png", picture(1)),
        ]
    ],
    "a sample without a picture": [[("0.png", picture(0)), ("note.txt", b"no picture"), ("1.png", picture(1))]],
    "no suffix": [[("0", picture(0)), ("1", picture(1, "JPEG")), ("readme", b"text")]],
    "a suffix of no format": [[("0.img", picture(0)), ("1.data", picture(1, "JPEG"))]],
    "a picture and its depth": [
        [(f"{n}.{kind}", picture(n if kind == "jpg" else 9)) for n in range(3) for kind in ("depth.png", "jpg")]
    ],
    "a picture in two formats": [[("0.jpg", picture(0)), ("0.png", picture(0)), ("1.png", picture(1))]],
    "a picture called image": [[("0.image.png", picture(0)), ("0.mask.png", picture(9)), ("1.image.jpg", picture(1))]],
    "names above the folder": [[(f"../pictures/{n}.png", picture(n)) for n in range(2)]],
    "members apart": [[*[(f"{n}.png", picture(n)) for n in range(3)], *[(f"{n}.txt", b"t") for n in range(3)]]],
}


@every_mode
@pytest.mark.parametrize("kind", KINDS)
def test_any_member_that_is_a_picture_is_read(kind: str, streaming: bool, tmp_path: Path) -> None:
    """Oracle: the pictures written, once each, counted from 0; as a folder of tars and as a dataset."""
    for index, files in enumerate(KINDS[kind]):
        write_tar(tmp_path / "tars" / f"{index:03d}.tar", files)
    found = numbers(tmp_path / "tars", streaming=streaming)
    assert found == list(range(len(found))) and len(found) >= 2
    as_data_set = DataSource(dataset_name=str(tmp_path / "tars"), validation_split="train", streaming=streaming)
    assert len(load_validation_images(as_data_set, num_images=100, resolution=8).images) == len(found)


@every_mode
@pytest.mark.parametrize("column", ["png", "jpg", "image"])
def test_a_column_that_names_a_format_takes_the_others_too(column: str, streaming: bool, tmp_path: Path) -> None:
    """Oracle: the pictures written; the suffix of a member is how its picture is stored, not which picture it is."""
    write_tar(tmp_path / "a.tar", [("0.jpg", picture(0, "JPEG")), ("1.depth.png", picture(9)), ("1.png", picture(1))])
    assert numbers(tmp_path, image_column=column, streaming=streaming) == [0, 1]


@every_mode
@pytest.mark.parametrize("column", ["depth.png", "depth", "Depth.PNG", "depth.jpg"])
def test_one_of_several_pictures_can_be_named(column: str, streaming: bool, tmp_path: Path) -> None:
    """Oracle: the depths written, in whatever format; a sample without one is left out, and named where it is known."""
    write_tar(
        tmp_path / "a.tar",
        [
            ("0.png", picture(9)),
            ("0.depth.png", picture(0)),
            ("1.png", picture(9)),
            ("2.depth.webp", picture(2, "WEBP")),
        ],
    )
    assert numbers(tmp_path, image_column=column, streaming=streaming) == [0, 2]
    if not streaming:
        source = DataSource(validation_data_dir=str(tmp_path), image_column=column)
        (skipped,) = load_validation_images(source, num_images=9, resolution=8).skipped
        assert skipped.report() == (
            f"2 members of tars were skipped: {OTHER_IMAGE} (1: a.tar: 0.png); samples without {column} (1: a.tar: 1.png)"
        )


TAR_FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}


@every_mode
@pytest.mark.parametrize("tar_format", TAR_FORMATS)
def test_names_of_any_kind(tar_format: str, streaming: bool, tmp_path: Path) -> None:
    """Oracle: the pictures written; long names, names in Unicode and names that are no Unicode."""
    names = [
        "画像-äöü-🙂.png",
        os.fsdecode(b"caf\xe9.png"),
        f"{'d' * 60}/{'n' * 60}.png",
        "a name with\na line break.png",
    ]
    write_tar(
        tmp_path / "a.tar", [(name, picture(n)) for n, name in enumerate(names)], tar_format=TAR_FORMATS[tar_format]
    )
    assert numbers(tmp_path, streaming=streaming) == [0, 1, 2, 3]


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "a.tar.gz": gzip.compress, "a.tgz": gzip.compress, "a.tar.bz2": bz2.compress, "a.tar.xz": lzma.compress,
    "A.TAR": bytes, "gzipped-all-the-same.tar": gzip.compress,
}  # fmt: skip


@every_mode
@pytest.mark.parametrize("name", PACKERS)
def test_compressed_tars(name: str, streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: the pictures written, and no second copy in the cache after a second reading."""
    plain = write_tar(tmp_path / "plain", [(f"{n}.png", picture(n)) for n in range(3)]).read_bytes()
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / name).write_bytes(PACKERS[name](plain))
    for _ in range(2):
        assert numbers(tmp_path / "tars", streaming=streaming) == [0, 1, 2]
    copies = 0 if streaming or PACKERS[name] is bytes else 1
    assert len(list((tmp_path / "cache/unpacked_tars").glob("*"))) == copies
    assert not [message for message in caplog.messages if "ends early" in message]


@every_mode
def test_tars_in_a_row_and_damaged_ones(streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: the pictures around the damage; `cat a.tar b.tar` is a tar of both; what is no tar holds nothing."""
    first = write_tar(tmp_path / "first", [("0.png", picture(0)), ("1.png", picture(1))]).read_bytes()
    second = write_tar(tmp_path / "second", [("2.png", picture(2)), ("3.png", picture(3))]).read_bytes()
    damaged = bytearray(second)
    damaged[:512] = b"\xff" * 512  # the header of the first member
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/0.tar").write_bytes(first + bytes(damaged))
    (tmp_path / "tars/1.tar").write_bytes(b"")
    (tmp_path / "tars/2.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 30)
    (tmp_path / "tars/3.tgz").write_bytes(gzip.compress(second + os.urandom(4096))[:-2048])
    assert {0, 1, 3} <= set(numbers(tmp_path / "tars", streaming=streaming)) <= {0, 1, 2, 3}
    for name in ("1.tar", "2.tar", "3.tgz"):
        assert any(name in message for message in caplog.messages), name


@every_mode
def test_captions_come_from_members_and_from_json(streaming: bool, tmp_path: Path) -> None:
    """Oracle: the captions written beside each picture, whatever else a sample has."""
    files = [
        ("0.png", picture(0)), ("0.txt", "\ufeffzero\r\n".encode()), ("0.json", b'{"caption": "nought", "n": 0}'),
        ("1.jpg", picture(1, "JPEG")), ("1.json", b'{"caption": ["one", "uno"], "n": 1}'), ("1.txt", "ein\u2028s".encode()),
    ]  # fmt: skip
    write_tar(tmp_path / "a.tar", files)
    assert read(tmp_path, caption_column="txt", streaming=streaming) == [(0, "zero"), (1, "ein\u2028s")]
    assert read(tmp_path, caption_column="text", streaming=streaming) == [(0, "zero"), (1, "ein\u2028s")]
    assert read(tmp_path, caption_column="caption", streaming=streaming) == [(0, "nought"), (1, "one")]
    assert read(tmp_path, caption_column="n", streaming=streaming) == [(0, "0"), (1, "1")]
    with pytest.raises(UserError, match=r"caption_column: there is no column 'title' .* png, txt, json, .* caption, n"):
        read(tmp_path, caption_column="title", streaming=streaming)


@every_mode
def test_captions_of_names_with_dots(streaming: bool, tmp_path: Path) -> None:
    """Oracle: the text of the same name, though by the first dot all of it is one sample."""
    files = [
        (f"photo.{n}.{kind}", content) for n in range(2) for kind, content in (("png", picture(n)), ("txt", b"%d" % n))
    ]
    write_tar(tmp_path / "a.tar", files)
    assert read(tmp_path, caption_column="txt", streaming=streaming) == [(0, "0"), (1, "1")]


@every_mode
@pytest.mark.parametrize(
    ("field", "column"), [("prompt", "prompt"), ("caption.txt", "caption"), ("Text.EN", "text.en")]
)
def test_captions_of_any_field_are_whole(field: str, column: str, streaming: bool, tmp_path: Path) -> None:
    """Oracle: the caption written, longer than what tells the format of a member."""
    caption = "é " * listing.HEAD + "end"
    write_tar(tmp_path / "a.tar", [("0.png", picture(0)), (f"0.{field}", caption.encode())])
    assert read(tmp_path, caption_column=column, streaming=streaming) == [(0, caption)]


@every_mode
def test_images_with_a_caption_are_read_however_many_have_none(streaming: bool, tmp_path: Path) -> None:
    """Oracle: as many images as were asked for, since as many have a caption; the others are the ten before them."""
    texts = [(f"{n:02d}.txt", b"%d" % n) for n in range(10, 20)]
    write_tar(tmp_path / "a.tar", sorted([*[(f"{n:02d}.png", picture(n)) for n in range(20)], *texts]))
    source = DataSource(validation_data_dir=str(tmp_path), caption_column="txt", streaming=streaming)
    loaded = load_validation_images(source, num_images=10, resolution=8)
    assert loaded.captions == [str(n) for n in range(10, 20)]
    assert loaded.names == [f"{tmp_path / 'a.tar'}: {n}.png" for n in range(10, 20)]
    assert loaded.without_caption == [f"{tmp_path / 'a.tar'}: {n:02d}.png" for n in range(10)]


def test_captions_apart_from_their_pictures(tmp_path: Path) -> None:
    """Oracle: the captions written, after all the pictures, as `tar cf a.tar *.png *.txt` does."""
    pictures = [(f"{n}.png", picture(n)) for n in range(3)]
    write_tar(tmp_path / "a.tar", [*pictures, *[(f"{n}.txt", b"%d" % n) for n in range(3)]])
    assert read(tmp_path, caption_column="txt") == [(0, "0"), (1, "1"), (2, "2")]


@every_mode
def test_an_image_without_a_caption_is_left_out_and_named(streaming: bool, tmp_path: Path) -> None:
    """Oracle: the two samples written with one; a text that is no text is none."""
    files = [
        ("0.png", picture(0)),
        ("0.txt", b"zero"),
        ("1.png", picture(1)),
        ("2.png", picture(2)),
        ("2.txt", b"\xff\xfe\xfd"),
    ]
    write_tar(tmp_path / "a.tar", [*files, ("3.png", picture(3)), ("3.txt", b"three")])
    source = DataSource(validation_data_dir=str(tmp_path), caption_column="txt", streaming=streaming)
    loaded = load_validation_images(source, num_images=9, resolution=8)
    assert loaded.captions == ["zero", "three"]
    assert loaded.without_caption == [f"{tmp_path / 'a.tar'}: {n}.png" for n in (1, 2)]


@every_mode
def test_tars_without_pictures_are_one_line(streaming: bool, tmp_path: Path) -> None:
    """Oracle: the line says what there is instead."""
    write_tar(tmp_path / "a.tar", [("0.npy", b"\x93NUMPY"), ("0.txt", b"zero")])
    with pytest.raises(UserError, match=r"no sample in .* has an image .* members npy, txt"):
        read(tmp_path, streaming=streaming)


def test_samples_without_a_picture_are_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: what was written; of a phone's pictures the package that reads them is named, if it is missing."""
    monkeypatch.setattr(listing, "image_formats", lambda: ("PNG",))  # as without pillow-heif
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60)
    write_tar(
        tmp_path / "tars/a.tar", [(f"{n}.png", picture(n)) for n in range(4)] + [("8.txt", b"x"), ("9.xyz", heic)]
    )
    data = training(tmp_path)
    assert data.num_images == 4
    assert "2 members of tars were skipped" in data.skipped[0]
    assert (
        "samples without an image (1)" in data.skipped[0]
        and "needs pillow-heif: pip install pillow-heif (1)" in data.skipped[0]
    )
    assert any("a.tar: 8.txt" in message for message in caplog.messages)
    (stream,) = {training(tmp_path, streaming=True).samples.images}
    with caplog.at_level(logging.WARNING):
        assert sum(1 for _ in stream) == 4
    assert any("8.txt skipped" in message for message in caplog.messages)


def training(tmp_path: Path, **flags: object) -> TrainingData:
    """The tars in `tmp_path / "tars"` for training, validated on one picture of their own."""
    (tmp_path / "val").mkdir(exist_ok=True)
    (tmp_path / "val/20.png").write_bytes(picture(20))
    source = DataSource(train_data_dir=str(tmp_path / "tars"), validation_data_dir=str(tmp_path / "val"), **flags)
    return open_data(source, resolution=8, seed=0, center_crop=True, random_flip=False, num_validation_images=1)


@every_mode
def test_training_order_is_that_of_any_other_data(streaming: bool, tmp_path: Path) -> None:
    """Oracle: invariance; each epoch is a permutation, two processes read what one does, and a resume the tail.

    The samples can be sent to workers, and a broken picture is replaced and named.
    """
    for shard in range(3):
        files = [(f"{n}.{'png' if n % 2 else 'jpeg'}", picture(n)) for n in range(4 * shard, 4 * shard + 4)]
        write_tar(tmp_path / f"tars/{shard}.tar", files)
    data = pickle.loads(pickle.dumps(training(tmp_path, streaming=streaming)))
    whole = list(islice(training_batches(data, batch_size=4), 6))
    seen = [round(float(image.mean() + 1) * 12.75) for batch in whole for image in batch.images]
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12)) and seen[:12] != seen[12:]
    resumed = list(islice(training_batches(data, batch_size=4, first_position=8), 4))
    assert all(one.images.equal(other.images) for one, other in zip(whole[2:], resumed, strict=True))
    ranks = [list(islice(training_batches(data, batch_size=2, rank=rank, world_size=2), 2)) for rank in (0, 1)]
    assert ranks[0][0].images.equal(whole[0].images[:2]) and ranks[1][1].images.equal(whole[1].images[2:])
    worker = list(islice(training_batches(data, batch_size=4, num_workers=1), 2))
    assert worker[1].images.equal(whole[1].images)


@every_mode
def test_a_broken_picture_is_replaced_and_named(streaming: bool, tmp_path: Path) -> None:
    """Oracle: the one that was cut, by tar and member."""
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(noise, "JPEG")
    files = [(f"{n}.png", picture(n)) for n in range(1, 9)]
    tar = write_tar(tmp_path / "tars/a.tar", [*files, ("cut.jpg", noise.getvalue()[:-200])])
    data = training(tmp_path, streaming=streaming)
    ledger = ImageLedger(data.num_images)
    for batch in islice(training_batches(data, batch_size=3), 3):
        ledger.update(batch)
    assert list(ledger.bad_images) == [f"{tar}: cut.jpg"]


def test_splits_of_tars_are_told_by_their_names(tmp_path: Path) -> None:
    """Oracle: the pictures of each split; those that nobody asks for are not even opened."""
    write_tar(tmp_path / "tars/train-000.tar", [(f"{n}.png", picture(n)) for n in range(8)])
    write_tar(tmp_path / "tars/test-000.tar", [(f"{n}.jpg", picture(n)) for n in range(8, 11)])
    opened = open_images(DataSource(dataset_name=str(tmp_path / "tars")), 8, 0)
    assert (len(opened.training), len(opened.validation)) == (8, 3)
    part = open_images(DataSource(dataset_name=str(tmp_path / "tars"), train_split="train[:50%]"), 8, 0)
    assert (len(part.training), len(part.validation)) == (4, 3)
    (tmp_path / "tars/train-000.tar").write_bytes(b"no tar")
    loaded = load_validation_images(DataSource(dataset_name=str(tmp_path / "tars")), num_images=9, resolution=8)
    assert len(loaded.images) == 3


@every_mode
def test_remote_tars(streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the pictures written, behind a URL, as those of a dataset of the Hub are; downloaded, or streamed."""
    tar = write_tar(tmp_path / "a.tar", [("0.jpg", picture(0, "JPEG")), ("1.png", picture(1))]).read_bytes()
    files = {}
    for split, content in (("train", tar), ("test", gzip.compress(tar))):
        files[split] = f"memory://{tmp_path.name}/{split}.tar"
        with fsspec.open(files[split], "wb") as file:
            file.write(content)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # which also guards the memory
    builder = datasets.load_dataset_builder("webdataset", data_files=files)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *names, **settings: builder)
    for split in files:
        source = DataSource(
            dataset_name="user/tars", validation_split=split, streaming=streaming, cache_dir=str(tmp_path)
        )
        assert len(load_validation_images(source, num_images=9, resolution=8).images) == 2
    assert (tmp_path / "downloads").exists() == (not streaming)


@every_mode
def test_links_inside_a_tar_are_named(streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: what was written; no link is followed, wherever it leads."""
    path = write_tar(tmp_path / "a.tar", [("0.png", picture(0))])
    with tarfile.open(path, "a") as tar:
        for name, kind, target in (("1.png", tarfile.LNKTYPE, "0.png"), ("2.png", tarfile.SYMTYPE, "/etc/passwd")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    assert numbers(tmp_path, streaming=streaming) == [0]
    assert sum("skipped: a link" in message for message in caplog.messages) == 2


def test_the_index_reads_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: reads of `tarfile` counted; of members that are pictures by their suffix there is none."""
    write_tar(
        tmp_path / "a.tar", [("0.png", picture(0)), ("0.json", json.dumps({"n": 0}).encode()), ("1.png", picture(1))]
    )
    honest, extracted = tarfile.TarFile.extractfile, []

    def noted(tar: tarfile.TarFile, member: tarfile.TarInfo) -> io.BufferedReader:
        extracted.append(member.name)
        return honest(tar, member)

    monkeypatch.setattr(tarfile.TarFile, "extractfile", noted)
    assert numbers(tmp_path) == [0, 1]
    assert extracted == ["0.json"]
