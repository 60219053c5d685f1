"""A diffusion model's UNet as attacks see it: noise in, noise predicted, and gradients back to the latents.

Sources: Ho et al., "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239); Salimans and Ho, "Progressive
Distillation for Fast Sampling of Diffusion Models" (arXiv 2202.00512), for v-prediction; Song et al., "Denoising
Diffusion Implicit Models" (arXiv 2010.02502), for the sampler; SDXL (arXiv 2307.01952), for its added conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from srl_utils.attacks.draws import Generators, draw, draw_normal
from srl_utils.errors import UserError, WrongType
from srl_utils.metrics.losses import mean_squared_error

TIME_IDS = 6  # SDXL is told the original size, the crop's corner and the target size, two numbers each
FURTHER_CONDITIONS = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")


class PromptEmbeddings(NamedTuple):
    """Prompts and those to steer away from, in the order in which a pipeline's `encode_prompt` returns them.

    The first dimension is that of the images, or 1 where all share one prompt.
    """

    embeds: Tensor  # [1 or N,L,D]
    negative: Tensor  # [1 or N,L,D]
    pooled: Tensor | None = None  # [1 or N,P], of SDXL
    negative_pooled: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Denoiser:
    """The frozen UNet of a latent diffusion model with its prompt, or one for each image.

    Latents `[N,C,h,w]` are at the scale that the UNet was trained on, float32; it computes in its own precision.
    Timesteps are `[N]` integers. Row i of whatever is drawn comes from `generators[i]`, on the CPU. Everything
    passes gradient to the latents, and none to parameters.
    """

    unet: UNet2DConditionModel
    scheduler: DDIMScheduler
    prompt: PromptEmbeddings
    pixels_per_latent: int

    @classmethod
    def from_pipeline(cls, pipe: DiffusionPipeline, prompt: str | PromptEmbeddings) -> Denoiser:
        """The denoiser of `pipe`: Stable Diffusion 1.x, 2.x or XL, epsilon- or v-prediction.

        The pipeline's own UNet is used, whose parameters stop requiring gradient. Its scheduler only tells how much
        noise a timestep has and what the UNet predicts.

        Raises:
            WrongType: a TypeError, if the denoiser of `pipe` is no UNet, as with flow-matching transformers.
            UserError: a ValueError, if its UNet is for inpainting, instructions and so on, or if the embeddings are
                not those that it takes.
        """
        _check_unet(pipe)
        _check_scheduler(pipe)
        embeddings = prompt if isinstance(prompt, PromptEmbeddings) else encode_prompts(pipe, [prompt])
        _check_embeddings(pipe, embeddings)
        scheduler = DDIMScheduler.from_config(
            pipe.scheduler.config, clip_sample=False, thresholding=False, timestep_spacing="leading"
        )
        return cls(pipe.unet.requires_grad_(False).eval(), scheduler, embeddings, pipe.vae_scale_factor)

    def draw(self, latents: Tensor, generators: Generators) -> tuple[Tensor, Tensor]:
        """A timestep `[N]`, uniform among all that the model is trained on, and white noise for each latent."""
        integers = partial(torch.randint, self.scheduler.config.num_train_timesteps)
        return draw(integers, (), generators, like=latents).long(), draw_normal(generators, like=latents)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(a) latents + sqrt(1 - a) noise, a being `alphas_cumprod` at the timestep."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def predict_noise(self, noised: Tensor, timesteps: Tensor) -> Tensor:
        """The noise `[N,C,h,w]` that the UNet sees in `noised`."""
        output = self._output(noised, timesteps)
        # v = sqrt(a) noise - sqrt(1 - a) latents, and so the noise is sqrt(a) v + sqrt(1 - a) noised.
        return self.add_noise(output, noised, timesteps) if self._predicts_velocity else output

    def loss(self, latents: Tensor, generators: Generators) -> Tensor:
        """The model's training loss `[N]` at a random timestep: mean squared error of the noise, or of v."""
        timesteps, noise = self.draw(latents, generators)
        output = self._output(self.add_noise(latents, noise, timesteps), timesteps)
        wanted = self.scheduler.get_velocity(latents, noise, timesteps) if self._predicts_velocity else noise
        return mean_squared_error(output, wanted)

    @torch.no_grad()
    def score_error(self, latents: Tensor, generators: Generators) -> Tensor:
        """Predicted less added noise `[N,C,h,w]` at a random timestep, without gradient."""
        timesteps, noise = self.draw(latents, generators)
        return self.predict_noise(self.add_noise(latents, noise, timesteps), timesteps) - noise

    def edit(
        self,
        latents: Tensor,
        generators: Generators,
        *,
        num_steps: int,
        strength: float,
        guidance_scale: float,
        eta: float,
    ) -> Tensor:
        """The latents after an image-to-image edit: noised, then denoised by DDIM.

        Args:
            latents: `[N,C,h,w]`.
            generators: one per image.
            num_steps: steps that are taken; the schedule has `num_steps / strength`.
            strength: in (0,1], share of the schedule that the latents are noised by.
            guidance_scale: of classifier-free guidance.
            eta: noise that the sampler adds in each step, 0 (none) to 1 (as much as ancestral sampling).
        """
        self.scheduler.set_timesteps(round(num_steps / strength))
        timesteps = self.scheduler.timesteps[-num_steps:]
        start = timesteps[:1].expand(len(latents))
        latents = self.add_noise(latents, draw_normal(generators, like=latents), start)
        for timestep in timesteps:
            output = self._guided_output(latents, timestep, guidance_scale)
            fresh = draw_normal(generators, like=latents)
            latents = self.scheduler.step(output, timestep, latents, eta=eta, variance_noise=fresh).prev_sample
        return latents

    @property
    def _predicts_velocity(self) -> bool:
        return self.scheduler.config.prediction_type == "v_prediction"

    def _guided_output(self, noised: Tensor, timestep: Tensor, guidance_scale: float) -> Tensor:
        steered = self._output(noised, timestep)
        free = self._output(noised, timestep, negative=True)
        return free + guidance_scale * (steered - free)

    def _output(self, noised: Tensor, timesteps: Tensor, *, negative: bool = False) -> Tensor:
        """What the UNet predicts, noise or v, float32."""
        embeds, pooled = (
            (self.prompt.negative, self.prompt.negative_pooled)
            if negative
            else (self.prompt.embeds, self.prompt.pooled)
        )
        like_noised = {"device": noised.device, "dtype": self.unet.dtype}
        added = {}
        if pooled is not None:
            height, width = (side * self.pixels_per_latent for side in noised.shape[2:])
            time_ids = torch.tensor([[height, width, 0, 0, height, width]], **like_noised)
            added = {"text_embeds": pooled.to(**like_noised), "time_ids": time_ids}
        output = self.unet(
            noised.to(self.unet.dtype),
            timesteps,
            encoder_hidden_states=embeds.to(**like_noised).expand(len(noised), -1, -1),
            added_cond_kwargs={name: tensor.expand(len(noised), -1) for name, tensor in added.items()},
        )
        return output.sample.float()


@torch.no_grad()
def encode_prompts(pipe: DiffusionPipeline, prompts: Sequence[str]) -> PromptEmbeddings:
    """What the UNet of `pipe` is told by them, in float32 or as the text encoder computes."""
    settings = {"device": pipe.unet.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    return PromptEmbeddings(*pipe.encode_prompt(prompt=list(prompts), **settings))


def takes_latents_alone(pipe: DiffusionPipeline) -> bool:
    """Whether the denoiser is shown no picture beside the latents, as for inpainting or instructions."""
    unet = pipe.components.get("unet")
    return unet is None or unet.config.in_channels == unet.config.out_channels


def _check_unet(pipe: DiffusionPipeline) -> None:
    kind = type(pipe).__name__
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, UNet2DConditionModel):
        raise WrongType(f"the denoiser of this {kind} is no UNet; take one of Stable Diffusion 1.x, 2.x or XL")
    if not takes_latents_alone(pipe):
        raise UserError(
            f"the UNet of this {kind} takes {unet.config.in_channels} channels and gives {unet.config.out_channels}, as for "
            "inpainting, instructions or up-scaling; take a plain text-to-image model"
        )
    further = [name for name in FURTHER_CONDITIONS if unet.config.get(name) is not None]
    if further or unet.config.addition_embed_type not in (None, "text_time"):
        raise UserError(f"the UNet of this {kind} wants conditions other than a prompt and sizes")


def _check_scheduler(pipe: DiffusionPipeline) -> None:
    config = pipe.scheduler.config
    prediction = config.get("prediction_type")
    if "beta_schedule" not in config or prediction not in ("epsilon", "v_prediction"):
        raise UserError(
            f"the {type(pipe.scheduler).__name__} of this {type(pipe).__name__} is not of a model that predicts "
            f"epsilon or v from a schedule of betas (prediction type: {prediction})"
        )


def _check_embeddings(pipe: DiffusionPipeline, embeddings: PromptEmbeddings) -> None:
    """SDXL needs pooled embeddings, of the width that leaves room for six time ids (its refiner has others)."""
    config = pipe.unet.config
    if config.addition_embed_type is None:
        return
    if embeddings.pooled is None or embeddings.negative_pooled is None:
        raise UserError(f"this {type(pipe).__name__} needs the pooled embeddings of the prompt as well")
    width = embeddings.pooled.shape[1] + TIME_IDS * config.addition_time_embed_dim
    if width != config.projection_class_embeddings_input_dim:
        raise UserError(
            f"the UNet of this {type(pipe).__name__} takes added conditions of width "
            f"{config.projection_class_embeddings_input_dim}, not {width}: a refiner, or another prompt's embeddings"
        )
