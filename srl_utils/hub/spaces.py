"""Choose the files of a Space with the app: the package, the embedded models, and what a Space needs beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from srl_utils.errors import MissingFile

ROOT = Path(__file__).parents[2]
PAGE = ("README.md", "app.py")
LICENSE = "LICENSE"
"""Of the repository, which the page names."""
REQUIREMENTS = "requirements.txt"
LISTS = (REQUIREMENTS, "requirements/eval.txt", "requirements/app.txt")
"""Joined to the one list that a Space reads."""
FOLDERS = ("srl_utils", "miniature/weights/vae", "miniature/weights/robust", "miniature/weights/sd")
"""A push replaces all their files."""

Files = dict[str, Path | bytes]


def space_files(root: Path = ROOT) -> Files:
    """Return what a Space holds: its paths, and a file or its content for each.

    Args:
        root: a clone of the repository.

    Raises:
        MissingFile: if it is none, such as the folder of an installed package.
    """
    page, folders = root / "spaces", [root / name for name in FOLDERS]
    if not all(folder.is_dir() for folder in (page, *folders)):
        raise MissingFile("a Space is made from a clone of the repository; run this command there")
    found: Files = {LICENSE: root / LICENSE, **{name: page / name for name in PAGE}}
    found[REQUIREMENTS] = "\n".join((root / name).read_text(encoding="utf-8") for name in LISTS).encode()
    return found | {path.relative_to(root).as_posix(): path for folder in folders for path in _files_in(folder)}


def _files_in(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path
