"""python -m srl_utils.hub push OUTPUT_DIR --repo_id user/name"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from srl_utils.autoencoders import AutoencoderSource, load_autoencoder, read_config
from srl_utils.command_line import Parser, exit_code
from srl_utils.hub.publishing import EXIT_PUSH_FAILED, PushError, create_repository, push


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    source = AutoencoderSource(pretrained_model_name_or_path=str(args.output_dir))
    read_config(source)
    load_autoencoder(source)  # what does not load here would not load from there
    try:
        repo_id = create_repository(args.repo_id, token=None, private=args.private)
        print(f"pushed to {push(args.output_dir, repo_id, token=None, commit_message=args.commit_message)}")
    except PushError as error:
        print(f"error: the push of {args.output_dir} to {args.repo_id} failed: {error}", file=sys.stderr)
        return EXIT_PUSH_FAILED
    return 0


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m srl_utils.hub", description="The token is that of `hf auth login`, or HF_TOKEN.")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("push", help="publish what a training has left in its output folder")
    command.add_argument("output_dir", type=Path, help="the --output_dir of the training")
    command.add_argument("--repo_id", required=True, help="user/name on the Hub; created where it does not exist")
    command.add_argument("--private", action="store_true", help="create it as a private repository")
    command.add_argument("--commit_message", default="End of training")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(exit_code(main))
