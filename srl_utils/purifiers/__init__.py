"""Purifiers: changes of images that weaken perturbations, such as a JPEG file or a denoiser.

purifier = purifier_of("resize-0.5+jpeg-75")
purified = purifier(images)                     # [N,3,H,W] in [-1,1]
"""

from srl_utils.purifiers.base import Purifier, chain
from srl_utils.purifiers.catalogue import PurifierResources, known_purifiers, purifier_of

__all__ = ["Purifier", "PurifierResources", "chain", "known_purifiers", "purifier_of"]
