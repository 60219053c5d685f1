"""The standard protocols: fixed images, attacks and budget, so that the rows of two VAEs can be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from srl_utils.evaluation.catalogue import expanded
from srl_utils.evaluation.cli.running import digest
from srl_utils.images.datasets import load_validation_images
from srl_utils.images.sources import DataSource


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What every VAE of a table is measured by.

    Attributes:
        title: of its table.
        images: what the images are, for readers.
        resolution: side of the images in pixels.
        num_images: number of images.
        batch_size: images attacked at a time; no value depends on it.
        image_digest: of the images' pixels; None if the first submitted row decides.
        folder: the images, inside the zoo; None if they are a dataset's.
        dataset: flags of the evaluation that name a dataset.
        attacks: names of attacks and presets.
        epsilon: budget of the attacks in units of a [0,1] image.
        check_images: images of the robustness checks; 0 leaves them out.
    """

    title: str
    images: str
    resolution: int
    num_images: int
    batch_size: int
    image_digest: str | None
    folder: str | None = None
    dataset: Mapping[str, Any] = field(default_factory=dict)
    attacks: tuple[str, ...] = ("strong",)
    epsilon: str = "8/255"
    check_images: int = 2

    @property
    def fingerprint(self) -> str:
        """Return a digest of all that the numbers depend on; rows with another one are of another protocol."""
        settings = {
            name: value for name, value in asdict(self).items() if name not in ("title", "images", "batch_size")
        }
        return digest(json.dumps({**settings, "attacks": expanded(self.attacks)}, sort_keys=True).encode())

    @property
    def quick(self) -> Protocol:
        """Return the protocol of a first try: two images and a short attack."""
        return replace(self, num_images=2, image_digest=None, attacks=("clean", "pgd-2"), check_images=0)

    def flags(self, zoo: Path) -> dict[str, Any]:
        """Return the flags of the evaluation, without VAEs and output folder."""
        data = self.dataset if self.folder is None else {"data_dir": str(zoo / self.folder)}
        checks = {"num_check_images": self.check_images} if self.check_images else {"no_checks": True}
        return {
            **data, **checks, "resolution": self.resolution, "num_images": self.num_images, "batch_size": self.batch_size,
            "attacks": self.attacks, "epsilons": [self.epsilon], "metrics": ["psnr", "ssim", "drift"],
            "mixed_precision": "no", "seed": 0,
        }  # fmt: skip

    def load_images(self, zoo: Path) -> Tensor:
        """Return the images, `[n,3,R,R]` in [-1,1], as the evaluation loads them.

        Raises:
            UserError: if they cannot be read.
        """
        flags = self.flags(zoo)
        source = DataSource(
            dataset_name=flags.get("dataset_name"),
            validation_data_dir=flags.get("data_dir"),
            validation_split=flags.get("split"),
            streaming=flags.get("streaming", False),
        )
        return load_validation_images(source, num_images=self.num_images, resolution=self.resolution).images


def digest_of(images: Tensor) -> str:
    """Return the digest of the pixels of images `[n,3,R,R]`: 16 hexadecimal digits."""
    return digest(images.numpy().tobytes())


PROTOCOLS = {
    "embedded": Protocol(
        title="Embedded VAEs, 64 px",
        images="16 held-out photographs of scikit-image and 16 scenes",
        resolution=64,
        num_images=32,
        batch_size=16,
        image_digest="8e297f23b5a9d1c2",
        folder="images/embedded",
    ),
    "full": Protocol(
        title="Full-size VAEs, 256 px",
        images="64 images of COCO's validation split",
        resolution=256,
        num_images=64,
        batch_size=8,
        image_digest=None,
        dataset={"dataset_name": "detection-datasets/coco", "split": "val", "streaming": True},
    ),
}
"""By name. `zoo/images/embedded` holds the 16 held-out tiles that the evaluation takes of `scikit-image` at 64 px, and
the first 16 scenes of `python -m miniature.draw`."""
