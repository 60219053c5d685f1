"""Writing without losing: what stands on the disk before, during and after a save."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from srl_utils.errors import UserError
from srl_utils.files import MANIFEST, fault, seal, write_atomically, write_text_atomically
from srl_utils.training.checkpoints import STATE_FILE, Checkpoints, save_drop_in
from srl_utils.training.interruption import Interruption
from srl_utils.training.journal import Journal


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / STATE_FILE).write_text("{}")
    seal(path)
    return path


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    """Oracle: the old content, while the new one is being written and after that has failed."""
    path = tmp_path / "results.json"
    write_text_atomically(path, "old")

    def fail(aside: Path) -> None:
        aside.write_text("half")
        assert path.read_text() == "old"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"


def test_the_newest_is_newest_by_number(tmp_path: Path) -> None:
    """Oracle: counting. 1000 comes after 900 although not in the alphabet; unfinished folders do not count."""
    for step in (900, 1000, 50):
        checkpoint(tmp_path, step)
    (tmp_path / ".checkpoint-2000.partial").mkdir()
    (tmp_path / "checkpoint-notes").mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert [path.name for path in checkpoints.found()] == ["checkpoint-50", "checkpoint-900", "checkpoint-1000"]
    assert checkpoints.resolve("latest") == tmp_path / "checkpoint-1000"
    assert checkpoints.resolve("checkpoint-50") == tmp_path / "checkpoint-50"
    assert checkpoints.resolve(str(tmp_path / "checkpoint-900")) == tmp_path / "checkpoint-900"


def test_resolving_nothing(tmp_path: Path) -> None:
    """Oracle: the contract: `latest` may find nothing, a named folder must be a checkpoint."""
    assert Checkpoints(tmp_path).resolve("latest") is None
    checkpoint(tmp_path, 5)
    with pytest.raises(UserError, match="holds: checkpoint-5"):
        Checkpoints(tmp_path).resolve("checkpoint-6")


class FakeAccelerator:
    """The part of an Accelerator that saving needs; `save_state` writes a file or fails."""

    is_main_process = True

    def __init__(self, *, fail: bool = False) -> None:
        self.fail = fail

    def wait_for_everyone(self) -> None:
        pass

    def save_state(self, folder: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / STATE_FILE).write_text("{}")
        if self.fail:
            raise OSError("disk full")


def test_pruning_comes_after_saving(tmp_path: Path) -> None:
    """Oracle: the folders. A save that fails prunes nothing; its remains are gone after the next one."""
    checkpoints = Checkpoints(tmp_path, total_limit=2)
    for step in (1, 2):
        checkpoints.save(FakeAccelerator(), step)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(FakeAccelerator(fail=True), 3)
    assert [path.name for path in checkpoints.found()] == ["checkpoint-1", "checkpoint-2"]
    checkpoints.save(FakeAccelerator(), 4)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}


def test_saving_over_a_checkpoint_of_a_rewound_run(tmp_path: Path) -> None:
    """Oracle: the new content stands, and nothing of the old one."""
    (checkpoint(tmp_path, 3) / "outdated").write_text("")
    Checkpoints(tmp_path).save(FakeAccelerator(), 3)
    assert {path.name for path in (tmp_path / "checkpoint-3").iterdir()} == {STATE_FILE, MANIFEST}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_channels_last_weights_are_saved_without_being_moved(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    """Oracle: the VAE's own tensors, the same values on the disk and the same storage in memory afterwards."""
    tiny_vae.to(memory_format=torch.channels_last)
    before = {name: tensor.data_ptr() for name, tensor in tiny_vae.state_dict().items()}
    (tmp_path / "checkpoint-1").mkdir()
    save_drop_in(tiny_vae, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-1", "config.json", "diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in tiny_vae.state_dict().items())
    assert {name: tensor.data_ptr() for name, tensor in tiny_vae.state_dict().items()} == before


OF_AN_EARLIER_RUN = [
    "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bf16.safetensors",
    "diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin", "srl_vae.safetensors",
]  # fmt: skip
OF_THE_USER = [
    "diffusion_pytorch_model.kept.safetensors", "diffusion_pytorch_model_backup.safetensors", "pytorch_model.bin", "LICENSE"
]  # fmt: skip


@pytest.mark.parametrize("variants", [[], ["fp16"]], ids=["full", "with fp16"])
def test_a_drop_in_leaves_no_weights_of_an_earlier_run(
    tiny_vae: AutoencoderKL, tmp_path: Path, variants: list[str]
) -> None:
    """Oracle: diffusers, which loads the saved VAE or nothing under every name that a run writes; other files stay.

    Among the leftovers is the folder of a run that was killed while it saved.
    """
    (tmp_path / ".drop-in.partial").mkdir()
    for name in (*OF_AN_EARLIER_RUN, *OF_THE_USER, ".drop-in.partial/diffusion_pytorch_model.bf16.safetensors"):
        (tmp_path / name).write_bytes(b"outdated")
    save_drop_in(tiny_vae, tmp_path, variants=variants)
    written = {"config.json", "diffusion_pytorch_model.safetensors", *(OF_AN_EARLIER_RUN[:1] if variants else [])}
    assert {path.name for path in tmp_path.iterdir()} == {*written, *OF_THE_USER}
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in tiny_vae.state_dict().items())
    for variant in ("fp16", "bf16"):
        if variant in variants:
            assert AutoencoderKL.from_pretrained(tmp_path, variant=variant)
        else:
            with pytest.raises(OSError, match=variant):
                AutoencoderKL.from_pretrained(tmp_path, variant=variant)


def test_a_config_names_no_folder_of_this_machine(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    """Oracle: a search for the folder in the file; of a VAE of the Hub the config keeps the id."""
    tiny_vae.save_pretrained(tmp_path / "private/base")
    base = AutoencoderKL.from_pretrained(tmp_path / "private/base")
    save_drop_in(base, tmp_path / "out")
    text = (tmp_path / "out/config.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["_name_or_path"] == "base"
    base.register_to_config(_name_or_path="user/base")
    save_drop_in(base, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["_name_or_path"] == "user/base"


def test_the_journal_takes_back_lost_steps(tmp_path: Path) -> None:
    """Oracle: the rows. Those after the step that a run resumes from are gone; NaN is null, which JSON allows."""

    class Trackers:
        is_main_process = True

        def log(self, values: dict, step: int) -> None:
            pass

    journal = Journal(Trackers(), tmp_path / "metrics.jsonl")
    journal.begin(0)
    for step in (1, 2, 3):
        journal.write(step, {"loss": float("nan") if step == 2 else float(step)})
    journal.begin(2)
    rows = [json.loads(line) for line in journal.path.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}]
    journal.begin(0)
    assert journal.path.read_text() == ""


@pytest.fixture
def python_handles_interrupts() -> Iterator[None]:
    """Python's own SIGINT handler, which is missing in a process that was started in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("python_handles_interrupts")
def test_the_first_signal_is_noted_and_the_second_acts() -> None:
    """Oracle: Python's own handler, which raises KeyboardInterrupt; it is back after the first signal."""
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with Interruption():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- damage ---------------------------------------------------------------------------------------------


def three_files(folder: Path) -> Path:
    """A sealed folder with something to damage."""
    (folder / "vae").mkdir(parents=True)
    for name in (STATE_FILE, "optimizer.bin", "vae/weights"):
        (folder / name).write_bytes(name.encode() * 100)
    seal(folder)
    return folder


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", [STATE_FILE, "optimizer.bin", "vae/weights", MANIFEST])
@pytest.mark.parametrize("damage", [flipped, cut, Path.unlink, lambda path: path.write_bytes(b"")])
def test_damage_of_any_file_is_found_and_named(name: str, damage: Callable[[Path], object], tmp_path: Path) -> None:
    """Oracle: the file that was damaged by a bit, a byte or altogether; before that there is no fault."""
    folder = three_files(tmp_path / "folder")
    assert fault(folder) is None
    damage(folder / name)
    assert Path(name).name in fault(folder) or name == MANIFEST


@given(st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_change_of_a_byte_goes_unseen(tmp_path: Path, data: st.DataObject) -> None:
    """Oracle: SHA-256, and of the manifest's own bytes the content that it says (spaces between its words aside)."""
    folder = tmp_path / "folder"
    if not folder.exists():
        three_files(folder)
    path = folder / data.draw(st.sampled_from(["optimizer.bin", "vae/weights", MANIFEST]))
    before = path.read_bytes()
    place, value = data.draw(st.integers(0, len(before) - 1)), data.draw(st.integers(0, 255))
    path.write_bytes(before[:place] + bytes([value]) + before[place + 1 :])
    try:
        same = json.loads(before) == json.loads(path.read_bytes()) if path.name == MANIFEST else value == before[place]
    except ValueError:
        same = False
    try:
        assert (fault(folder) is None) == same
    finally:
        path.write_bytes(before)


def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path: Path) -> None:
    """Oracle: the one before it, with a line on each that is skipped; a damaged one asked for is refused."""
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    flipped(tmp_path / "checkpoint-3" / STATE_FILE)
    (tmp_path / "checkpoint-2" / MANIFEST).unlink()
    told: list[str] = []
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.resolve("latest", tell=told.append) == tmp_path / "checkpoint-1"
    assert [("checkpoint-3" in line, "checkpoint-2" in line) for line in told] == [(True, False), (False, True)]
    with pytest.raises(UserError, match=f"checkpoint-3 is damaged: {STATE_FILE} differs from its checksum"):
        checkpoints.resolve("checkpoint-3")
    cut(tmp_path / "checkpoint-1" / STATE_FILE)
    with pytest.raises(UserError, match="all checkpoints"):
        checkpoints.resolve("latest", tell=told.append)


def test_what_was_just_saved_is_never_pruned(tmp_path: Path) -> None:
    """Oracle: the limit and the step just saved, with a higher number left over from a run that was rewound."""
    for step in (1, 2, 9):
        checkpoint(tmp_path, step)
    Checkpoints(tmp_path, total_limit=5).save(FakeAccelerator(), 3)
    assert len(Checkpoints(tmp_path).found()) == 4
    Checkpoints(tmp_path, total_limit=1).save(FakeAccelerator(), 4)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_save_that_breaks_off_between_its_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the checkpoint of the same step that was there before is still found, and kept until the next is there."""
    checkpoint(tmp_path, 3)
    honest, renames = os.replace, []

    def fail_second(source: Path, target: Path) -> None:
        renames.append(target)
        if len(renames) == 2:
            raise OSError("power is gone")
        honest(source, target)

    monkeypatch.setattr(os, "replace", fail_second)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(OSError, match="power"):
        checkpoints.save(FakeAccelerator(), 3)
    kept = checkpoints.resolve("latest")
    checkpoints.tidy(kept)
    assert kept.name == ".checkpoint-3.outdated" and fault(kept) is None
    checkpoints.save(FakeAccelerator(), 4)
    assert [path.name for path in checkpoints.found()] == [kept.name, "checkpoint-4"]
    checkpoints.save(FakeAccelerator(), 3)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-4"}
