"""Clips: the frames of videos, animations and folders, their sources, the order of samples, and what is refused."""

from __future__ import annotations

import io
import logging
import pickle
import struct
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import av
import datasets
import numpy as np
import pytest
import torch
from helpers.batches import first_batches, joined
from PIL import Image, ImageOps
from torch import Tensor

from srl_utils.errors import UserError
from srl_utils.images import clips, videos
from srl_utils.images.clips import FrameFolder, decode_clip, list_clips
from srl_utils.images.datasets import DataSource, TrainingData, load_validation_images, open_data
from srl_utils.images.decoding import UnreadableImage
from srl_utils.images.framing import random_box
from srl_utils.images.ledger import ImageLedger
from srl_utils.images.pixels import from_pil

NUM_FRAMES = 4
LENGTH = 7  # frames of a clip in the tests of sources
COUNT = 8  # clips there
RNG = np.random.default_rng(0)
# Blocks of 4 x 4 pixels: noise that every encoder takes.
NOISE = [RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1) for _ in range(17)]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps prepared datasets out of the home folder, and leaves out a pause that follows each shuffled stream."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01, raising=False)


def video(
    frames: Sequence[np.ndarray] = NOISE,
    codec: str = "ffv1",
    container: str = "matroska",
    pixels: str = "bgr0",
    **options: str,
) -> bytes:
    """Return a video with a key frame every five frames; the default codec is lossless."""
    file = io.BytesIO()
    layout = "rgba" if frames[0].shape[2] == 4 else "rgb24"
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=8, options={"threads": "1"} | options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.gop_size = pixels, 5
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format=layout)))
        output.mux(stream.encode())
    return file.getvalue()


H264 = {"codec": "libx264rgb", "pixels": "rgb24", "qp": "0", "bf": "3"}  # lossless, and stored in another order
VIDEOS = {
    "mkv": {},
    "mov": {"codec": "png", "container": "mov", "pixels": "rgb24"},
    "mp4": {**H264, "container": "mp4"},
    "mp4 in fragments": {**H264, "container": "mp4", "movflags": "frag_keyframe+empty_moov"},
    "mkv of h264": {**H264},
    "avi": {**H264, "container": "avi"},
    "webm": {"codec": "libvpx-vp9", "container": "webm", "pixels": "gbrp", "lossless": "1", "lag-in-frames": "9"},
}


def animation(frames: Sequence[np.ndarray], file_format: str, **options) -> bytes:
    file = io.BytesIO()
    first, *others = map(Image.fromarray, frames)
    first.save(file, file_format, save_all=True, append_images=others, **options)
    return file.getvalue()


def encoded(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG")
    return file.getvalue()


def write_frames(folder: Path, frames: Sequence[np.ndarray]) -> Path:
    """Write frames whose natural order is not that of the alphabet: 8.png, 9.png, 10.png, ..."""
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames, start=8):
        Image.fromarray(frame).save(folder / f"{number}.png")
    return folder


def as_tensor(frames: Sequence[np.ndarray]) -> Tensor:
    return torch.stack([from_pil(Image.fromarray(frame)) for frame in frames], dim=1)


def every_stretch(source: object, length: int) -> list[Tensor]:
    """Decode NUM_FRAMES frames from each place where they may begin."""
    places = length - NUM_FRAMES + 1
    return [
        decode_clip(source, from_pil, num_frames=NUM_FRAMES, start=(place + 0.5) / places) for place in range(places)
    ]


def assert_frames(source: object, frames: Sequence[np.ndarray]) -> None:
    for place, stretch in enumerate(every_stretch(source, len(frames))):
        assert stretch.equal(as_tensor(frames[place : place + NUM_FRAMES])), place


def reason(source: object, num_frames: int = NUM_FRAMES) -> str:
    with pytest.raises(UnreadableImage) as error:
        decode_clip(source, from_pil, num_frames=num_frames, start=0.5)
    assert "\n" not in str(error.value)
    return str(error.value)


# Decoding


@pytest.mark.parametrize("kind", VIDEOS)
def test_frames_of_videos_are_those_written(kind: str, tmp_path: Path) -> None:
    """Oracle: the frames before lossless compression, from every start: key frames and others, in bytes and in files."""
    content = video(**VIDEOS[kind])
    assert_frames(content, NOISE)
    (tmp_path / "video").write_bytes(content)
    assert_frames(tmp_path / "video", NOISE)
    assert_frames({"bytes": None, "path": str(tmp_path / "video")}, NOISE)
    assert_frames((tmp_path / "video").as_uri(), NOISE)


@pytest.mark.parametrize(("file_format", "options"), [("WEBP", {"lossless": True}), ("PNG", {})])
def test_frames_of_animations_are_those_written(file_format: str, options: dict) -> None:
    """Oracle: the frames before lossless compression."""
    assert_frames(animation(NOISE[:9], file_format, **options), NOISE[:9])


def test_frames_of_a_gif_are_those_written() -> None:
    """Oracle: frames of few colours, which a palette holds exactly."""
    frames = [np.full((8, 8, 3), (20 * number, 255 - number, 7), np.uint8) for number in range(9)]
    assert_frames(animation(frames, "GIF"), frames)


def test_frames_of_a_folder_are_in_natural_order(tmp_path: Path) -> None:
    """Oracle: the frames written, of which 10.png follows 9.png; captions and hidden files are no frames."""
    folder = write_frames(tmp_path / "clip", NOISE[:9])
    (folder / "notes.txt").write_text("a note")
    (folder / ".9.png").write_bytes(b"")
    assert_frames(FrameFolder(folder), NOISE[:9])


def test_only_the_group_of_a_start_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: counting. From anywhere in 300 frames, no more than a key frame's group and the frames wanted."""
    decoded: list[int] = []
    honest = videos.Video._decoded

    def counted(self: videos.Video, seek_to: int | None) -> Iterator[Any]:
        for frame in honest(self, seek_to):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(videos.Video, "_decoded", counted)
    for kind in ("mkv", "mp4"):
        content = video([NOISE[number % 17] for number in range(300)], **VIDEOS[kind])
        for start in (0.0, 0.33, 0.5, 0.999):
            decoded.clear()
            decode_clip(content, from_pil, num_frames=NUM_FRAMES, start=start)
            assert len(decoded) <= 2 * 5 + NUM_FRAMES, (kind, start)


def test_a_seek_that_leads_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the frames written, although each seek goes to the last key frame, as with a damaged index."""
    honest = videos.Video._decoded
    monkeypatch.setattr(
        videos.Video, "_decoded", lambda self, seek_to: honest(self, None if seek_to is None else self.keys[-1])
    )
    assert_frames(video(), NOISE)


def test_a_list_of_other_files_opens_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: FFmpeg would take this text for the video that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.mkv").write_bytes(video())
    assert "no video of a known format" in reason(b"ffconcat version 1.0\nfile other.mkv\n")


def test_a_video_that_begins_between_key_frames() -> None:
    """Oracle: the frames from the first key frame on, 12 of 17. Their number is known only when all are decoded."""
    file = io.BytesIO()
    with (
        av.open(io.BytesIO(video(**{**H264, "bf": "0"}, sc_threshold="0"))) as whole,
        av.open(file, "w", format="matroska") as output,
    ):
        stream = output.add_stream_from_template(whole.streams.video[0])
        for packet in islice(whole.demux(video=0), 1, LENGTH * 9):
            if packet.size:
                packet.stream = stream
                output.mux(packet)
    content = file.getvalue()
    assert decode_clip(content, from_pil, num_frames=12, start=0.0).equal(as_tensor(NOISE[5:]))
    assert decode_clip(content, from_pil, num_frames=12, start=0.9).equal(as_tensor(NOISE[5:]))
    assert reason(content, 14) == "has 12 frames, fewer than 14"


def test_an_animation_that_states_too_many_frames() -> None:
    """Oracle: the nine frames written, the last ones from a start beyond them; the header says 40."""
    content = animation(NOISE[:9], "PNG")
    place = content.index(b"acTL") + 4
    head = content[place - 4 : place] + struct.pack(">2I", 40, 0)
    crc = struct.pack(">I", zlib.crc32(head))
    content = content[: place - 4] + head + crc + content[place + 12 :]
    late = decode_clip(content, from_pil, num_frames=NUM_FRAMES, start=0.99)
    assert late.equal(as_tensor(NOISE[5:9]))
    assert reason(content, 10) == "has 9 frames, fewer than 10"


MATRICES = {  # a, b, c, d of a display matrix, and what it does to the rows and columns
    "as stored": ((1, 0, 0, 1), lambda frame: frame),
    "a quarter clockwise": ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),
    "half": ((-1, 0, 0, -1), lambda frame: np.rot90(frame, 2)),
    "a quarter back": ((0, -1, 1, 0), lambda frame: np.rot90(frame, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),
    "transposed": ((0, 1, 1, 0), lambda frame: frame.swapaxes(0, 1)),
    "transposed and turned": ((0, -1, -1, 0), lambda frame: np.rot90(frame.swapaxes(0, 1), 2)),
}


@pytest.mark.parametrize("kind", MATRICES)
def test_rotated_videos_become_upright(kind: str) -> None:
    """Oracle: ISO 14496-12; a pixel (x, y) is shown at (ax + cy, bx + dy). The matrix is put into the track's header."""
    content = video(**VIDEOS["mp4"])
    (a, b, c, d), expected = MATRICES[kind]
    place = content.index(b"tkhd") + 4 + 40
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    content = content[:place] + matrix + content[place + len(matrix) :]
    assert_frames(content, [np.ascontiguousarray(expected(frame)) for frame in NOISE])


def test_transparent_parts_are_white() -> None:
    """Oracle: Pillow's composite over white, within its rounding."""
    alpha = np.linspace(0, 255, 24, dtype=np.uint8)[None, :, None].repeat(16, 0)
    frames = [np.concatenate([frame, alpha], axis=2) for frame in NOISE]
    white = Image.new("RGBA", (24, 16), "white")
    flat = [np.asarray(Image.alpha_composite(white, Image.fromarray(frame)).convert("RGB")) for frame in frames]
    assert_frames(video(frames, "png", "mov", "rgba"), flat)


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv420p10le", "yuv444p", "yuvj444p"])
@pytest.mark.parametrize("size", [(16, 24), (15, 9)])
def test_kinds_of_samples_and_odd_sizes(pixels: str, size: tuple[int, int]) -> None:
    """Oracle: flat colours, which subsampling keeps; two levels allow for the rounding of YUV in 8 bits."""
    frames = [np.full((*size, 3), (200, 30 + number, 90), np.uint8) for number in range(LENGTH)]
    content = video(frames, "libx264", pixels=pixels, qp="0") if "j" in pixels else video(frames, pixels=pixels)
    for place, stretch in enumerate(every_stretch(content, LENGTH)):
        error = (stretch - as_tensor(frames[place : place + NUM_FRAMES])).abs().max()
        assert error <= 2 * 2 / 255, (place, error * 127.5)


def song(pictures: Sequence[np.ndarray] = (), *, cover: bool = False) -> bytes:
    """Return a second of silence, with pictures as its video or as the picture of the song."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        sound: Any = output.add_stream("aac", rate=8000, layout="mono")
        stream: Any = None
        if len(pictures):
            stream = output.add_stream("png", rate=8)
            stream.height, stream.width = pictures[0].shape[:2]
            stream.pix_fmt = "rgb24"
            if cover:
                stream.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        frame.pts = 0
        output.mux(sound.encode(frame))
        for picture in pictures:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for encoder in filter(None, (stream, sound)):
            output.mux(encoder.encode())
    return file.getvalue()


def test_sound_is_ignored() -> None:
    """Oracle: the frames written beside it."""
    assert_frames(song(NOISE[:9]), NOISE[:9])


def test_frames_that_an_edit_list_cuts_off_are_not_shown() -> None:
    """Oracle: the frames from time 0 on; the first three are stored, with negative times."""
    file = io.BytesIO()
    content = video(**{**VIDEOS["mp4"], "bf": "0"}, sc_threshold="0")
    with av.open(io.BytesIO(content)) as whole, av.open(file, "w", format="mp4") as output:
        source = whole.streams.video[0]
        stream = output.add_stream_from_template(source)
        cut = round(3 / 8 / source.time_base)
        for packet in whole.demux(source):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - cut, packet.dts - cut, stream
                output.mux(packet)
    assert_frames(file.getvalue(), NOISE[3:])


def without_end(content: bytes) -> bytes:
    return content[: len(content) // 2]


BROKEN = {
    "empty": (b"", "no video of a known format"),
    "text": (b"hello there" * 30, "no video of a known format"),
    "playlist": (b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n#EXT-X-ENDLIST\n", "no video of a known format"),
    "audio": (song(), "has no video"),
    "audio with a picture": (song(NOISE[:1], cover=True), "has no video"),
    "mp4 without its end": (without_end(video(**VIDEOS["mp4"])), "no video of a known format"),
    "short video": (video(NOISE[:3]), "has 3 frames, fewer than 4"),
    "short animation": (animation(NOISE[:2], "WEBP", lossless=True), "has 2 frames, fewer than 4"),
    "still": (animation(NOISE[:1], "PNG"), "is a still image, and not a clip"),
    "animation without its end": (without_end(animation(NOISE[:9], "GIF")), ""),
    "number": (3, "int instead of a clip"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_clips_have_one_reason(kind: str) -> None:
    """Oracle: the reason, for files that are broken, too short, or no clips."""
    source, expected = BROKEN[kind]
    num_frames = 9 if kind == "animation without its end" else NUM_FRAMES
    assert expected in reason(source, num_frames)


def test_a_video_without_its_end_still_has_its_beginning() -> None:
    """Oracle: the frames written; a Matroska file is readable up to where it breaks off."""
    content = without_end(video())
    found = decode_clip(content, from_pil, num_frames=NUM_FRAMES, start=0.0)
    assert found.equal(as_tensor(NOISE[:NUM_FRAMES]))
    assert "fewer than 17" in reason(content, 17)


def test_broken_folders_have_one_reason(tmp_path: Path) -> None:
    """Oracle: the reason names the frame, or both sizes, or the number of frames."""
    folder = write_frames(tmp_path / "clip", NOISE[:5])
    assert reason(FrameFolder(folder), 6) == "has 5 frames, fewer than 6"
    (folder / "10.png").write_bytes(b"broken")
    assert reason(FrameFolder(folder), 5).startswith("10.png: no image of a known format")
    Image.new("RGB", (30, 16)).save(folder / "10.png")
    source = DataSource(validation_data_dir=str(tmp_path), num_frames=5)
    with pytest.raises(UserError, match="none of 1 validation images can be read"):
        load_validation_images(source, num_images=1, resolution=8)


# Sources


def clip(identity: int, length: int = LENGTH) -> list[np.ndarray]:
    """Flat gray frames whose level tells the clip and the number of the frame, whatever their crop."""
    return [np.full((12, 10, 3), 24 * identity + 3 * number, np.uint8) for number in range(length)]


def content_of(identity: int, length: int = LENGTH) -> bytes:
    return video(clip(identity, length))


def told(batch: Tensor) -> list[tuple[int, list[int]]]:
    """Return which clip each is, and the numbers of its frames."""
    levels = ((batch.mean((1, 3, 4)) + 1) * 127.5).round().int()
    return [(int(row[0]) // 24, (row % 24 // 3).tolist()) for row in levels]


def write_clips(folder: Path, numbers: Sequence[int] = range(COUNT)) -> Path:
    """Write clips of every kind."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        path = folder / f"part{number % 2}" / f"{number:02d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 4 == 0:
            write_frames(folder / "frames" / path.name, clip(number))
        elif number % 4 == 1:
            path.with_suffix(".mkv").write_bytes(content_of(number))
        elif number % 4 == 2:
            path.with_suffix(".gif").write_bytes(animation(clip(number), "GIF"))
        else:
            path.with_suffix(".png").write_bytes(animation(clip(number), "PNG"))
    return folder


def write_videos(folder: Path, numbers: Sequence[int] = range(COUNT)) -> Path:
    folder.mkdir(parents=True)
    for number in numbers:
        (folder / f"{number}.mkv").write_bytes(content_of(number))
    return folder


def video_column(contents: Sequence[bytes]) -> datasets.Dataset:
    table = {"clip": [{"bytes": content, "path": None} for content in contents], "text": ["a"] * len(contents)}
    features = datasets.Features({"clip": datasets.Video(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict(table, features=features)


def opened(source: DataSource, **changes) -> TrainingData:
    settings = {
        "resolution": 8,
        "seed": 0,
        "center_crop": False,
        "random_flip": True,
        "num_validation_images": 4,
    }
    return open_data(source, **(settings | changes))


def folder_data(tmp_path: Path, **changes) -> TrainingData:
    train, validation = tmp_path / "train", tmp_path / "val"
    if not train.exists():
        write_clips(train)
        write_clips(validation, [9])
    source = DataSource(train_data_dir=str(train), validation_data_dir=str(validation), num_frames=NUM_FRAMES)
    return opened(source, **changes)


def stream_data(tmp_path: Path, **changes) -> TrainingData:
    folder = tmp_path / "parquet"
    if not folder.exists():
        folder.mkdir()
        video_column([content_of(number) for number in range(COUNT)]).to_parquet(folder / "train.parquet")
        video_column([content_of(9)]).to_parquet(folder / "validation.parquet")
    source = DataSource(dataset_name=str(folder), streaming=True, image_column="clip", num_frames=NUM_FRAMES)
    return opened(source, **changes)


KINDS = {"map": folder_data, "stream": stream_data}


def sources(tmp_path: Path) -> dict[str, DataSource]:
    """The same clips in every form."""
    contents = [content_of(number) for number in range(COUNT)]
    video_column(contents).save_to_disk(tmp_path / "saved")
    (tmp_path / "tables").mkdir()
    video_column(contents).to_parquet(tmp_path / "tables" / "train.parquet")
    films = str(write_videos(tmp_path / "films"))
    paths = sorted(str(path) for path in Path(films).iterdir())
    datasets.Dataset.from_dict({"clip": paths}).save_to_disk(tmp_path / "paths")
    return {
        "folder": DataSource(train_data_dir=str(write_clips(tmp_path / "clips"))),
        "folder of videos": DataSource(train_data_dir=films),
        "videofolder": DataSource(dataset_name=films, image_column="video"),
        "videofolder stream": DataSource(dataset_name=films, image_column="video", streaming=True),
        "saved": DataSource(dataset_name=str(tmp_path / "saved"), image_column="clip"),
        "paths": DataSource(dataset_name=str(tmp_path / "paths"), image_column="clip"),
        "parquet": DataSource(dataset_name=str(tmp_path / "tables"), image_column="clip"),
        "parquet stream": DataSource(dataset_name=str(tmp_path / "tables"), image_column="clip", streaming=True),
    }


def test_every_source_yields_the_same_clips(tmp_path: Path) -> None:
    """Oracle: the clips written, once per epoch, of each some consecutive frames; the middle ones for validation."""
    validation = str(write_clips(tmp_path / "val", [9]))
    for name, source in sources(tmp_path).items():
        settings = {"validation_data_dir": validation, "num_frames": NUM_FRAMES}
        data = opened(DataSource(**(vars(source) | settings)))
        _, batch = joined(first_batches(data, 2))
        assert batch.shape == (COUNT, 3, NUM_FRAMES, 8, 8) and batch.dtype == torch.float32
        assert sorted(identity for identity, _ in told(batch)) == list(range(COUNT)), name
        assert all(np.all(np.diff(frames) == 1) for _, frames in told(batch)), name
        assert told(data.validation_images) == [(9, [2, 3, 4, 5])]
        assert data.num_images == (None if source.streaming else COUNT)
        assert "training clips of 4 frames, 1 validation clips of 4 frames" in data.description


def test_clips_are_held_out_like_images(tmp_path: Path) -> None:
    """Oracle: set difference; the evaluation holds out the clips that the training holds out."""
    folder = write_clips(tmp_path / "clips")
    source = DataSource(train_data_dir=str(folder), validation_split="0.25", num_frames=NUM_FRAMES)
    data = opened(source)
    held_out = [identity for identity, _ in told(data.validation_images)]
    trained = {identity for identity, _ in told(joined(first_batches(data, 3))[1])}
    assert len(held_out) == 2 and trained == set(range(COUNT)) - set(held_out)
    again = load_validation_images(source, num_images=4, resolution=8)
    assert again.images.equal(data.validation_images)


def test_clips_of_a_folder(tmp_path: Path) -> None:
    """Oracle: the files put there. Stills beside videos, as previews are, and stills of no sub-folder are no frames."""
    write_frames(tmp_path / "a" / "b" / "frames", NOISE[:5])
    (tmp_path / "a" / "1.MP4").write_bytes(b"film")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "film.webm").write_bytes(b"film")
    (tmp_path / "c" / "film.jpg").write_bytes(encoded(NOISE[0]))
    (tmp_path / "a" / "2.gif").write_bytes(animation(clip(1), "GIF"))
    (tmp_path / "a" / "3.gif").write_bytes(animation(clip(1)[:1], "GIF"))
    (tmp_path / "a" / "1.jpg").write_bytes(encoded(NOISE[0]))
    (tmp_path / "cover.jpg").write_bytes(encoded(NOISE[0]))
    (tmp_path / "notes.txt").write_text("a note")
    (tmp_path / "song.mp3").write_bytes(b"song")
    found, skipped = list_clips(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a/1.MP4", "a/2.gif", "a/b/frames", "c/film.webm"]
    assert dict(skipped.names) == {
        clips.BESIDE_CLIPS: ["a/1.jpg", "a/3.gif", "c/film.jpg"],
        clips.OUTSIDE_FOLDERS: ["cover.jpg"],
        "no suffix of an image that Pillow reads": ["song.mp3"],
    }


def test_captions_of_clips(tmp_path: Path) -> None:
    """Oracle: the text beside a video and beside a folder of frames."""
    (tmp_path / "1.mkv").write_bytes(content_of(1))
    (tmp_path / "1.txt").write_text("a film")
    write_frames(tmp_path / "2", clip(2))
    (tmp_path / "2.txt").write_text("frames")
    source = DataSource(validation_data_dir=str(tmp_path), caption_column="text", num_frames=NUM_FRAMES)
    assert load_validation_images(source, num_images=2, resolution=8).captions == ["a film", "frames"]


# Order


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("kind", KINDS)
def test_workers_processes_and_resumes_change_nothing(kind: str, tmp_path: Path) -> None:
    """Oracle: invariance, bit by bit, also of a pickled copy; another seed gives other clips."""
    data = KINDS[kind](tmp_path)
    batches = first_batches(data, 5)
    positions, expected = joined(batches)
    assert positions == list(range(20))
    assert joined(first_batches(data, 5, num_workers=3))[1].equal(expected)
    assert joined(first_batches(pickle.loads(pickle.dumps(data)), 5))[1].equal(expected)
    assert joined(first_batches(KINDS[kind](tmp_path), 2, first_position=12))[1].equal(expected[12:])
    ranks = [first_batches(data, 5, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    assert joined([batch for pair in zip(*ranks, strict=True) for batch in pair])[1].equal(expected)
    assert not joined(first_batches(KINDS[kind](tmp_path, seed=1), 5))[1].equal(expected)


def test_starts_cover_the_clip(tmp_path: Path) -> None:
    """Oracle: the four places where four of seven frames may begin, all of which 80 draws meet."""
    _, batch = joined(first_batches(folder_data(tmp_path), 20))
    assert {frames[0] for _, frames in told(batch)} == {0, 1, 2, 3}


def test_frames_of_a_sample_share_box_and_flip(tmp_path: Path) -> None:
    """Oracle: a clip whose frames are all alike stays so; its samples are parts that random_box and the flip explain."""
    write_frames(tmp_path / "train" / "clip", [NOISE[0]] * LENGTH)
    place = str(tmp_path / "train")
    data = opened(DataSource(train_data_dir=place, validation_data_dir=place, num_frames=NUM_FRAMES))
    _, batch = joined(first_batches(data, 5))
    assert batch.equal(batch[:, :, :1].expand_as(batch))
    flips = 0
    for position, sample in enumerate(batch):
        rng = np.random.default_rng((0, 1, position))
        flip, _ = rng.random() < 0.5, rng.random()
        box = random_box(24, 16, rng=rng)
        expected = Image.fromarray(NOISE[0]).resize((8, 8), Image.Resampling.LANCZOS, box=box)
        assert sample[:, 0].equal(from_pil(ImageOps.mirror(expected) if flip else expected))
        flips += flip
    assert 0 < flips < 20


def test_images_are_as_before(tmp_path: Path) -> None:
    """Oracle: the draws of an image written out: a flip, then a box of (seed, 1, position)."""
    Image.fromarray(NOISE[0]).save(tmp_path / "1.png")
    data = opened(DataSource(train_data_dir=str(tmp_path), validation_data_dir=str(tmp_path)))
    for position, sample in enumerate(joined(first_batches(data, 5))[1]):
        rng = np.random.default_rng((0, 1, position))
        flip = rng.random() < 0.5
        box = random_box(24, 16, rng=rng)
        expected = Image.fromarray(NOISE[0]).resize((8, 8), Image.Resampling.LANCZOS, box=box)
        assert sample.equal(from_pil(ImageOps.mirror(expected) if flip else expected))
    square = Image.fromarray(NOISE[0]).resize((8, 8), Image.Resampling.LANCZOS, box=(4, 0, 20, 16))
    assert data.validation_images.equal(from_pil(square)[None])
    assert data.description.endswith("1 training images, 1 validation images")


# Clips that cannot be read


def test_short_and_broken_clips_are_replaced_and_counted(tmp_path: Path) -> None:
    """Oracle: the clips that remain, and the names of the others, in a folder and in a stream."""
    data = folder_data(tmp_path)
    write_frames(tmp_path / "train" / "short", clip(8, 3))
    (tmp_path / "train" / "part0" / "short.mkv").write_bytes(content_of(8, 3))
    (tmp_path / "train" / "part0" / "broken.mp4").write_bytes(b"broken")
    (tmp_path / "train" / "part0" / "song.mkv").write_bytes(song())
    data = folder_data(tmp_path)
    ledger = ImageLedger(data.num_images)
    batches = first_batches(data, 3)
    for batch in batches:
        ledger.update(batch)
    assert data.num_images == COUNT + 4
    assert {identity for identity, _ in told(joined(batches)[1])} == set(range(COUNT))
    assert {Path(name).name for name in ledger.bad_images} == {"short", "short.mkv", "broken.mp4", "song.mkv"}
    with pytest.raises(UserError, match="4 of 12 training images cannot be read"):
        ledger.check(0.05)
    folder = tmp_path / "tables"
    folder.mkdir()
    video_column([content_of(0), content_of(1, 3), b"broken"]).to_parquet(folder / "train.parquet")
    source = DataSource(dataset_name=str(folder), streaming=True, image_column="clip", num_frames=NUM_FRAMES)
    stream = opened(DataSource(**(vars(source) | {"validation_data_dir": str(tmp_path / "val")})))
    (batch,) = first_batches(stream, 1)
    assert [identity for identity, _ in told(batch.images)] == [0] * 4 and len(set(batch.bad_images)) == 2


def test_validation_tells_why_a_clip_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: the reason in the log, and the next clip in the place of the short one."""
    write_frames(tmp_path / "1", clip(1, 3))
    write_frames(tmp_path / "2", clip(2))
    source = DataSource(validation_data_dir=str(tmp_path), num_frames=NUM_FRAMES)
    with caplog.at_level(logging.WARNING):
        loaded = load_validation_images(source, num_images=1, resolution=8)
    assert told(loaded.images) == [(2, [2, 3, 4, 5])] and loaded.unreadable == [str(tmp_path / "1")]
    assert "has 3 frames, fewer than 4" in caplog.text


def write_stills(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "stills", NOISE[:3])
    (tmp_path / "tar").mkdir()
    with tarfile.open(tmp_path / "tar" / "a.tar", "w") as tar:
        tar.add(folder / "8.png", "8.png")
    table = {"image": [Image.fromarray(frame) for frame in NOISE[:3]]}
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "saved")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"train_data_dir": "stills"}, ["train_data_dir: stills holds no clips", "`num_frames` is 4", "(3: "]),
        ({"train_data_dir": "tar"}, ["train_data_dir: tar holds tars", "unpack them"]),
        ({"dataset_name": "./tar"}, ["dataset_name: ./tar holds tars", "unpack them"]),
        ({"dataset_name": "scikit-image"}, ["dataset_name: ", "are no clips", "leave `num_frames` at 1"]),
        ({"dataset_name": "./saved"}, ["training images tried can be read", "is a still image, and not a clip"]),
        ({"dataset_name": "./stills"}, ["dataset_name: ./stills is read as still images", "`train_data_dir`"]),
        ({"train_data_dir": "stills", "num_frames": 0}, ["num_frames: must be at least 1, got 0"]),
    ],
)
def test_still_images_are_refused_in_one_line(
    settings: dict, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the message names the source and what to give instead."""
    monkeypatch.chdir(tmp_path)
    write_stills(tmp_path)
    with pytest.raises(UserError) as error:
        opened(DataSource(**({"num_frames": NUM_FRAMES} | settings)))
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_without_pyav_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the command that installs it, in one line; animations and folders of frames need no PyAV."""
    monkeypatch.setitem(sys.modules, "av", None)
    videos.has_pyav.cache_clear()
    try:
        assert reason(content_of(1)) == "needs PyAV: pip install av"
        with pytest.raises(UserError, match=r"2 files were skipped: needs PyAV: pip install av \(2: 1.mkv, 2.mkv\)"):
            opened(DataSource(train_data_dir=str(write_videos(tmp_path / "films", [1, 2])), num_frames=NUM_FRAMES))
        found, skipped = list_clips(write_clips(tmp_path / "clips"))
        assert len(found) == COUNT - 2 and "needs PyAV" in skipped.summary()
        assert_frames(animation(NOISE[:9], "PNG"), NOISE[:9])
    finally:
        videos.has_pyav.cache_clear()
