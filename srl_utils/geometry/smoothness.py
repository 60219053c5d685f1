"""Local Lipschitz constants: how much a small change of an image can change the output of a network.

The constant at an image x is the largest |J v| among the changes v of size 1, where J is the Jacobian at x. Power
iteration finds it: v becomes the steepest change of size 1 along J'Jv. In L2, that is the power method for the largest
singular value. For L-infinity it is a sign step, as in the power method for other norms (Boyd 1974; Higham 1992). Each
value is reached by some v, so it is a lower bound, and no step lowers it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp, vjp

from srl_utils.attacks.draws import Generators, draw_normal
from srl_utils.attacks.gradient import Budget, Norm
from srl_utils.geometry.derivatives import differentiable_attention


@torch.no_grad()
def local_lipschitz(
    function: Callable[[Tensor], Tensor], images: Tensor, norm: Norm, *, generators: Generators, num_steps: int
) -> Tensor:
    """Return the local Lipschitz constant at each image, `[N]`: output in L2 over input in `norm`.

    Args:
        function: maps `[N,...]` to `[N,...]`; output i may depend on input i only.
        images: where the constants are measured, `[N,...]`.
        norm: `l2` or `linf`: how the change of an image is measured.
        generators: one per image, for the first v.
        num_steps: of the power iteration.
    """
    steepest = Budget(norm=norm).steepest
    change = steepest(draw_normal(generators, like=images))
    with differentiable_attention():
        pull = vjp(function, images)[1]
        for _ in range(num_steps):
            change = steepest(pull(jvp(function, (images,), (change,))[1])[0])
        moved = jvp(function, (images,), (change,))[1]
    return moved.flatten(1).norm(dim=1)
