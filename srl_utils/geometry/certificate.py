"""Center smoothing: a certificate that no small change of an input moves a smoothed output far.

The smoothed output is the centre of a small ball that holds half of the outputs for noisy inputs. The certificate needs
no gradient and no knowledge of the network. Source: Kumar and Goldstein, "Center Smoothing: Certified Robustness for
Networks with Structured Outputs", NeurIPS 2021 (arXiv 2102.09701), algorithms 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

MISS = 0.005
"""Probability with which each of the two estimates of a certificate may fail; that of the paper's experiments."""
BALL_FACTOR = 3
"""1 + beta: the point with the smallest median distance is the centre of a ball at most twice (beta) as large as need be."""
MARGIN = 1.75
"""Delta over the error of its estimate. A larger one abstains less often and certifies larger distances."""
CANDIDATES = 30
"""Outputs among which the centre is chosen, as in the authors' code for large outputs."""
FEWEST_SAMPLES = 100
"""With fewer samples, no quantile is certain enough for a certificate."""

Function = Callable[[Tensor], Tensor]
"""Maps `[N,...]` to `[N,...]`; its distance is the Euclidean one."""


@dataclass(frozen=True, kw_only=True)
class CenterSmoothing:
    """How an output is smoothed and certified.

    Attributes:
        sigma: standard deviation of the noise, in units of the input.
        samples: noisy inputs of each of the three estimates.
        batch_size: noisy inputs at a time.

    Raises:
        ValueError: if sigma is not positive or if there are fewer than `FEWEST_SAMPLES` samples.
    """

    sigma: float
    samples: int = 500
    batch_size: int = 50

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(f"sigma must be positive, got {self.sigma}")
        if self.samples < FEWEST_SAMPLES:
            raise ValueError(f"a certificate needs at least {FEWEST_SAMPLES} samples, got {self.samples}")

    @property
    def confidence(self) -> float:
        """Return the probability with which a certificate holds."""
        return 1 - 2 * MISS

    @property
    def _error(self) -> float:
        """Return how far an estimated probability may be from the true one (Hoeffding's bound, both sides)."""
        return math.sqrt(math.log(2 / MISS) / (2 * self.samples))

    @property
    def _delta(self) -> float:
        """Return Delta: the ball around the centre may hold so much less than half of the outputs."""
        return MARGIN * self._error

    @torch.no_grad()
    def center(self, function: Function, point: Tensor, generator: torch.Generator) -> Tensor | None:
        """Return the smoothed output at a point, `[1,...]`, or None if it abstains (algorithm 1).

        Args:
            function: what is smoothed.
            point: `[1,...]`.
            generator: of the CPU, for the noise.
        """
        candidates = function(self._noisy(point, CANDIDATES, generator))
        medians = torch.cat(
            [_distances(outputs, candidates) for outputs in self._outputs(function, point, generator)]
        ).median(dim=0)
        chosen = int(medians.values.argmin())
        center = candidates[chosen : chosen + 1]
        inside = self._distances(function, point, center, generator) <= medians.values[chosen]
        held = inside.double().mean().item() - self._error
        return center if 0.5 - held <= self._delta else None

    @torch.no_grad()
    def bounds(
        self, function: Function, point: Tensor, center: Tensor, radii: list[float], generator: torch.Generator
    ) -> list[float | None]:
        """Return for each radius how far the smoothed output can move from `center` (algorithm 2).

        If the L2 distance of another point from this one is at most the radius, its smoothed output is within the bound,
        with the probability `confidence`. It is None where the samples are too few for a certificate.

        Args:
            function: what is smoothed.
            point: `[1,...]`.
            center: its smoothed output, `[1,...]`.
            radii: in units of the input.
            generator: of the CPU, for the noise.
        """
        distances = self._distances(function, point, center, generator).sort().values
        return [self._bound(distances, radius) for radius in radii]

    def _bound(self, distances: Tensor, radius: float) -> float | None:
        """Return the bound from sorted distances `[samples]`; they hold its quantile with an error on one side."""
        normal = NormalDist()
        probability = normal.cdf(normal.inv_cdf(0.5 + self._delta) + radius / self.sigma)
        quantile = probability + math.sqrt(math.log(1 / MISS) / (2 * len(distances)))
        place = math.ceil(quantile * len(distances))
        return BALL_FACTOR * distances[place - 1].item() if place <= len(distances) else None

    def _distances(self, function: Function, point: Tensor, center: Tensor, generator: torch.Generator) -> Tensor:
        """Return the distances of new outputs from the centre, `[samples]`."""
        return torch.cat([_distances(outputs, center)[:, 0] for outputs in self._outputs(function, point, generator)])

    def _outputs(self, function: Function, point: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield the outputs of noisy inputs in batches; together they are as many as `samples`."""
        for start in range(0, self.samples, self.batch_size):
            yield function(self._noisy(point, min(self.batch_size, self.samples - start), generator))

    def _noisy(self, point: Tensor, count: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn((count, *point.shape[1:]), generator=generator).to(point)
        return point + self.sigma * noise


def _distances(outputs: Tensor, centers: Tensor) -> Tensor:
    """Return the Euclidean distance of each output `[N,...]` from each centre `[K,...]`, `[N,K]`.

    cdist subtracts, where the quicker way by products rounds distances of near points to anything.
    """
    return torch.cdist(outputs.flatten(1), centers.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
