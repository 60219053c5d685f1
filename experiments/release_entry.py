"""Write the zoo's entry of a VAE that will be published, and print where it is.

    python -m experiments.release_entry outputs/my-robust-vae --weights user/my-robust-vae --base stabilityai/sd-vae-ft-mse \\
        --protocol full --data COCO --budget 8/255 --link https://huggingface.co/user/my-robust-vae

`experiments/release.sh` runs it before the training, so that a bad value is known before days of work.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from srl_utils.command_line import Parser, exit_code
from srl_utils.files import write_text_atomically
from srl_utils.zoo.entries import checked_entry
from srl_utils.zoo.measuring import name_of

GIVEN = ("weights", "base", "protocol", "data", "budget", "link")


def main(arguments: list[str] | None = None) -> int:
    """Check the entry, write it, print its path, and return the exit code.

    Raises:
        UserError: if a value is not one that an entry has.
    """
    args = parse_args(arguments)
    given = {field: getattr(args, field) for field in GIVEN}
    fields = {"name": name_of(args.weights), "objective": "srl", "digest": None, "base_digest": None, **given}
    path = args.folder / f"{checked_entry(fields).name}.yaml"
    write_text_atomically(path, yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))
    print(path)
    return 0


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = Parser(prog="python -m experiments.release_entry", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="gets the entry, a YAML file named like the VAE")
    for field in GIVEN:
        parser.add_argument(f"--{field}", required=True, help="field of the entry, as in docs/leaderboard.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(exit_code(main))
