"""Writes the table of all training flags into docs/training.md.

python -m docs.scripts.flags
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

import train_srl_vae

PAGE = Path(__file__).parents[1] / "training.md"
START = "<!-- flags: written by `python -m docs.scripts.flags` -->\n"
END = "<!-- end of flags -->\n"
PIXEL_DISTANCES = {"epsilon", "gaussian_noise"}
"""Flags whose default reads better as a multiple of 1/255."""


class ParserFound(Exception):
    """Carries the parser out of the function that builds it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def training_parser() -> argparse.ArgumentParser:
    """Return the parser that `train_srl_vae.parse_args` builds."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        raise ParserFound(parser)

    with patch.object(argparse.ArgumentParser, "parse_known_args", stop):
        try:
            train_srl_vae.parse_args([])
        except ParserFound as found:
            return found.parser
    raise RuntimeError("train_srl_vae.parse_args parses nothing")


def flag_tables(parser: argparse.ArgumentParser) -> str:
    """Return Markdown with a heading and a table of flags for each group of the parser."""
    sections = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.option_strings and action.dest != "help"]
        if actions:
            rows = [f"| {names(action)} | {default(action)} | {meaning(action)} |" for action in actions]
            sections.append(
                "\n".join([f"### {group.title}", "", "| flag | default | meaning |", "|---|---|---|", *rows])
            )
    return "\n\n".join(sections) + "\n"


def names(action: argparse.Action) -> str:
    return ", ".join(f"`{option}`" for option in action.option_strings)


def default(action: argparse.Action) -> str:
    value = action.default
    if value is None or value == []:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if action.dest in PIXEL_DISTANCES and value:
        return f"`{value * 255:g}/255`"
    return f"`{value}`"


def meaning(action: argparse.Action) -> str:
    """Return the help text, and the choices if there are any."""
    text = (action.help or "").replace("%%", "%").replace(" (default: %(default)s)", "").replace("|", "\\|")
    parts = [text] if text else []
    if action.choices:
        parts.append("choices: " + ", ".join(f"`{choice}`" for choice in action.choices))
    return "; ".join(parts)


def updated(page: str, tables: str) -> str:
    """Return the page with the tables between its two markers."""
    before, rest = page.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{tables}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(updated(page, flag_tables(training_parser())), encoding="utf-8")


if __name__ == "__main__":
    main()
