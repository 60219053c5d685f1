"""Load diffusion pipelines, also those that purify images."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import isdir  # unlike that of pathlib, it returns False for a name that is too long
from pathlib import Path

import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from huggingface_hub import snapshot_download

from srl_utils.attacks.denoiser import takes_latents_alone
from srl_utils.errors import UserError, WrongType, errors_about
from srl_utils.vae.files import first_line
from srl_utils.vae.loading import AutoencoderSource
from srl_utils.vae.places import described, parse_place


def load_pipeline(source: AutoencoderSource, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """Load a diffusion pipeline with its weights in `dtype`, by default float32.

    Raises:
        UserError: if it cannot be loaded.
    """
    place: str | Path = source.pretrained_model_name_or_path
    settings = {"revision": source.revision, "variant": source.variant, "use_safetensors": True}
    try:
        if source.subfolder:  # pipelines, unlike models, have no argument for it
            place = Path(place if isdir(place) else _snapshot(source), source.subfolder)
        pipeline = DiffusionPipeline.from_pretrained(place, **settings)
    except (OSError, ValueError) as error:
        reason = f"{described(source, 'model_index.json')} cannot be loaded: {first_line(error)}"
        raise UserError(reason, parameter="pipeline") from None
    pipeline.set_progress_bar_config(disable=True)  # it would show a bar for each batch
    return pipeline if dtype is None else pipeline.to(dtype)


def load_purifier_pipelines(
    places: Sequence[str], *, device: torch.device, dtype: torch.dtype | None = None
) -> list[DiffusionPipeline]:
    """Load the pipelines of purifiers; see `purifying_pipeline`.

    Args:
        places: folders and Hub ids, in the form `FORM`.
        device: where they compute.
        dtype: of their weights; None stands for float32.

    Raises:
        UserError: if one cannot be loaded.
    """
    with errors_about("purifier_pipelines"):
        loaded = [load_pipeline(parse_place(place), dtype) for place in places]
    return [purifying_pipeline(pipeline.to(device)) for pipeline in loaded]


def purifying_pipeline(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Return a text-to-image pipeline as one that starts from images, with the same networks, and others as they are.

    Raises:
        WrongType: a TypeError, if it is no pipeline of diffusers.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise WrongType(
            f"expected pipelines of diffusers, got {type(pipeline).__name__}", parameter="purifier_pipelines"
        )
    try:
        return as_image_to_image(pipeline)
    except UserError:  # it purifies in another way, as upscalers and models of pixels do
        return pipeline


def as_image_to_image(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Return an image-to-image pipeline with the same networks.

    Raises:
        UserError: if the pipeline cannot start from an image alone.
    """
    kind = type(pipeline).__name__
    if not takes_latents_alone(pipeline):
        raise UserError(f"this {kind} cannot start from an image alone; give a text-to-image pipeline")
    try:
        image_to_image = AutoPipelineForImage2Image.from_pipe(pipeline)
    except ValueError as error:
        raise UserError(f"this {kind} cannot edit images: {str(error).splitlines()[0]}") from None
    image_to_image.set_progress_bar_config(disable=True)
    return image_to_image


def _snapshot(source: AutoencoderSource) -> str:
    """Download the files that a pipeline may need from the subfolder, without pickles; return the snapshot's folder."""
    kinds = ("json", "txt", "model", "safetensors")
    patterns = [f"{source.subfolder}/{pattern}" for kind in kinds for pattern in (f"*.{kind}", f"**/*.{kind}")]
    return snapshot_download(source.pretrained_model_name_or_path, revision=source.revision, allow_patterns=patterns)
