"""Measures the miniature's CLIP, classifier and diffusion model on scenes that none of them has seen.

python -m miniature.measure_world                # writes miniature/weights/measured.json and README.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor
from torch.nn.functional import normalize

from miniature.scene_set import SceneSet, scene_set
from srl_utils.attacks.draws import image_generators
from srl_utils.images.pixels import to_model_range
from srl_utils.metrics.features import (
    ClipSimilarity,
    ImageClassifier,
    frechet_distance,
    load_clip_similarity,
    load_image_classifier,
)

UNSEEN_SEED = 10_003
BATCH = 64


def main() -> None:
    args = parse_args()
    weights = args.weights
    classifier = load_image_classifier(str(weights / "classifier"))
    vae = AutoencoderKL.from_pretrained(weights / "vae").eval()
    single, fresh = (
        scene_set(args.work_dir, seed=seed, count=args.num_images, pair_share=0.0)
        for seed in (UNSEEN_SEED, UNSEEN_SEED + 1)
    )
    results = measure_classifier(classifier, vae, single)
    results |= measure_clip(load_clip_similarity(str(weights / "clip")), single)
    pipeline = StableDiffusionPipeline.from_pretrained(weights / "sd")
    results |= measure_diffusion(
        pipeline, classifier, single, fresh, steps=args.num_inference_steps, guidance=args.guidance_scale
    )
    settings = {name: getattr(args, name) for name in ("num_images", "num_inference_steps", "guidance_scale")}
    (weights / "measured.json").write_text(json.dumps({**settings, **results}, indent=1) + "\n")
    (weights / "README.md").write_text(README.format(**settings, **results))
    print(json.dumps(results, indent=1))


def measure_classifier(classifier: ImageClassifier, vae: AutoencoderKL, scenes: SceneSet) -> dict[str, float]:
    """Share of scenes whose colour and shape it names, as they are drawn and as the VAE returns them."""
    images = all_pixels(scenes)
    with torch.no_grad():
        reconstructions = torch.cat([vae(batch).sample for batch in images.split(BATCH)])
    return {
        "classifier_accuracy": share_shown(classifier, images, scenes.captions),
        "classifier_accuracy_reconstructed": share_shown(classifier, reconstructions.clamp(-1, 1), scenes.captions),
    }


def measure_clip(clip: ClipSimilarity, scenes: SceneSet) -> dict[str, float]:
    """Share of scenes whose own caption is the nearest of all, and the other way round."""
    images = all_pixels(scenes)
    seen = normalize(clip.embed_images(images))
    read = normalize(clip.embed_texts(scenes.captions, images.device))
    nearest, own = seen @ read.T, torch.arange(len(images))
    return {
        "clip_image_to_text": (nearest.argmax(dim=1) == own).float().mean().item(),
        "clip_text_to_image": (nearest.argmax(dim=0) == own).float().mean().item(),
    }


def measure_diffusion(
    pipeline: StableDiffusionPipeline,
    classifier: ImageClassifier,
    prompts: SceneSet,
    fresh: SceneSet,
    *,
    steps: int,
    guidance: float,
) -> dict[str, float]:
    """Share of images that show what their caption says, and FID on the classifier's features against fresh scenes."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for numbers in torch.arange(len(prompts.captions)).split(BATCH):
        output = pipeline(
            [prompts.captions[number] for number in numbers],
            num_inference_steps=steps, guidance_scale=guidance, generator=image_generators(0, numbers.tolist()), output_type="pt",
        )  # fmt: skip
        images.append(to_model_range(output.images))
    generated = torch.cat(images)
    pools = [classifier.features(each)["pool"] for each in (all_pixels(fresh), generated, all_pixels(prompts))]
    return {
        "shown": share_shown(classifier, generated, prompts.captions),
        "fid": frechet_distance(pools[0], pools[1]),
        "fid_of_drawn_scenes": frechet_distance(pools[0], pools[2]),
    }


def share_shown(classifier: ImageClassifier, images: Tensor, captions: list[str]) -> float:
    return classifier.shown(images, captions).mean().item()


def all_pixels(scenes: SceneSet) -> Tensor:
    return scenes.pixels(torch.arange(len(scenes.captions)))


README = """# The miniature world's networks

Everything here was trained by `make miniature` on this repository's own drawings; nothing was downloaded.
The diffusion model's 25,000 steps were made in four runs, each with a cosine of its own over 5,500, 16,000 (left at
13,250), 18,000 and 25,000 steps; the command goes through them in one.

| folder | what it is | loads with |
|---|---|---|
| `vae` | the autoencoder; its own README has its figures | `AutoencoderKL.from_pretrained` |
| `sd` | a text-to-image model on that autoencoder's latents: CLIP text encoder, UNet (float16), DDIM scheduler; v-prediction | `StableDiffusionPipeline.from_pretrained` |
| `clip` | a CLIP of scenes and their captions | `CLIPModel.from_pretrained` |
| `classifier` | a RegNet that names colour and shape of a scene's object | `AutoModelForImageClassification.from_pretrained` |

Measured by `python -m miniature.measure_world` on {num_images} scenes of one object that none of them has seen:

| measure | value |
|---|---|
| classifier: colour and shape right, drawn scenes | {classifier_accuracy:.3f} |
| classifier: the same, as the autoencoder returns them | {classifier_accuracy_reconstructed:.3f} |
| CLIP: own caption nearest among {num_images} | {clip_image_to_text:.3f} |
| CLIP: own scene nearest among {num_images} | {clip_text_to_image:.3f} |
| generated at guidance {guidance_scale}, {num_inference_steps} steps: colour and shape as prompted, by the classifier | {shown:.3f} |
| FID of generated images against as many fresh scenes, on the classifier's features | {fid:.2f} |
| FID of drawn scenes against the same | {fid_of_drawn_scenes:.2f} |
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=Path("miniature/weights"))
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/miniature"), help="keeps the drawn scenes")
    parser.add_argument("--num_images", type=int, default=512)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=5.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
