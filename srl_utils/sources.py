"""Where images come from: folders, tars, Hugging Face datasets and the embedded photographs, still undecoded."""

from __future__ import annotations

import json
import logging
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
from torch.utils.data import Subset

from srl_utils.decoding import picture_suffixes
from srl_utils.errors import MissingFile, UserError, one_line
from srl_utils.photographs import Split, photograph_tiles, recoloured
from srl_utils.pictures import RawImage, list_files

logger = logging.getLogger(__name__)

PHOTOGRAPHS = "scikit-image"
LARGEST_TILE = 256  # pixels; every photograph holds one
VALIDATION_SPLITS = ("validation", "val", "test")
HELD_OUT_SHARE, HELD_OUT_LIMIT = 0.05, 1000
SHUFFLE_BUFFER = 1000
TAR_END = 1024  # bytes
METADATA = "metadata.jsonl"
HELD_OUT_SEED = 3  # second word of a seed: keeps these draws apart from those of pictures.py and data.py


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Where images come from; each field is the command line flag of the same name, where a command has it."""

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_data_dir: str | None = None
    validation_data_dir: str | None = None
    validation_split: str | None = None
    image_column: str = "image"
    caption_column: str | None = None
    streaming: bool = False
    max_train_samples: int | None = None
    cache_dir: str | None = None

    @classmethod
    def from_flags(cls, args: Namespace) -> DataSource:
        """Of a command that has some of the flags; what it lacks stays at its default."""
        return cls(**{name: value for name, value in vars(args).items() if name in cls.__dataclass_fields__})

    def check(self) -> None:
        """Raises a UserError if flags conflict, a MissingFile if a folder does not exist; opens nothing."""
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise UserError("give either --dataset_name or --train_data_dir, and not both")
        if self.validation_data_dir and self.validation_split:
            raise UserError("give --validation_data_dir or --validation_split, not both")
        for flag in ("train_data_dir", "validation_data_dir"):
            folder = getattr(self, flag)
            if folder is not None and not Path(folder).is_dir():
                raise MissingFile(f"--{flag} {folder}: there is no such folder")


@dataclass(frozen=True)
class DatasetImages(Sequence[RawImage]):
    """The undecoded image column of a map-style dataset."""

    dataset: datasets.Dataset
    column: str
    caption_column: str | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> RawImage:
        row = self.dataset[int(index)]
        label = _label(row, self.column)
        name = f"row {index} ({label})" if label else f"row {index}"
        return RawImage(row[self.column], name, _caption(row, self.caption_column))


@dataclass(frozen=True)
class StreamImages:
    """The undecoded image column of a streamed dataset, in the order of its files."""

    dataset: datasets.IterableDataset
    column: str
    caption_column: str | None = None

    def __iter__(self) -> Iterator[RawImage]:
        with _one_line_error("the streamed data set"):
            # Unlike iter(dataset), this yields the same order inside a worker of a DataLoader.
            for rows in self.dataset.iter(batch_size=1):
                row = {name: values[0] for name, values in rows.items()}
                yield RawImage(row.get(self.column), _label(row, self.column), _caption(row, self.caption_column))

    def shuffled(self, *, seed: int, epoch: int) -> StreamImages:
        """The same images in the order of one epoch."""
        dataset = self.dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        dataset.set_epoch(epoch)
        return replace(self, dataset=dataset)
Images = Sequence[RawImage] | StreamImages
RawSplit = list[RawImage] | datasets.Dataset | datasets.IterableDataset


def open_images(source: DataSource, resolution: int, seed: int) -> tuple[Images, Images]:
    """Training and validation images, disjoint unless the user names overlapping ones."""
    source.check()
    splits = _open_splits(source, resolution)
    if "train" not in splits:
        raise UserError(f"{source.dataset_name} has no split 'train'; its splits are {', '.join(splits)}")
    training, validation = _choose_validation(source, splits, seed)
    limit = source.max_train_samples
    if limit is not None and isinstance(training, StreamImages):
        return replace(training, dataset=training.dataset.take(limit)), validation
    if limit is not None and limit < len(training):
        return Subset(training, range(limit)), validation
    return training, validation


def open_validation_folder(source: DataSource) -> Images:
    """The images of `validation_data_dir`."""
    return _as_images(_open_folder("validation_data_dir", source), source)


def _open_splits(source: DataSource, resolution: int) -> dict[str, RawSplit]:
    if source.train_data_dir:
        return {"train": _open_folder("train_data_dir", source)}
    if source.dataset_name == PHOTOGRAPHS:
        return {"train": _training_photographs(resolution), "validation": _photographs("validation", resolution)}
    folder = Path(source.dataset_name)
    with _one_line_error(f"--dataset_name {source.dataset_name}"):
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            # Made by save_to_disk: memory-mapped, so that there is nothing to gain from streaming it.
            if source.streaming:
                raise UserError("--streaming has no effect on a folder made by save_to_disk")
            loaded = datasets.load_from_disk(source.dataset_name)
        else:
            loaded = datasets.load_dataset(
                source.dataset_name,
                source.dataset_config_name,
                streaming=source.streaming,
                cache_dir=source.cache_dir,
            )
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _training_photographs(resolution: int) -> list[RawImage]:
    """Tiles of three scales, the coarser ones repeated, since there are fewer of them; half of them recoloured.

    They have twice the resolution, so that a random crop of a quarter of the area need not be scaled up.
    """
    tiles = [tile for across in (1, 2, 4) for tile in _photographs("train", 2 * resolution, across) * (4 // across)]
    return [RawImage(recoloured(tile.source, seed), tile.label) for seed, tile in enumerate(tiles)]


def _photographs(split: Split, side: int, across: int = 2) -> list[RawImage]:
    tiles = photograph_tiles(split, side=min(side, LARGEST_TILE), across=across)
    return [RawImage(tile, f"{split} tile {index}") for index, tile in enumerate(tiles)]


def _open_folder(flag: str, source: DataSource) -> RawSplit:
    """The image files below the folder that `flag` names, or else what its tar files (WebDataset) hold."""
    folder = Path(getattr(source, flag))
    if not folder.is_dir():
        raise MissingFile(f"--{flag} {folder}: there is no such folder")
    if files := list_files(folder, picture_suffixes()):
        _refuse_without_columns(source, flag)
        captions = _read_captions(folder, source.caption_column) if source.caption_column else {}
        return [RawImage(path, str(path), captions.get(str(path.relative_to(folder)), "")) for path in files]
    tars = [str(path) for path in list_files(folder, frozenset({".tar"}))]
    if not tars:
        raise UserError(f"--{flag} {folder}: there are no image files (.png, .jpg, ...) and no .tar files in it")
    for tar in filter(_ends_early, tars):
        logger.warning("%s ends early: what is missing from it cannot be counted", one_line(tar))
    with _one_line_error(f"--{flag} {folder}"):
        return datasets.load_dataset(
            "webdataset", data_files=tars, split="train", streaming=source.streaming, cache_dir=source.cache_dir
        )


def _read_captions(folder: Path, column: str) -> dict[str, str]:
    """By file name, from the `metadata.jsonl` that the datasets library wants beside the images of a folder."""
    path = folder / METADATA
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {str(Path(row["file_name"])): _caption(row, column) for row in rows}
    except FileNotFoundError:
        raise UserError(
            f"--caption_column {column}: {folder} has no {METADATA}, with a line such as "
            f'{{"file_name": "1.png", "{column}": "a red circle"}} for each image'
        ) from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} cannot be read as lines of JSON with file_name and {column}: {error!r}") from None


def _refuse_without_columns(source: DataSource, flag: str) -> None:
    """Where the folder of `flag` is all there is, what is meant for a table or a stream would be ignored."""
    if source.dataset_name or (flag == "validation_data_dir" and source.train_data_dir):
        return
    for name in ("image_column", "streaming"):
        if getattr(source, name) != DataSource.__dataclass_fields__[name].default:
            raise UserError(f"--{name} has no effect on a folder of image files")


def _ends_early(tar: str) -> bool:
    """Whether the file lacks the zeros that close a tar, which readers in sequence take for its end."""
    with open(tar, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAR_END))
        return file.read() != bytes(TAR_END)


@contextmanager
def _one_line_error(what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # what a broken connection raises differs between the versions of the libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        advice = "check the name, --dataset_config_name and the network connection"
        raise UserError(f"{what} cannot be read: {reason}; {advice}") from error


def _choose_validation(source: DataSource, splits: Mapping[str, RawSplit], seed: int) -> tuple[Images, Images]:
    training = _as_images(splits["train"], source)
    if source.validation_data_dir:
        return training, open_validation_folder(source)
    wanted = source.validation_split
    if wanted is None:
        wanted = next((name for name in VALIDATION_SPLITS if name in splits), None)
    if wanted in splits:
        return training, _as_images(splits[wanted], source)
    share, limit = (HELD_OUT_SHARE, HELD_OUT_LIMIT) if wanted is None else (_parse_share(wanted, splits), None)
    if isinstance(training, StreamImages):
        raise UserError(
            "no images can be held out of streamed training data for validation; "
            "give --validation_data_dir, or a split of the data set as --validation_split"
        )
    return _hold_out(training, share, limit, seed)


def _parse_share(text: str, splits: Mapping[str, RawSplit]) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UserError(
            f"--validation_split {text} is no split of the data set (it has {', '.join(splits)}) "
            "and no share of the training images between 0 and 1, such as 0.05"
        )
    return share


def _hold_out(
    images: Sequence[RawImage], share: float, limit: int | None, seed: int
) -> tuple[Sequence[RawImage], Sequence[RawImage]]:
    if len(images) < 2:
        raise UserError("a single training image leaves none to hold out; give --validation_data_dir")
    number = min(max(round(share * len(images)), 1), limit or len(images), len(images) - 1)
    order = np.random.default_rng((seed, HELD_OUT_SEED)).permutation(len(images))
    return Subset(images, np.sort(order[number:])), Subset(images, np.sort(order[:number]))


def _as_images(split: RawSplit, source: DataSource) -> Images:
    """The image column of a dataset, set to stay undecoded: one bad image must not end the iteration."""
    if isinstance(split, list):
        return split
    column = source.image_column
    columns = list(split.features or next(iter(split), {}))
    if not columns or (isinstance(split, datasets.Dataset) and len(split) == 0):
        raise UserError(f"{source.dataset_name or source.train_data_dir} holds no images; check its files and splits")
    if column not in columns:
        raise UserError(f"--image_column {column}: there is no such column; the columns are {', '.join(columns)}")
    captions = source.caption_column
    if captions is not None and captions not in columns:
        raise UserError(f"--caption_column {captions}: there is no such column; the columns are {', '.join(columns)}")
    if isinstance((split.features or {}).get(column), datasets.Image):
        split = split.cast_column(column, datasets.Image(decode=False))
    split = split.select_columns([name for name in columns if name in (column, captions, "__key__")])
    kind = StreamImages if isinstance(split, datasets.IterableDataset) else DatasetImages
    return kind(split, column, captions)


def _caption(row: Mapping[str, object], column: str | None) -> str:
    """Of several, as COCO has them, the first."""
    value = row[column] if column else ""
    return str(value[0] if isinstance(value, list) and value else value or "")


def _label(row: Mapping[str, object], column: str) -> str:
    value = row.get(column)
    path = value.get("path") if isinstance(value, dict) else value
    return row.get("__key__") or (path if isinstance(path, str) else "")
