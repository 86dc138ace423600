"""Solvers of the flow's differential equation: velocity and noise in, clean latents out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# (latents at time t, t) -> velocity
Velocity = Callable[[Tensor, float], Tensor]
# called after each step with (steps done, latents)
OnStep = Callable[[int, Tensor], None]


@torch.no_grad()
def euler(
    velocity: Velocity, noise: Tensor, times: Sequence[float], on_step: OnStep | None = None
) -> Tensor:
    """Follow the velocity from ``times[0]`` to ``times[-1]`` by straight steps.

    One model call per step; exact when the path is straight. The state is kept in the type of
    ``noise``; float32 is meant.
    """
    latents = noise
    for index, (now, following) in enumerate(zip(times[:-1], times[1:], strict=True)):
        latents = latents + (following - now) * velocity(latents, now).to(latents.dtype)
        if on_step:
            on_step(index + 1, latents)
    return latents
