"""An attack by random search, for objectives without a gradient or with a misleading one.

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
"""Queries, of 10000, after which the squares' share of the image is halved (paper, section on the L-infinity attack).
For another number of queries they are scaled, as in the authors' code."""


@dataclass(frozen=True, kw_only=True)
class SquareConfig(Budget):
    """Budget and length of the Square attack.

    Attributes:
        num_queries: calls of the objective, the start included.
        initial_share: share of the image that the first square covers, in (0,1]. The paper takes 0.05 for ordinary
            classifiers, AutoAttack 0.8 for robust ones. An error of the whole image needs large squares: on the
            embedded autoencoder 0.8 reaches more than 0.3 and 0.05, with 100 and with 500 queries.

    Raises:
        ValueError: if the budget is invalid (see `Budget`) or not `linf`, if `num_queries` is negative, or if
            `initial_share` is not in (0,1].
    """

    num_queries: int = 5000
    initial_share: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm != "linf":
            raise ValueError(f"norm must be 'linf' for the Square attack, got '{self.norm}'")
        if self.num_queries < 0:
            raise ValueError(f"num_queries must be at least 0, got {self.num_queries}")
        if not 0 < self.initial_share <= 1:
            raise ValueError(f"initial_share must be above 0 and at most 1, got {self.initial_share}")

    def side_at(self, query: int, height: int, width: int) -> int:
        """Return the side in pixels of the square of query number `query`, counted from 0 after the start."""
        passed = query * 10_000 // self.num_queries
        share = self.initial_share / 2 ** sum(passed > halving for halving in HALVINGS)
        return min(max(round(math.sqrt(share * height * width)), 1), height, width)


def square_attack(
    objective: Objective, clean: Tensor, config: SquareConfig, *, generators: Generators | None = None
) -> Tensor:
    """Return images on the border of the ball around `clean` that make `objective` large, found without its gradient.

    The attack starts from vertical stripes. Each query changes one square of the image by one colour on the ball's
    border. An image keeps the square if its value rises.

    Args:
        objective: returns one value per image, to be maximised; called under `torch.no_grad`.
        clean: `[N,3,H,W]`, or clips `[N,3,T,H,W]`, float in [-1,1].
        config: budget and number of queries.
        generators: one CPU generator per image, so that its squares do not depend on the batch. None draws from
            PyTorch's global generator.

    Returns:
        `[N,3,H,W]`, in [-1,1]. With 0 queries or an epsilon of 0, `clean` itself.

    Raises:
        ValueError: if the number of generators is not the number of images.
    """
    clean = clean.detach()
    if config.num_queries == 0 or config.epsilon == 0:
        return clean
    height, width = clean.shape[-2:]
    frames = (1,) * (clean.ndim - 4)  # of a clip, which all get the same stripes and squares
    best = BestIterate(clean)
    with torch.no_grad():
        stripes = config.project(
            clean + config.radius * draw_signs((3, *frames, 1, width), generators, like=clean), clean
        )
        best.update(stripes, objective(stripes))
        for query in range(config.num_queries - 1):
            square = draw_square(config.side_at(query, height, width), generators, like=clean)
            change = config.radius * draw_signs((3, *frames, 1, 1), generators, like=clean)
            tried = torch.where(square, config.project(clean + change, clean), best.images)
            best.update(tried, objective(tried))
    return best.images


def draw_square(side: int, generators: Generators | None, *, like: Tensor) -> Tensor:
    """Draw one square of `side` pixels in each image, every place equally likely; bool, True inside.

    The result is `[N,1,H,W]`, or for clips `[N,1,1,H,W]`.
    """
    height, width = like.shape[-2:]
    top, left = draw(torch.rand, (2, 1, 1), generators, like=like).split(1, dim=1)
    rows = torch.arange(height, device=like.device)[:, None] - (top * (height - side + 1)).floor()
    columns = torch.arange(width, device=like.device) - (left * (width - side + 1)).floor()
    inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
    return inside if like.ndim == 4 else inside.unsqueeze(2)
