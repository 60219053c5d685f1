"""A miniature Stable Diffusion: a CLIP text encoder and a conditional UNet on the miniature VAE's latents.

The parts are of the full-size model's classes, so the pipelines for text-to-image, image-to-image and inpainting load
the result. The model predicts v, as Stable Diffusion 2 does, and sees pure noise at the last timestep (Lin et al.,
"Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv 2305.08891). Otherwise images of one flat colour
would all have a medium brightness.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from miniature.scene_set import SceneSet
from miniature.tokens import special_tokens
from miniature.training import Settings, train
from srl_utils.attacks.draws import image_generators
from srl_utils.evaluation.tasks.finetuning import draw_numbers
from srl_utils.files import save_tensors, write_atomically
from srl_utils.vae.latents import LatentScale
from srl_utils.vae.loading import hide_local_origin

NO_PROMPT_SHARE = 0.1
"""Share of samples that are trained without their caption, for classifier-free guidance."""
TEXT_WIDTH = 128


class PromptedDenoiser(nn.Module):
    """Text encoder and UNet, trained together."""

    def __init__(self, vocabulary: int, tokens: int, special: dict[str, int], latents: torch.Size) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary, hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, num_hidden_layers=3,
                num_attention_heads=4, max_position_embeddings=tokens, projection_dim=TEXT_WIDTH, **special,
            )
        )  # fmt: skip
        self.unet = UNet2DConditionModel(
            sample_size=latents[-1],
            in_channels=latents[0],
            out_channels=latents[0],
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            block_out_channels=(64, 128),
            layers_per_block=1,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,
            norm_num_groups=16,
        )
        # On the CPU, the backward pass of fused attention took a third of a training step.
        self.unet.set_attn_processor(AttnProcessor())
        self.text_encoder.set_attn_implementation("eager")

    def forward(self, noised: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """Return the predicted v `[N,C,h,w]` of `noised` for tokenized captions `[N,L]`."""
        words = self.text_encoder(tokens).last_hidden_state
        return self.unet(noised, timesteps, encoder_hidden_states=words).sample


def build_scheduler() -> DDIMScheduler:
    """Return the noise schedule of training and sampling."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # the pipelines require it
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def build_pipeline(
    scenes: SceneSet, vae: AutoencoderKL, tokenizer: CLIPTokenizer, settings: Settings
) -> StableDiffusionPipeline:
    """Train the diffusion model on captioned scenes. Training resumes from the state in `settings.work_dir`."""
    torch.manual_seed(settings.seed)
    latents = scaled_latents(vae.to(settings.device), scenes, settings.work_dir / "latents.safetensors")
    network = PromptedDenoiser(
        len(tokenizer), tokenizer.model_max_length, special_tokens(tokenizer), latents.shape[1:]
    ).to(settings.device, memory_format=torch.channels_last)
    loss = partial(
        velocity_loss,
        predict=settings.compiled(PromptedDenoiser.forward),
        scheduler=build_scheduler(),
        latents=latents,
        tokens=tokenizer([*scenes.captions, ""], padding="max_length", return_tensors="pt")["input_ids"],
        settings=settings,
    )
    trained = train(network, loss, "diffusion.pt", settings)
    trained = trained.to(memory_format=torch.contiguous_format)  # safetensors takes no other format
    hide_local_origin(vae)
    return StableDiffusionPipeline(
        vae=vae.half(),  # half the file size; diffusers loads it in float32
        text_encoder=trained.text_encoder,
        tokenizer=tokenizer,
        unet=trained.unet.half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def velocity_loss(
    network: nn.Module,
    step: int,
    *,
    predict: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor],
    scheduler: DDIMScheduler,
    latents: Tensor,
    tokens: Tensor,
    settings: Settings,
) -> Tensor:
    """Return the mean squared error of v (Salimans and Ho, arXiv 2202.00512) at a step's random timesteps and noise."""
    device = next(network.parameters()).device
    numbers = draw_numbers(settings.seed, step, batch_size=settings.batch_size, out_of=len(latents))
    (generator,) = image_generators(settings.seed, [step])
    clean = latents[numbers].float()
    noise = torch.randn(clean.shape, generator=generator)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), generator=generator)
    unprompted = torch.rand(len(clean), generator=generator) < NO_PROMPT_SHARE
    prompts = torch.where(unprompted[:, None], tokens[-1], tokens[numbers])
    noised = scheduler.add_noise(clean, noise, timesteps).to(device, memory_format=torch.channels_last)
    wanted = scheduler.get_velocity(clean, noise, timesteps).to(device)
    return F.mse_loss(predict(network, noised, timesteps.to(device), prompts.to(device)).float(), wanted)


@torch.no_grad()
def scaled_latents(vae: AutoencoderKL, scenes: SceneSet, path: Path) -> Tensor:
    """Return the posterior means `[N,C,h,w]` of all scenes, scaled for the UNet, in float16.

    They are saved at `path`, and computed again if the autoencoder or the scenes have changed.
    """
    first = vae.encode(scenes.pixels(torch.arange(1)).to(vae.device)).latent_dist.mean
    made_of = f"{len(scenes.captions)} scenes, {first.double().sum().item():.6g}"
    if not path.exists() or metadata_of(path) != made_of:
        batches = torch.arange(len(scenes.captions)).split(256)
        means = [vae.encode(scenes.pixels(batch).to(vae.device)).latent_dist.mean.half().cpu() for batch in batches]
        latents = LatentScale.of(vae).scale(torch.cat(means)).contiguous()
        write_atomically(path, lambda aside: save_tensors({"latents": latents}, aside, {"made_of": made_of}))
    return load_file(path)["latents"]


def metadata_of(path: Path) -> str:
    """Return what the saved latents were made of."""
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("made_of", "")
