"""Bad, hostile and unusual images among good ones, and data that end or fail in the middle of a run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from helpers.bad_pictures import PNG, UNREADABLE, UNUSUAL, fill, picture, write_tar
from helpers.runs import Run

from srl_utils.command_line import exit_code
from srl_utils.errors import UserError, one_line
from srl_utils.evaluation.__main__ import main as evaluate
from srl_utils.images.decoding import UnreadableImage, decode_rgb, image_suffixes
from srl_utils.images.ledger import ImageLedger
from srl_utils.images.listing import list_files
from srl_utils.images.sources import DataSource, StreamImages, open_images
from srl_utils.pipelines.__main__ import main as sanitize

GOOD = 80
NOBODY = 65534


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_picture_is_unreadable(name: str, tmp_path: Path) -> None:
    """Oracle: none of these files holds a whole picture that may be decoded; the reason is one line, and soon there."""
    fill(tmp_path, {name: UNREADABLE[name]})
    with pytest.raises(UnreadableImage) as caught:
        decode_rgb(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_only_unusual_is_a_picture(name: str, tmp_path: Path) -> None:
    """Oracle: each of these was written whole by Pillow, under whatever name."""
    fill(tmp_path, {name: UNUSUAL[name]})
    assert list_files(tmp_path, image_suffixes()) == [tmp_path / name]
    assert decode_rgb(tmp_path / name).mode == "RGB"


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """All of them among good pictures, in a folder whose own name is no Unicode, with a link back to its top."""
    folder = tmp_path / os.fsdecode(b"photographs\xff")
    for number in range(GOOD):
        (folder / "good").mkdir(parents=True, exist_ok=True)
        picture().save(folder / "good" / f"{number}.png")
    fill(folder / "bad", UNREADABLE)
    fill(folder / "unusual", UNUSUAL)
    (folder / "good" / "loop").symlink_to(folder, target_is_directory=True)
    return folder


LISTED = [name for name in UNREADABLE if Path(name).suffix in image_suffixes()]


def test_training_finishes_on_a_mixture(
    run: Run, flags: list[str], mixture: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: the list of what was put there. Every bad file is named once, in one line, and all are counted."""
    images = GOOD + len(LISTED) + len(UNUSUAL)
    split = flags.index("--validation_split")
    code, printed = run(
        *flags[:split], *flags[split + 2 :], "--train_data_dir", mixture, "--validation_data_dir", mixture / "unusual",
        "--pgd_steps", "0", "--train_batch_size", "16", "--max_train_steps", -(-images // 16),
        "--max_bad_images", "0.5",
    )  # fmt: skip
    assert code == 0, printed
    assert f"{len(LISTED)} unreadable images were replaced" in printed
    named = [record.args[0] for record in caplog.records if "unreadable training image" in record.msg]
    assert sorted(named) == sorted(one_line(str(mixture / "bad" / name)) for name in LISTED)
    assert not [name for name in named if "\n" in name]
    (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_evaluation_finishes_on_a_mixture(mixture: Path, vae_folder: Path, tmp_path: Path) -> None:
    """Oracle: as above; what was skipped is counted and named in the report."""
    out = tmp_path / "out"
    code = evaluate([
        "reconstruction", "--baseline", str(vae_folder), "--vae", f"same={vae_folder}", "--data_dir", str(mixture),
        "--resolution", "16", "--num_images", "200", "--attacks", "clean", "--metrics", "psnr", "--no_checks",
        "--output_dir", str(out),
    ])  # fmt: skip
    assert code == 0
    rows = json.loads((out / "results.json").read_text())
    assert {row["n"] for row in rows} == {GOOD + len(UNUSUAL)}
    report = (out / "report.md").read_text(encoding="utf-8")
    assert f"{len(LISTED)} unreadable images were left out" in report
    assert all(name.split(".")[0] in report for name in LISTED if name.isascii())


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore")
def test_sanitizing_finishes_on_a_mixture(
    mixture: Path, vae_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Oracle: as above; each bad file is named on a line of its own, and so is the animation, which GIF gives 256 colours."""
    out = tmp_path / "out"
    assert exit_code(lambda: sanitize(["sanitize", str(mixture), str(out), "--vae", str(vae_folder)])) == 0
    told = capfd.readouterr().err.split(f"{len(LISTED)} images cannot be read:\n")[1].splitlines()
    bad = one_line(str(mixture / "bad"))
    named, lost = told[: len(LISTED)], told[len(LISTED) :]
    assert [line.strip().removeprefix(bad + "/").split(" (")[0] for line in named] == sorted(map(one_line, LISTED))
    assert lost[0] == "1 images lost something in their new format:" and "animated.gif: colours" in lost[1]
    assert len(lost) == 2
    assert len([path for path in out.rglob("*") if path.is_file()]) == GOOD + len(UNUSUAL)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that this process, no longer root, may read, with one file and one folder that it may not."""
    folder = Path(tempfile.mkdtemp())
    fill(folder, {"open.png": PNG, "closed.png": PNG})
    fill(folder / "closed", {"inside.png": PNG})
    for path, mode in (
        (folder, 0o755),
        (folder / "open.png", 0o644),
        (folder / "closed.png", 0),
        (folder / "closed", 0),
    ):
        path.chmod(mode)
    privileged = os.geteuid() == 0
    if privileged:
        os.seteuid(NOBODY)
    yield folder
    if privileged:
        os.seteuid(0)
    (folder / "closed").chmod(0o700)
    shutil.rmtree(folder)


def test_what_may_not_be_read(guarded: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: permissions. The file is unreadable with that reason; the folder is skipped and named."""
    with caplog.at_level(logging.WARNING):
        files = list_files(guarded, image_suffixes())
    assert [file.name for file in files] == ["closed.png", "open.png"]
    assert any(str(guarded / "closed") in message and "Permission denied" in message for message in caplog.messages)
    with pytest.raises(UnreadableImage, match="Permission denied"):
        decode_rgb(guarded / "closed.png")
    decode_rgb(guarded / "open.png")


# --- data that end or fail in the middle ---------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streamed"])
def test_a_tar_that_ends_early_is_named(
    streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the whole tar, which gives 12 images and no warning; half of it gives fewer and its name."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    counts = []
    for part in ("whole", "half"):
        (tmp_path / part).mkdir()
        file = tmp_path / part / "images.tar"
        data = write_tar(file, {str(number): PNG for number in range(12)})
        if part == "half":
            file.write_bytes(data[: len(data) // 2])
        source = DataSource(
            train_data_dir=str(tmp_path / part), validation_data_dir=str(fill(tmp_path / "val", {"a.png": PNG})),
            image_column="png", streaming=streaming,
        )  # fmt: skip
        counts.append(sum(1 for _ in open_images(source, 16, 0)[0]))
        assert any(str(file) in message for message in caplog.messages) == (part == "half")
    assert counts[0] == 12 and 0 < counts[1] < 12


class Disconnected(Exception):
    """As an HTTP library's own errors are: of no built-in kind."""


def rows_until(failure: int) -> Iterator[dict[str, bytes]]:
    for number in range(10_000):
        if number == failure:
            raise Disconnected("the server went away\nand said more")
        yield {"image": PNG}


def test_a_stream_that_fails_is_one_line() -> None:
    """Oracle: the images before the failure, then a UserError that says what the library said."""
    stream = StreamImages(datasets.IterableDataset.from_generator(rows_until, gen_kwargs={"failure": 3}), "image")
    read = []
    with pytest.raises(UserError, match="the server went away") as caught:
        for image in stream:
            read.append(image)
    assert len(read) == 3 and "\n" not in str(caught.value)


def test_data_that_fail_in_the_middle_cost_no_step(
    run: Run, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the checkpoint of the last whole step, and a resume from it to the end, with exit codes 2 and 0."""
    honest, batches = ImageLedger.update, []

    def fail_once(ledger: ImageLedger, batch: object) -> None:
        batches.append(batch)
        if len(batches) == 3:
            raise UserError("the streamed dataset cannot be read: gone")
        honest(ledger, batch)

    monkeypatch.setattr(ImageLedger, "update", fail_once)
    code, printed = run(*flags)
    assert code == 2 and "gone; saved" in printed and "--resume_from_checkpoint latest" in printed, printed
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert run(*flags, "--resume_from_checkpoint", "latest")[0] == 0
