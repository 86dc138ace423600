"""Averages of checkpoints of one training, made when it is over.

All of them are the recurrence ``W <- beta_i W + (1 - beta_i) checkpoint``, from the oldest to the
newest. The power function profile is that of Karras et al. 2023, arXiv:2312.02696, appendix C;
the numbers of its equations are those that the authors' own code names
(https://github.com/NVlabs/edm2, training/phema.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

# Of a profile that is flat (gamma 0): every moment of the training counts the same.
WIDEST_SIGMA_REL = 1 / math.sqrt(12)
_NARROWEST_SIGMA_REL = 1e-6


def gamma_of(sigma_rel: float) -> float:
    """Exponent of the profile ``t ** gamma`` whose standard deviation is ``sigma_rel`` of ``t``.

    It is the only root that is not negative of
    ``g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2)``, equation 126.

    Raises:
        ValueError: there is none, because ``sigma_rel`` is not in (0, `WIDEST_SIGMA_REL`].
    """
    if not _NARROWEST_SIGMA_REL <= sigma_rel <= WIDEST_SIGMA_REL:
        raise ValueError(f"sigma_rel {sigma_rel} is not in (0, {WIDEST_SIGMA_REL:.6f}]")
    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    # The sum of all three is -7, so the others' real parts are negative.
    return max(0.0, float(roots.real.max()))


def betas(num_checkpoints: int, *, beta: float, beta2: float | None = None) -> list[float]:
    """For every checkpoint but the first: ``beta``, or even steps from it to ``beta2``."""
    last = num_checkpoints - 2
    if beta2 is None or last < 1:
        return [beta] * (last + 1)
    return [beta + (beta2 - beta) * index / last for index in range(last + 1)]


def power_betas(num_checkpoints: int, *, gamma: float, keep_first: bool = False) -> list[float]:
    """For every checkpoint but the first: of the power function, at equal distances.

    Equation 127 with time counted in checkpoints. By the usual count the second one is at time 1
    and its beta is 0, so the first has no part in the mean. ``keep_first`` counts it.
    """
    first = 2 if keep_first else 1
    times = range(first, first + num_checkpoints - 1)
    return [(1 - 1 / time) ** (gamma + 1) for time in times]


def step_betas(steps: Sequence[int], *, gamma: float) -> list[float]:
    """For every checkpoint but the first: of the power function, at any distances.

    Equation 127. A checkpoint stands for the time since the one before it, so that with T the
    last step its weight is the integral of ``(gamma + 1) t ** gamma / T ** (gamma + 1)`` over
    that time, and the first one stands for all that was before.

    Args:
        steps: optimizer steps done, at least 1 and increasing.

    Raises:
        ValueError: they are not.
    """
    if steps[0] < 1 or any(later <= earlier for earlier, later in pairwise(steps)):
        raise ValueError(f"steps {list(steps)} do not begin above 0 and increase")
    return [(earlier / later) ** (gamma + 1) for earlier, later in pairwise(steps)]


def weights_of(betas: Sequence[float]) -> list[float]:
    """The part that every checkpoint has in the result of the recurrence; their sum is 1."""
    weights = [1.0]
    for beta in betas:
        weights = [weight * beta for weight in weights] + [1 - beta]
    return weights


def effective_number(weights: Sequence[float]) -> float:
    """How many checkpoints, equally weighted, give as small a variance: ``1 / sum w^2``."""
    return 1 / math.fsum(weight**2 for weight in weights)


def weighted_sum(tensors: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """Sum of weight times tensor, in float32 or better; one tensor is held at a time."""
    total: Tensor | None = None
    for tensor, weight in zip(tensors, weights, strict=True):
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        if total is None:
            total = tensor * weight
        else:
            total = total.to(torch.promote_types(total.dtype, tensor.dtype))
            total.add_(tensor, alpha=weight)
    if total is None:
        raise ValueError("nothing to add")
    return total
