"""Entries: what the schema accepts, and that the shipped ones are what they say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from helpers.runs import ROOT
from helpers.zoo import FIELDS, write_entry

import train_srl_vae
from srl_utils.errors import MissingFile, UserError
from srl_utils.images.photographs import load_photographs, photograph_tiles
from srl_utils.images.pixels import from_pil
from srl_utils.training.arithmetic import step_arithmetic
from srl_utils.vae.codec import load_codec
from srl_utils.vae.loading import AutoencoderSource
from srl_utils.zoo.entries import read_entries, read_entry, training_flags
from srl_utils.zoo.protocols import PROTOCOLS, digest_of

ENTRIES = read_entries(ROOT / "zoo")
TRAINING = "python train_srl_vae.py"


def test_the_first_entries_are_the_embedded_vaes() -> None:
    """Oracle: specification."""
    assert {f"embedded-{name}" for name in ("original", "paper", "fast", "control", "vq", "video")} <= ENTRIES.keys()


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.weights.startswith("miniature/")])
def test_shipped_weights_have_the_digest_of_their_entry(name: str) -> None:
    """Oracle: the digest of the loaded weights."""
    source = AutoencoderSource(pretrained_model_name_or_path=str(ROOT / ENTRIES[name].weights))
    assert load_codec(name, source, device=torch.device("cpu")).digest == ENTRIES[name].digest


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.command])
def test_commands_make_the_weights_of_their_entry(name: str) -> None:
    """Oracle: the parser of the training; the weights have no fixed digest, and a repeated command continues."""
    entry = ENTRIES[name]
    args = train_srl_vae.parse_args(training_flags(entry.command), environment={})
    assert entry.digest is None and entry.base_digest == ENTRIES["embedded-original"].digest
    assert str(args.output_dir) == entry.weights and args.pretrained_model_name_or_path == entry.base
    assert args.resume_from_checkpoint == "latest"


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.command])
def test_costs_are_those_of_the_commands(name: str) -> None:
    """Oracle: the operations that the training counts for an image, times the images of all steps."""
    entry = ENTRIES[name]
    args = train_srl_vae.parse_args(training_flags(entry.command), environment={})
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(ROOT / entry.base))
    arithmetic = step_arithmetic(
        vae,
        resolution=args.resolution,
        pgd_steps=args.pgd_steps,
        lpips_net=None,
        originality=args.originality_weight > 0,
    )
    tflop = arithmetic.image * args.train_batch_size * args.max_train_steps / 1e12
    assert args.lpips_weight == 0 and entry.cost == pytest.approx(tflop, abs=0.05)


def test_entries_without_a_command_have_a_digest() -> None:
    """Oracle: specification."""
    assert all(entry.digest for entry in ENTRIES.values() if entry.command is None)


def test_the_embedded_images_are_those_of_the_protocol() -> None:
    """Oracle: the digest in the protocol."""
    protocol = PROTOCOLS["embedded"]
    images = protocol.load_images(ROOT / "zoo")
    assert images.shape == (32, 3, 64, 64) and digest_of(images) == protocol.image_digest


def test_the_photographs_are_those_of_scikit_image() -> None:
    """Oracle: the tiles of its three photographs; the README beside them is no image."""
    images = PROTOCOLS["embedded"].load_images(ROOT / "zoo")
    tiles = torch.stack([from_pil(tile) for tile in photograph_tiles("validation", side=64)])
    assert len(load_photographs("validation", short_side=128)) == 3 and torch.equal(images[:16], tiles)
    assert (ROOT / "zoo/images/README.md").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "colour: no such field"),
        ({"name": "Big VAE"}, "name: 'Big VAE' is not made of"),
        ({"name": "original", "base": "x"}, "name: evaluations call the base original"),
        ({"digest": 1234567890123456}, "digest: expected text or null, got 1234567890123456; put it in quotes"),
        ({"digest": "abc"}, "digest: 'abc' is not 16 hexadecimal digits"),
        ({"budget": "8 levels"}, "budget: '8 levels' is not a number or a fraction"),
        ({"budget": "8"}, "budget: 8 is outside"),
        ({"protocol": "other"}, "protocol: other is not known; choose from embedded, full"),
        ({"objective": ""}, "objective: expected text, got ''"),
        ({"link": "  "}, "link: expected text, got '  '"),
        ({"base_digest": "f" * 16}, "base_digest: there is no base"),
        ({"base": "x", "base_digest": "abc"}, "base_digest: 'abc' is not 16 hexadecimal digits"),
        ({"cost": "90 min"}, "cost: expected a number or null, got '90 min'"),
        ({"cost": math.inf}, "cost: expected a number or null, got inf"),
        ({"cost": 10**400}, "cost: expected a number or null, got 1000"),
        ({"cost": True}, "cost: expected a number or null, got True"),
        ({"cost": 0}, "cost: 0 TFLOP are not above 0"),
        ({"command": "rm -rf x"}, "command: it has to start with python train_srl_vae.py"),
        ({"command": "python -c 'import os'"}, "command: it has to start with python train_srl_vae.py"),
        ({"command": "python train_srl_vae.py 'x"}, "command: No closing quotation"),
        ({"command": TRAINING}, "command: it needs --output_dir outputs/small, the entry's weights, once"),
        ({"command": f"{TRAINING} --output_dir outputs/small --output_dir=/etc"}, "command: it needs --output_dir outputs/small"),
        ({"command": f"{TRAINING} --output_dir outputs/small-2"}, "command: it needs --output_dir outputs/small"),
        ({"command": f"{TRAINING} --push_to_hub"}, "command: --push_to_hub publishes"),
        ({"command": f"{TRAINING} --hub_model_id=user/x"}, "command: --hub_model_id=user/x publishes"),
        ({"link": "javascript:alert(1)"}, "link: javascript:alert"),
        ({"claims": {"worst": 20}}, "claims: setting: this field is missing"),
        ({"claims": {"setting": "theirs", "worst": "20 dB"}}, "claims: worst: expected a number or null, got '20 dB'"),
    ],
)  # fmt: skip
def test_bad_entries_get_one_line(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    """Oracle: specification: the file, the field, and what is wrong with it."""
    path = write_entry(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        read_entry(path)
    assert str(caught.value).startswith(f"{path}: {message}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_needed(field: str, tmp_path: Path) -> None:
    """Oracle: specification."""
    path = write_entry(tmp_path)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith(f"{field}:")))
    with pytest.raises(UserError, match=f"{field}: this field is missing"):
        read_entry(path)


def test_numbers_may_be_whole(tmp_path: Path) -> None:
    """Oracle: the same number as text."""
    claims = read_entry(write_entry(tmp_path, claims={"setting": "theirs", "worst": 20})).claims
    assert claims.worst == 20.0 and claims.clean is None


@pytest.mark.parametrize("equals", [" ", "="])
def test_the_weights_of_a_command_are_the_entrys(equals: str, tmp_path: Path) -> None:
    """Oracle: specification, for both ways to write the flag."""
    command = f"{TRAINING} --output_dir{equals}outputs/small --random_flip"
    assert read_entry(write_entry(tmp_path, command=command)).command == command


@pytest.mark.parametrize(
    "text", ["a: [", "just words", "", "data: 2020-13-45", "cost: 0x_", f"cost: {'9' * 5000}", "[" * 20_000]
)
def test_files_that_hold_no_entry(text: str, tmp_path: Path) -> None:
    """Oracle: one line that names the file."""
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=str(path)) as caught:
        read_entry(path)
    assert "\n" not in str(caught.value)


def test_an_entry_has_a_file_of_its_name(tmp_path: Path) -> None:
    """Oracle: specification."""
    write_entry(tmp_path).rename(tmp_path / "entries/other.yaml")
    with pytest.raises(UserError, match=r"small has to be in small\.yaml"):
        read_entries(tmp_path)


def test_without_a_zoo(tmp_path: Path) -> None:
    """Oracle: the kind of error, and what to do."""
    with pytest.raises(MissingFile, match="clone of the repository"):
        read_entries(tmp_path)
