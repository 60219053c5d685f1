"""The standard protocols: fixed images, attacks and budget, so that the rows of two VAEs can be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from srl_utils.evaluation.catalogue import AttackResources, select
from srl_utils.evaluation.cli.running import digest
from srl_utils.evaluation.perturbations import NO_THREAT, Perturbation
from srl_utils.evaluation.results import Setting
from srl_utils.evaluation.sanity import CheckSettings
from srl_utils.evaluation.study import THREAT_MODELS
from srl_utils.evaluation.tasks.base import DRIFT
from srl_utils.images.datasets import load_validation_images
from srl_utils.images.pixels import parse_pixel_distance
from srl_utils.images.sources import DataSource
from srl_utils.zoo.describing import described

QUALITIES = ("psnr", "ssim")
"""Metrics under every attack; `drift` is of clean images alone, and needs latents of the base's shape."""


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
        """Return a digest of all that the numbers depend on; rows with another one are of another protocol.

        It covers what the attacks do, and not only their names: steps, step sizes, severities and objectives.
        """
        flags = {name: value for name, value in self.flags(Path()).items() if name not in ("data_dir", "batch_size")}
        settings = {
            "flags": flags,
            "images": self.image_digest,
            "attacks": [described(perturbation) for perturbation in self.perturbations],
            "checks": described(self.check_settings) if self.check_images else None,
        }
        return digest(json.dumps(settings, sort_keys=True).encode())

    @property
    def perturbations(self) -> list[Perturbation]:
        """Return what is done to the images; attacks that need a target or a denoiser are left out."""
        return select(self.attacks, [self.check_settings.epsilon], AttackResources()).perturbations

    @property
    def check_settings(self) -> CheckSettings:
        """Return the settings of the robustness checks."""
        return CheckSettings(epsilon=parse_pixel_distance(self.epsilon))

    @property
    def settings(self) -> set[Setting]:
        """Return what each row holds a mean of, beside the drift."""
        return {
            Setting(done.name, done.objective, threat_model, done.epsilon, metric)
            for done in self.perturbations
            for threat_model in (THREAT_MODELS if done.adversarial else (NO_THREAT,))
            for metric in QUALITIES
        }

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
            "attacks": self.attacks, "epsilons": [self.epsilon], "threat_models": THREAT_MODELS,
            "metrics": [*QUALITIES, DRIFT], "mixed_precision": "no", "seed": 0,
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
        images="16 crops of three photographs of scikit-image, and 16 drawn scenes",
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
"""By name. `zoo/images/embedded` holds the 16 tiles that the evaluation cuts from the three held-out photographs of
`scikit-image` at 64 px, and the first 16 scenes of `python -m miniature.draw`."""
