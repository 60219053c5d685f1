"""The command `python -m srl_utils.evaluation`: choose the evaluation and read its flags."""

from __future__ import annotations

import argparse
import sys

from srl_utils.command_line import Parser
from srl_utils.errors import UserError
from srl_utils.evaluation.cli import editing, generation, geometry, personalisation, poisoning, reconstruction

COMMANDS = {
    "reconstruction": reconstruction,
    "generation": generation,
    "editing": editing,
    "poisoning": poisoning,
    "personalisation": personalisation,
    "geometry": geometry,
}
FLAGS = {"validation_data_dir": "data_dir", "train_data_dir": "data_dir", "validation_split": "split"}
"""The flag that sets a parameter of the library, where the names differ."""


def main(arguments: list[str] | None = None) -> int:
    """Run an evaluation and return its exit code.

    Args:
        arguments: words of the command line; by default those of this process.

    Raises:
        UserError: if a flag is wrong, or if something cannot be loaded or measured.
    """
    try:
        args = parse_args(arguments)
        return COMMANDS[args.command].run(args)
    except UserError as error:
        error.rename(FLAGS)
        raise


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Return the flags of an evaluation.

    Raises:
        UserError: if a flag is unknown, has a wrong value, or has no effect.
    """
    parser = Parser(prog="python -m srl_utils.evaluation", description="Compares VAEs under attack.")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    parsers = {
        name: commands.add_parser(name, help=module.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for name, module in COMMANDS.items()
    }
    for name, module in COMMANDS.items():
        module.add_arguments(parsers[name])
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(given, argparse.Namespace(arguments=given))
    parsers[args.command].refuse_without_effect(args, COMMANDS[args.command].effects(args))
    return args
