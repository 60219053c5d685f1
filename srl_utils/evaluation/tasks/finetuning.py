"""Fine-tune the UNet of a diffusion model on captioned images, as the training scripts of diffusers do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from srl_utils.attacks.denoiser import Denoiser, encode_prompts
from srl_utils.attacks.denoiser_training import float32_copy, in_dtype, training_step
from srl_utils.attacks.draws import image_generators
from srl_utils.errors import MissingPackage

LORA_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


@dataclass(frozen=True, kw_only=True)
class FinetuningConfig:
    """Fine-tuning with AdamW at a constant learning rate, in float32."""

    num_steps: int
    batch_size: int
    learning_rate: float
    lora_rank: int | None = None
    """Rank of adapters of the attention (Hu et al., arXiv 2106.09685), which need peft; None trains all weights."""

    def check(self) -> None:
        """Check that peft is installed if it is needed.

        Raises:
            MissingPackage: an ImportError, if it is not.
        """
        if self.lora_rank is not None and find_spec("peft") is None:
            raise MissingPackage("adapters need the package peft; run pip install peft", parameter="lora_rank")


def finetune(
    pipeline: DiffusionPipeline,
    latents: Tensor,
    captions: Sequence[str],
    config: FinetuningConfig,
    *,
    seed: int,
    after_step: Callable[[int, UNet2DConditionModel], object] = lambda step, unet: None,
) -> UNet2DConditionModel:
    """Return a fine-tuned copy of the pipeline's UNet; the pipeline keeps its own.

    Args:
        pipeline: Stable Diffusion 1.x, 2.x or XL.
        latents: `[N,C,h,w]` at the UNet's scale.
        captions: one for each image.
        config: how it is trained.
        seed: fixes the adapters' start, the order of the images, the timesteps and the noise.
        after_step: called with the number of steps taken and the copy as it is then.

    Raises:
        UserError: if the pipeline is of another kind.
    """
    prompts = encode_prompts(pipeline, captions)
    unet = float32_copy(pipeline.unet)
    with torch.random.fork_rng(devices=[]):  # peft draws the adapters from the global generator
        torch.manual_seed(seed)
        adapted = _trainable(unet, config)
    optimizer = torch.optim.AdamW(
        [weight for weight in adapted.parameters() if weight.requires_grad], lr=config.learning_rate
    )
    denoiser = replace(Denoiser.from_pipeline(pipeline, prompts), unet=unet)
    for step in range(config.num_steps):
        batch = draw_numbers(seed, step, batch_size=config.batch_size, out_of=len(latents))
        told = prompts.part(batch)
        generators = image_generators(seed, range(step * config.batch_size, step * config.batch_size + len(batch)))
        training_step(replace(denoiser, prompt=told), optimizer, latents[batch.to(latents.device)], generators)
        after_step(step + 1, unet)
    merged = unet if adapted is unet else adapted.merge_and_unload()  # type: ignore[operator] # of peft
    return in_dtype(merged.requires_grad_(False).eval(), pipeline.unet.dtype)


def _trainable(unet: UNet2DConditionModel, config: FinetuningConfig) -> nn.Module:
    """Return `unet` with all weights trainable, or with trainable adapters only."""
    if config.lora_rank is None:
        return unet.requires_grad_(True)
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        unet, LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=LORA_TARGETS)
    )


def draw_numbers(seed: int, step: int, *, batch_size: int, out_of: int) -> Tensor:
    """Return the numbers of the samples in the batch of one step, `[batch_size]` in [0,out_of).

    Each epoch has every sample once, in a new order.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    orders = {
        epoch: torch.randperm(out_of, generator=image_generators(seed, [epoch])[0])
        for epoch in {position // out_of for position in positions}
    }
    return torch.stack([orders[position // out_of][position % out_of] for position in positions])
