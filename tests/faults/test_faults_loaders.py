"""Files of every kind for whatever reads files: hypothesis changes sound ones, no loader raises what it does not promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.bad_pictures import JPEG, PNG, SIDE, encoded, picture
from helpers.runs import build_tiny_vae
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from srl_utils.errors import UserError, one_line
from srl_utils.files import MANIFEST, fault, read_json, seal
from srl_utils.images.decoding import UnreadableImage, decode_rgb
from srl_utils.training.journal import Journal
from srl_utils.vae.loading import WEIGHTS_NAME, AutoencoderSource, load_autoencoder, read_config

PICTURES = {
    "jpeg": JPEG, "progressive jpeg": encoded("JPEG", progressive=True), "png": PNG, "gif": encoded("GIF"),
    "webp": encoded("WEBP"), "bmp": encoded("BMP"), "tiff": encoded("TIFF", compression="tiff_lzw"),
    "palette": encoded("PNG", picture().quantize(8)), "tga": encoded("TGA"), "ppm": encoded("PPM"),
    "ico": encoded("ICO", sizes=[(SIDE, SIDE)]), "jpeg 2000": encoded("JPEG2000"),
}  # fmt: skip


def changed(data: bytes) -> st.SearchStrategy[bytes]:
    """`data` with some bytes changed, and perhaps cut, or with a part repeated."""

    def apply(changes: list[tuple[int, int]], end: int, repeated: int) -> bytes:
        copy = bytearray(data)
        for place, value in changes:
            copy[place] = value
        return bytes(copy[:end] + copy[: min(repeated, end)])

    places = st.integers(0, len(data) - 1) | st.integers(0, min(64, len(data) - 1))  # headers are near the front
    changes = st.lists(st.tuples(places, st.integers(0, 255)), max_size=8)
    return st.builds(apply, changes, st.just(len(data)) | st.integers(0, len(data)), st.just(0) | st.integers(0, 64))


def drawn(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


FEW_AND_MANY = pytest.mark.parametrize("examples", [20, pytest.param(500, marks=pytest.mark.faults)])


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
@FEW_AND_MANY
@pytest.mark.parametrize("kind", PICTURES)
def test_a_changed_picture_is_one_or_is_unreadable(kind: str, examples: int) -> None:
    """Oracle: the two promised outcomes; no other error, no hang. Unchanged it is a picture."""
    assert decode_rgb(PICTURES[kind]).mode == "RGB"

    @drawn(examples)
    @given(changed(PICTURES[kind]))
    def attempt(data: bytes) -> None:
        try:
            assert decode_rgb(data).mode == "RGB"
        except UnreadableImage as error:
            assert "\n" not in str(error)

    attempt()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.timeout(600)
@FEW_AND_MANY
def test_any_configuration_is_taken_or_refused_in_one_line(examples: int, tmp_path: Path) -> None:
    """Oracle: a configuration or a UserError, whatever stands in place of the entries of a sound one."""
    build_tiny_vae().save_config(tmp_path)
    file = tmp_path / "config.json"
    sound = json.loads(file.read_text())

    @drawn(examples)
    @given(st.dictionaries(st.sampled_from(sorted(sound)) | st.text(max_size=8), JSON, max_size=3))
    def attempt(entries: dict[str, object]) -> None:
        file.write_text(json.dumps({**sound, **entries}))
        try:
            assert isinstance(read_config(AutoencoderSource(pretrained_model_name_or_path=str(tmp_path))), dict)
        except UserError as error:
            assert len(one_line(str(error))) < 1000

    attempt()


@pytest.mark.timeout(600)
@FEW_AND_MANY
def test_changed_weights_are_numbers_or_refused(examples: int, tmp_path: Path) -> None:
    """Oracle: a VAE of finite weights or a UserError."""
    build_tiny_vae().save_pretrained(tmp_path)
    sound = (tmp_path / WEIGHTS_NAME).read_bytes()

    @drawn(examples // 2)
    @given(changed(sound))
    def attempt(data: bytes) -> None:
        (tmp_path / WEIGHTS_NAME).write_bytes(data)
        try:
            vae = load_autoencoder(AutoencoderSource(pretrained_model_name_or_path=str(tmp_path)))
        except UserError:
            return
        assert all(torch.isfinite(parameter).all() for parameter in vae.parameters())

    attempt()


class Alone:
    is_main_process = True


@FEW_AND_MANY
def test_changed_records_are_read_or_refused(examples: int, tmp_path: Path) -> None:
    """Oracle: a journal keeps lines of steps, other records are a value or a UserError, a manifest whole or at fault."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_bytes(b"content")
    seal(tmp_path / "folder")
    manifest, record, journal = tmp_path / "folder" / MANIFEST, tmp_path / "record.json", tmp_path / "journal.jsonl"
    whole = manifest.read_bytes()
    lines = b"".join(json.dumps({"step": step, "loss": 0.5}).encode() + b"\n" for step in range(3))

    @drawn(examples)
    @given(changed(whole), changed(lines))
    def attempt(of_manifest: bytes, of_journal: bytes) -> None:
        manifest.write_bytes(of_manifest)
        assert fault(tmp_path / "folder") is None or of_manifest != whole
        record.write_bytes(of_manifest)
        try:
            read_json(record)
        except UserError as error:
            assert "is damaged; remove it" in str(error)
        journal.write_bytes(of_journal)
        Journal(Alone(), journal).begin(1)
        assert all(json.loads(line)["step"] <= 1 for line in journal.read_text().splitlines())

    attempt()
