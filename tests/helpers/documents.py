"""What the documents contain: pages, links, headings, table cells and shell commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from helpers.runs import ROOT

README, RESULTS = ROOT / "README.md", ROOT / "benchmarks/RESULTS.md"
PAGES = [README, RESULTS, *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", flags=re.DOTALL | re.MULTILINE)
GENERATED = re.compile(r"<!-- flags.*?<!-- end of flags -->", flags=re.DOTALL)
VARIABLE = re.compile(r"([A-Z]+)=(.*)", flags=re.DOTALL)


class Command(NamedTuple):
    """A line of a shell block: its words, variables and continued lines filled in, comments removed."""

    page: Path
    words: list[str]

    def __str__(self) -> str:
        return f"{self.page.name}: {shlex.join(self.words)[:60]}"


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return [body for _, name, body in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def prose(page: Path) -> str:
    """Return the text outside fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(page: Path) -> Iterator[Command]:
    """Yield the commands of all shell blocks."""
    variables: dict[str, str] = {}
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            filled = re.sub(r"\$([A-Z]+)", lambda match: variables[match[1]], line)
            words = shlex.split(filled, comments=True)
            if len(words) == 1 and (assignment := VARIABLE.fullmatch(words[0])):
                variables[assignment[1]] = assignment[2]
            elif words:
                yield Command(page, words)


def inline_code(page: Path) -> list[str]:
    """Return what stands between single backticks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def links(page: Path) -> list[str]:
    """Return the targets of all links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """Return the anchors of all headings, as GitHub and MkDocs form them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def cells(page: Path) -> list[str]:
    """Return the cells of all tables but the generated ones."""
    lines = GENERATED.sub("", prose(page)).splitlines()
    rows = [line.strip().strip("|") for line in lines if line.strip().startswith("|")]
    return [cell.strip() for row in rows for cell in re.split(r"(?<!\\)\|", row)]
