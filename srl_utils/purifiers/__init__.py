"""Purifiers: changes of images that weaken perturbations, such as a JPEG file or a denoiser.

purifier = purifier_of("resize-0.5+jpeg-75")
purified = purifier(images)                     # [N,3,H,W] in [-1,1]
"""

from srl_utils.purifiers.base import Autoencoder, Purifier, chain
from srl_utils.purifiers.catalogue import (
    LOOP,
    PurifierResources,
    check_purifier,
    known_purifiers,
    purifier_of,
    uses_noise,
    uses_perceptual,
    uses_pipeline,
    uses_vae,
)

__all__ = [
    "LOOP",
    "Autoencoder",
    "Purifier",
    "PurifierResources",
    "chain",
    "check_purifier",
    "known_purifiers",
    "purifier_of",
    "uses_noise",
    "uses_perceptual",
    "uses_pipeline",
    "uses_vae",
]
