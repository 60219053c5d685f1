"""Measure how many steps a diffusion model needs until it works with another autoencoder.

    python -m experiments.adaptation --vae outputs/both --output_dir outputs/adaptation

The denoiser of the miniature is fine-tuned on the autoencoder's latents, or trained anew on them, for several numbers of
steps. Each time it generates images, and edits scenes by image-to-image; the FID of both against fresh scenes is measured.
Text-to-image needs the decoder alone, edits need the encoder too. Finished parts are kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from experiments.runner import WEIGHTS
from miniature.diffusion import scaled_latents
from miniature.measure_world import UNSEEN_SEED, all_pixels, generate, share_shown
from miniature.scene_set import SceneSet, scene_set
from srl_utils.evaluation.tasks.finetuning import FinetuningConfig, finetune
from srl_utils.files import read_json, write_text_atomically
from srl_utils.metrics.features import ImageClassifier, frechet_distance, load_image_classifier

ADAPTED, ANEW = "adapted", "anew"
LEARNING_RATES = {ADAPTED: 3e-4, ANEW: 1e-3}
GENERATED, EDITED = "fid", "edited-fid"
INFERENCE_STEPS, GUIDANCE, STRENGTH = 10, 2.5, 0.6


def main() -> None:
    """Adapt the denoiser, generate and measure."""
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = AutoencoderKL.from_pretrained(args.vae).eval().requires_grad_(False)
    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS / "sd", vae=vae).to(device)
    classifier = load_image_classifier(str(WEIGHTS / "classifier"))
    scenes, prompts, fresh = (
        scene_set(args.work_dir, seed=seed, count=count)
        for seed, count in ((0, args.num_scenes), (UNSEEN_SEED, args.num_images), (UNSEEN_SEED + 1, args.num_images))
    )
    latents = scaled_latents(vae, scenes, args.output_dir / "latents.safetensors").to(device, torch.float32)
    wanted = classifier.features(all_pixels(fresh))["pool"]
    measure = partial(generated_and_edited, classifier=classifier, prompts=prompts, wanted=wanted)
    for start, numbers in ((ADAPTED, args.steps), (ANEW, args.steps_anew)):
        files = {steps: args.output_dir / f"{start}-{steps}.json" for steps in numbers}
        missing = {steps: path for steps, path in files.items() if not path.exists()}
        if missing:
            teach(pipeline, start, missing, latents, scenes.captions, measure, args)


def teach(
    pipeline: StableDiffusionPipeline,
    start: str,
    files: Mapping[int, Path],
    latents: Tensor,
    captions: list[str],
    measure: Callable[[StableDiffusionPipeline], dict[str, float]],
    args: argparse.Namespace,
) -> None:
    """Teach a denoiser `latents`, and write what it generates on the way.

    Args:
        pipeline: keeps its own denoiser.
        start: `ADAPTED` begins with the pipeline's denoiser, `ANEW` with random weights.
        files: the measures after each of these numbers of steps; 0 is the start.
        latents: `[N,C,h,w]` at the denoiser's scale.
        captions: of the images.
        measure: measures what a pipeline generates.
        args: `batch_size` and `seed`.
    """

    def keep(steps: int, unet: UNet2DConditionModel) -> None:
        if steps in files:
            write_text_atomically(files[steps], json.dumps(measure(with_denoiser(pipeline, unet)), indent=1) + "\n")
            print(f"{files[steps].stem}: {read_json(files[steps])}", flush=True)

    unet = pipeline.unet
    if start == ANEW:
        torch.manual_seed(args.seed)
        unet = UNet2DConditionModel.from_config(unet.config).to(pipeline.device)
    keep(0, unet)
    config = FinetuningConfig(num_steps=max(files), batch_size=args.batch_size, learning_rate=LEARNING_RATES[start])
    finetune(with_denoiser(pipeline, unet), latents, captions, config, seed=args.seed, after_step=keep)


def generated_and_edited(
    pipeline: StableDiffusionPipeline, *, classifier: ImageClassifier, prompts: SceneSet, wanted: Tensor
) -> dict[str, float]:
    """Return the FIDs of images generated from captions and of their scenes edited with them, and the share as prompted.

    Args:
        pipeline: generates; with the same parts, image-to-image edits.
        classifier: gives the features and the labels.
        prompts: scenes with their captions.
        wanted: features of other scenes.
    """
    settings = {"num_inference_steps": INFERENCE_STEPS, "guidance_scale": GUIDANCE}
    generated = generate(pipeline, prompts, **settings)
    editor = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    edited = generate(editor, prompts, image_to_image=True, strength=STRENGTH, **settings)
    fids = {
        name: frechet_distance(wanted, classifier.features(images)["pool"])
        for name, images in ((GENERATED, generated), (EDITED, edited))
    }
    return {**fids, "shown": share_shown(classifier, generated, prompts.captions)}


def with_denoiser(pipeline: StableDiffusionPipeline, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """Return a pipeline with another denoiser and the same other parts."""
    return StableDiffusionPipeline(**{**pipeline.components, "unet": unet}, requires_safety_checker=False)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--vae", type=Path, required=True)
    add("--steps", type=int, nargs="*", default=[0, 30, 100, 300], help="with which the denoiser is fine-tuned")
    add("--steps_anew", type=int, nargs="*", default=[], help="with which one is trained from random weights")
    add("--batch_size", type=int, default=32)
    add("--num_scenes", type=int, default=4000, help="to teach")
    add("--num_images", type=int, default=256, help="to generate, and to edit")
    add("--work_dir", type=Path, default=Path("outputs/miniature"), help="saved scenes")
    add("--seed", type=int, default=0)
    add("--output_dir", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
