"""python -m srl_utils.app [--vae NAME=PLACE]"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from srl_utils.app.serving import check_address, interrupted_by_sigterm, port_in_use, temporary_folder
from srl_utils.app.world import Visitors, World
from srl_utils.command_line import Parser, device, exit_code, image_side, positive_int
from srl_utils.errors import MissingFile, MissingPackage, errors_about
from srl_utils.evaluation.cli.loading import BASELINE, load_codecs, vae_sources
from srl_utils.pipelines.loading import load_pipeline
from srl_utils.vae.codec import frozen_codec
from srl_utils.vae.loading import UPDATES_NAME, AutoencoderSource, load_autoencoder, merge_updates
from srl_utils.vae.places import parse_named_place

EMBEDDED = Path(__file__).parents[2] / "miniature/weights"
"""The embedded world, in a clone of the repository."""
ROBUST = "robust"
LOCALHOST = "127.0.0.1"
WAITING = 32
"""Computations that wait; more are refused."""


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    if find_spec("gradio") is None:
        raise MissingPackage("the app needs the package gradio; run pip install gradio")
    check_address(args.host, args.port)
    serve(load_world(args), args)
    return 0


def serve(world: World, args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C or SIGTERM, and delete all temporary files then.

    Raises:
        UserError: if no port is free.
    """
    with interrupted_by_sigterm(), temporary_folder() as folder, Visitors() as visitors:
        uploads = str(folder / "uploads")  # apart from what a computation writes, which the page copies
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
        from srl_utils.app.page import build_page, launch_settings  # optional, and reads the environment

        page = build_page(world, visitors).queue(max_size=WAITING)
        try:
            page.launch(server_name=args.host, server_port=args.port, share=args.share, **launch_settings())
        except OSError as error:
            if error.errno is None:  # gradio's own
                raise port_in_use(args.port) from None
            raise


def load_world(args: argparse.Namespace) -> World:
    """Load the models that the flags name, or the embedded world.

    Raises:
        UserError: if one cannot be loaded.
    """
    if args.baseline is None and not EMBEDDED.is_dir():
        raise MissingFile("there is no embedded VAE outside a clone of the repository; give `baseline`")
    sources = vae_sources(str(args.baseline or EMBEDDED / "vae"), args.vae)
    codecs = {codec.name: codec for codec in load_codecs(sources, device=args.device, dtype=None)}
    if args.baseline is None and ROBUST not in codecs:
        robust = load_autoencoder(AutoencoderSource(pretrained_model_name_or_path=str(EMBEDDED / "vae")))
        merge_updates(robust, EMBEDDED / ROBUST / UPDATES_NAME)
        codecs[ROBUST] = frozen_codec(robust, ROBUST, device=args.device)
    resolution = args.resolution or codecs[BASELINE].vae.config.get("sample_size") or 256
    return World(codecs=codecs, pipelines=load_pipelines(args), resolution=resolution)


def load_pipelines(args: argparse.Namespace) -> Mapping[str, DiffusionPipeline]:
    """Return the pipelines by name: those of the flags, or the embedded one beside the embedded VAE."""
    with errors_about("pipeline"):
        named = dict(map(parse_named_place, args.pipeline))
    if args.baseline is None and not named:
        named = {"miniature": AutoencoderSource(pretrained_model_name_or_path=str(EMBEDDED / "sd"))}
    return {name: load_pipeline(source).to(args.device) for name, source in named.items()}


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m srl_utils.app", description="A page in the browser: clean, attack and edit images with VAEs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--baseline", default=None, help="PLACE of the original VAE, a folder or Hub id; by default the embedded one")
    add("--vae", nargs="+", default=[], metavar="NAME=PLACE", help="further VAEs, fine-tuned from the original")
    add(
        "--pipeline", nargs="+", default=[], metavar="NAME=PLACE", help="pipelines that edit, trained with the original"
    )
    add(
        "--resolution",
        type=image_side,
        default=None,
        help="side of attacked and edited images; the VAE's own by default",
    )
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    add("--host", default=LOCALHOST, help="address to listen on; 0.0.0.0 lets other machines in")
    add("--port", type=positive_int, default=None, help="by default the first free one from 7860")
    add("--share", action="store_true", help="also serve the page at a public address of gradio")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(exit_code(main))
