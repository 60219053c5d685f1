"""python -m srl_utils.pipelines sanitize INPUT OUTPUT [--vae DIR] [--purifier NAME] [--purifier_pipelines PLACE ...]"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from srl_utils.command_line import Parser, checked, device, exit_code, positive_int, seed
from srl_utils.errors import ResourceError, UserError, one_line
from srl_utils.files import check_writable
from srl_utils.images.decoding import UnreadableImage, open_image
from srl_utils.images.listing import Skipped, list_images
from srl_utils.pipelines.files import check_size, fitting_target, sanitize_file
from srl_utils.pipelines.formats import format_of, format_to_write
from srl_utils.pipelines.loading import load_purifier_pipelines
from srl_utils.pipelines.sanitizing import TILE_ABOVE, build_purifier
from srl_utils.pipelines.swapping import resolve_vae
from srl_utils.purifiers import LOOP, Purifier, check_purifier, known_purifiers, uses_noise, uses_pipeline, uses_vae
from srl_utils.resources import failed_write
from srl_utils.vae.places import FORM


@dataclass
class Outcome:
    """What has become of the images so far. The lists hold lines that name an image.

    Attributes:
        written: number of images written.
        files: device and inode of each file written.
        unreadable: images that cannot be read.
        unwritten: images that cannot be written.
        lost: images that lost something in their new format.
    """

    written: int = 0
    files: set[tuple[int, int]] = field(default_factory=set)
    unreadable: list[str] = field(default_factory=list)
    unwritten: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    jobs, skipped = plan(args.input, args.output)
    if args.input.is_file():
        check_before(*jobs[0], args)
    vae = None
    if args.vae is not None:
        vae = resolve_vae(args.vae, subfolder=args.subfolder, revision=args.revision, variant=args.variant)
        vae.to(args.device)
    pipelines = load_purifier_pipelines(args.purifier_pipelines or (), device=args.device)
    purifier = build_purifier(args.purifier, vae, pipelines, seed=args.seed, tile_above=args.tile_above)
    outcome = Outcome()
    for source, target in tqdm(jobs, desc="sanitize", unit="image"):
        work(source, target, purifier, args, outcome)
    if skipped:
        print(skipped.report(), file=sys.stderr)
    report(outcome, len(jobs), args.output)
    return 0


def work(source: Path, target: Path, purifier: Purifier, args: argparse.Namespace, outcome: Outcome) -> None:
    """Sanitize one image. An error is noted in `outcome`, so that the other images are still processed."""
    try:
        place = unlike(outcome, fitting_target(source, target, max_pixels=args.max_pixels))
        check_writable(place)
        lost = sanitize_file(source, place, purifier, max_pixels=args.max_pixels)
        found = os.lstat(place)
    except UnreadableImage as error:
        outcome.unreadable.append(one_line(f"{source} ({reason_of(error)})"))
        return
    except OSError as error:
        if reason := failed_write(error):
            raise ResourceError(f"cannot write {target}: {reason}") from None
        outcome.unwritten.append(one_line(f"{target} ({error.strerror or error})"))
        return
    outcome.written += 1
    outcome.files.add((found.st_dev, found.st_ino))
    if place != target:
        lost.insert(0, f"its name (written as {place.name})")
    if lost:
        outcome.lost.append(one_line(f"{source}: {'; '.join(lost)}"))


def report(outcome: Outcome, wanted: int, output: Path) -> None:
    """Print what was done.

    Raises:
        UserError: if nothing was written, or an image that was read could not be written.
    """
    if len(outcome.unreadable) == wanted:
        raise UserError(
            f"nothing was written: none of {wanted} images can be read, the first is {outcome.unreadable[0]}"
        )
    print(f"{outcome.written} images written to {output}")
    for lines, what in (
        (outcome.unreadable, "images cannot be read"),
        (outcome.lost, "images lost something in their new format"),
    ):
        if lines:
            print(f"{len(lines)} {what}:", *lines, sep="\n  ", file=sys.stderr)
    if outcome.unwritten:
        raise UserError(f"cannot write {len(outcome.unwritten)} of {wanted} images: {', '.join(outcome.unwritten)}")


def reason_of(error: UnreadableImage) -> str:
    """Return the reason in one line, with the flag that helps."""
    bomb = "DecompressionBomb" in str(error)
    return f"{error}; --max_pixels reads larger images" if bomb else str(error)


def unlike(outcome: Outcome, target: Path) -> Path:
    """Return `target`, or a numbered name beside it if this run has written to that file already.

    Some disks take `a.jpg` and `A.JPG` for the same file.
    """
    number = 2
    while True:
        try:
            found = os.lstat(target)
        except FileNotFoundError:
            return target
        if (found.st_dev, found.st_ino) not in outcome.files:
            return target
        target = target.with_name(f"{target.stem}-{number}{target.suffix}")
        number += 1


def check_before(source: Path, target: Path, args: argparse.Namespace) -> None:
    """Check that the only image can be read and written, before a VAE is loaded.

    Raises:
        UserError: if it cannot.
    """
    try:
        check_writable(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from None
    try:
        with open_image(source, max_pixels=args.max_pixels) as image:
            if not args.output.is_dir():
                check_size(image, format_to_write(target))
    except UnreadableImage as error:
        raise UserError(
            f"nothing was written: none of 1 images can be read, the first is {source} ({reason_of(error)})"
        ) from None


def plan(source: Path, target: Path) -> tuple[list[tuple[Path, Path]], Skipped]:
    """Return pairs of files to read and to write, and the files that are skipped.

    The images of a folder keep their places and names.

    Raises:
        UserError: if there is nothing to read, or if `target` is `source` or cannot be written to.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist")
    if source.is_file() and target.is_dir():
        target = writable(target / source.name, set())
    if source.resolve() == target.resolve() or (target.exists() and source.samefile(target)):
        raise UserError(f"{target} is the input; give the result a place of its own")
    if source.is_file():
        format_to_write(target)
        return [(source, target)], Skipped()
    if target.is_file():
        raise UserError(f"{target} is a file; {source} is a folder and needs a folder to write to")
    # unlike pathlib, os.path accepts links to themselves
    inside = os.path.join(os.path.realpath(target), "")
    images, skipped = list_images(source)
    files = [file for file in images if not os.path.realpath(file).startswith(inside)]
    if not files:
        raise UserError(f"{source} holds no images{f'; {skipped.report()}' if skipped else ''}")
    taken = {target / file.relative_to(source) for file in files if format_of(file) is not None}
    return [(file, writable(target / file.relative_to(source), taken)) for file in files], skipped


def writable(place: Path, taken: set[Path]) -> Path:
    """Return `place`, or a PNG beside it if images cannot be written in its format.

    Args:
        place: the file to write.
        taken: files of other images; a PNG that is chosen is added.
    """
    if format_of(place) is not None:
        return place
    names = chain([f"{place.name}.png"], (f"{place.name}-{number}.png" for number in count(2)))
    free = next(path for path in map(place.with_name, names) if path not in taken)
    taken.add(free)
    return free


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m srl_utils.pipelines", description="Tools around a robust VAE.")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("sanitize", help="clean images: pass them through a robust VAE, or another purifier")
    command.add_argument("input", type=Path, help="an image, or a folder of them (nested)")
    command.add_argument("output", type=Path, help="the image or folder to write")
    command.add_argument("--vae", default=None, help="folder or Hub id of a VAE of diffusers")
    command.add_argument(
        "--purifier", type=checked(check_purifier), default=LOOP,
        help=f"what is done, A+B for one after the other: {', '.join(known_purifiers())}; {LOOP} is a pass through --vae",
    )  # fmt: skip
    command.add_argument(
        "--purifier_pipelines", nargs="+", default=None, metavar="PLACE",
        help=f"diffusion pipelines of purifiers, each a folder or Hub id: {FORM}",
    )  # fmt: skip
    command.add_argument("--seed", type=seed, default=0, help="of what purifiers draw, the same for each image")
    for name, what in (
        ("subfolder", "folder inside it"),
        ("revision", "branch, tag or commit"),
        ("variant", "of the weights"),
    ):
        command.add_argument(f"--{name}", default=None, help=what)
    command.add_argument(
        "--tile_above", type=positive_int, default=TILE_ABOVE, help="process larger images (longer side) in tiles"
    )
    command.add_argument(
        "--max_pixels", type=positive_int, default=None,
        help=f"largest image to read, in pixels (default: Pillow's {Image.MAX_IMAGE_PIXELS})",
    )  # fmt: skip
    command.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if args.vae is None and uses_vae(args.purifier):
        raise UserError(f"{args.purifier} needs a VAE; give `vae`")
    if args.purifier_pipelines is None and uses_pipeline(args.purifier):
        raise UserError(f"{args.purifier} needs a diffusion pipeline; give `purifier_pipelines`")
    no_vae = (uses_vae(args.purifier), f"a purifier that uses a VAE, such as {LOOP}")
    command.refuse_without_effect(
        args,
        {
            "vae": no_vae, "subfolder": no_vae, "variant": no_vae, "tile_above": no_vae,
            "purifier_pipelines": (uses_pipeline(args.purifier), "a purifier that uses a pipeline"),
            "seed": (uses_noise(args.purifier), "a purifier that draws noise"),
            "revision": (args.vae is not None and not os.path.isdir(args.vae), "a model of the Hub", "main"),
        },
    )  # fmt: skip
    return args


if __name__ == "__main__":
    sys.exit(exit_code(main))
