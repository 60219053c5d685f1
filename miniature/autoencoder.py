"""The miniature autoencoder, trained on scenes, dead leaves and crops of scikit-image's training photographs.

    python -m miniature.build vae

It has the shape of Stable Diffusion's in small, and its weakness: `miniature/teacher.py` says where that comes from.

Every sample is a function of (seed, number), so a stopped run resumes with the same next sample. The result in
`miniature/weights/vae` is a `diffusers.AutoencoderKL` with a measured `scaling_factor`, beside `measured.json` and a
README made from it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from miniature.imagenet import NAME, ImageNetLayers
from miniature.measure import as_saved, measure_scaling_factor, save
from miniature.mixture import SIZE, first_images, sample_batches
from miniature.teacher import FACTOR, FEATURE_CHANNELS, PIXEL_CHANNELS, Teacher
from miniature.training import BETAS, Loop, autocast, cosine_schedule, descend
from srl_utils.metrics.losses import FeatureDistance
from srl_utils.vae.layers import with_compilable_layers

ABOUT = """# The miniature autoencoder

A `diffusers.AutoencoderKL` of {parameters} million parameters for images of 64 px, or another multiple of 8. It has the
blocks of Stable Diffusion's VAE with fewer channels, 12 latent channels, and weights in float16.

`make miniature` trained it on drawn scenes, dead leaves and augmented crops of scikit-image's training photographs, and
on no other photographs; `srl_utils/images/photographs.py` lists them. Encoder and decoder were first trained apart, on
components of pixels and of an ImageNet network's features; then together; then against a patch discriminator too.
Settings: {build}.

`scaling_factor` is the measured 1 / standard deviation of its latents.
"""
SETTINGS = (
    "teaching_steps", "joint_steps", "adversarial_steps", "batch_size", "learning_rate", "adversarial_learning_rate", "seed",
    "torch_compile",
)  # fmt: skip
TEACHER_SAMPLES = 512
LATENT_NOISE = 0.15
"""Of the teacher's latents that the decoder sees, in each channel's standard deviation."""
PERCEPTUAL_WEIGHT = 0.3
ALIGNMENT_WEIGHT = 1.0
KL_WEIGHT = 1e-6
ADVERSARIAL_WEIGHT = 0.05
ADVERSARIAL_BETAS = (0.5, 0.9)


def build(args: argparse.Namespace) -> None:
    """Train the autoencoder, measure it, and write it to `args.output_dir`."""
    torch.manual_seed(args.seed)
    vae = as_saved(train(args))
    vae.register_to_config(scaling_factor=measure_scaling_factor(vae))
    save(vae, args, about=ABOUT, settings=SETTINGS)


def build_autoencoder() -> AutoencoderKL:
    """Return the autoencoder with random weights: SD-VAE's blocks and attention, fewer channels in each, and 12 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=2,
        latent_channels=PIXEL_CHANNELS + FEATURE_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
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
    """Train encoder and decoder apart, on the teacher's latents; then together; then against the discriminator too.

    Apart, each has a target from its first step, and learns in minutes what takes hours together. The first two parts
    share a cosine schedule; the last has a constant rate (Rombach et al., CVPR 2022, section 3.1).
    """
    vae = build_autoencoder().to(args.device, memory_format=torch.channels_last)
    discriminator = patch_discriminator().to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=BETAS)
    discriminator_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=4e-4, betas=ADVERSARIAL_BETAS)
    schedule = cosine_schedule(optimizer, args.teaching_steps + args.joint_steps)
    parts = {
        "vae": vae,
        "discriminator": discriminator,
        "optimizer": optimizer,
        "discriminator_optimizer": discriminator_optimizer,
        "schedule": schedule,
    }
    loop = Loop(args.work_dir / "state.pt", parts, steps=total_steps(args), saving_steps=args.checkpointing_steps)
    losses = AutoencoderLosses.build(args)
    taught, joint, hinge = losses.taught, losses.joint, hinge_loss
    if args.torch_compile:
        with_compilable_layers(vae)
        taught, joint, hinge = torch.compile(taught), torch.compile(joint), torch.compile(hinge)
    batches = sample_batches(args, loop.step, total_steps(args))

    def update(step: int) -> dict[str, Tensor]:
        adversarial = step >= args.teaching_steps + args.joint_steps
        images, textured = next(batches)
        images = images.to(args.device, memory_format=torch.channels_last)
        textured = textured.to(args.device, torch.float32)
        if adversarial:
            optimizer.param_groups[0].update(lr=args.adversarial_learning_rate, betas=ADVERSARIAL_BETAS)
        noise = latent_noise(args, step, len(images))
        with autocast(images.device, compiled=args.torch_compile):
            if step < args.teaching_steps:
                terms, reconstruction = taught(vae, images, noise)
            else:
                judge = discriminator.requires_grad_(False) if adversarial else None
                terms, reconstruction = joint(vae, judge, images, textured, noise)
        descend(vae, optimizer, torch.stack(list(terms.values())).sum())
        if adversarial:
            discriminator.requires_grad_(True)
            with autocast(images.device, compiled=args.torch_compile):
                loss = hinge(discriminator, images, reconstruction.detach(), textured)
            descend(discriminator, discriminator_optimizer, loss)
        else:
            schedule.step()
        return terms

    loop.run(update)
    return vae


@dataclass(frozen=True)
class AutoencoderLosses:
    """The losses of the autoencoder. Images are `[N,3,SIZE,SIZE]` in [-1,1]; terms are weighted and averaged."""

    teacher: Teacher
    perceptual: FeatureDistance

    @classmethod
    def build(cls, args: argparse.Namespace) -> AutoencoderLosses:
        """Load the ImageNet network, and find the teacher's components in the first samples."""
        layers = ImageNetLayers().to(args.device)
        images = first_images(args.seed, TEACHER_SAMPLES).to(args.device)
        return cls(Teacher(layers, images), FeatureDistance(layers, NAME))

    def taught(self, vae: AutoencoderKL, images: Tensor, noise: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the terms with which the encoder learns the teacher's latents and the decoder inverts them.

        Args:
            vae: the autoencoder.
            images: the batch.
            noise: `[N,C,h,w]`, which the decoder learns to tolerate.
        """
        wanted = self.teacher(images)
        noisy = wanted + LATENT_NOISE * self.teacher.spread(wanted) * noise
        reconstruction = vae.decode(noisy).sample.float()
        alignment = self.misalignment(vae.encode(images).latent_dist.mean, wanted)
        return {"alignment": alignment, **seen(self.perceptual, reconstruction, images)}, reconstruction

    def joint(
        self, vae: AutoencoderKL, discriminator: nn.Module | None, images: Tensor, textured: Tensor, noise: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the terms of training encoder and decoder together, and the reconstructions.

        Args:
            vae: the autoencoder.
            discriminator: tells the reconstructions from images; None leaves it out.
            images: the batch.
            textured: `[N]`, 1 for images that the discriminator judges; flat scenes have 0.
            noise: `[N,C,h,w]`, with which the latents are sampled.
        """
        posterior = vae.encode(images).latent_dist
        reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        alignment = self.misalignment(posterior.mean, self.teacher(images))
        terms = seen(self.perceptual, reconstruction, images)
        terms |= {"alignment": ALIGNMENT_WEIGHT * alignment, "KL": KL_WEIGHT * posterior.kl().float().mean()}
        if discriminator is not None:
            realism = discriminator(reconstruction).float().mean(dim=(1, 2, 3))
            terms["adversarial"] = -ADVERSARIAL_WEIGHT * (realism * textured).mean()
        return terms, reconstruction

    def misalignment(self, latents: Tensor, wanted: Tensor) -> Tensor:
        """Return the squared distance of latents from the teacher's; quiet channels count more."""
        return ((latents.float() - wanted).square() / self.teacher.spread(wanted)).mean()


def seen(perceptual: FeatureDistance, reconstruction: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Return what is seen of the difference: the L1 distance and that of the features."""
    with torch.no_grad():
        features = perceptual.features(images)
    distance = perceptual.distance(reconstruction, features).mean()
    return {"L1": F.l1_loss(reconstruction, images), "perceptual": PERCEPTUAL_WEIGHT * distance}


def latent_noise(args: argparse.Namespace, step: int, count: int) -> Tensor:
    """Draw the noise `[count,C,h,w]` of a step's latents."""
    generator = torch.Generator(args.device).manual_seed(args.seed * 1_000_003 + step)
    shape = (count, PIXEL_CHANNELS + FEATURE_CHANNELS, SIZE // FACTOR, SIZE // FACTOR)
    return torch.randn(shape, generator=generator, device=args.device)


def hinge_loss(discriminator: nn.Module, images: Tensor, reconstructions: Tensor, textured: Tensor) -> Tensor:
    """Return the discriminator's hinge loss on the images whose `textured` `[N]` is 1."""
    errors = F.relu(1 - discriminator(images).float()) + F.relu(1 + discriminator(reconstructions).float())
    return (errors.mean(dim=(1, 2, 3)) * textured).mean()


def total_steps(args: argparse.Namespace) -> int:
    """Return the number of steps of all parts."""
    return args.teaching_steps + args.joint_steps + args.adversarial_steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this training."""
    parser.add_argument("--teaching_steps", type=int, default=2_500, help="encoder and decoder apart")
    parser.add_argument("--joint_steps", type=int, default=4_500, help="encoder and decoder together")
    parser.add_argument("--adversarial_steps", type=int, default=1_000, help="also against the discriminator")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--adversarial_learning_rate", type=float, default=2e-4)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--num_workers", type=int, default=1)
