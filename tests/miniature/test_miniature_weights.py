"""The networks that ship with the project: they load where users load them, and do what their README says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from helpers.runs import ROOT
from torch import Tensor

from miniature import measure
from miniature.measure_world import write_table
from miniature.scenes import draw_scene
from srl_utils.images.pixels import from_pil
from srl_utils.metrics.features import load_clip_similarity, load_image_classifier
from srl_utils.metrics.pixels import psnr
from srl_utils.vae.codec import load_codec
from srl_utils.vae.loading import AutoencoderSource

WEIGHTS = ROOT / "miniature/weights"
LIMIT_MB = 36


@pytest.fixture(scope="module")
def scenes() -> tuple[Tensor, list[str]]:
    """Of one object each, from a series that nothing was trained on."""
    drawn = [draw_scene(77, number, pair_share=0.0) for number in range(48)]
    return torch.stack([from_pil(scene.image) for scene in drawn]), [scene.caption for scene in drawn]


@pytest.mark.parametrize(
    "kind", [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline]
)
def test_every_pipeline_loads(kind) -> None:
    """Oracle: the library; the autoencoder in it is the one that ships beside it, and everything computes in float32."""
    pipe = kind.from_pretrained(WEIGHTS / "sd")
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.float32
    assert (WEIGHTS / "sd/vae/diffusion_pytorch_model.safetensors").read_bytes() == (
        WEIGHTS / "vae/diffusion_pytorch_model.safetensors"
    ).read_bytes()


def test_no_configuration_names_a_place_of_a_machine() -> None:
    """Oracle: specification; diffusers writes the folder that a network was loaded from."""
    configurations = [json.loads(path.read_text()) for path in WEIGHTS.rglob("*config.json")]
    assert len(configurations) > 5
    assert not [each for each in configurations if "/" in str(each.get("_name_or_path", ""))]


@pytest.mark.parametrize("folder", ["vae", "vq", "video"])
def test_autoencoders_reconstruct_as_measured(folder: str) -> None:
    """Oracle: the PSNR of unseen photographs and scenes in `measured.json`, and the least that was wanted of photographs."""
    results = json.loads((WEIGHTS / folder / "measured.json").read_text())["results"]
    codec = load_codec(
        folder, AutoencoderSource(pretrained_model_name_or_path=str(WEIGHTS / folder)), device=torch.device("cpu")
    )
    for name, images in (
        ("held-out scikit-image photographs", measure.tiles("validation", limit=measure.NUM_IMAGES)),
        ("scenes", measure.scenes(measure.UNSEEN_SEED + 1, measure.NUM_IMAGES)),
    ):
        (clean,) = [row for row in results[name]["rows"] if (row["attack"], row["metric"]) == ("clean", "psnr")]
        assert psnr(codec.reconstruct(images), images).mean().item() == pytest.approx(clean["value"], abs=0.05)
        assert clean["value"] > 24


def test_a_prompt_has_its_colours() -> None:
    """Oracle: the colours themselves; the background's in the corners, and the object's somewhere, with guidance."""
    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS / "sd")
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a large red circle on a blue background", "a large green square on a yellow background"]
    images = pipe(
        prompts,
        num_inference_steps=12,
        guidance_scale=5.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images
    blue, yellow = images[0, :, 0, 0], images[1, :, 0, 0]
    assert blue[2] > blue[0] + 0.2 and yellow[:2].min() > yellow[2] + 0.2
    red, green = ((image[channel] - image.mean(dim=0)).max() for image, channel in zip(images, (0, 1), strict=True))
    assert red > 0.25 and green > 0.1


def test_classifier_names_what_is_drawn(scenes) -> None:
    """Oracle: the scenes' captions, far above chance (1 in 96); what was measured, on more of them, is in the README."""
    images, captions = scenes
    classifier = load_image_classifier(str(WEIGHTS / "classifier"))
    assert classifier.shown(images, captions).mean() > 0.75
    assert classifier.shown(images, captions[1:] + captions[:1]).mean() < 0.2


def test_clip_tells_a_caption_from_another(scenes) -> None:
    """Oracle: each scene's own caption against that of the next."""
    images, captions = scenes
    clip = load_clip_similarity(str(WEIGHTS / "clip"))
    own, other = clip.image_text(images, captions), clip.image_text(images, captions[1:] + captions[:1])
    assert (own > other).float().mean() > 0.95


def test_readme_is_of_the_measurement(tmp_path: Path) -> None:
    """Oracle: the file itself, which writing the measurement again leaves as it is; so are the words above the table."""
    measured = json.loads((WEIGHTS / "measured.json").read_text())
    readme = tmp_path / "README.md"
    readme.write_text((WEIGHTS / "README.md").read_text())
    write_table(readme, {**measured, "fid": 123.0})
    assert "fresh scenes | 123.00 |" in readme.read_text() and readme.read_text() != (WEIGHTS / "README.md").read_text()
    write_table(readme, measured)
    assert readme.read_text() == (WEIGHTS / "README.md").read_text()
    assert readme.read_text().startswith("# The miniature world's networks")


def test_weights_are_small() -> None:
    """Oracle: the promised size of everything together."""
    size = sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file())
    assert size < LIMIT_MB * 1e6
