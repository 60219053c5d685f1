"""Check that this machine may publish to a repository of the Hub, before a training that takes days.

    python -m experiments.hub_access user/name

`experiments/release.sh` runs it first.
"""

from __future__ import annotations

import argparse
import sys

from huggingface_hub import HfApi

from srl_utils.command_line import Parser, exit_code
from srl_utils.errors import HubRefusal
from srl_utils.hub.publishing import PushError, may_pass, with_retries


def main(arguments: list[str] | None = None) -> int:
    """Print who would publish, and return the exit code.

    Raises:
        UserError: for the reasons of `publisher`.
    """
    args = parse_args(arguments)
    account, there = publisher(args.repo_id)
    print(f"{account} may publish to {args.repo_id}, which {'exists' if there else 'the push will create'}")
    return 0


def publisher(repo_id: str) -> tuple[str, bool]:
    """Return whose token this machine has, and whether the repository exists. Nothing is created or changed.

    Args:
        repo_id: `user/name`, or `organisation/name`.

    Raises:
        HubRefusal: a PermissionError, if there is no token, if it may only read, or if the repository is of somebody else.
        PushError: if the Hub cannot be reached.
    """
    api = HfApi()
    try:
        account = with_retries(api.whoami)
        there = with_retries(lambda: api.repo_exists(repo_id))
    except Exception as error:  # versions of huggingface_hub use different HTTP libraries
        kind = PushError if may_pass(error) else HubRefusal
        reason, *_ = str(error).strip().splitlines() or [type(error).__name__]
        told = f"cannot publish to {repo_id}: {reason.rstrip('.')}"
        raise kind(f"{told}; a token comes from `hf auth login` or HF_TOKEN") from None
    owners = [account["name"], *(organisation["name"] for organisation in account["orgs"])]
    if repo_id.partition("/")[0] not in owners:
        raise HubRefusal(f"cannot publish to {repo_id} with the token of {', '.join(owners)}; choose another HUB_ID")
    if account["auth"]["accessToken"]["role"] == "read":
        raise HubRefusal(f"the token of {account['name']} may only read; make one that may write, and `hf auth login`")
    return account["name"], there


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = Parser(prog="python -m experiments.hub_access", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("repo_id", help="user/name on the Hub")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(exit_code(main))
