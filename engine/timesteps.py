"""Uniform draws -> training times. Pure: the draws come from the caller.

Times are flow times in [0, 1], 1 = pure noise.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .flow import shift_time

# Draws are kept this far from 0 and 1, where the normal quantile is infinite.
_EDGE = 1e-7


class TimestepSampler(Protocol):
    """Maps uniform draws [B] to flow times [B].

    Args of each: ``scale`` spreads the times out around the middle, ``fixed_shift`` is the user's
    shift towards noise, ``resolution_shift`` the family's for the size of this batch.
    """

    def __call__(
        self, u_B: Tensor, *, scale: float, fixed_shift: float, resolution_shift: float
    ) -> Tensor: ...


def uniform(u_B: Tensor, *, scale: float, fixed_shift: float, resolution_shift: float) -> Tensor:
    """Every time equally often; nothing else matters."""
    return u_B


def sigmoid(u_B: Tensor, *, scale: float, fixed_shift: float, resolution_shift: float) -> Tensor:
    """Concentrate on middle times: ``sigmoid(scale z)`` with ``z`` standard normal."""
    return logit_normal(u_B, scale=scale)


def shift(u_B: Tensor, *, scale: float, fixed_shift: float, resolution_shift: float) -> Tensor:
    """`sigmoid`, then moved towards noise by the user's shift."""
    return shift_time(logit_normal(u_B, scale=scale), fixed_shift)


def flux_shift(u_B: Tensor, *, scale: float, fixed_shift: float, resolution_shift: float) -> Tensor:
    """`sigmoid`, then moved towards noise by the shift that fits the size of the latents."""
    return shift_time(logit_normal(u_B, scale=scale), resolution_shift)


def logit_normal(u_B: Tensor, *, scale: float) -> Tensor:
    """``sigmoid(scale z)``, with ``z`` the normal quantile of ``u``.

    Stratified draws stay stratified. Esser et al. 2024, arXiv:2403.03206, section 3.1.
    """
    return torch.sigmoid(scale * torch.special.ndtri(u_B.clamp(_EDGE, 1 - _EDGE)))


SAMPLERS: dict[str, TimestepSampler] = {
    "uniform": uniform,
    "sigmoid": sigmoid,
    "shift": shift,
    "flux_shift": flux_shift,
}
