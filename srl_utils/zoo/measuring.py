"""Measure a VAE by the standard protocol, after making its weights where they are missing."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from os.path import exists
from pathlib import Path
from typing import Any, TypeGuard

import torch

from srl_utils.errors import UserError
from srl_utils.evaluation import evaluate
from srl_utils.evaluation.cli.running import used_versions
from srl_utils.evaluation.timings import measured_timings
from srl_utils.files import read_json
from srl_utils.hub.contents import CARD
from srl_utils.resources import device_name
from srl_utils.vae.codec import Codec, load_codec
from srl_utils.vae.loading import WEIGHTS_NAME
from srl_utils.vae.places import parse_place
from srl_utils.zoo.entries import TRAINING, Entry, Subject, training_flags
from srl_utils.zoo.protocols import PROTOCOLS, Protocol, digest_of
from srl_utils.zoo.rows import ZooRow, check_base_digest, check_digest, check_images, read_rows

ROW = "row.json"


def measure(subject: Subject, zoo: Path, folder: Path, *, quick: bool = False, dry_run: bool = False) -> ZooRow | None:
    """Measure a VAE by its protocol, and write the row.

    Weights and images are checked before the attacks start. An interrupted call continues from what `folder` holds.

    Args:
        subject: the VAE.
        zoo: has the images, and the rows with which this one will be compared.
        folder: gets the row and the evaluation's report.
        quick: measure two images under a short attack; such a row cannot be submitted.
        dry_run: check everything and measure nothing.

    Returns:
        The row; None in a dry run.

    Raises:
        UserError: if weights or images cannot be loaded or made, or are not those of the entry or of the protocol.
    """
    protocol = PROTOCOLS[subject.protocol].quick if quick else PROTOCOLS[subject.protocol]
    images = protocol.load_images(zoo)
    check_images(digest_of(images), protocol, read_rows(zoo))
    if has_to_be_made(subject):
        if dry_run:
            print(f"{subject.weights} would be made first, by {subject.command}")
            return None
        make(subject)
    codec, base_digest = load(subject)
    flags = {**protocol.flags(zoo), **compared(subject), "output_dir": folder / "evaluation", "dry_run": dry_run}
    found = evaluate(**flags)
    if dry_run:
        return None
    device = device_name(codec.device)
    timings = measured_timings([codec], images, seed=0, device=device)
    row = ZooRow(
        name=subject.name,
        digest=codec.digest,
        base=subject.base,
        base_digest=base_digest,
        protocol=subject.protocol,
        fingerprint=protocol.fingerprint,
        images=digest_of(images),
        failed_checks=None if subject.base is None else failed_checks(folder / "evaluation", protocol),
        encoder_ms=1000 * timings.encoders[subject.name],
        device=timings.device,
        versions=used_versions(),
        date=date.today().isoformat(),
        results=[
            replace(row, vae=subject.name) for row in found.rows if subject.base is None or row.vae == subject.name
        ],
    )
    row.write(folder / ROW)
    return row


def load(subject: Subject) -> tuple[Codec, str | None]:
    """Load a VAE onto the GPU, if there is one.

    Returns:
        The VAE, and the digest of its base; None without a base.

    Raises:
        UserError: if VAE or base cannot be loaded, if the weights have to be made first, or if they are not those of the
            entry.
    """
    if has_to_be_made(subject):
        raise UserError(
            f"{subject.name}: there are no finished weights in {subject.weights}; make them first by "
            f"python -m srl_utils.zoo evaluate {subject.name}, or by its command: {subject.command}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codec = load_codec(subject.name, parse_place(subject.weights), device=device)
    check_digest(subject, codec.digest)
    base_digest = None
    if subject.base is not None:
        base_digest = load_codec("base", parse_place(subject.base), device=device).digest
    check_base_digest(subject, base_digest)
    return codec, base_digest


def has_to_be_made(subject: Subject) -> TypeGuard[Entry]:
    """Return whether an entry has a command that has not left weights and card yet."""
    made = (Path(subject.weights, name).exists() for name in (WEIGHTS_NAME, CARD))
    return isinstance(subject, Entry) and subject.command is not None and not all(made)


def make(entry: Entry) -> None:
    """Run the command of an entry.

    Raises:
        UserError: if the command fails.
    """
    print(f"making {entry.weights}: {entry.command}", flush=True)
    words = [sys.executable, *TRAINING[1:], *training_flags(entry.command or "")]
    code = run_to_its_end(words)
    if code:
        raise UserError(f"{entry.name}: its command ended with the exit code {code}; the same call continues it")


def run_to_its_end(words: Sequence[str]) -> int:
    """Run a command and return its exit code, which is negative if a signal has killed it.

    Ctrl-C and SIGTERM are left to the command: a training saves a checkpoint first. `subprocess.run` would kill it.
    """
    with subprocess.Popen(words) as child:
        handlers = {
            signal.SIGINT: lambda *_: None,  # a terminal sends it to both processes
            signal.SIGTERM: lambda *_: child.terminate(),
        }
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            return child.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def compared(subject: Subject) -> Mapping[str, Any]:
    """Return the flags of the evaluation that name the VAEs: transferred attacks are made on the base."""
    if subject.base is None:
        return {"baseline": subject.weights}
    return {"baseline": subject.base, "vae": {subject.name: subject.weights}}


def failed_checks(output_dir: Path, protocol: Protocol) -> list[str] | None:
    """Return the questions of the evaluation's robustness checks that failed; None if the protocol has no checks."""
    if not protocol.check_images:
        return None
    settings = protocol.check_settings
    name = f"*-{settings.epsilon!r}-{protocol.check_images}-{settings.name}.json"  # not those of an earlier protocol
    (path,) = (output_dir / "checks").glob(name)
    return [check["question"] for check in read_json(path) if not check["passed"]]


def subject_of(place: str, *, base: str | None, protocol: str) -> Subject:
    """Return a VAE that is no entry, named like the last part of its place.

    Raises:
        UserError: if the place gives no name, or one that is refused.
    """
    name = name_of(place)
    if not name:
        raise UserError(
            f"{place}: a VAE is named like its folder, which has no letter or digit of ASCII; rename the folder"
        )
    subject = Subject(name=name, weights=place, base=base, protocol=protocol, digest=None, base_digest=None)
    subject.check()
    return subject


def name_of(place: str) -> str:
    """Return the last part of a folder or a Hub id in lower-case letters, digits and single dashes.

    It is empty if the last part has neither letters nor digits of ASCII.
    """
    last = Path(place).resolve().name if exists(place) else place.rpartition("/")[2]
    return "-".join(re.findall("[a-z0-9]+", last.lower()))
