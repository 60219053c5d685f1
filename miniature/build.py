"""Trains the miniature autoencoder on scenes, dead leaves and crops of scikit-image's training photographs.

    python -m miniature.build                  # make miniature

Every sample is a function of (seed, number), so a run that is stopped and started again continues with the
sample it would have seen next. The result in `miniature/weights/vae` is a `diffusers.AutoencoderKL` whose
`scaling_factor` is measured, with `measured.json` and a README made from it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from miniature.measure import measure_scaling_factor, write_measurements
from miniature.scenes import draw_dead_leaves, draw_scene
from srl_utils.checkpoints import write_atomically
from srl_utils.images import from_pil
from srl_utils.photographs import load_photographs

SIZE = 64
LATENT_CHANNELS = 4
# Shares of a batch: photographs teach the statistics that are judged, dead leaves keep a network that sees
# twelve photographs from learning them by heart, scenes are what the miniature diffusion model will draw.
SHARES = {"scene": 0.35, "dead leaves": 0.2, "photograph": 0.45}
# Weak, so that latents keep the detail (and the weakness to attack) of full-size autoencoders.
KL_WEIGHT = 1e-7
EMA_DECAY = 0.999
WARMUP_STEPS = 200


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    state_path = args.work_dir / "state.pt"
    vae = small_autoencoder().to(args.device, memory_format=torch.channels_last)
    ema = EMAModel(vae.parameters(), decay=EMA_DECAY)
    ema.to(args.device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99))
    step = load_state(state_path, vae, ema, optimizer)
    train(args, vae, ema, optimizer, step, state_path)
    ema.copy_to(vae.parameters())
    vae.to(memory_format=torch.contiguous_format).eval()  # safetensors takes no other format
    vae.register_to_config(scaling_factor=measure_scaling_factor(vae))
    vae.save_pretrained(args.output_dir)
    write_measurements(vae, args.output_dir, build={"steps": args.steps, "batch_size": args.batch_size,
                                                    "learning_rate": args.learning_rate, "seed": args.seed})  # fmt: skip


def small_autoencoder() -> AutoencoderKL:
    """Down-samples by 4; no attention, so that it serves any image size at a cost linear in the pixels.

    Groups of one or two channels normalise each feature by its own contrast, so that faint structure is encoded
    as strongly as plain structure; with larger groups the same network was harder to attack.
    """
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=32,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def train(
    args: argparse.Namespace,
    vae: AutoencoderKL,
    ema: EMAModel,
    optimizer: torch.optim.Optimizer,
    first_step: int,
    state_path: Path,
) -> None:
    """Runs steps `first_step` to `args.steps`, saving the state every `args.checkpointing_steps`."""
    loss_of = torch.compile(autoencoder_loss) if args.torch_compile else autoencoder_loss
    batches = sample_batches(args, first_step)
    started = time.time()
    for step, images in enumerate(batches, start=first_step):
        learning_rate = args.learning_rate * learning_rate_factor(step, args.steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        images = images.to(args.device, memory_format=torch.channels_last)
        generator = torch.Generator(args.device).manual_seed(args.seed * 1_000_003 + step)
        latents = (len(images), LATENT_CHANNELS, SIZE // 4, SIZE // 4)
        noise = torch.randn(latents, generator=generator, device=args.device)
        with torch.autocast(images.device.type, torch.bfloat16):
            reconstruction_loss, kl = loss_of(vae, images, noise)
        (reconstruction_loss + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(vae.parameters())
        done = step + 1
        if done % 100 == 0:
            seconds = (time.time() - started) / (done - first_step)
            print(f"step {done}: L1 {reconstruction_loss.item():.4f} KL {kl.item():.0f} {seconds:.3f} s/step", flush=True)
        if done % args.checkpointing_steps == 0 or done == args.steps:
            save_state(state_path, vae, ema, optimizer, done)


def autoencoder_loss(vae: AutoencoderKL, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """L1 between images `[N,3,H,W]` and reconstructions from sampled latents, and the mean KL divergence."""
    posterior = vae.encode(images).latent_dist
    reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample
    return F.l1_loss(reconstruction.float(), images), posterior.kl().float().mean()


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    return min((step + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * step / steps)))


# --- samples --------------------------------------------------------------------------------------------


class Mixture(Dataset):
    """Sample `i` of the endless mixture, `[3,SIZE,SIZE]` in [-1,1]: a function of (seed, i) alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.photographs = load_photographs("train")

    def __getitem__(self, index: int) -> Tensor:
        rng = np.random.default_rng((self.seed, index, 2))
        kind = rng.choice(list(SHARES), p=list(SHARES.values()))
        if kind == "scene":
            return from_pil(draw_scene(self.seed, index, size=SIZE).image)
        if kind == "dead leaves":
            return from_pil(draw_dead_leaves(self.seed, index, size=SIZE))
        photograph = self.photographs[rng.integers(len(self.photographs))]
        return from_pil(augmented_crop(rng, photograph))


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


def sample_batches(args: argparse.Namespace, first_step: int) -> Iterator[Tensor]:
    remaining = range(first_step * args.batch_size, args.steps * args.batch_size)
    return iter(
        DataLoader(Mixture(args.seed), args.batch_size, sampler=remaining, num_workers=args.num_workers)
    )


# --- state ----------------------------------------------------------------------------------------------


def save_state(
    path: Path, vae: AutoencoderKL, ema: EMAModel, optimizer: torch.optim.Optimizer, step: int
) -> None:
    state = {
        "vae": vae.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
    }
    write_atomically(path, lambda aside: torch.save(state, aside))


def load_state(path: Path, vae: AutoencoderKL, ema: EMAModel, optimizer: torch.optim.Optimizer) -> int:
    """Continues from `path` where it exists; returns the number of steps already made."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    vae.load_state_dict(state["vae"])
    ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"continuing after step {state['step']}")
    return state["step"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("miniature/weights/vae"))
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/miniature"), help="state for resuming")
    parser.add_argument("--steps", type=int, default=5_500)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--torch_compile", action="store_true", help="needs a C++ compiler on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
