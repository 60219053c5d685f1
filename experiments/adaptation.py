"""Measure how many steps a diffusion model needs until it works with another autoencoder.

    python -m experiments.adaptation --vae outputs/both --output_dir outputs/adaptation

The denoiser of the miniature is fine-tuned on the autoencoder's latents, or trained anew on them, for several numbers of
steps. Each time it generates images, whose FID against fresh scenes is measured. Finished parts are kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from experiments.runner import WEIGHTS
from miniature.diffusion import scaled_latents
from miniature.measure_world import UNSEEN_SEED, measure_diffusion
from miniature.scene_set import scene_set
from srl_utils.evaluation.tasks.finetuning import FinetuningConfig, finetune
from srl_utils.files import read_json, write_text_atomically
from srl_utils.metrics.features import load_image_classifier

ADAPTED, ANEW = "adapted", "anew"
LEARNING_RATES = {ADAPTED: 3e-4, ANEW: 1e-3}
MEASURES = ("fid", "shown")
INFERENCE_STEPS, GUIDANCE = 20, 2.5


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
    measure = partial(
        measure_diffusion, classifier=classifier, prompts=prompts, fresh=fresh, steps=INFERENCE_STEPS, guidance=GUIDANCE
    )
    for start, numbers in ((ADAPTED, args.steps), (ANEW, args.steps_anew)):
        for steps in numbers:
            path = args.output_dir / f"{start}-{steps}.json"
            if not path.exists():
                taught = with_denoiser(pipeline, start, steps, latents, scenes.captions, args)
                write_text_atomically(path, json.dumps(measured(measure, taught), indent=1) + "\n")
                print(f"{path.stem}: {read_json(path)}", flush=True)


def measured(
    measure: Callable[[StableDiffusionPipeline], dict[str, float]], pipeline: StableDiffusionPipeline
) -> dict[str, float]:
    """Return FID and share of images as prompted, by name."""
    values = measure(pipeline)
    return {name: values[name] for name in MEASURES}


def with_denoiser(
    pipeline: StableDiffusionPipeline,
    start: str,
    steps: int,
    latents: Tensor,
    captions: list[str],
    args: argparse.Namespace,
) -> StableDiffusionPipeline:
    """Return the pipeline with a denoiser that was taught `latents`.

    Args:
        pipeline: keeps its own denoiser.
        start: `ADAPTED` begins with the pipeline's denoiser, `ANEW` with random weights.
        steps: of the training.
        latents: `[N,C,h,w]` at the denoiser's scale.
        captions: of the images.
        args: `batch_size` and `seed`.
    """
    first = pipeline
    if start == ANEW:
        torch.manual_seed(args.seed)
        first = replaced(pipeline, UNet2DConditionModel.from_config(pipeline.unet.config).to(pipeline.device))
    if not steps:
        return first
    config = FinetuningConfig(num_steps=steps, batch_size=args.batch_size, learning_rate=LEARNING_RATES[start])
    return replaced(pipeline, finetune(first, latents, captions, config, seed=args.seed))


def replaced(pipeline: StableDiffusionPipeline, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """Return a pipeline with another denoiser and the same other parts."""
    return StableDiffusionPipeline(**{**pipeline.components, "unet": unet}, requires_safety_checker=False)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--vae", type=Path, required=True)
    add("--steps", type=int, nargs="*", default=[0, 30, 100, 300, 1000], help="with which the denoiser is fine-tuned")
    add("--steps_anew", type=int, nargs="*", default=[], help="with which one is trained from random weights")
    add("--batch_size", type=int, default=64)
    add("--num_scenes", type=int, default=4000, help="to teach")
    add("--num_images", type=int, default=256, help="to generate")
    add("--work_dir", type=Path, default=Path("outputs/miniature"), help="saved scenes")
    add("--seed", type=int, default=0)
    add("--output_dir", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
