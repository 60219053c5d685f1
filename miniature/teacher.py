"""What the autoencoder's latents are made to hold: principal components of pixels and of features.

Latent diffusion's autoencoders inherit the weakness of their perceptual loss: a change that no eye sees moves the
features of an ImageNet network far, and the latents with them. That takes millions of images to arise by itself. Here the
encoder is aligned with such features outright, as in VA-VAE (Yao et al., "Reconstruction vs. Generation", CVPR 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

from miniature.imagenet import ImageNetLayers

FACTOR = 8
"""Pixels of an image for each latent, horizontally and vertically."""
PIXEL_CHANNELS, FEATURE_CHANNELS = 4, 8
PIXEL_SCALE = 0.25
"""Standard deviation of the channels that hold pixels. A small change of the image cannot move these far."""


class PrincipalComponents(nn.Module):
    """The strongest principal components of feature maps, each scaled to variance 1.

    Args:
        maps: `[N,C,h,w]`, from which they are found.
        count: number of components.
    """

    mean: Tensor
    projection: Tensor

    def __init__(self, maps: Tensor, count: int) -> None:
        super().__init__()
        samples = maps.transpose(0, 1).flatten(1)
        variances, directions = torch.linalg.eigh(torch.cov(samples))
        self.register_buffer("mean", samples.mean(dim=1).view(-1, 1, 1))
        self.register_buffer("projection", (directions[:, -count:] / variances[-count:].sqrt()).T)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the components `[N,count,h,w]` of maps `[N,C,h,w]`."""
        return torch.einsum("kc,nchw->nkhw", self.projection, maps - self.mean)


class Teacher(nn.Module):
    """Maps images to the latents that the encoder imitates: pixels in the first channels, ImageNet features in the others.

    Args:
        layers: the network of the features.
        images: `[N,3,H,W]` in [-1,1], from which the components are found.
    """

    def __init__(self, layers: ImageNetLayers, images: Tensor) -> None:
        super().__init__()
        self.layers = layers
        self.pixels = PrincipalComponents(pixel_unshuffle(images, FACTOR), PIXEL_CHANNELS)
        self.features = PrincipalComponents(layers(images)[-1], FEATURE_CHANNELS)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return latents `[N,12,H/8,W/8]` of images `[N,3,H,W]` in [-1,1]."""
        pixels = PIXEL_SCALE * self.pixels(pixel_unshuffle(images, FACTOR))
        return torch.cat([pixels, self.features(self.layers(images)[-1])], dim=1)

    def spread(self, latents: Tensor) -> Tensor:
        """Return the standard deviation of each channel, shaped for `latents`."""
        channels = torch.ones(latents.shape[1], 1, 1, device=latents.device)
        channels[:PIXEL_CHANNELS] = PIXEL_SCALE
        return channels
