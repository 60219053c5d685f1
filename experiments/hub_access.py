"""Check that this machine may publish to a repository of the Hub, before a training that takes days.

    python -m experiments.hub_access user/name

`experiments/release.sh` runs it first.
"""

from __future__ import annotations

import argparse
import sys

from srl_utils.command_line import Parser, exit_code
from srl_utils.hub.publishing import publisher


def main(arguments: list[str] | None = None) -> int:
    """Print who would publish, and return the exit code.

    Raises:
        UserError: for the reasons of `publisher`.
    """
    args = parse_args(arguments)
    account, there = publisher(args.repo_id)
    print(f"{account} may publish to {args.repo_id}, which {'exists' if there else 'the push will create'}")
    return 0


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = Parser(prog="python -m experiments.hub_access", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("repo_id", help="user/name on the Hub")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(exit_code(main))
