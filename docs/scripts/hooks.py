"""MkDocs hooks: files outside docs/ that the site contains, and links between them and the pages.

Links are written for the repository, so that they work where the files are read. On the site, `README.md` is the first
page and everything else keeps its path.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
OUTSIDE = (
    "README.md",
    "LICENSE",
    "examples/robust_vae.ipynb",
    "benchmarks/RESULTS.md",
    "benchmarks/data-wait.png",
    "benchmarks/time-to-robustness.png",
    "miniature/weights/README.md",
    "miniature/weights/vae/README.md",
    "miniature/weights/robust/README.md",
    "miniature/weights/vq/README.md",
    "miniature/weights/video/README.md",
    "zoo/images/README.md",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/."""
    for place in OUTSIDE:
        files.append(File.generated(config, site_place(place), abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links between files of the repository by links between pages."""
    source = page.file.abs_src_path
    if source is None:
        return markdown
    here = Path(source).parent

    def replaced(match: re.Match[str]) -> str:
        opening, target, closing = match.groups()
        if ":" in target:
            return match.group()
        place = os.path.relpath(here / target, ROOT)
        link = posixpath.relpath(site_place(place), posixpath.dirname(page.file.src_uri) or ".")
        return f"{opening}{link}{closing}"

    return LINK.sub(replaced, markdown)


def site_place(place: str) -> str:
    """Return the path on the site of a file of the repository."""
    return "index.md" if place == "README.md" else place.removeprefix("docs/")
