"""A diffusion model's UNet for attacks: it predicts the noise in latents and passes gradients back to them.

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

TIME_IDS = 6  # of SDXL: the original size, the crop's corner and the target size, two numbers each
FURTHER_CONDITIONS = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")


class PromptEmbeddings(NamedTuple):
    """Embedded prompts, in the order in which a pipeline's `encode_prompt` returns them.

    Attributes:
        embeds: the prompts, `[N,L,D]`, or `[1,L,D]` if all images share one.
        negative: the negative prompts of classifier-free guidance, of the same shape.
        pooled: the pooled embeddings of the prompts, `[N,P]` or `[1,P]`; SDXL needs them.
        negative_pooled: those of the negative prompts.
    """

    embeds: Tensor
    negative: Tensor
    pooled: Tensor | None = None
    negative_pooled: Tensor | None = None

    def part(self, numbers: Tensor) -> PromptEmbeddings:
        """Return the embeddings of the prompts `numbers` `[n]` alone."""
        pooled = (None if each is None else each[numbers.to(each.device)] for each in self[2:])
        return PromptEmbeddings(*(each[numbers.to(each.device)] for each in (self.embeds, self.negative)), *pooled)


@dataclass(frozen=True, eq=False)
class Denoiser:
    """The frozen UNet of a latent diffusion model with its prompt, or with one prompt per image.

    Latents `[N,C,h,w]` are float32, scaled as the UNet was trained; the UNet computes in its own precision. Timesteps
    are `[N]` integers. Image i draws from `generators[i]`; None draws from PyTorch's global generator (see
    `draws.draw`). Methods pass gradients to the latents, unless they say otherwise, and never to parameters.

    The UNet of a model for inpainting takes a mask and the latents of an image with a hole beside the noised latents.
    `predict_noise` alone works with it; the other methods raise a UserError.
    """

    unet: UNet2DConditionModel
    scheduler: DDIMScheduler
    prompt: PromptEmbeddings
    pixels_per_latent: int

    @classmethod
    def from_pipeline(cls, pipe: DiffusionPipeline, prompt: str | PromptEmbeddings) -> Denoiser:
        """Return the denoiser of a pipeline of Stable Diffusion 1.x, 2.x or XL, with epsilon- or v-prediction.

        The pipeline may be one for inpainting.

        The denoiser shares the pipeline's UNet and stops its parameters from requiring gradients. From the pipeline's
        scheduler it takes the noise of each timestep and the kind of prediction.

        Args:
            pipe: the pipeline.
            prompt: one prompt for all images, or embedded prompts.

        Raises:
            WrongType: a TypeError, if the denoiser of `pipe` is not a UNet, for instance a flow-matching transformer.
            UserError: a ValueError, if the UNet takes more than latents and a prompt, or what inpainting adds to them (for
                instance instructions), or if the embeddings do not fit it.
        """
        _check_unet(pipe)
        _check_scheduler(pipe)
        embeddings = prompt if isinstance(prompt, PromptEmbeddings) else encode_prompts(pipe, [prompt])
        _check_embeddings(pipe, embeddings)
        scheduler = DDIMScheduler.from_config(
            pipe.scheduler.config, clip_sample=False, thresholding=False, timestep_spacing="leading"
        )
        return cls(pipe.unet.requires_grad_(False).eval(), scheduler, embeddings, pipe.vae_scale_factor)

    @property
    def inpaints(self) -> bool:
        """Whether the UNet is that of a model for inpainting."""
        return inpaints(self.unet)

    def draw(self, latents: Tensor, generators: Generators | None = None) -> tuple[Tensor, Tensor]:
        """Draw a timestep `[N]`, uniform among the model's training timesteps, and white noise for each latent."""
        integers = partial(torch.randint, self.scheduler.config.num_train_timesteps)
        return draw(integers, (), generators, like=latents).long(), draw_normal(generators, like=latents)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return sqrt(a) latents + sqrt(1 - a) noise, where a is `alphas_cumprod` at the timestep."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def predict_noise(self, noised: Tensor, timesteps: Tensor, *, beside: Tensor | None = None) -> Tensor:
        """Return the noise `[N,C,h,w]` that the UNet predicts in `noised`.

        Args:
            noised: `[N,C,h,w]`.
            timesteps: `[N]`.
            beside: what a model for inpainting takes too, `[N,1+C,h,w]`: the mask, 1 in the hole, and the latents of the
                image with a hole.
        """
        output = self._output(noised, timesteps, beside=beside)
        # v = sqrt(a) noise - sqrt(1 - a) latents, so the noise is sqrt(a) v + sqrt(1 - a) noised.
        return self.add_noise(output, noised, timesteps) if self._predicts_velocity else output

    def loss(self, latents: Tensor, generators: Generators | None = None) -> Tensor:
        """Return the model's training loss `[N]` at a random timestep: the mean squared error of the noise, or of v."""
        timesteps, noise = self.draw(latents, generators)
        output = self._output(self.add_noise(latents, noise, timesteps), timesteps)
        wanted = self.scheduler.get_velocity(latents, noise, timesteps) if self._predicts_velocity else noise
        return mean_squared_error(output, wanted)

    @torch.no_grad()
    def score_error(self, latents: Tensor, generators: Generators | None = None) -> Tensor:
        """Return the predicted minus the added noise `[N,C,h,w]` at a random timestep, without gradient."""
        timesteps, noise = self.draw(latents, generators)
        return self.predict_noise(self.add_noise(latents, noise, timesteps), timesteps) - noise

    def edit(
        self,
        latents: Tensor,
        generators: Generators | None = None,
        *,
        num_steps: int,
        strength: float,
        guidance_scale: float,
        eta: float,
    ) -> Tensor:
        """Return the latents `[N,C,h,w]` after an image-to-image edit: noised, then denoised by DDIM.

        Args:
            latents: `[N,C,h,w]`.
            generators: one CPU generator per image, or None.
            num_steps: denoising steps; the whole schedule has `num_steps / strength`.
            strength: share of the schedule that is run, in (0,1].
            guidance_scale: weight of classifier-free guidance.
            eta: noise that each step adds, from 0 (none) to 1 (as much as ancestral sampling).
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

    def _output(
        self, noised: Tensor, timesteps: Tensor, *, negative: bool = False, beside: Tensor | None = None
    ) -> Tensor:
        """Return the UNet's prediction, noise or v, `[N,C,h,w]` float32."""
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
        if beside is None and self.inpaints:
            raise UserError("this model inpaints: its UNet needs a mask and an image too; use a text-to-image model")
        given = noised if beside is None else torch.cat([noised, beside], dim=1)
        output = self.unet(
            given.to(self.unet.dtype),
            timesteps,
            encoder_hidden_states=embeds.to(**like_noised).expand(len(noised), -1, -1),
            added_cond_kwargs={name: tensor.expand(len(noised), -1) for name, tensor in added.items()},
        )
        return output.sample.float()


@torch.no_grad()
def encode_prompts(pipe: DiffusionPipeline, prompts: Sequence[str]) -> PromptEmbeddings:
    """Return the prompts embedded by the text encoders of `pipe`, in their precision."""
    settings = {"device": pipe.unet.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    return PromptEmbeddings(*pipe.encode_prompt(prompt=list(prompts), **settings))


def takes_latents_alone(pipe: DiffusionPipeline) -> bool:
    """Return whether the denoiser takes latents without another image (inpainting and instruction models take one)."""
    unet = pipe.components.get("unet")
    return unet is None or unet.config.in_channels == unet.config.out_channels


def inpaints(unet: UNet2DConditionModel) -> bool:
    """Return whether the UNet takes a mask and latents of an image beside the noised latents."""
    return unet.config.in_channels == 2 * unet.config.out_channels + 1


def _check_unet(pipe: DiffusionPipeline) -> None:
    kind = type(pipe).__name__
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, UNet2DConditionModel):
        raise WrongType(f"the denoiser of this {kind} is not a UNet; use a pipeline of Stable Diffusion 1.x, 2.x or XL")
    if not takes_latents_alone(pipe) and not inpaints(unet):
        raise UserError(
            f"the UNet of this {kind} takes {unet.config.in_channels} channels and returns {unet.config.out_channels}, "
            "as models for instructions or upscaling do; use a text-to-image model"
        )
    further = [name for name in FURTHER_CONDITIONS if unet.config.get(name) is not None]
    if further or unet.config.addition_embed_type not in (None, "text_time"):
        raise UserError(
            f"the UNet of this {kind} needs conditions other than a prompt and sizes; use a text-to-image model"
        )


def _check_scheduler(pipe: DiffusionPipeline) -> None:
    config = pipe.scheduler.config
    prediction = config.get("prediction_type")
    if "beta_schedule" not in config or prediction not in ("epsilon", "v_prediction"):
        raise UserError(
            f"the {type(pipe.scheduler).__name__} of this {type(pipe).__name__} does not predict epsilon or v with a "
            f"schedule of betas (prediction type: {prediction}); use a pipeline of Stable Diffusion 1.x, 2.x or XL"
        )


def _check_embeddings(pipe: DiffusionPipeline, embeddings: PromptEmbeddings) -> None:
    """Raise a UserError if the pooled embeddings that SDXL needs are missing or do not have the right width.

    Six time ids fill the rest of its added conditions. SDXL's refiner has five and is refused.
    """
    config = pipe.unet.config
    if config.addition_embed_type is None:
        return
    if embeddings.pooled is None or embeddings.negative_pooled is None:
        raise UserError(
            f"this {type(pipe).__name__} needs the pooled embeddings of the prompt; encode_prompts returns them"
        )
    width = embeddings.pooled.shape[1] + TIME_IDS * config.addition_time_embed_dim
    if width != config.projection_class_embeddings_input_dim:
        raise UserError(
            f"the UNet of this {type(pipe).__name__} takes added conditions of width "
            f"{config.projection_class_embeddings_input_dim}, not {width}; it is a refiner, or the embeddings are another "
            "model's"
        )
