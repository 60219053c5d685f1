"""The miniature autoencoder, trained on scenes, dead leaves and crops of scikit-image's training photographs.

    python -m miniature.build vae

Every sample is a function of (seed, number), so a stopped run resumes with the same next sample. The result in
`miniature/weights/vae` is a `diffusers.AutoencoderKL` with a measured `scaling_factor`, beside `measured.json` and a
README made from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image, ImageEnhance
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from miniature.measure import measure_scaling_factor, write_measurements
from miniature.scenes import draw_dead_leaves, draw_scene
from miniature.training import BETAS, Loop, cosine_schedule, descend
from srl_utils.images.photographs import load_photographs
from srl_utils.images.pixels import from_pil
from srl_utils.vae.layers import with_compilable_layers

SIZE = 64
PHOTOGRAPH_SIDE = 512  # pixels of the shorter side; the smallest crops show photographs at full resolution
# Shares of a batch. Photographs have the statistics that the measurements use, dead leaves prevent overfitting to
# twelve photographs, and scenes are what the miniature diffusion model draws.
SHARES = {"scene": 0.4, "dead leaves": 0.15, "photograph": 0.45}
# Weak, so that latents keep the detail of full-size autoencoders, and their weakness to attacks.
KL_WEIGHT = 1e-7
ADVERSARIAL_WEIGHT = 0.05
ADVERSARIAL_BETAS = (0.5, 0.9)


def build(args: argparse.Namespace) -> None:
    """Train the autoencoder, measure it, and write it to `args.output_dir`."""
    torch.manual_seed(args.seed)
    vae = train(args).to(memory_format=torch.contiguous_format).eval()  # safetensors takes no other format
    vae.register_to_config(scaling_factor=measure_scaling_factor(vae))
    vae.save_pretrained(args.output_dir)
    names = (
        "architecture",
        "pixel_steps",
        "adversarial_steps",
        "batch_size",
        "learning_rate",
        "adversarial_learning_rate",
        "seed",
    )
    settings = {name: getattr(args, name) for name in names}
    write_measurements(vae, args.output_dir, build={**settings, "torch_compile": args.torch_compile})


# Both down-sample by 4 and normalise groups of 4 to 8 channels, as the SD-VAE does.
ARCHITECTURES: dict[str, dict[str, object]] = {
    # The shipped one. Without attention its cost is linear in the pixels.
    "small": {
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "latent_channels": 8,
        "norm_num_groups": 8,
        "mid_block_add_attention": False,
    },
    # Half the latents and a deeper network with attention, to test whether results carry over.
    "attention": {
        "block_out_channels": (32, 64, 96),
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 16,
        "mid_block_add_attention": True,
    },
}


def build_autoencoder(architecture: str) -> AutoencoderKL:
    """Return one of `ARCHITECTURES` with random weights."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=SIZE,
        **ARCHITECTURES[architecture],
    )


def patch_discriminator() -> nn.Sequential:
    """Return a network that tells images from reconstructions, patch by patch of 38 px (Isola et al., CVPR 2017)."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, stride=2, padding=1),
        nn.GroupNorm(8, 64),
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, 128, 4, stride=2, padding=1),
        nn.GroupNorm(8, 128),
        nn.LeakyReLU(0.2),
        nn.Conv2d(128, 1, 3, padding=1),
    )


# --- training -------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> AutoencoderKL:
    """Train the autoencoder for its pixels with a cosine schedule, then against the discriminator at a constant rate.

    Autoencoders of latent diffusion models are trained like this (Rombach et al., CVPR 2022, section 3.1). The pixel
    loss alone gives a smoother network, which attacks hardly affect.
    """
    vae = build_autoencoder(args.architecture).to(args.device, memory_format=torch.channels_last)
    discriminator = patch_discriminator().to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=BETAS)
    discriminator_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=4e-4, betas=ADVERSARIAL_BETAS)
    schedule = cosine_schedule(optimizer, args.pixel_steps)
    parts = {
        "vae": vae,
        "discriminator": discriminator,
        "optimizer": optimizer,
        "discriminator_optimizer": discriminator_optimizer,
        "schedule": schedule,
    }
    loop = Loop(args.work_dir / "state.pt", parts, steps=total_steps(args), saving_steps=args.checkpointing_steps)
    vae_loss, discriminator_loss = autoencoder_loss, hinge_loss
    if args.torch_compile:
        with_compilable_layers(vae)
        vae_loss, discriminator_loss = torch.compile(autoencoder_loss), torch.compile(hinge_loss)
    batches = sample_batches(args, loop.step)

    def update(step: int) -> dict[str, Tensor]:
        adversarial = step >= args.pixel_steps
        images, textured = next(batches)
        images = images.to(args.device, memory_format=torch.channels_last)
        textured = textured.to(args.device, torch.float32)
        if adversarial:
            optimizer.param_groups[0].update(lr=args.adversarial_learning_rate, betas=ADVERSARIAL_BETAS)
        judge = discriminator.requires_grad_(False) if adversarial else None
        noise = latent_noise(args, step, len(images))
        with torch.autocast(images.device.type, torch.bfloat16):
            loss, pixel_loss, reconstruction = vae_loss(vae, judge, images, textured, noise)
        descend(vae, optimizer, loss)
        if adversarial:
            discriminator.requires_grad_(True)
            with torch.autocast(images.device.type, torch.bfloat16):
                loss = discriminator_loss(discriminator, images, reconstruction.detach(), textured)
            descend(discriminator, discriminator_optimizer, loss)
        else:
            schedule.step()
        return {"L1": pixel_loss, "loss": loss}

    loop.run(update)
    return vae


def latent_noise(args: argparse.Namespace, step: int, count: int) -> Tensor:
    """Draw the noise `[count,C,h,w]` of a step's sampled latents."""
    generator = torch.Generator(args.device).manual_seed(args.seed * 1_000_003 + step)
    channels = ARCHITECTURES[args.architecture]["latent_channels"]
    return torch.randn((count, channels, SIZE // 4, SIZE // 4), generator=generator, device=args.device)


def autoencoder_loss(
    vae: AutoencoderKL, discriminator: nn.Module | None, images: Tensor, textured: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the autoencoder's loss, its L1 term, and the reconstructions `[N,3,H,W]`.

    The loss is the L1 distance of reconstructions from sampled latents, the KL divergence and, with a discriminator,
    how well it detects the reconstructions. The discriminator's term counts images whose `textured` `[N]` is 1; flat
    scenes, with 0, are left out.
    """
    posterior = vae.encode(images).latent_dist
    reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    pixel_loss = F.l1_loss(reconstruction, images)
    loss = pixel_loss + KL_WEIGHT * posterior.kl().float().mean()
    if discriminator is not None:
        realism = discriminator(reconstruction).float().mean(dim=(1, 2, 3))
        loss = loss - ADVERSARIAL_WEIGHT * (realism * textured).mean()
    return loss, pixel_loss, reconstruction


def hinge_loss(discriminator: nn.Module, images: Tensor, reconstructions: Tensor, textured: Tensor) -> Tensor:
    """Return the discriminator's hinge loss on the images whose `textured` `[N]` is 1."""
    errors = F.relu(1 - discriminator(images).float()) + F.relu(1 + discriminator(reconstructions).float())
    return (errors.mean(dim=(1, 2, 3)) * textured).mean()


def total_steps(args: argparse.Namespace) -> int:
    """Return the number of steps of both phases."""
    return args.pixel_steps + args.adversarial_steps


# --- samples --------------------------------------------------------------------------------------------


class Mixture(Dataset):
    """An endless mixture of training images. Sample i depends on (seed, i) alone.

    A sample is an image `[3,SIZE,SIZE]` in [-1,1] and a number: 0.0 for a scene, 1.0 for an image with texture.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.photographs = load_photographs("train", short_side=PHOTOGRAPH_SIDE)

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        rng = np.random.default_rng((self.seed, index, 2))
        kind = rng.choice(list(SHARES), p=list(SHARES.values()))
        if kind == "scene":
            return from_pil(draw_scene(self.seed, index, size=SIZE).image), 0.0
        if kind == "dead leaves":
            return from_pil(draw_dead_leaves(self.seed, index, size=SIZE)), 1.0
        photograph = self.photographs[rng.integers(len(self.photographs))]
        return from_pil(augmented_crop(rng, photograph)), 1.0


def augmented_crop(rng: np.random.Generator, photograph: Image.Image) -> Image.Image:
    """Return a random crop of a photograph, rotated, mirrored and recoloured at random."""
    side = int(SIZE * (min(photograph.size) / SIZE) ** (rng.random() ** 1.5))
    left = int(rng.integers(0, photograph.width - side + 1))
    top = int(rng.integers(0, photograph.height - side + 1))
    box = (left, top, left + side, top + side)
    crop = photograph.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    crop = crop.transpose(Image.Transpose(int(rng.integers(0, 7))))
    if rng.random() < 0.3:
        crop = Image.merge("RGB", [crop.split()[channel] for channel in rng.permutation(3)])
    for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        crop = enhance(crop).enhance(float(rng.uniform(0.6, 1.4)))
    return crop


def sample_batches(args: argparse.Namespace, first_step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of the steps from `first_step`: images `[N,3,SIZE,SIZE]` and whether they have texture, `[N]`."""
    remaining = range(first_step * args.batch_size, total_steps(args) * args.batch_size)
    return iter(DataLoader(Mixture(args.seed), args.batch_size, sampler=remaining, num_workers=args.num_workers))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this training."""
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="small")
    parser.add_argument("--pixel_steps", type=int, default=5_000)
    parser.add_argument("--adversarial_steps", type=int, default=1_200)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--adversarial_learning_rate", type=float, default=2e-4)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--num_workers", type=int, default=1)
