"""python -m srl_utils.hub push OUTPUT_DIR --repo_id user/name

python -m srl_utils.hub convert SOURCE TARGET

python -m srl_utils.hub push-space --repo_id user/name
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import constants

from srl_utils.command_line import Parser, exit_code, expanded_path
from srl_utils.errors import MissingFile, UserError
from srl_utils.hub.contents import CARD, Contents, contents
from srl_utils.hub.converting import PRECISIONS, convert
from srl_utils.hub.publishing import (
    EXIT_PUSH_FAILED,
    SPACE,
    PushError,
    create_repository,
    open_branch,
    push,
    push_space,
)
from srl_utils.hub.spaces import FOLDERS, space_files
from srl_utils.vae.loading import AutoencoderSource, load_autoencoder, read_config
from srl_utils.vae.places import FORM, parse_place
from srl_utils.vae.single_file import MODELS, PREFIXES


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    return args.run(args)


def run_convert(args: argparse.Namespace) -> int:
    """Convert a VAE, and print where it is; return the exit code."""
    note = convert(source_of(args), args.target, config=args.config, precision=args.precision, prefix=args.prefix)
    if note is not None:
        print(f"note: {note}", file=sys.stderr)
    print(f"converted to {args.target}")
    return 0


def source_of(args: argparse.Namespace) -> AutoencoderSource:
    """Return where SOURCE is, in the folder of --subfolder if that is given.

    Raises:
        UserError: if SOURCE has another form than `FORM`, or names another subfolder.
    """
    source = parse_place(args.source)
    if args.subfolder is None:
        return source
    if source.subfolder not in (None, args.subfolder):
        raise UserError(f"{args.source} names the subfolder {source.subfolder} already", parameter="subfolder")
    return replace(source, subfolder=args.subfolder)


def run_push(args: argparse.Namespace) -> int:
    """Publish a folder, and print its address; return the exit code."""
    if not args.output_dir.is_dir():
        raise MissingFile(f"there is no folder {args.output_dir}; give the `output_dir` of a training")
    source = AutoencoderSource(pretrained_model_name_or_path=str(args.output_dir))
    read_config(source)
    load_autoencoder(source)  # refuse a VAE that users could not load
    what = contents(args.output_dir)
    if what.left_out:
        print(f"not published, as {CARD} does not describe them: {', '.join(what.left_out)}", file=sys.stderr)
    if args.dry_run:
        print(f"would push to {args.repo_id}: {', '.join(what.names)}")
        return 0
    try:
        print(f"pushed to {publish(args, what)}")
    except PushError as error:
        print(f"error: the push of {args.output_dir} to {args.repo_id} failed: {error}", file=sys.stderr)
        return EXIT_PUSH_FAILED
    return 0


def run_push_space(args: argparse.Namespace) -> int:
    """Publish the app as a Space, and print its address; return the exit code."""
    files = space_files()
    try:
        repo_id = create_repository(args.repo_id, token=None, private=args.private, kind=SPACE)
        commit = push_space(files, repo_id, folders=FOLDERS, commit_message=args.commit_message)
    except PushError as error:
        print(f"error: the push of the app to {args.repo_id} failed: {error}", file=sys.stderr)
        return EXIT_PUSH_FAILED
    print(f"pushed to {commit}; the page is at {constants.ENDPOINT}/spaces/{repo_id}")
    return 0


def publish(args: argparse.Namespace, what: Contents) -> str:
    """Open repository and branch, upload, and return the addresses of commit and branch."""
    repo_id = create_repository(args.repo_id, token=None, private=args.private)
    if args.revision is not None:
        open_branch(repo_id, args.revision, token=None)
    commit = push(what, repo_id, token=None, commit_message=args.commit_message, branch=args.revision)
    if args.revision is None:
        return commit
    return f"{commit} on the branch {constants.ENDPOINT}/{repo_id}/tree/{quote(args.revision)}"


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m srl_utils.hub", description="The token is that of `hf auth login`, or HF_TOKEN.")
    commands = parser.add_subparsers(required=True, metavar="command")
    add_push(commands.add_parser("push", help="publish what a training has left in its output folder"))
    add_convert(
        commands.add_parser("convert", help="turn a VAE of diffusers into one file for other programs, or back")
    )
    add_push_space(commands.add_parser("push-space", help="publish the app with the embedded models as a Space"))
    return parser.parse_args(arguments)


def add_push_space(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_push_space)
    command.add_argument("--repo_id", required=True, help="user/name of the Space; created where it does not exist")
    command.add_argument("--private", action="store_true", help="create it private; one that is public is made private")
    command.add_argument("--commit_message", default="Update the app")


def add_push(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_push)
    command.add_argument("output_dir", type=Path, help="the --output_dir of the training")
    command.add_argument("--repo_id", required=True, help="user/name on the Hub; created where it does not exist")
    command.add_argument("--private", action="store_true", help="create it private; one that is public is made private")
    command.add_argument(
        "--revision", type=branch, default=None, help="branch; created from main where it does not exist"
    )
    command.add_argument("--commit_message", default="End of training")
    command.add_argument("--dry_run", action="store_true", help="check the folder and its card, list the files, stop")


def add_convert(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_convert)
    command.add_argument("source", help=f"a single .safetensors file, or a folder or Hub id of a VAE: {FORM}")
    command.add_argument(
        "target", type=expanded_path, help="a new .safetensors file, or else a new folder of diffusers"
    )
    command.add_argument("--subfolder", default=None, help="folder of the VAE inside SOURCE, such as vae")
    command.add_argument(
        "--config", default=None,
        help=f"of a single file that does not tell it: {', '.join(MODELS)}, or a PLACE with a config.json",
    )  # fmt: skip
    command.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="of the written weights (default: fp32)"
    )
    command.add_argument(
        "--prefix",
        choices=PREFIXES[1:],
        default="",
        help="what names in a single file begin with (default: nothing, as other programs want a VAE)",
    )


def branch(name: str) -> str:
    """Parse the name of a branch."""
    if not name.strip() or name == "HEAD" or name.startswith("refs/") or re.fullmatch(r"[0-9a-f]{40}", name):
        raise argparse.ArgumentTypeError(f"{name!r} is not the name of a branch, such as main or robust-v2")
    return name


if __name__ == "__main__":
    sys.exit(exit_code(main))
