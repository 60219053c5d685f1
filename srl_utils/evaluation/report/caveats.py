"""Find what limits the numbers of a report: too few images, cut captions, sizes that do not suit a metric."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from torch import Tensor

from srl_utils.evaluation.tasks.base import Metrics
from srl_utils.images.pixels import frames_of
from srl_utils.metrics.features import RFID_CHANGES, SPLITS, SUBSET_SIZE, InceptionFeatures
from srl_utils.metrics.losses import LPIPS_METRICS
from srl_utils.metrics.pixels import SSIM_WINDOW

FEW_FOR_BOOTSTRAP = 20
"""Below this number of images, bootstrap intervals are too narrow."""
LPIPS_SIDE = 64
"""Side of the patches on which LPIPS was fitted (Zhang et al. 2018), pixels."""
INCEPTION_SIDE = 299
"""Side of the images that Inception takes, pixels."""
MOST_NAMED = 3
"""Number of captions that a caveat quotes."""
FRECHET = ("fid", "rfid", RFID_CHANGES)


class Caveat(NamedTuple):
    """One sentence, and the metrics that it concerns; none if it concerns all results."""

    text: str
    metrics: tuple[str, ...] = ()


def caveats_of_metrics(metrics: Metrics, images: Tensor, *, n: int) -> list[Caveat]:
    """Return the caveats of the metrics.

    Args:
        metrics: the metrics to measure.
        images: some of the images, `[N,3,R,R]` in [-1,1], or clips `[N,3,T,R,R]`, of which sets hold all frames.
        n: number of images or clips in each mean and set.
    """
    side = images.shape[-1]
    frames = frames_of(images[:1])
    found = [*_of_sets(metrics, frames, n * len(frames)), *_of_sizes(side)]
    if n < FEW_FOR_BOOTSTRAP:
        found.append(
            Caveat(
                f"95% intervals from {n} images are too narrow: a bootstrap of so few misses the true mean more often."
            )
        )
    return [caveat for caveat in found if not caveat.metrics or not set(caveat.metrics).isdisjoint(metrics.names)]


def _of_sets(metrics: Metrics, image: Tensor, n: int) -> Iterator[Caveat]:
    if metrics.features is None:
        return
    features = metrics.features.features(image)
    width, classes = features["pool"].shape[1], features["logits"].shape[1]
    if n <= width:
        yield Caveat(
            f"FID of {n} images on features of {width} dimensions: the covariance is singular and the value biased "
            f"upwards. Use it only to rank VAEs at {n} images.",
            FRECHET,
        )
    if n <= max(width, SUBSET_SIZE):
        yield Caveat(
            f"KID of {n} images, in one subset, on features of {width} dimensions: unbiased but noisy; it may be negative.",
            ("kid",),
        )
    if n < SPLITS * classes:
        yield Caveat(
            f"Inception Score of {n} images in {SPLITS} parts, with {classes} classes: biased downwards. Compare it only "
            f"at equal numbers of images; {n // SPLITS} images score at most {n // SPLITS}.",
            ("is",),
        )
    sets = (*FRECHET, "kid", "is")
    side = image.shape[-1]
    if not isinstance(metrics.features, InceptionFeatures):
        yield Caveat("FID, KID and IS use the classifier's features: do not compare them with published values.", sets)
    elif side < INCEPTION_SIDE:
        yield Caveat(
            f"Inception sees images of {side} px enlarged to {INCEPTION_SIDE} px: compare only with values at {side} px.",
            sets,
        )


def _of_sizes(side: int) -> Iterator[Caveat]:
    if side < LPIPS_SIDE:
        yield Caveat(
            f"LPIPS was fitted on patches of {LPIPS_SIDE} px; the images have {side} px.", tuple(LPIPS_METRICS)
        )
    if side < 3 * SSIM_WINDOW:
        places = side - SSIM_WINDOW + 1
        yield Caveat(f"SSIM is a mean over {places} x {places} places of its {SSIM_WINDOW} px window.", ("ssim",))


def caveat_of_precision(mixed_precision: str) -> list[Caveat]:
    """Return the caveat of a precision below float32; none for `no`."""
    if mixed_precision == "no":
        return []
    return [
        Caveat(f"The networks ran in {mixed_precision}: values differ from those in float32, most of all a high PSNR.")
    ]


def caveats_of_prompts(metrics: Metrics, pipeline: DiffusionPipeline | None, prompts: Sequence[str]) -> list[Caveat]:
    """Return a caveat for each text encoder, of CLIP and of the pipeline, that cuts some of the prompts."""
    found = []
    if metrics.clip is not None and "clip-text" in metrics.names:
        limit = metrics.clip.model.config.text_config.max_position_embeddings
        if told := _cut(metrics.clip.processor.tokenizer, limit, prompts):
            found.append(Caveat(f"{told} of the CLIP model: the similarity ignores the rest.", ("clip-text",)))
    components = {} if pipeline is None else pipeline.components
    for name in (name for name in components if name.startswith("tokenizer") and components[name] is not None):
        if told := _cut(components[name], _longest_prompt(pipeline, components[name]), prompts):
            found.append(Caveat(f"{told} of the pipeline's {name}, which ignores the rest."))
    return found


def _longest_prompt(pipeline: DiffusionPipeline, tokenizer: Any) -> int:
    """Return the longest prompt in tokens; pipelines cut prompts for T5 shorter than its tokenizer does."""
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    own = tokenizer.model_max_length
    return min(own, parameter.default) if parameter is not None and "T5" in type(tokenizer).__name__ else own


def _cut(tokenizer: Any, limit: int, prompts: Sequence[str]) -> str:
    """Return how many prompts exceed the limit, quoting the first ones; empty if none does."""
    lengths = tokenizer(list(prompts), truncation=False, padding=False, verbose=False)["input_ids"]
    long = [prompt for prompt, tokens in zip(prompts, lengths, strict=True) if len(tokens) > limit]
    if not long:
        return ""
    named = ", ".join(f"'{prompt[:40].rstrip()}...'" for prompt in long[:MOST_NAMED])
    more = ", ..." if len(long) > MOST_NAMED else ""
    return f"{len(long)} of {len(prompts)} captions ({named}{more}) are cut after the {limit} tokens"
