"""An attack by random search, for objectives without a gradient or with one that misleads; knows no VAE.

Source: Square attack, Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random
search", ECCV 2020, the L-infinity version.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from srl_utils.attacks.draws import Generators, draw, draw_signs
from srl_utils.attacks.gradient import BestIterate, Budget, Objective

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After how many of 10000 queries the squares' share of the image is halved (paper, section on the L-infinity attack);
for another number of queries they are scaled, as in the authors' code."""


@dataclass(frozen=True, kw_only=True)
class SquareConfig(Budget):
    """Budget and length of the Square attack; an l2 ball is refused."""

    num_queries: int = 5000
    """Evaluations of the objective for every image, that of the start included."""
    initial_share: float = 0.8
    """Of the image, in the first square; in (0,1].

    The paper takes 0.05 for ordinary classifiers, whose decision a small square can change. 0.8 is what AutoAttack
    takes for robust ones, and the choice for an error of a whole image, to which every part of it contributes: on the
    embedded autoencoder it reaches more than 0.3 and 0.05 do, with 100 queries as with 500.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm != "linf" or self.num_queries < 0 or not 0 < self.initial_share <= 1:
            raise ValueError(f"{self} is none that the Square attack knows")

    def side_at(self, query: int, height: int, width: int) -> int:
        """Side in pixels of the square of query number `query`, the first after the start being 0."""
        passed = query * 10_000 // self.num_queries
        share = self.initial_share / 2 ** sum(passed > halving for halving in HALVINGS)
        return min(max(round(math.sqrt(share * height * width)), 1), height, width)


def square_attack(
    objective: Objective, clean: Tensor, config: SquareConfig, *, generators: Generators | None
) -> Tensor:
    """Images at the border of the ball around `clean` that make `objective` large, found without its gradient.

    Starts from vertical stripes and sets one square after the other to one colour change at the border of the ball;
    an image keeps a square that raises its value.

    Args:
        objective: value per image, to be maximised; called under `torch.no_grad`.
        clean: `[N,3,H,W]` float in [-1,1].
        config: budget and number of queries.
        generators: one CPU generator per image, so that what is tried on an image does not depend on its batch.

    Returns:
        `[N,3,H,W]`, in [-1,1]. With 0 queries or an epsilon of 0, `clean` itself.

    Raises:
        ValueError: unless there is one generator per image.
    """
    clean = clean.detach()
    if config.num_queries == 0 or config.epsilon == 0:
        return clean
    height, width = clean.shape[2:]
    best = BestIterate(clean)
    with torch.no_grad():
        stripes = config.project(clean + config.radius * draw_signs((3, 1, width), generators, like=clean), clean)
        best.update(stripes, objective(stripes))
        for query in range(config.num_queries - 1):
            square = draw_square(config.side_at(query, height, width), generators, like=clean)
            change = config.radius * draw_signs((3, 1, 1), generators, like=clean)
            tried = torch.where(square, config.project(clean + change, clean), best.images)
            best.update(tried, objective(tried))
    return best.images


def draw_square(side: int, generators: Generators | None, *, like: Tensor) -> Tensor:
    """`[N,1,H,W]` bool, true in one square of each image, which lies anywhere with even chances."""
    height, width = like.shape[2:]
    top, left = draw(torch.rand, (2, 1, 1), generators, like=like).split(1, dim=1)
    rows = torch.arange(height, device=like.device)[:, None] - (top * (height - side + 1)).floor()
    columns = torch.arange(width, device=like.device) - (left * (width - side + 1)).floor()
    return (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
