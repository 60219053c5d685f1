"""Detect catastrophic overfitting: the encoder withstands only the few steps that it is trained against.

Source: Wong, Rice and Kolter, "Fast is better than free: Revisiting adversarial training", ICLR 2020, section 5.4: within
a few hundred updates, training against one step becomes useless against many, while the training itself looks fine.
"""

from __future__ import annotations

from statistics import fmean

FALL = 1.0
"""dB by which the PSNR of attacked held-out images must have fallen from its best."""
WIDENING = 2.0
"""dB by which its gap to the PSNR of attacked training images must have grown since then."""


class OverfittingGuard:
    """Compares the PSNR of training images under the training's attack with that of held-out images under many steps.

    In a healthy run both rise. If the first rises and the second falls, the training's attack no longer finds what a
    stronger attack finds.
    """

    def __init__(self) -> None:
        self.since_validation: list[float] = []
        self.best = -float("inf")
        self.gap_at_best = 0.0

    def count(self, attacked_psnr: float) -> None:
        """Add the PSNR, in dB, of a step's attacked training images."""
        self.since_validation.append(attacked_psnr)

    def judge(self, validated_psnr: float) -> str | None:
        """Take the PSNR, in dB, of attacked held-out images; return a warning if the encoder overfits, else None."""
        if not self.since_validation:
            return None
        trained, self.since_validation = fmean(self.since_validation), []
        gap = trained - validated_psnr
        if validated_psnr > self.best:
            self.best, self.gap_at_best = validated_psnr, gap
            return None
        if validated_psnr > self.best - FALL or gap < self.gap_at_best + WIDENING:
            return None
        return (
            f"catastrophic overfitting: held-out images under attack fell to {validated_psnr:.2f} dB from "
            f"{self.best:.2f} dB, while the training's own attack finds {trained:.2f} dB; it has too few steps: raise "
            "pgd_steps, or lower learning_rate, and continue from an earlier checkpoint"
        )

    def state_dict(self) -> dict[str, float | list[float]]:
        """Return the counts as JSON values."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float | list[float]]) -> None:
        """Continue from the counts of `state_dict`."""
        vars(self).update(state)
