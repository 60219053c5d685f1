"""The documents: their links lead somewhere, their commands are accepted, their generated parts are current."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from helpers.documents import (
    PAGES,
    README,
    RESULTS,
    Command,
    anchors,
    cells,
    commands,
    inline_code,
    links,
)
from helpers.runs import ROOT

import train_srl_vae
from docs.scripts import flags
from srl_utils.evaluation.cli import main as evaluation
from srl_utils.hub import __main__ as hub
from srl_utils.pipelines import __main__ as pipelines
from srl_utils.zoo import __main__ as zoo

MOST_WORDS = {README: 1200, RESULTS: 1200}
WORDS_IN_A_CELL = 12
PARSERS = {
    "train_srl_vae": train_srl_vae.parse_args,
    "srl_utils.evaluation": evaluation.parse_args,
    "srl_utils.pipelines": pipelines.parse_args,
    "srl_utils.hub": hub.parse_args,
    "srl_utils.zoo": zoo.parse_args,
}
"""Those that check more than argparse does."""
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
COMMANDS = [command for page in PAGES for command in commands(page)]


class Accepted(BaseException):
    """Ends a program as soon as it has parsed its command line."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        self.arguments = arguments


def parse(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Return what a program makes of its command line, without running it."""
    if module in PARSERS:
        return PARSERS[module](words)

    def parse_and_stop(parser: argparse.ArgumentParser, arguments: list[str] | None = None, *_: object) -> None:
        namespace, unknown = parser.parse_known_args(arguments)
        assert not unknown, unknown
        raise Accepted(namespace)

    with monkeypatch.context() as patch, pytest.raises(Accepted) as accepted:
        patch.setattr(sys, "argv", [module, *words])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        runpy.run_module(module, run_name="__main__")
    return accepted.value.arguments


def program(words: list[str]) -> tuple[str, list[str]]:
    """Return the module that a command runs and the module's words; checks those of `accelerate launch`."""
    if words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        return launched.training_script.removesuffix(".py"), launched.training_script_args
    assert words[:2] == ["python", "-m"], words
    return words[2], words[3:]


@EACH_PAGE
def test_links_lead_somewhere(page: Path) -> None:
    """Oracle: the files of the repository, and the headings of the page that a link points into."""
    for target in links(page):
        if target.startswith("https://"):
            continue
        place, _, anchor = target.partition("#")
        found = (page.parent / place).resolve() if place else page
        assert found.is_file() and found.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_are_accepted(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the parser of each program; `...` stands for flags of the reader's own."""
    words = [word for word in command.words if word != "..."]
    match words:
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        case ["pip", "install", "-r", file]:
            assert (ROOT / file).is_file()
        case ["pip", "install", what]:
            assert re.match(r"srl[-_]utils", what)
        case ["hf", "auth", "login"]:
            pass
        case _:
            args = parse(*program(words), monkeypatch)
            for arm in getattr(args, "arms", ()):
                train_srl_vae.parse_args([*shlex.split(args.train_flags), *shlex.split(arm.partition("=")[2])])


def test_every_program_has_a_command() -> None:
    """Oracle: the programs that the documents describe; without it, the test above could check nothing."""
    named = {program(command.words)[0] for command in COMMANDS if command.words[0] in ("accelerate", "python")}
    assert named >= {*PARSERS, "miniature.draw", "experiments.time_to_robustness", "benchmarks.train_step"}


def known_flags() -> set[str]:
    """Return the flags that the programs define, and those of `accelerate launch`."""
    folders = [ROOT / name for name in ("srl_utils", "experiments", "benchmarks", "miniature")]
    programs = [ROOT / "train_srl_vae.py", *(path for folder in folders for path in folder.rglob("*.py"))]
    defined = {flag for path in programs for flag in re.findall(r'"(--[a-z][\w-]*)"', path.read_text(encoding="utf-8"))}
    return defined | set(launch_command_parser()._option_string_actions) | {"--no-torch_compile"}


@EACH_PAGE
def test_what_the_text_names_exists(page: Path) -> None:
    """Oracle: modules, targets of make, files and flags between backticks are those of the repository."""
    known = known_flags()
    for code in inline_code(page):
        if match := re.match(r"python -m ([\w.]+)", code):
            assert importlib.util.find_spec(match[1]), code
        if match := re.fullmatch(r"make ([\w-]+)", code):
            assert re.search(rf"^{match[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), code
        if re.fullmatch(r"test_\w+\.py", code):
            assert list((ROOT / "tests").rglob(code)), code
        elif re.fullmatch(r"[\w/]+\.py|(docs|miniature|benchmarks|experiments|srl_utils)/[\w/.]+", code):
            assert (ROOT / code).exists(), code
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            assert flag in known, f"{flag} in {code}"


@EACH_PAGE
def test_table_cells_are_short(page: Path) -> None:
    """Oracle: specification; generated tables show the help texts as they are."""
    long = [cell for cell in cells(page) if len(cell.split()) > WORDS_IN_A_CELL]
    assert not long


@pytest.mark.parametrize("page", MOST_WORDS, ids=lambda page: page.name)
def test_pages_are_short(page: Path) -> None:
    """Oracle: specification, counted as `wc -w` does."""
    assert len(page.read_text(encoding="utf-8").split()) <= MOST_WORDS[page]


def test_the_demo_of_the_makefile_is_the_documented_one() -> None:
    """Oracle: `make --dry-run demo` for two processes."""
    shown = subprocess.run(
        ["make", "--dry-run", "demo", "PROCESSES=2"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    line = next(line for line in shown.replace("\\\n", " ").splitlines() if "accelerate launch" in line)
    documented = [command.words for command in COMMANDS if "outputs/demo" in command.words[-1:]]
    assert len(documented) == 1
    assert shlex.split(line.partition(" accelerate ")[2]) == documented[0][1:]


def test_the_table_of_flags_is_current() -> None:
    """Oracle: `parse_args` itself; each flag is there once, with the default that a run has."""
    page = flags.PAGE.read_text(encoding="utf-8")
    tables = flags.flag_tables(flags.training_parser())
    assert page == flags.updated(page, tables), "run python -m docs.scripts.flags"
    rows = dict(re.findall(r"^\| `--(\w+)`.*? \| (.*?) \|", tables, flags=re.MULTILINE))
    defaults = vars(train_srl_vae.parse_args([], environment={}))
    assert tables.count("\n| `--") == len(rows)
    shown = {"False": "off", "True": "on", "None": "", "[]": "", str(8 / 255): "`8/255`"}
    assert rows == {name: shown.get(str(value), f"`{value}`") for name, value in defaults.items()}


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Oracle: MkDocs in strict mode; every page of docs/ and the README is there."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    for page in PAGES:
        place = "index" if page == README else page.with_suffix("").relative_to(ROOT).as_posix().removeprefix("docs/")
        assert (tmp_path / "site" / f"{place}.html").is_file(), page
    assert "robust_vae" in (tmp_path / "site/api.html").read_text(encoding="utf-8")
