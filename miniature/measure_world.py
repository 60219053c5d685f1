"""Measure the miniature's CLIP, classifier and diffusion model on unseen scenes.

    python -m miniature.measure_world                # writes measured.json and the table in README.md

The measurements are written into the weights' folder: `measured.json`, and the last part of `README.md`, from the line
that names this command on. The rest of the README is left as it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor
from torch.nn.functional import normalize

from miniature.scene_set import SceneSet, scene_set
from srl_utils.attacks.draws import image_generators
from srl_utils.files import write_text_atomically
from srl_utils.images.pixels import to_model_range, to_unit_range
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
    """Measure all networks and write the results."""
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
    write_text_atomically(weights / "measured.json", json.dumps({**settings, **results}, indent=1) + "\n")
    write_table(weights / "README.md", {**settings, **results})
    print(json.dumps(results, indent=1))


def measure_classifier(classifier: ImageClassifier, vae: AutoencoderKL, scenes: SceneSet) -> dict[str, float]:
    """Return the classifier's accuracy on drawn scenes and on their reconstructions by the VAE, each in [0,1]."""
    return {
        "classifier_accuracy": share_shown(classifier, all_pixels(scenes), scenes.captions),
        "classifier_accuracy_reconstructed": share_shown(classifier, reconstructed(vae, scenes), scenes.captions),
    }


def measure_clip(clip: ClipSimilarity, scenes: SceneSet) -> dict[str, float]:
    """Return the share of scenes whose nearest caption is their own, and of captions whose nearest scene is theirs."""
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
    """Return the share of generated images that show their prompt, and three FIDs on the classifier's features.

    Args:
        pipeline: generates one image for each caption of `prompts`.
        classifier: classifies the images and gives the features.
        prompts: scenes whose captions are the prompts.
        fresh: other scenes, against which the FIDs are measured: of generated images, of the scenes of `prompts`, and of
            these as the autoencoder returns them.
        steps: the sampler's steps.
        guidance: weight of classifier-free guidance.
    """
    generated = generate(pipeline, prompts, num_inference_steps=steps, guidance_scale=guidance)
    wanted = classifier.features(all_pixels(fresh))["pool"]
    others = {
        "fid": generated,
        "fid_of_reconstructed_scenes": reconstructed(pipeline.vae, prompts),
        "fid_of_drawn_scenes": all_pixels(prompts),
    }
    distances = {name: frechet_distance(wanted, classifier.features(each)["pool"]) for name, each in others.items()}
    return {"shown": share_shown(classifier, generated, prompts.captions), **distances}


def generate(
    pipeline: DiffusionPipeline, prompts: SceneSet, *, image_to_image: bool = False, **settings: float
) -> Tensor:
    """Return what a pipeline makes of captions, `[N,3,H,W]` in [-1,1].

    Args:
        pipeline: Stable Diffusion's for text-to-image or for image-to-image.
        prompts: scenes whose captions are the prompts.
        image_to_image: whether the pipeline gets the scenes too.
        settings: of the pipeline's call.
    """
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for numbers in torch.arange(len(prompts.captions)).split(BATCH):
        shown = {"image": to_unit_range(prompts.pixels(numbers))} if image_to_image else {}
        output = pipeline(
            [prompts.captions[number] for number in numbers], **shown, **settings,
            generator=image_generators(0, numbers.tolist()), output_type="pt",
        )  # fmt: skip
        images.append(to_model_range(output.images).cpu())
    return torch.cat(images)


@torch.no_grad()
def reconstructed(vae: AutoencoderKL, scenes: SceneSet) -> Tensor:
    """Return all scenes as the autoencoder returns them, `[N,3,H,W]` in [-1,1]."""
    return torch.cat([vae(batch.to(vae.device)).sample.cpu() for batch in all_pixels(scenes).split(BATCH)]).clamp(-1, 1)


def share_shown(classifier: ImageClassifier, images: Tensor, captions: list[str]) -> float:
    """Return the share of images that the classifier labels as their captions do."""
    return classifier.shown(images, captions).mean().item()


def all_pixels(scenes: SceneSet) -> Tensor:
    """Return all scenes, `[N,3,H,W]` in [-1,1]."""
    return scenes.pixels(torch.arange(len(scenes.captions)))


HEADING = "Measured by `python -m miniature.measure_world`"
TABLE = (
    HEADING
    + """ on {num_images} unseen scenes of one object:

| measure | value |
|---|---|
| classifier: colour and shape right, drawn scenes | {classifier_accuracy:.3f} |
| classifier: the same, reconstructed scenes | {classifier_accuracy_reconstructed:.3f} |
| CLIP: own caption nearest among {num_images} | {clip_image_to_text:.3f} |
| CLIP: own scene nearest among {num_images} | {clip_text_to_image:.3f} |
| generated images: colour and shape as prompted, by the classifier | {shown:.3f} |
| FID of generated images against as many fresh scenes | {fid:.2f} |
| FID of reconstructed scenes against the same | {fid_of_reconstructed_scenes:.2f} |
| FID of drawn scenes against the same | {fid_of_drawn_scenes:.2f} |

Images are generated with guidance {guidance_scale} and {num_inference_steps} steps. FIDs use the classifier's features.
"""
)


def write_table(readme: Path, measured: dict[str, float]) -> None:
    """Replace the measurements at the end of `readme`, or begin it with them."""
    above = readme.read_text(encoding="utf-8").partition(HEADING)[0] if readme.exists() else ""
    write_text_atomically(readme, above + TABLE.format(**measured))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=Path("miniature/weights"))
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/miniature"), help="saved scenes")
    parser.add_argument("--num_images", type=int, default=512)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=2.5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
