"""Read where VAEs and pipelines are: `NAME=PLACE@REVISION:SUBFOLDER,variant=VARIANT` on a command line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from os.path import exists, isdir  # unlike those of pathlib, they return False for a name that is too long
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from srl_utils.errors import UserError
from srl_utils.files import home_expanded
from srl_utils.vae.loading import AutoencoderSource

FORM = "PLACE@REVISION:SUBFOLDER,variant=VARIANT; everything except PLACE may be left out"
VARIANT = re.compile(r"(.+),variant=([\w.-]+)", re.S)


def parse_place(text: str) -> AutoencoderSource:
    """Return the source that `text` names: a folder, a single file or a Hub id, in the form `FORM`.

    A path that exists is taken as it is, even if it contains @, : or a comma. A leading ~ stands for the home folder.

    Raises:
        UserError: if `text` has another form, or names a revision of a folder.
    """
    return _local(text) or _on_the_hub(text)


def parse_named_place(text: str) -> tuple[str, AutoencoderSource]:
    """Return name and source of `NAME=PLACE`, or of `PLACE`, whose name is the last part of its path.

    If `text` can be read in several ways, a place that exists as a path wins: `outputs/lr=1e-4` is a folder if that
    folder exists.

    Raises:
        UserError: if name or place is empty, or for the reasons of `parse_place`.
    """
    alone = _local(text)
    if alone is not None:
        return _own_name(text, alone), alone
    splits = [(text[: match.start()], text[match.end() :]) for match in re.finditer("=", _without_variant(text))]
    name: str | None
    for name, place in splits:
        local = _local(place)
        if local is not None and name.strip():
            return name.strip(), local
    for place in (text, *(place for _, place in splits)):
        _refuse_suffix_of_folder(place)
    name, place = splits[0] if splits else (None, text)
    if not place.strip() or (name is not None and not name.strip()):
        raise UserError(f"{text}: expected NAME=PLACE or PLACE, and there is no such folder")
    source = _on_the_hub(place)
    return (_own_name(text, source) if name is None else name.strip()), source


def described(source: AutoencoderSource, file: str) -> str:
    """Return place, revision, subfolder, variant and commit on the Hub as text for readers.

    Args:
        source: what was loaded.
        file: one of its files, such as config.json, by which the Hub's cache finds the commit.
    """
    parts = [source.pretrained_model_name_or_path]
    for title in ("revision", "subfolder", "variant"):
        if value := getattr(source, title):
            parts.append(f"{title} {value}")
    if commit := resolved_commit(source, file):
        parts.append(f"commit {commit}")
    return ", ".join(parts)


def resolved_commit(source: AutoencoderSource, file: str) -> str | None:
    """Return the hash of the loaded commit from the Hub's cache; None for a folder or an unknown file."""
    if exists(source.pretrained_model_name_or_path):
        return None
    name = f"{source.subfolder}/{file}" if source.subfolder else file
    try:
        path = try_to_load_from_cache(source.pretrained_model_name_or_path, name, revision=source.revision)
    except ValueError:  # not a valid name on the Hub
        return None
    if not isinstance(path, str):
        return None
    parts = Path(path).parts
    return parts[parts.index("snapshots") + 1]


def _local(text: str) -> AutoencoderSource | None:
    """Return the source if `text` is a path that exists, perhaps with subfolder or variant; otherwise None."""
    for place, subfolder, variant in _readings(text):
        path = home_expanded(place)
        if place and exists(path) and (subfolder is None or isdir(os.path.join(path, subfolder))):
            return AutoencoderSource(pretrained_model_name_or_path=path, subfolder=subfolder, variant=variant)
    return None


def _readings(text: str) -> Iterator[tuple[str, str | None, str | None]]:
    """Yield path, subfolder and variant for each way to read `text`, the longest path first."""
    yield text, None, None
    match = VARIANT.fullmatch(text)
    whole, variant = (match[1], match[2]) if match else (text, None)
    yield whole, None, variant
    for colon in reversed([found.start() for found in re.finditer(":", whole)]):
        yield whole[:colon], whole[colon + 1 :] or None, variant


def _on_the_hub(text: str) -> AutoencoderSource:
    """Return the source of `ID@REVISION:SUBFOLDER,variant=VARIANT`.

    A revision such as refs/pr/3 may have slashes, but no colon.

    Raises:
        UserError: if `text` has another form.
    """
    text = text.strip()
    _refuse_suffix_of_folder(text)
    match = VARIANT.fullmatch(text)
    rest, variant = (match[1], match[2]) if match else (text, None)
    rest, colon, subfolder = rest.partition(":")
    name, at, revision = rest.partition("@")
    if subfolder.startswith(("/", "\\")):  # a missing folder such as C:/models, or an address
        return AutoencoderSource(pretrained_model_name_or_path=text)
    empty = (at and not revision) or (colon and not subfolder)
    if not name or empty or (colon and "@" in subfolder) or "," in revision:
        raise UserError(f"{text}: expected {FORM}")
    return AutoencoderSource(
        pretrained_model_name_or_path=home_expanded(name),
        subfolder=subfolder or None,
        revision=revision or None,
        variant=variant,
    )


def _refuse_suffix_of_folder(text: str) -> None:
    """Raise a UserError if `text` is a path of this machine followed by a revision or a missing subfolder."""
    for sign in re.finditer("[@:]", text):
        folder, suffix = text[: sign.start()], _without_variant(text[sign.end() :])
        if folder and suffix and "=" not in suffix and exists(home_expanded(folder)):
            kind = "folder" if isdir(home_expanded(folder)) else "file"
            lack = "has no revisions; leave out" if sign[0] == "@" else f"has no subfolder {suffix}; leave out"
            raise UserError(f"{text}: {folder} is a {kind} on this machine and {lack} {sign[0]}{suffix}")


def _without_variant(text: str) -> str:
    """Return `text` without a trailing `,variant=VARIANT`."""
    match = VARIANT.fullmatch(text)
    return match[1] if match else text


def _own_name(text: str, source: AutoencoderSource) -> str:
    """Return the last part of the path, without following links, and the suffixes: two commits have two names."""
    path = source.pretrained_model_name_or_path
    name = os.path.basename(os.path.abspath(path))
    if not name:
        raise UserError(f"{text}: this place has no name; write NAME={text}")
    suffixes = (("@", source.revision), (":", source.subfolder), (",", source.variant))
    return name + "".join(f"{sign}{value}" for sign, value in suffixes if value)
