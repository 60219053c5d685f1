"""The miniature's discrete autoencoder, trained on the images of the continuous one.

    python -m miniature.build vq

Its latents are words of a codebook, as in VQGAN (Esser et al., CVPR 2021). Encoder and decoder first train without the
codebook. Then its codes are placed in the features of a sample by k-means, and all three train together. A code that a
window of steps has not used moves to a feature of the batch, so that all of the codebook stays in use.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import VQModel
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from miniature.autoencoder import seen
from miniature.imagenet import NAME, ImageNetLayers
from miniature.measure import as_saved, save
from miniature.mixture import SIZE, first_images, sample_batches
from miniature.training import BETAS, Loop, autocast, cosine_schedule, descend
from srl_utils.metrics.losses import FeatureDistance
from srl_utils.vae.layers import with_compilable_layers

ABOUT = """# The miniature's discrete autoencoder

A `diffusers.VQModel` of {parameters} million parameters for images of 64 px, or another multiple of 4: each 4 x 4 pixels
become one of 512 tokens. Its weights are in float16.

`python -m miniature.build vq` trained it on drawn scenes, dead leaves and augmented crops of scikit-image's training
photographs: first without the codebook, then with it. Settings: {build}.
"""
SETTINGS = ("plain_steps", "joint_steps", "batch_size", "learning_rate", "seed", "torch_compile")
CODES, CODE_DIMENSIONS = 512, 4
COMMITMENT_WEIGHT = 0.25
"""Of the quantiser's loss: of the codes' distance from the features, and the features' from them."""
SAMPLES = 256
"""Images whose features place the codes."""
WINDOW = 50
"""Steps after which codes that were not used are moved."""
Terms = dict[str, Tensor]


def build(args: argparse.Namespace) -> None:
    """Train the autoencoder, measure it, and write it to `args.output_dir`."""
    torch.manual_seed(args.seed)
    save(as_saved(train(args)), args, about=ABOUT, settings=SETTINGS)


def build_autoencoder() -> VQModel:
    """Return the autoencoder with random weights; each word stands for 4 x 4 pixels."""
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=CODE_DIMENSIONS,
        num_vq_embeddings=CODES,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
    )


class CodeUse(nn.Module):
    """Counts how often each code was used since the last window ended."""

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(CODES, dtype=torch.long))

    def count(self, tokens: Tensor) -> None:
        """Add the codes of a batch, whole numbers `[n]`."""
        self.counts += torch.bincount(tokens, minlength=CODES)

    @torch.no_grad()
    def renew(self, codebook: nn.Embedding, features: Tensor, generator: torch.Generator) -> None:
        """Move the codes that were not used to features `[n,D]`, drawn without repetition, and begin a new window."""
        unused = (self.counts == 0).nonzero().flatten()[: len(features)]
        picks = torch.randperm(len(features), generator=generator)[: len(unused)]
        codebook.weight[unused] = features[picks.to(features.device)]
        self.counts.zero_()


def train(args: argparse.Namespace) -> VQModel:
    """Train encoder and decoder, then the codebook with them."""
    vae = build_autoencoder().to(args.device, memory_format=torch.channels_last)
    steps = args.plain_steps + args.joint_steps
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=BETAS)
    schedule, use = cosine_schedule(optimizer, steps), CodeUse().to(args.device)
    parts = {"vae": vae, "optimizer": optimizer, "schedule": schedule, "use": use}
    loop = Loop(args.work_dir / "vq.pt", parts, steps=steps, saving_steps=args.checkpointing_steps)
    losses = DiscreteLosses(FeatureDistance(ImageNetLayers().to(args.device), NAME))
    plain, quantised = losses.plain, losses.quantised
    if args.torch_compile:
        with_compilable_layers(vae)
        plain, quantised = torch.compile(plain), torch.compile(quantised)
    batches = sample_batches(args, loop.step, steps)

    def update(step: int) -> Terms:
        images, _ = next(batches)
        images = images.to(args.device, memory_format=torch.channels_last)
        if step == args.plain_steps:
            place_codes(vae, args)
        with autocast(images.device, compiled=args.torch_compile):
            if step < args.plain_steps:
                terms, features, tokens = *plain(vae, images), None
            else:
                terms, features, tokens = quantised(vae, images)
        descend(vae, optimizer, torch.stack(list(terms.values())).sum())
        schedule.step()
        if tokens is not None:
            use.count(tokens)
            if (step + 1) % WINDOW == 0:
                generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
                use.renew(vae.quantize.embedding, flattened(features), generator)
        return terms

    loop.run(update)
    return vae


class DiscreteLosses:
    """The losses of the autoencoder. Images are `[N,3,SIZE,SIZE]` in [-1,1]; terms are weighted and averaged."""

    def __init__(self, perceptual: FeatureDistance) -> None:
        self.perceptual = perceptual

    def plain(self, vae: VQModel, images: Tensor) -> tuple[Terms, Tensor]:
        """Return the terms without the codebook, and the features `[N,D,h,w]`."""
        features = vae.encode(images).latents
        reconstruction = vae.decode(features, force_not_quantize=True).sample.float()
        return seen(self.perceptual, reconstruction, images), features.detach()

    def quantised(self, vae: VQModel, images: Tensor) -> tuple[Terms, Tensor, Tensor]:
        """Return the terms through the codebook, the features, and the number of each one's code, `[N*h*w]`."""
        features = vae.encode(images).latents.float()
        codes, distance, (_, _, tokens) = vae.quantize(features)
        reconstruction = vae.decode(codes, force_not_quantize=True).sample.float()
        terms = seen(self.perceptual, reconstruction, images)
        return terms | {"quantisation": COMMITMENT_WEIGHT * distance}, features.detach(), tokens


@torch.no_grad()
def place_codes(vae: VQModel, args: argparse.Namespace) -> None:
    """Place the codes at the centres of the features of the first samples."""
    images = first_images(args.seed, SAMPLES).to(args.device)
    features = torch.cat([flattened(vae.encode(batch).latents) for batch in images.split(32)])
    centres, _ = kmeans2(features.cpu().double().numpy(), CODES, minit="++", seed=args.seed)
    vae.quantize.embedding.weight.copy_(torch.from_numpy(centres))


def flattened(features: Tensor) -> Tensor:
    """Return features `[N,D,h,w]` as rows `[N*h*w,D]`."""
    return features.float().permute(0, 2, 3, 1).flatten(0, 2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this training."""
    parser.add_argument("--plain_steps", type=int, default=1_500, help="without the codebook")
    parser.add_argument("--joint_steps", type=int, default=4_500, help="with it")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--num_workers", type=int, default=1)
