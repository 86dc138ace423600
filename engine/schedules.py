"""Learning-rate multipliers as functions of the optimizer step, counted from 0."""

from __future__ import annotations


def constant_with_warmup(step: int, *, warmup_steps: int) -> float:
    """Rise in equal steps to 1 at the end of the warm-up, then stay.

    The first step already has ``1 / warmup_steps``: a step with a rate of zero would be wasted.
    """
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
