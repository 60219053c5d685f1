"""What a report says of the limits of its numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.runs import ROOT
from helpers.small_pipelines import build_pipeline
from helpers.small_text_encoder import add_text_encoders
from torch import Tensor

from srl_utils.evaluation.report.caveats import Caveat, caveat_of_precision, caveats_of_metrics, caveats_of_prompts
from srl_utils.evaluation.tasks.base import Metrics
from srl_utils.metrics.features import load_clip_similarity
from srl_utils.metrics.losses import LPIPS_METRICS

WIDTH, CLASSES = 64, 10


class Narrow:
    """Features of 64 dimensions and 10 classes."""

    def features(self, images: Tensor) -> dict[str, Tensor]:
        return {"pool": torch.zeros(len(images), WIDTH), "logits": torch.zeros(len(images), CLASSES)}


def starts(caveats: list[Caveat]) -> set[str]:
    return {caveat.text.split(" of ")[0] for caveat in caveats}


@pytest.mark.parametrize(
    ("n", "singular", "noisy", "biased"),
    [
        (19, True, True, True),
        (64, True, True, True),
        (65, False, True, True),
        (100, False, True, False),
        (1001, False, False, False),
    ],
)
def test_sets_of_few_images(n: int, singular: bool, noisy: bool, biased: bool, images) -> None:
    """Oracle: linear algebra, the covariance of n images has rank n - 1 and so is singular up to n = 64; KID takes one
    subset up to 1000 images; no part of n / 10 images scores above the number of its images.
    """
    metrics = Metrics(names=("fid", "kid", "is"), features=Narrow())
    found = starts(caveats_of_metrics(metrics, images(1, 64), n=n))
    assert ("FID" in found, "KID" in found, "Inception Score" in found) == (singular, noisy, biased)
    sample = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (torch.linalg.matrix_rank(torch.cov(sample.T)) < WIDTH) == singular
    assert any(text.startswith("95% intervals") for text in found) == (n < 20)


def test_sets_hold_all_frames_of_clips(images) -> None:
    """Oracle: linear algebra, as above: 13 clips of 5 frames have 65 frames, 12 have 60."""
    metrics, clip = Metrics(names=("fid",), features=Narrow()), images(5, 64).transpose(0, 1)[None]
    assert "FID" in starts(caveats_of_metrics(metrics, clip, n=12))
    assert "FID" not in starts(caveats_of_metrics(metrics, clip, n=13))


def test_only_what_is_measured_has_a_caveat(images) -> None:
    """Oracle: specification; at 16 px SSIM has 6 x 6 places and LPIPS less than its patches, at 64 px neither."""
    small = caveats_of_metrics(Metrics(names=("ssim", "lpips-alex")), images(1, 16), n=50)
    assert [caveat.metrics for caveat in small] == [tuple(LPIPS_METRICS), ("ssim",)]
    assert "6 x 6 places" in small[1].text
    assert caveats_of_metrics(Metrics(names=("psnr",)), images(1, 16), n=50) == []
    assert caveats_of_metrics(Metrics(names=("ssim", "lpips-alex")), images(1, 64), n=50) == []
    assert caveat_of_precision("no") == [] and "bf16" in caveat_of_precision("bf16")[0].text


def test_captions_that_are_cut_are_counted_and_named(tmp_path: Path) -> None:
    """Oracle: counting. The tiny pipeline reads 8 tokens, two of them marks, and a letter is a token each; the embedded CLIP
    model has a limit of its own, up to which nothing is said.
    """
    pipe = add_text_encoders(build_pipeline("sd"), tmp_path)
    prompts = ["a b c d e f", "a b c d e f g", "g f e d c b a", "a"]
    (caveat,) = caveats_of_prompts(Metrics(names=("psnr",)), pipe, prompts)
    assert caveat.text.startswith(
        "2 of 4 captions ('a b c d e f g...', 'g f e d c b a...') are cut after the 8 tokens of the pipeline's tokenizer"
    )
    assert caveat.metrics == ()
    clip = load_clip_similarity(str(ROOT / "miniature/weights/clip"))
    limit = clip.model.config.text_config.max_position_embeddings
    metrics = Metrics(names=("clip-text",), clip=clip)
    fitting, long = ("circle " * count for count in (limit - 2, limit - 1))
    assert caveats_of_prompts(metrics, None, [fitting]) == []
    (caveat,) = caveats_of_prompts(metrics, None, [fitting, long])
    assert caveat.metrics == ("clip-text",) and "1 of 2 captions ('circle circle" in caveat.text
    assert f"{limit} tokens of the CLIP model" in caveat.text
