"""The miniature autoencoder, trained on scenes, dead leaves and crops of scikit-image's training photographs.

    python -m miniature.build vae

Every sample is a function of (seed, number), so a run that is stopped and started again continues with the
sample it would have seen next. The result in `miniature/weights/vae` is a `diffusers.AutoencoderKL` whose
`scaling_factor` is measured, with `measured.json` and a README made from it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image, ImageEnhance
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from miniature.measure import measure_scaling_factor, write_measurements
from miniature.scenes import draw_dead_leaves, draw_scene
from srl_utils.files import write_atomically
from srl_utils.images.photographs import load_photographs
from srl_utils.images.pixels import from_pil
from srl_utils.vae.layers import with_compilable_layers

SIZE = 64
PHOTOGRAPH_SIDE = 512  # pixels, of the shorter side: crops of down to SIZE show them at their full resolution
# Shares of a batch: photographs teach the statistics that are judged, dead leaves keep a network that sees
# twelve photographs from learning them by heart, scenes are what the miniature diffusion model will draw.
SHARES = {"scene": 0.4, "dead leaves": 0.15, "photograph": 0.45}
# Weak, so that latents keep the detail (and the weakness to attack) of full-size autoencoders.
KL_WEIGHT = 1e-7
ADVERSARIAL_WEIGHT = 0.05
WARMUP_STEPS = 200


def build(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    state = State.begin(args.device, args.architecture)
    state_path = args.work_dir / "state.pt"
    state.load(state_path)
    train(args, state, state_path)
    vae = state.vae.to(memory_format=torch.contiguous_format).eval()  # safetensors takes no other format
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


# Both down-sample by 4, and groups of 4 to 8 channels are normalised together, as in the SD-VAE.
ARCHITECTURES: dict[str, dict[str, object]] = {
    # What ships. No attention, so that it serves any image size at a cost linear in the pixels.
    "small": {
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "latent_channels": 8,
        "norm_num_groups": 8,
        "mid_block_add_attention": False,
    },
    # Half the latents and a deeper network with attention, to see whether what holds for one holds for another.
    "attention": {
        "block_out_channels": (32, 64, 96),
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 16,
        "mid_block_add_attention": True,
    },
}


def build_autoencoder(architecture: str) -> AutoencoderKL:
    """One of `ARCHITECTURES`, with random weights."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=SIZE,
        **ARCHITECTURES[architecture],
    )


def patch_discriminator() -> nn.Sequential:
    """Tells for each 38 px patch whether it is of an image or of a reconstruction (Isola et al., CVPR 2017)."""
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


@dataclass
class State:
    """Everything that the next step depends on."""

    vae: AutoencoderKL
    discriminator: nn.Sequential
    optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer
    step: int = 0

    @classmethod
    def begin(cls, device: str, architecture: str) -> State:
        vae = build_autoencoder(architecture).to(device, memory_format=torch.channels_last)
        discriminator = patch_discriminator().to(device, memory_format=torch.channels_last)
        return cls(
            vae,
            discriminator,
            torch.optim.AdamW(vae.parameters()),
            torch.optim.AdamW(discriminator.parameters(), lr=4e-4, betas=(0.5, 0.9)),
        )

    def save(self, path: Path) -> None:
        state = {name: part.state_dict() for name, part in self._parts()} | {"step": self.step}
        write_atomically(path, lambda aside: torch.save(state, aside))

    def load(self, path: Path) -> None:
        """Continues from `path` where it exists."""
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        for name, part in self._parts():
            part.load_state_dict(state[name])
        self.step = state["step"]
        print(f"continuing after step {self.step}")

    def _parts(self) -> Iterator[tuple[str, nn.Module | torch.optim.Optimizer]]:
        return ((name, part) for name, part in vars(self).items() if name != "step")


def train(args: argparse.Namespace, state: State, state_path: Path) -> None:
    """First for the pixels alone, annealed, then against the discriminator as well, at a constant rate.

    That is how the autoencoders of latent diffusion models are trained (Rombach et al., CVPR 2022, section 3.1).
    The pixel loss alone gives a smoother network, which hardly suffers from an attack.
    """
    vae_loss, discriminator_loss = autoencoder_loss, hinge_loss
    if args.torch_compile:
        with_compilable_layers(state.vae)
        vae_loss, discriminator_loss = torch.compile(autoencoder_loss), torch.compile(hinge_loss)
    first_step, started = state.step, time.time()
    for images, textured in sample_batches(args, first_step):
        adversarial = state.step >= args.pixel_steps
        state.optimizer.param_groups[0].update(schedule(args, state.step))
        images = images.to(args.device, memory_format=torch.channels_last)
        textured = textured.to(args.device, torch.float32)
        generator = torch.Generator(args.device).manual_seed(args.seed * 1_000_003 + state.step)
        noise = torch.randn(
            (len(images), state.vae.config.latent_channels, SIZE // 4, SIZE // 4),
            generator=generator,
            device=args.device,
        )
        judge = state.discriminator.requires_grad_(False) if adversarial else None
        with torch.autocast(images.device.type, torch.bfloat16):
            loss, pixel_loss, reconstruction = vae_loss(state.vae, judge, images, textured, noise)
        update(state.vae, state.optimizer, loss)
        if adversarial:
            state.discriminator.requires_grad_(True)
            with torch.autocast(images.device.type, torch.bfloat16):
                loss = discriminator_loss(state.discriminator, images, reconstruction.detach(), textured)
            update(state.discriminator, state.discriminator_optimizer, loss)
        state.step += 1
        if state.step % 100 == 0:
            seconds = (time.time() - started) / (state.step - first_step)
            print(
                f"step {state.step}: L1 {pixel_loss.item():.4f} loss {loss.item():.4f} {seconds:.3f} s/step", flush=True
            )
        if state.step % args.checkpointing_steps == 0 or state.step == total_steps(args):
            state.save(state_path)


def update(module: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def autoencoder_loss(
    vae: AutoencoderKL, discriminator: nn.Module | None, images: Tensor, textured: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """L1 and KL divergence of reconstructions from sampled latents, and what gives them away to `discriminator`.

    Returns the loss, its L1 term, and the reconstructions `[N,3,H,W]`. Only samples that are `textured` (1, else 0)
    are shown to the discriminator: flat scenes have nothing for it to judge.
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
    """Of the discriminator, on the samples that are `textured`."""
    errors = F.relu(1 - discriminator(images).float()) + F.relu(1 + discriminator(reconstructions).float())
    return (errors.mean(dim=(1, 2, 3)) * textured).mean()


def schedule(args: argparse.Namespace, step: int) -> dict[str, object]:
    """Settings of the autoencoder's AdamW: warm-up and a cosine to zero, then constant."""
    if step >= args.pixel_steps:
        return {"lr": args.adversarial_learning_rate, "betas": (0.5, 0.9)}
    cosine = 0.5 * (1 + math.cos(math.pi * step / args.pixel_steps))
    return {"lr": args.learning_rate * min((step + 1) / WARMUP_STEPS, cosine), "betas": (0.9, 0.99)}


def total_steps(args: argparse.Namespace) -> int:
    return args.pixel_steps + args.adversarial_steps


# --- samples --------------------------------------------------------------------------------------------


class Mixture(Dataset):
    """Sample `i` of the endless mixture: a function of (seed, i) alone.

    An image `[3,SIZE,SIZE]` in [-1,1], and 0.0 for a scene or 1.0 for what has texture.
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
    """A crop at a random scale, turned, mirrored and recoloured: twelve photographs must go a long way."""
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
    remaining = range(first_step * args.batch_size, total_steps(args) * args.batch_size)
    return iter(DataLoader(Mixture(args.seed), args.batch_size, sampler=remaining, num_workers=args.num_workers))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="small")
    parser.add_argument("--pixel_steps", type=int, default=5_000)
    parser.add_argument("--adversarial_steps", type=int, default=1_200)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--adversarial_learning_rate", type=float, default=2e-4)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--num_workers", type=int, default=1)
