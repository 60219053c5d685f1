"""python -m srl_utils.zoo list | evaluate NAME|FOLDER|HUB_ID | submit ENTRY | leaderboard"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from srl_utils.command_line import Parser, exit_code, expanded_path
from srl_utils.errors import UserError
from srl_utils.evaluation.report.tables import markdown_table
from srl_utils.files import home_expanded
from srl_utils.markdown import as_text
from srl_utils.zoo.entries import Subject, read_entries
from srl_utils.zoo.leaderboard import PAGE, TABLES, write_leaderboard
from srl_utils.zoo.measuring import ROW, measure, subject_of
from srl_utils.zoo.protocols import PROTOCOLS
from srl_utils.zoo.rows import check_rows, read_rows
from srl_utils.zoo.submitting import check_entry, pull_request, submission, write


def main(arguments: list[str] | None = None) -> int:
    """Run a command of the zoo and return its exit code.

    Raises:
        UserError: if a flag, an entry, a row or a VAE is refused.
    """
    args = parse_args(arguments)
    return args.run(args)


def run_list(args: argparse.Namespace) -> int:
    """Print the entries and what was measured of them."""
    entries, rows = read_entries(args.zoo), read_rows(args.zoo)
    check_rows(entries, rows)
    lines = [["VAE", "base", "objective", "worst case (dB)", "protocol", "weights"]]
    for entry in entries.values():
        worst = f"{rows[entry.name].worst.value:.2f}" if entry.name in rows else "not measured"
        cells = (entry.name, entry.base or "", entry.objective, worst, entry.protocol, entry.weights)
        lines.append([as_text(cell) for cell in cells])
    print(markdown_table(lines))
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    """Measure a VAE, and say where its row is."""
    subject = chosen(args)
    folder = args.output_dir / subject.name / ("quick" if args.quick else "")
    row = measure(subject, args.zoo, folder, quick=args.quick, dry_run=args.dry_run)
    if row is not None:
        print(
            f"{row.name}: worst case {row.worst.value:.2f} dB under {row.worst.attack} ({row.worst.threat_model}), "
            f"clean {row.clean:.2f} dB. Row: {folder / ROW}"
        )
    return 0


def chosen(args: argparse.Namespace) -> Subject:
    """Return the entry of this name, or else the VAE at this place.

    Raises:
        UserError: if --base or --protocol has no effect or is missing.
    """
    entry = read_entries(args.zoo).get(args.vae)
    if entry is None:
        if args.protocol is None:
            raise UserError(f"{args.vae} is no entry of the zoo; choose a `protocol`: {', '.join(PROTOCOLS)}")
        return subject_of(args.vae, base=args.base, protocol=args.protocol)
    for flag in ("base", "protocol"):
        if getattr(args, flag) is not None:
            raise UserError(f"has no effect on {entry.name}, whose entry has one", parameter=flag)
    return entry


def run_submit(args: argparse.Namespace) -> int:
    """Check an entry and its row, and write them into the zoo or print them."""
    if args.dry_run and not args.row.exists():
        entry = check_entry(args.entry)
        print(f"{entry.name}: the entry and its weights are accepted; there is no row {args.row} yet")
        return 0
    row, files = submission(args.entry, args.row, args.zoo)
    if args.pull_request:
        print(pull_request(row, files))
    elif args.dry_run:
        print(f"{row.name}: entry and row are accepted; would write {' and '.join(map(str, files))}")
    else:
        write(files)
        print(f"wrote {' and '.join(map(str, files))}; now run python -m srl_utils.zoo leaderboard")
    return 0


def run_leaderboard(args: argparse.Namespace) -> int:
    """Write the leaderboard, and say where it is."""
    write_leaderboard(args.zoo, args.output_dir)
    print(f"wrote {args.output_dir / PAGE} and {args.output_dir / TABLES}")
    return 0


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Return the flags of a command.

    Raises:
        UserError: if a flag is unknown or has a wrong value.
    """
    parser = Parser(prog="python -m srl_utils.zoo", description="Measures VAEs by one protocol, and ranks them.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, add in {
        "list": add_list, "evaluate": add_evaluate, "submit": add_submit, "leaderboard": add_leaderboard,
    }.items():  # fmt: skip
        command = commands.add_parser(name, help=add.__doc__)
        command.add_argument(
            "--zoo", type=expanded_path, default=Path("zoo"), help="folder of entries, rows and images (default: zoo)"
        )
        add(command)
    return parser.parse_args(arguments)


def add_list(command: argparse.ArgumentParser) -> None:
    """show the entries and what was measured of them"""
    command.set_defaults(run=run_list)


def add_evaluate(command: argparse.ArgumentParser) -> None:
    """measure a VAE by the standard protocol"""
    command.set_defaults(run=run_evaluate)
    add = command.add_argument
    add("vae", type=home_expanded, help="name of an entry, or folder or Hub id of a VAE")
    add("--base", default=None, help="of a VAE that is no entry: the one that was fine-tuned; none by default")
    add("--protocol", choices=PROTOCOLS, default=None, help="of a VAE that is no entry")
    add("--quick", action="store_true", help="two images and a short attack, to try it; the row cannot be submitted")
    add("--dry_run", action="store_true", help="check everything, print what would be computed, stop")
    add(
        "--output_dir", type=expanded_path, default=Path("outputs/zoo"),
        help="gets a folder with the row and the report; an interrupted evaluation continues (default: outputs/zoo)",
    )  # fmt: skip


def add_submit(command: argparse.ArgumentParser) -> None:
    """check an entry and its row, and add them to the zoo"""
    command.set_defaults(run=run_submit)
    add = command.add_argument
    add("entry", type=expanded_path, help="the entry, a YAML file")
    add("row", type=expanded_path, help="the row that evaluate has written, a JSON file")
    add("--pull_request", action="store_true", help="print the text of a pull request and write nothing")
    add("--dry_run", action="store_true", help="check the entry, and the row if there is one, and write nothing")


def add_leaderboard(command: argparse.ArgumentParser) -> None:
    """write docs/leaderboard.md and docs/zoo.html"""
    command.set_defaults(run=run_leaderboard)
    command.add_argument(
        "--output_dir", type=expanded_path, default=Path("docs"), help="has leaderboard.md (default: docs)"
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
