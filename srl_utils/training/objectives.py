"""The objectives of a training: what each attacks, decodes and keeps in place, one row of `OBJECTIVES` each.

`srl_utils/training/step.py` has the formulas. The flags, the arithmetic of a step and the step itself all read this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TERMS = ("loss", "originality", "latent", "mse", "lpips", "attacked_psnr")
"""Values of a batch, in this order: mean loss, its four unweighted terms, and PSNR under attack in dB."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What tells one objective from another.

    Attributes:
        victim: the encoder that the attack differentiates through, which is the one in training or its frozen original.
            None without an attack.
        attacks_latents: whether every attack maximises the distance of the latents. Otherwise a share of them does, and
            the others maximise the reconstruction loss.
        anchor: the encoder whose latents of clean images those of attacked images should keep.
        decodes: the images whose reconstructions are in the loss. Transformed ones are decoded from transformed latents.
            None if nothing is decoded.
        fixed_latent_weight: beta, if the objective leaves no choice.
    """

    victim: Literal["trained", "original"] | None = "trained"
    attacks_latents: bool = False
    anchor: Literal["trained", "original"] = "original"
    decodes: Literal["attacked", "clean", "transformed"] | None = "attacked"
    fixed_latent_weight: float | None = None

    @property
    def terms(self) -> tuple[str, ...]:
        """Return those of `TERMS` that the objective has.

        The PSNR is under an attack on the encoder in training, so that it compares with the validation's.
        """
        measured = {
            "latent": self.victim is not None,
            "mse": self.decodes is not None,
            "lpips": self.decodes is not None,
            "attacked_psnr": self.decodes == "attacked" and self.victim == "trained",
        }
        return tuple(name for name in TERMS if measured.get(name, True))

    def latent_weight(self, asked: float) -> float:
        """Return beta, the weight of the distance of attacked latents, if `asked` is the user's."""
        return asked if self.fixed_latent_weight is None else self.fixed_latent_weight

    def latent_share(self, asked: float) -> float:
        """Return the share of the images that is attacked on its latents, if `asked` is the user's."""
        if self.victim is None:
            return 0.0
        return 1.0 if self.attacks_latents else asked


OBJECTIVES = {
    "srl": Objective(),
    "purify": Objective(victim="original"),
    "feature": Objective(attacks_latents=True, decodes=None, fixed_latent_weight=1.0),
    "trades": Objective(attacks_latents=True, anchor="trained", decodes="clean"),
    "equivariance": Objective(victim=None, decodes="transformed", fixed_latent_weight=0.0),
}
"""The objectives by name."""
