"""How wrong a prediction is: a measure of each element, made one number per sample.

The first dimension is the batch; all others belong to a sample, so images and videos are alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

# (prediction, target, size of the error above which a robust measure grows linearly) -> errors
Measure = Callable[[Tensor, Tensor, float], Tensor]


def mse(prediction: Tensor, target: Tensor, c: float) -> Tensor:
    """Squared difference; ``c`` has no meaning."""
    return F.mse_loss(prediction, target, reduction="none")


def l1(prediction: Tensor, target: Tensor, c: float) -> Tensor:
    """Absolute difference; ``c`` has no meaning."""
    return F.l1_loss(prediction, target, reduction="none")


def huber(prediction: Tensor, target: Tensor, c: float) -> Tensor:
    """``d^2 / 2`` up to ``c``, from there ``c (|d| - c / 2)`` (Huber 1964)."""
    return F.huber_loss(prediction, target, reduction="none", delta=c)


def smooth_l1(prediction: Tensor, target: Tensor, c: float) -> Tensor:
    """`huber` over ``c``: ``|d| - c / 2`` from there (Girshick 2015, arXiv:1504.08083)."""
    return F.smooth_l1_loss(prediction, target, reduction="none", beta=c)


MEASURES: dict[str, Measure] = {"mse": mse, "l1": l1, "huber": huber, "smooth_l1": smooth_l1}


def sample_means(errors: Tensor, weight: Tensor | None = None) -> Tensor:
    """The mean error [B] of each sample.

    Args:
        errors: [B, ...].
        weight: of each element, at least 0, in a shape that broadcasts to that of ``errors``; a
            weight that is 0 everywhere in a sample gives 0. None weighs all elements alike.
    """
    within = tuple(range(1, errors.ndim))
    if weight is None:
        return errors.mean(within)
    # Nothing divided by the smallest number is nothing.
    smallest = torch.finfo(weight.dtype).tiny
    return (errors * weight).mean(within) / weight.mean(within).clamp(min=smallest)


def mask_weight(mask: Tensor, *, unmasked: float) -> Tensor:
    """Weights from a mask in [0, 1]: ``unmasked`` where it is 0, 1 where it is 1."""
    return unmasked + (1 - unmasked) * mask
