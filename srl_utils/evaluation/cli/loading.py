"""Load what single flags name: VAEs, images, a classifier, a target."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from srl_utils.errors import UserError, errors_about
from srl_utils.images.clips import clip_at, is_clip
from srl_utils.images.datasets import ValidationImages, load_validation_images
from srl_utils.images.decoding import UnreadableImage
from srl_utils.images.framing import Crop, decode_square
from srl_utils.images.listing import few
from srl_utils.images.sources import DataSource
from srl_utils.metrics.features import ImageClassifier, load_image_classifier
from srl_utils.metrics.pixels import SSIM_WINDOW
from srl_utils.vae.codec import Codec, load_codec
from srl_utils.vae.loading import AutoencoderSource
from srl_utils.vae.places import described, parse_named_place, parse_place

BASELINE = "original"
"""Name of the baseline in reports."""


def vae_sources(baseline: str, vaes: Sequence[str]) -> dict[str, AutoencoderSource]:
    """Return where the VAEs are, by name, the baseline first.

    Args:
        baseline: PLACE of the original VAE.
        vaes: NAME=PLACE or PLACE of each other VAE.

    Raises:
        UserError: if a name is given twice, or if a name or a place is empty.
    """
    with errors_about("baseline"):
        sources = {BASELINE: parse_place(baseline)}
    with errors_about("vae"):
        for text in vaes:
            name, source = parse_named_place(text)
            if name in sources:
                rest = text.removeprefix(f"{name}=")
                raise UserError(f"{text}: there are two VAEs of the name {name}; write NAME={rest}")
            sources[name] = source
    return sources


def load_codecs(
    sources: Mapping[str, AutoencoderSource], *, device: torch.device, dtype: torch.dtype | None
) -> list[Codec]:
    """Load the VAEs, by name, onto `device`; None as `dtype` stands for float32.

    Raises:
        UserError: if a VAE cannot be loaded; the message names it and its place.
    """
    return [_load_codec(name, source, device, dtype) for name, source in sources.items()]


def _load_codec(name: str, source: AutoencoderSource, device: torch.device, dtype: torch.dtype | None) -> Codec:
    try:
        return load_codec(name, source, device=device, autocast_dtype=dtype)
    except UserError as error:
        place = described(source, "config.json")
        parameter = "baseline" if name == BASELINE else "vae"
        raise type(error)(f"the VAE {name} at {place}: {error.problem}", parameter=parameter) from None


def load_images(args: argparse.Namespace, notes: list[str]) -> ValidationImages:
    """Load the images that the flags choose, with their captions.

    Args:
        args: the flags of `add_shared_arguments`, `caption_column` and `num_frames`.
        notes: gets a note for each kind of image that was left out, and one if there are fewer than asked for.

    Raises:
        UserError: if the flags do not say which images to take, or if there are none.
    """
    if (args.dataset_name is None) == (args.data_dir is None):
        raise UserError("give either `dataset_name` or `data_dir`, and not both")
    if args.resolution < SSIM_WINDOW:
        raise UserError(f"SSIM needs at least {SSIM_WINDOW} px, got {args.resolution}", parameter="resolution")
    source = DataSource(
        dataset_name=args.dataset_name,
        validation_data_dir=args.data_dir,
        validation_split=args.split,
        image_column=args.image_column,
        caption_column=args.caption_column,
        streaming=args.streaming,
        num_frames=args.num_frames,
    )
    loaded = load_validation_images(source, num_images=args.num_images, resolution=args.resolution, seed=args.seed)
    notes.extend(part.report() for part in loaded.skipped if part)
    if loaded.without_caption:
        names = few(loaded.without_caption, 20)
        notes.append(f"{len(loaded.without_caption)} images without a caption were left out: {names}")
    if loaded.unreadable:
        notes.append(f"{len(loaded.unreadable)} unreadable images were left out: {', '.join(loaded.unreadable)}")
    if loaded.enlarged:
        sizes = " to ".join(str(side) for side in sorted({min(loaded.enlarged), max(loaded.enlarged)}))
        notes.append(
            f"{len(loaded.enlarged)} images were enlarged to {args.resolution} px: their short sides have {sizes} px"
        )
    if len(loaded.images) < args.num_images:
        notes.append(f"there are only {len(loaded.images)} images, fewer than the {args.num_images} of --num_images")
    return loaded


def load_classifier(place: str | None, metrics: Sequence[str]) -> ImageClassifier | None:
    """Load the image classifier at `place`, a folder or Hub id; return None if there is none.

    Raises:
        UserError: if it cannot be loaded, or if a metric needs one and `place` is None.
    """
    if place is None and "shown" in metrics:
        raise UserError("shown needs `classifier`, which tells what an image shows", parameter="metrics")
    if place is None:
        return None
    return load_image_classifier(place)


def load_target(path: Path, resolution: int, *, num_frames: int = 1) -> Tensor:
    """Return the central square of an image at `resolution` R, `[1,3,R,R]` in [-1,1].

    For clips, `path` may also be a clip, of which the middle `num_frames` are returned, `[1,3,T,R,R]`.

    Raises:
        UserError: if the image or clip cannot be read.
    """
    clip = num_frames > 1 and is_clip(path)
    crop = Crop(resolution=resolution)
    try:
        return (decode_square(clip_at(path), crop, num_frames=num_frames) if clip else decode_square(path, crop))[None]
    except UnreadableImage as error:
        raise UserError(f"{path} cannot be read: {error}", parameter="target") from None
