"""Center smoothing (arXiv 2102.09701) by hand, for linear maps of Gaussian noise."""

from __future__ import annotations

import math
from statistics import NormalDist

from scipy.stats import ncx2

FAILURE = 0.005
MARGIN = 1.75
"""Delta over the error of its estimate, as this project chose it."""


def quantile(samples: int, radius: float) -> float:
    """Return which quantile of the distances bounds the move within `radius`, in units of the noise (algorithm 2).

    The centre's ball holds 1/2 + Delta of the outputs, where the error of an estimate is sqrt(ln(2/alpha) / 2n). A move
    of the input shifts this probability to Phi(Phi^-1(p) + radius); one side of an estimate's error is added.
    """
    delta = MARGIN * math.sqrt(math.log(2 / FAILURE) / (2 * samples))
    normal = NormalDist()
    return normal.cdf(normal.inv_cdf(0.5 + delta) + radius) + math.sqrt(math.log(1 / FAILURE) / (2 * samples))


def linear_bound(slope: float, dimensions: int, offset: float, share: float) -> float:
    """Return 1 + beta = 3 times the `share`-quantile of |slope (z - c)|, z normal and c of the length `offset`."""
    return 3 * slope * math.sqrt(ncx2.ppf(share, dimensions, offset**2))
