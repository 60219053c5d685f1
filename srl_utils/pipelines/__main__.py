"""python -m srl_utils.pipelines sanitize INPUT OUTPUT --vae DIR"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from srl_utils.checkpoints import write_atomically
from srl_utils.command_line import Parser, exit_code, positive_int
from srl_utils.decoding import UnreadableImage, decode_rgb, picture_suffixes
from srl_utils.errors import ResourceError, UserError, one_line
from srl_utils.pictures import list_files
from srl_utils.pipelines.sanitizing import TILE_ABOVE, sanitize
from srl_utils.pipelines.swapping import resolve_vae
from srl_utils.resources import failed_write

WRITABLE = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    jobs = list(plan(args.input, args.output))
    vae = resolve_vae(args.vae, subfolder=args.subfolder, revision=args.revision, variant=args.variant)
    vae.to(args.device)
    unreadable = []
    for source, target in tqdm(jobs, desc="sanitize", unit="image"):
        try:
            picture = decode_rgb(source)
        except UnreadableImage as error:
            unreadable.append(one_line(f"{source} ({error})"))
            continue
        save(sanitize(picture, vae, tile_above=args.tile_above), target)
    if len(unreadable) == len(jobs):
        raise UserError(f"nothing was written: none of {len(jobs)} images can be read, the first is {unreadable[0]}")
    print(f"{len(jobs) - len(unreadable)} images written to {args.output}")
    if unreadable:
        print(f"{len(unreadable)} images cannot be read:", *unreadable, sep="\n  ", file=sys.stderr)
    return 0


def plan(source: Path, target: Path) -> Iterator[tuple[Path, Path]]:
    """What to read and where to write it; a folder's images keep their places and names.

    Raises:
        UserError: if there is nothing to read, or if `target` is `source` or no place to write to.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist")
    if source.is_file() and target.is_dir():
        target = writable(target / source.name)
    if source.resolve() == target.resolve():
        raise UserError(f"{target} is the input; give the result a place of its own")
    if source.is_file():
        if target.suffix.lower() not in WRITABLE:
            raise UserError(f"{target} must end in one of {', '.join(sorted(WRITABLE))}")
        yield source, target
        return
    if target.is_file():
        raise UserError(f"{target} is a file; {source} is a folder and needs a folder to write to")
    # os.path bears links that lead to themselves, unlike pathlib
    inside = os.path.join(os.path.realpath(target), "")
    files = [file for file in list_files(source, picture_suffixes()) if not os.path.realpath(file).startswith(inside)]
    if not files:
        raise UserError(f"{source} holds no images")
    for file in files:
        yield file, writable(target / file.relative_to(source))


def writable(place: Path) -> Path:
    """`place`, or a PNG's beside it where its own format can only be read."""
    return place if place.suffix.lower() in WRITABLE else place.with_name(f"{place.name}.png")


def save(picture: Image.Image, target: Path) -> None:
    """Writes `picture` in the format of the name's suffix, with little loss where that format loses any.

    Raises:
        UserError: if there is no writing there; a ResourceError if the disk is full.
    """
    form = Image.registered_extensions()[target.suffix.lower()]
    try:
        write_atomically(target, lambda aside: picture.save(aside, format=form, quality=95))
    except OSError as error:
        kind = ResourceError if failed_write(error) else UserError
        raise kind(f"cannot write {target}: {error.strerror or error}") from None


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m srl_utils.pipelines", description="Tools around a robust VAE.")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("sanitize", help="encode and decode images through a robust VAE")
    command.add_argument("input", type=Path, help="an image, or a folder of them (nested)")
    command.add_argument("output", type=Path, help="the image or folder to write")
    command.add_argument("--vae", required=True, help="folder or Hub id of an AutoencoderKL")
    for name, what in (
        ("subfolder", "folder inside it"),
        ("revision", "branch, tag or commit"),
        ("variant", "of the weights"),
    ):
        command.add_argument(f"--{name}", default=None, help=what)
    command.add_argument(
        "--tile_above", type=positive_int, default=TILE_ABOVE, help="process larger images (longer side) in tiles"
    )
    command.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    command.refuse_without_effect({"revision": (not os.path.isdir(args.vae), "a model of the Hub")})
    return args


def device(text: str) -> torch.device:
    """One that is there."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text} is not to be had: {str(error).splitlines()[0]}") from None


if __name__ == "__main__":
    sys.exit(exit_code(main))
