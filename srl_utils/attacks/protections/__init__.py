"""Published perturbations that keep diffusion models from using an image, with their authors' settings.

    victim = Victim.of(codec)
    protected = protect(PROTECTIONS["mist-textural"], victim, clean)

Authors give budgets and steps for images in [-1,1] or in [0,1]; here all are in units of a [0,1] image. The settings are
those of the code that each loss names as its source; a setting of a paper that could not be confirmed is marked
UNCONFIRMED. Rounding a protected image to 8 bits may add up to half a level to its perturbation.
"""

from srl_utils.attacks.protections.blurring import BlurGuardConfig
from srl_utils.attacks.protections.making import protect, target_of
from srl_utils.attacks.protections.presets import PROTECTIONS, GlazeConfig, Protection
from srl_utils.attacks.protections.targets import grey, mist_pattern, style_transfer
from srl_utils.attacks.protections.victim import ProtectedBatch, Victim

__all__ = [
    "PROTECTIONS",
    "BlurGuardConfig",
    "GlazeConfig",
    "ProtectedBatch",
    "Protection",
    "Victim",
    "grey",
    "mist_pattern",
    "protect",
    "style_transfer",
    "target_of",
]
