"""Find images in folders, tars, Hugging Face datasets and the built-in data sets, still undecoded."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias, cast

import datasets
import numpy as np
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset

from srl_utils.errors import MissingFile, UserError, one_line
from srl_utils.images.built_in import BUILT_IN, Drawn
from srl_utils.images.captions import as_caption, folder_captions
from srl_utils.images.clips import clip_at, list_clips
from srl_utils.images.framing import RawImage, RawImages
from srl_utils.images.listing import Skipped, list_files, list_images
from srl_utils.images.photographs import Split, photograph_tiles, recoloured
from srl_utils.images.webdataset import COLUMNS as TAR_COLUMNS
from srl_utils.images.webdataset import SampleReader, TarImages, index_tars, is_tar, stream_tars

PHOTOGRAPHS = "scikit-image"
NEED_NO_DOWNLOAD = (PHOTOGRAPHS, *BUILT_IN)
"""Names of the built-in data sets, which have neither columns nor streams."""
LARGEST_TILE = 256  # pixels; no photograph is smaller
VALIDATION_SPLITS = ("validation", "val", "test")
HELD_OUT_SHARE, HELD_OUT_LIMIT = 0.05, 1000
SHUFFLE_BUFFER = 1000
CLIPS_WANTED = "give videos, animated images or sub-folders of frames, or leave `num_frames` at 1"
TARS_OF_IMAGES = "holds tars, of which only still images are read; unpack them, or leave `num_frames` at 1"
UNKNOWN_TO_LIBRARY = "an image that the datasets library skips"
HELD_OUT_SEED = 3  # second word of seeds, so that these draws differ from those of framing.py and datasets.py


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Where images come from. Fields are named like the training's flags; the evaluation fills them from its own."""

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_split: str = "train"
    train_data_dir: str | None = None
    validation_data_dir: str | None = None
    validation_split: str | None = None
    image_column: str = "image"
    caption_column: str | None = None
    streaming: bool = False
    max_train_samples: int | None = None
    num_frames: int = 1
    """Frames of a clip; 1 for images."""
    cache_dir: str | None = None

    @classmethod
    def from_flags(cls, args: Namespace) -> DataSource:
        """Return the source that a command's flags describe; a flag that the command lacks keeps its default."""
        return cls(**{name: value for name, value in vars(args).items() if name in cls.__dataclass_fields__})

    def check(self) -> None:
        """Check the settings without opening anything.

        Raises:
            UserError: if settings conflict.
            MissingFile: if a folder does not exist.
        """
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise UserError("give exactly one of `dataset_name` and `train_data_dir`")
        if self.validation_data_dir and self.validation_split:
            raise UserError("give one of `validation_data_dir` and `validation_split`, not both")
        if self.num_frames < 1:
            raise UserError(f"must be at least 1, got {self.num_frames}", parameter="num_frames")
        for name in ("train_data_dir", "validation_data_dir"):
            folder = getattr(self, name)
            if folder is not None:
                _check_folder(folder, name)


@dataclass(frozen=True)
class DatasetImages:
    """The undecoded image column of a map-style dataset."""

    dataset: datasets.Dataset
    column: str
    caption_column: str | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def listed(self) -> list[tuple[str, str]]:
        """Return name and caption of each image; decodes nothing."""
        if self.caption_column is None:
            return [(f"row {index}", "") for index in range(len(self))]
        rows = self.dataset.select_columns([self.caption_column])
        return [(f"row {index}", _caption(row, self.caption_column)) for index, row in enumerate(rows)]

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
        with _one_line_error("the streamed dataset"):
            # Unlike iter(dataset), this yields the same order inside a worker of a DataLoader.
            for rows in self.dataset.iter(batch_size=1):
                row = {name: values[0] for name, values in rows.items()}
                yield RawImage(row.get(self.column), _label(row, self.column), _caption(row, self.caption_column))

    def shuffled(self, *, seed: int, epoch: int) -> StreamImages:
        """Return the same images in the order of an epoch."""
        dataset = self.dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        dataset.set_epoch(epoch)
        return replace(self, dataset=dataset)


Images = RawImages | StreamImages


class Opened(NamedTuple):
    """Training and validation images, and the files that were skipped."""

    training: Images
    validation: Images
    skipped: list[Skipped]


class OpenedValidation(NamedTuple):
    """Validation images, and the files that were skipped."""

    images: Images
    skipped: list[Skipped]


def open_images(source: DataSource, resolution: int, seed: int) -> Opened:
    """Open training and validation images. They are disjoint unless the user names overlapping ones.

    Args:
        source: where the images come from.
        resolution: side in pixels, for scikit-image's photographs.
        seed: decides which images are held out for validation.

    Raises:
        UserError: if settings conflict, if there is no such dataset or split, or if it holds no images.
    """
    source.check()
    splits = _open_splits(source, resolution)
    training = splits.pick(source.train_split)
    if training is None:
        raise UserError(
            f"{source.dataset_name} has no split '{source.train_split}'; name one of its splits: {', '.join(splits.found)}",
            parameter="train_split",
        )
    validation = splits.validation()
    if isinstance(validation, HeldOut):
        training, validation = _hold_out(training, validation, seed)
    return Opened(_limited(training, source.max_train_samples), validation, splits.skipped)


def open_validation(source: DataSource, resolution: int, seed: int) -> OpenedValidation:
    """Open the validation images alone.

    They are those of the only split, if it is not `train_split`. If there is no other split than `train_split`, they
    are the images that the training holds out. Arguments and errors are those of `open_images`.
    """
    if source.validation_data_dir:
        splits = Splits(source, {})
        return OpenedValidation(splits.folder("validation_data_dir"), splits.skipped)
    source.check()
    splits = _open_splits(source, resolution)
    validation = splits.only_other() or splits.validation()
    if isinstance(validation, HeldOut):
        _, validation = _hold_out(splits.to_hold_out_of(), validation, seed)
    return OpenedValidation(validation, splits.skipped)


def captioned(images: RawImages) -> tuple[RawImages, list[str]]:
    """Return the images that have a caption, and the names of the others; decodes nothing."""
    listed = _listed(images)
    having = [index for index, (_, caption) in enumerate(listed) if caption]
    return _selected(images, having), [name for name, caption in listed if not caption]


def _selected(images: RawImages, indices: Sequence[int]) -> RawImages:
    """Return some of the images. torch takes anything with a length and indices for a dataset, unlike its types."""
    return Subset(cast(Dataset[RawImage], images), indices)


def _listed(images: RawImages) -> list[tuple[str, str]]:
    if isinstance(images, (DatasetImages, TarImages)):
        return images.listed()
    if isinstance(images, Subset):
        whole = _listed(cast(RawImages, images.dataset))
        return [whole[index] for index in images.indices]
    if isinstance(images, ConcatDataset):
        return [pair for part in images.datasets for pair in _listed(cast(RawImages, part))]
    return [(raw.name, raw.caption) for raw in map(images.__getitem__, range(len(images)))]


def _limited(training: Images, limit: int | None) -> Images:
    if isinstance(training, StreamImages):
        return training if limit is None else replace(training, dataset=training.dataset.take(limit))
    if limit is not None and limit < len(training):
        return _selected(training, range(limit))
    return training


@dataclass(frozen=True)
class Tars:
    """Paths or URLs of the tars of a split, not yet opened."""

    paths: Sequence[str]


RawSplit: TypeAlias = list[RawImage] | Drawn | Tars | datasets.Dataset | datasets.IterableDataset


class HeldOut(NamedTuple):
    """How many training images to hold out for validation: a share, up to a limit."""

    share: float
    limit: int | None


@dataclass(frozen=True)
class Splits:
    """The splits of a source by name; a split is opened on demand."""

    source: DataSource
    found: Mapping[str, RawSplit]
    skipped: list[Skipped] = field(default_factory=list)
    """What was skipped in what was opened."""

    def folder(self, flag: str) -> Images:
        """Return the images of the folder that `flag` names."""
        return self._open(_list_folder(flag, self.source, self.skipped))

    def pick(self, wanted: str) -> Images | None:
        """Return a split by its name, or by a sum of parts in the notation of the datasets library: `train[:10%]+test`.

        Returns:
            None if there is no such split.

        Raises:
            UserError: for parts and sums of streamed splits.
        """
        if wanted in self.found:
            return self._open(self.found[wanted])
        if not _split_names(wanted) <= self.found.keys():
            return None
        if self.source.streaming:
            raise UserError(
                f"{wanted}: parts and sums of splits cannot be streamed; name a whole split, or do not stream"
            )
        opened = {name: cast(RawImages, self._open(self.found[name])) for name in _split_names(wanted)}
        try:
            parts = datasets.ReadInstruction.from_spec(wanted).to_absolute(
                {n: len(split) for n, split in opened.items()}
            )
        except (ValueError, AssertionError):
            return None
        images = [_selected(opened[part.splitname], range(part.from_, part.to)) for part in parts]
        return images[0] if len(images) == 1 else ConcatDataset(cast(list[Dataset[RawImage]], images))

    def only_other(self) -> Images | None:
        """Return the only split if it is not for training; None if there are several or the settings name another."""
        if len(self.found) != 1:
            return None
        ((name, split),) = self.found.items()
        name = str(getattr(split, "split", None) or name)  # a saved dataset knows the name of its split
        if name == self.source.train_split or self.source.validation_split not in (None, name):
            return None
        return self._open(split)

    def validation(self) -> Images | HeldOut:
        """Return the split for validation, or else how many training images to hold out."""
        if self.source.validation_data_dir:
            return self.folder("validation_data_dir")
        wanted = self.source.validation_split
        if wanted is None:
            trained = _split_names(self.source.train_split)
            wanted = next((name for name in VALIDATION_SPLITS if name in self.found and name not in trained), None)
        if wanted is not None and (validation := self.pick(wanted)) is not None:
            return validation
        return HeldOut(HELD_OUT_SHARE, HELD_OUT_LIMIT) if wanted is None else HeldOut(self._share(wanted), None)

    def to_hold_out_of(self) -> Images:
        """Return the training split, or else the only split.

        Raises:
            UserError: if there are several splits of other names.
        """
        if (training := self.pick(self.source.train_split)) is not None:
            return training
        if len(self.found) == 1:
            return self._open(next(iter(self.found.values())))
        raise UserError(
            f"{self.source.dataset_name} has no split for validation; name one of its splits: {', '.join(self.found)}",
            parameter="validation_split",
        )

    def _share(self, text: str) -> float:
        try:
            share = float(text)
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            raise UserError(
                f"'{text}' is neither a split of the dataset (it has {', '.join(self.found)}) nor a share of the training "
                "images between 0 and 1; give one of these, such as 0.05",
                parameter="validation_split",
            )
        return share

    def _open(self, split: RawSplit) -> Images:
        """Open the undecoded images of a split."""
        if isinstance(split, (list, Drawn)):
            return split
        return self._open_tars(split.paths) if isinstance(split, Tars) else _image_column(split, self.source)

    def _open_tars(self, tars: Sequence[str]) -> Images:
        """Open tars; remote ones are downloaded, unless they are streamed."""
        source = self.source
        reader = SampleReader(source.image_column, source.caption_column)
        where = one_line(source.dataset_name or os.path.dirname(tars[0]))
        if any("://" in tar for tar in tars) and not source.streaming:
            with _one_line_error(where, parameter="dataset_name"):
                cache = source.cache_dir and os.path.join(source.cache_dir, "downloads")
                config = datasets.DownloadConfig(cache_dir=cache)
                tars = datasets.DownloadManager(download_config=config).download(list(tars))
        with _one_line_error(where):
            if source.streaming:
                return StreamImages(stream_tars(tars, reader, where=where), *TAR_COLUMNS[:2])
            images, without = index_tars(tars, reader, where=where, cache_dir=source.cache_dir)
        self.skipped.append(without)
        return images


def _split_names(text: str) -> set[str]:
    """Return the splits that `train[:10%]+test` is made of."""
    return {part.partition("[")[0].strip() for part in text.split("+")}


def _open_splits(source: DataSource, resolution: int) -> Splits:
    skipped: list[Skipped] = []
    return Splits(source, _find_splits(source, resolution, skipped), skipped)


def _find_splits(source: DataSource, resolution: int, skipped: list[Skipped]) -> dict[str, RawSplit]:
    if source.train_data_dir:
        return {source.train_split: _list_folder("train_data_dir", source, skipped)}
    if source.dataset_name in NEED_NO_DOWNLOAD:
        if source.num_frames > 1:
            raise UserError(
                f"the images of {source.dataset_name} are no clips; {CLIPS_WANTED}", parameter="dataset_name"
            )
        return _built_in_splits(source.dataset_name, resolution)
    folder = Path(source.dataset_name or "")
    with _one_line_error(source.dataset_name, parameter="dataset_name"):
        if not ((folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()):
            return _load_splits(source, skipped)
        # save_to_disk made this folder. It is memory-mapped, so streaming has no advantage.
        if source.streaming:
            raise UserError("no effect on a folder made by save_to_disk; leave it out", parameter="streaming")
        loaded = datasets.load_from_disk(source.dataset_name)
    return dict(loaded) if isinstance(loaded, dict) else {source.train_split: loaded}


def _load_splits(source: DataSource, skipped: list[Skipped]) -> dict[str, RawSplit]:
    """Find the splits of a dataset of the Hub, or of a folder that the datasets library understands."""
    builder = datasets.load_dataset_builder(source.dataset_name, source.dataset_config_name, cache_dir=source.cache_dir)
    if isinstance(builder, WebDataset):
        if source.num_frames > 1:
            raise UserError(f"{source.dataset_name} {TARS_OF_IMAGES}", parameter="dataset_name")
        return {str(name): Tars(list(files)) for name, files in builder.config.data_files.items()}
    folder = Path(source.dataset_name or "")
    if isinstance(builder, ImageFolder) and source.num_frames > 1:
        raise UserError(
            f"{source.dataset_name} is read as still images; give its folder of frames as `train_data_dir` or `data_dir`",
            parameter="dataset_name",
        )
    if isinstance(builder, ImageFolder) and folder.is_dir():
        skipped.append(_skipped_by_library(folder))
    if source.streaming:
        return dict(builder.as_streaming_dataset())
    builder.download_and_prepare()
    return dict(builder.as_dataset())


def _skipped_by_library(folder: Path) -> Skipped:
    images, others = list_images(folder)
    unknown = [str(path.relative_to(folder)) for path in images if path.suffix.lower() not in ImageFolder.EXTENSIONS]
    return Skipped({**others.names, UNKNOWN_TO_LIBRARY: unknown} if unknown else others.names)


def _built_in_splits(name: str, resolution: int) -> dict[str, RawSplit]:
    """Return the splits of a built-in data set; only the photographs have one for training."""
    if name == PHOTOGRAPHS:
        return {"train": _training_photographs(resolution), "validation": _photographs("validation", resolution)}
    return {"validation": BUILT_IN[name](resolution)}


def _training_photographs(resolution: int) -> list[RawImage]:
    """Return tiles of scikit-image's photographs at three scales, half of them recoloured.

    Coarser tiles are fewer, so they are repeated. Tiles have twice the resolution, so that a random crop of a quarter
    of the area is not scaled up.
    """
    tiles = [tile for across in (1, 2, 4) for tile in _tiles("train", 2 * resolution, across) * (4 // across)]
    return [RawImage(recoloured(tile, seed), label) for seed, (tile, label) in enumerate(tiles)]


def _photographs(split: Split, side: int) -> list[RawImage]:
    return [RawImage(tile, label) for tile, label in _tiles(split, side, across=2)]


def _tiles(split: Split, side: int, across: int) -> list[tuple[Image.Image, str]]:
    """Cut photographs into tiles of up to `LARGEST_TILE` pixels, each with its label."""
    tiles = photograph_tiles(split, side=min(side, LARGEST_TILE), across=across)
    return [(tile, f"{split} tile {index}") for index, tile in enumerate(tiles)]


def _list_folder(parameter: str, source: DataSource, skipped: list[Skipped]) -> list[RawImage] | Tars:
    """List the image files below the folder that `parameter` names, or else its tar files (WebDataset)."""
    folder = Path(getattr(source, parameter))
    _check_folder(folder, parameter)
    if source.num_frames > 1:
        return _list_folder_of_clips(folder, parameter, source, skipped)
    images, others = list_images(folder)
    if not images and (tars := [str(path) for path in list_files(folder) if is_tar(path)]):
        return Tars(tars)
    if not images:
        found = f"; {others.report()}" if others else ""
        raise UserError(
            f"{folder} holds no image files (.png, .jpg, ...) and no .tar files{found}", parameter=parameter
        )
    _refuse_without_columns(source, parameter)
    skipped.append(others)
    captions = _folder_captions(folder, images, source.caption_column)
    return [RawImage(path, str(path), caption) for path, caption in zip(images, captions, strict=True)]


def _list_folder_of_clips(
    folder: Path, parameter: str, source: DataSource, skipped: list[Skipped]
) -> list[RawImage] | Tars:
    clips, others = list_clips(folder)
    if not clips and any(map(is_tar, list_files(folder))):
        raise UserError(f"{folder} {TARS_OF_IMAGES}", parameter=parameter)
    if not clips:
        found = f" ({others.report()})" if others else ""
        raise UserError(
            f"{folder} holds no clips, but `num_frames` is {source.num_frames}{found}; {CLIPS_WANTED}",
            parameter=parameter,
        )
    _refuse_without_columns(source, parameter)
    skipped.append(others)
    captions = _folder_captions(folder, clips, source.caption_column)
    return [RawImage(clip_at(path), str(path), caption) for path, caption in zip(clips, captions, strict=True)]


def _folder_captions(folder: Path, images: Sequence[Path], column: str | None) -> list[str]:
    return folder_captions(folder, images, column) if column else [""] * len(images)


def _check_folder(folder: str | Path, parameter: str) -> None:
    """Raise a MissingFile if the folder that `parameter` names does not exist."""
    if not Path(folder).is_dir():
        raise MissingFile(f"there is no folder {folder}; check the path", parameter=parameter)


def _refuse_without_columns(source: DataSource, parameter: str) -> None:
    """Refuse settings for tables and streams if all images come from the folder that `parameter` names.

    Raises:
        UserError: for the first such setting.
    """
    if source.dataset_name or (parameter == "validation_data_dir" and source.train_data_dir):
        return
    for name in ("image_column", "streaming"):
        if getattr(source, name) != DataSource.__dataclass_fields__[name].default:
            raise UserError("no effect on a folder of image files; leave it out", parameter=name)


@contextmanager
def _one_line_error(what: str | None, *, parameter: str | None = None) -> Iterator[None]:
    """Turn any error of the datasets library into a UserError of one line, which starts with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # versions of the libraries raise different errors for a broken connection
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        advice = "check its name, its configuration and the network connection"
        raise UserError(f"{what} cannot be read: {reason}; {advice}", parameter=parameter) from error


def _hold_out(images: Images, held: HeldOut, seed: int) -> tuple[RawImages, RawImages]:
    if isinstance(images, StreamImages):
        raise UserError(
            "no images can be held out of a streamed dataset; name a split for validation, or give a folder of validation images"
        )
    if len(images) < 2:
        raise UserError(
            "a single image leaves none to hold out for validation; add images, or give a folder of validation images"
        )
    number = min(max(round(held.share * len(images)), 1), held.limit or len(images), len(images) - 1)
    order = np.random.default_rng((seed, HELD_OUT_SEED)).permutation(len(images))
    training, validation = (np.sort(part).tolist() for part in (order[number:], order[:number]))
    return _selected(images, training), _selected(images, validation)


def _image_column(split: datasets.Dataset | datasets.IterableDataset, source: DataSource) -> Images:
    """Open the image column of a dataset without decoding: one bad image must not end the iteration.

    Raises:
        UserError: if the dataset is empty or lacks a column.
    """
    column = source.image_column
    columns = list(split.features or next(iter(split), {}))
    if not columns or (isinstance(split, datasets.Dataset) and len(split) == 0):
        raise UserError(f"{source.dataset_name or source.train_data_dir} holds no images; check its files and splits")
    captions = source.caption_column
    for parameter, name in (("image_column", column), ("caption_column", captions)):
        if name is not None and name not in columns:
            told = f"there is no column '{name}'; the columns are {', '.join(columns)}"
            raise UserError(told + _advice_on_folder(source), parameter=parameter)
    feature = (split.features or {}).get(column)
    if isinstance(feature, (datasets.Image, datasets.Video)):
        split = split.cast_column(column, type(feature)(decode=False))
    split = split.select_columns([name for name in columns if name in (column, captions, "__key__")])
    kind = StreamImages if isinstance(split, datasets.IterableDataset) else DatasetImages
    return kind(split, column, captions)


def _advice_on_folder(source: DataSource) -> str:
    """Return advice if the datasets library takes a folder of images for a dataset of the files beside them."""
    folder = Path(source.dataset_name or os.devnull)
    if folder.is_dir() and (list_images(folder)[0] or any(map(is_tar, list_files(folder)))):
        return f"; {folder} holds image files or tars: give it as a folder of images instead of a dataset"
    return ""


def _caption(row: Mapping[str, object], column: str | None) -> str:
    return as_caption(row[column]) if column else ""


def _label(row: Mapping[str, object], column: str) -> str:
    value = row.get(column)
    path = value.get("path") if isinstance(value, dict) else value
    return str(row.get("__key__") or (path if isinstance(path, str) else ""))
