"""Rectified flow: noising, the regression target and the sampler's time grid.

Flow time ``t`` is in [0, 1]: 0 is data, 1 is pure noise (Liu et al. 2022, arXiv:2209.03003;
Esser et al. 2024, arXiv:2403.03206).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def noisy_latents(latents: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
    """``(1 - t) latents + t noise``, with one time per batch entry."""
    return torch.lerp(latents, noise, _per_sample(t_B, latents))


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """``noise - latents``: the direction of increasing ``t``, the same at every ``t``."""
    return noise - latents


def draw_noise(like: Tensor, *, generator: torch.Generator, offset: float = 0.0) -> Tensor:
    """Normal noise in float32, shaped like latents [B, C, ...] and on their device.

    Args:
        generator: on the same device; gives the noise first and the offsets after it.
        offset: deviation of a second draw that all elements of a sample's channel share, without
            which no step learns to change the mean of a picture
            (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
    """
    noise = torch.randn(like.shape, generator=generator, device=like.device)
    if offset:
        shared = torch.Size([*like.shape[:2], *[1] * (like.ndim - 2)])
        shift = torch.randn(shared, generator=generator, device=like.device)
        noise.add_(shift, alpha=offset)
    return noise


def mix(latents: Tensor, noise: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """`noisy_latents` and `velocity_target`, of which the second takes the place of ``noise``."""
    noisy = noisy_latents(latents, noise, t_B)
    return noisy, noise.sub_(latents)


def cosmap_weight(t_B: Tensor) -> Tensor:
    """``2 / (pi (1 - 2t + 2t^2))``: middle times count most.

    Esser et al. 2024, arXiv:2403.03206, section 3.1.
    """
    return 2 / (math.pi * (1 - 2 * t_B + 2 * t_B**2))


def inverse_square_weight(t_B: Tensor) -> Tensor:
    """``1 / t^2``, called sigma_sqrt by diffusers' training scripts; from 0.001 down constant."""
    return t_B.clamp(min=1e-3) ** -2


LOSS_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "cosmap": cosmap_weight,
    "sigma_sqrt": inverse_square_weight,
}


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Move times in [0, 1] towards noise: ``shift t / (1 + (shift - 1) t)``, 0 and 1 stay.

    Undone by ``1 / shift``. Esser et al. 2024, arXiv:2403.03206, section 5.3.2.
    """
    return shift * t / (1 + (shift - 1) * t)


def linear_shift(num_tokens: int, *, first: tuple[int, float], second: tuple[int, float]) -> float:
    """``exp(mu)`` where ``mu`` lies on the line through two (number of tokens, mu) points."""
    slope = (second[1] - first[1]) / (second[0] - first[0])
    return math.exp(first[1] + slope * (num_tokens - first[0]))


def flux_shift(num_tokens: int) -> float:
    """FLUX.1's shift for this many tokens of 2x2 latents."""
    return linear_shift(num_tokens, first=(256, 0.5), second=(4096, 1.15))


def qwen_shift(num_tokens: int) -> float:
    """Qwen-Image's shift for this many tokens of 2x2 latents."""
    return linear_shift(num_tokens, first=(256, 0.5), second=(8192, 0.9))


def sampling_times(num_steps: int, shift: float) -> list[float]:
    """``num_steps + 1`` shifted times from 1 down to 0, evenly spaced before the shift."""
    return shift_time(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).tolist()


def _per_sample(t_B: Tensor, like: Tensor) -> Tensor:
    return t_B.to(like).view(-1, *[1] * (like.ndim - 1))
