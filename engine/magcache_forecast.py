"""What stands in for the residual of a step that MagCache skips, made of those before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .magcache import Plan

# (skipped step, the steps computed before it) -> the weight of each of their residuals
Predict = Callable[[int, Sequence[int]], dict[int, float]]


def reuse(step: int, computed: Sequence[int]) -> dict[int, float]:
    """Take the residual of the last computed step, as MagCache does."""
    return {computed[-1]: 1.0}


def linear(step: int, computed: Sequence[int]) -> dict[int, float]:
    """Follow the line through the residuals of the last two computed steps.

    Steps are counted, not their flow times, which needs no sampler to say them and was measured to
    be as good. The line is followed at most as far as the two are apart: further on it would add
    more of their rounding than of the truth. Forecasts instead of reuse are from Liu et al. 2025,
    arXiv:2503.06923, who make one for every layer.
    """
    if len(computed) < 2:
        return reuse(step, computed)
    earlier, later = computed[-2:]
    beyond = min((step - later) / (later - earlier), 1.0)
    return {later: 1 + beyond, earlier: -beyond}


# How the residual of a skipped step is made of those of computed ones.
PREDICTIONS: dict[str, Predict] = {"reuse": reuse, "linear": linear}


def weights(plan: Plan, predict: Predict) -> list[dict[int, float]]:
    """For each step the computed steps whose residuals stand in for its own, each with its weight.

    Empty for steps that are computed.
    """
    found: list[dict[int, float]] = []
    computed: list[int] = []
    for step, now in enumerate(plan.computed):
        if now:
            computed.append(step)
        found.append({} if now else predict(step, computed))
    return found
