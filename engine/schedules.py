"""Learning-rate multipliers as functions of the optimizer step, counted from 0.

After the warm-up a schedule is a shape over the progress of what is left: 0 at the first step
after it, 1 one step after the last. Names and shapes are those of transformers'
``get_scheduler`` where it has them; piecewise_constant is that of diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

_DEFAULT_TIMESCALE = 10_000  # of inverse_sqrt without a warm-up, as in transformers
_DEFAULT_DECAY = 0.2  # of what follows the warm-up


class ScheduleSettings(NamedTuple):
    """What the shapes are made from; see the settings of the same names.

    ``decay_steps``, ``stable_steps`` and ``timescale`` have defaults of their own where they are
    None. ``waves`` are those of cosine, where half a wave leads from the top to the minimum.
    ``rises`` and ``falls`` are keys of `RISES` and `FALLS`. Each of ``rules`` is the step before
    which it counts, and its multiplier.
    """

    total_steps: int
    warmup_steps: int = 0
    min_ratio: float = 0.0
    num_cycles: float = 1
    waves: float = 0.5
    power: float = 1.0
    decay_steps: int | None = None
    stable_steps: int | None = None
    timescale: int | None = None
    rex_alpha: float = 0.1
    rex_beta: float = 0.9
    rises: str = "linear"
    falls: str = "cosine"
    rules: tuple[tuple[float, float], ...] = ()

    @property
    def steps_left(self) -> int:
        """After the warm-up."""
        return max(1, self.total_steps - self.warmup_steps)


# (progress after the warm-up, settings) -> the part of the rate above its minimum
Shape = Callable[[float, ScheduleSettings], float]


def constant(progress: float, settings: ScheduleSettings) -> float:
    return 1.0


def linear(progress: float, settings: ScheduleSettings) -> float:
    return 1.0 - progress


def cosine(progress: float, settings: ScheduleSettings) -> float:
    """``waves`` of a cosine from its top. Loshchilov and Hutter 2017, arXiv:1608.03983."""
    return (1 + math.cos(2 * math.pi * settings.waves * progress)) / 2


def cosine_with_restarts(progress: float, settings: ScheduleSettings) -> float:
    """``num_cycles`` times from the top to the minimum; arXiv:1608.03983."""
    within = settings.num_cycles * progress % 1.0
    return (1 + math.cos(math.pi * within)) / 2 if progress < 1 else 0.0


def polynomial(progress: float, settings: ScheduleSettings) -> float:
    return (1.0 - progress) ** settings.power


def inverse_sqrt(progress: float, settings: ScheduleSettings) -> float:
    """``1 / sqrt(1 + steps / timescale)``, which has no end."""
    steps = progress * settings.steps_left
    timescale = settings.timescale or settings.warmup_steps or _DEFAULT_TIMESCALE
    return (1 + steps / timescale) ** -0.5


def sqrt_fall(progress: float, settings: ScheduleSettings) -> float:
    """Fast at first. Hägele et al. 2024, arXiv:2405.18392."""
    return 1 - math.sqrt(progress)


# From 1 to 0, for the end of warmup_stable_decay.
FALLS: dict[str, Shape] = {"cosine": cosine, "linear": linear, "1-sqrt": sqrt_fall}

# From 0 to 1, for the warm-up.
RISES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
    "1-sqrt": lambda progress: 1 - math.sqrt(1 - progress),
}


def warmup_stable_decay(progress: float, settings: ScheduleSettings) -> float:
    """Constant for ``stable_steps``, then down over ``decay_steps``, then the minimum."""
    left, stable, decay = settings.steps_left, settings.stable_steps, settings.decay_steps
    if decay is None:
        decay = _DEFAULT_DECAY * left if stable is None else left - stable
    if stable is None:
        stable = left - decay
    steps = round(progress * left) - stable  # rounded: progress is a quotient of whole steps
    if steps <= 0:
        return 1.0
    return FALLS[settings.falls](steps / decay, settings) if steps < decay else 0.0


def piecewise_constant(progress: float, settings: ScheduleSettings) -> float:
    """The multiplier of the first rule whose end, counted from the run's start, is to come."""
    step = settings.warmup_steps + round(progress * settings.steps_left)
    return next(value for end, value in settings.rules if step < end)


def rex(progress: float, settings: ScheduleSettings) -> float:
    """``(1 - p) / (alpha + beta (1 - p))``: slow at first, fast at the end.

    Chen et al. 2021, arXiv:2107.04197, with alpha = beta = 1/2.
    """
    left = 1.0 - progress
    return left / (settings.rex_alpha + settings.rex_beta * left)


SHAPES: dict[str, Shape] = {
    "constant": constant,
    "constant_with_warmup": constant,
    "linear": linear,
    "cosine": cosine,
    "cosine_with_restarts": cosine_with_restarts,
    "cosine_with_min_lr": cosine,
    "polynomial": polynomial,
    "inverse_sqrt": inverse_sqrt,
    "warmup_stable_decay": warmup_stable_decay,
    "piecewise_constant": piecewise_constant,
    "rex": rex,
}


def multiplier(name: str, step: int, settings: ScheduleSettings) -> float:
    """What the learning rate is multiplied with at optimizer step ``step``.

    The warm-up rises from the minimum to where the shape begins; its first step is above the
    minimum already, because a step with a rate of zero would be wasted.
    """
    warmup, floor = settings.warmup_steps, settings.min_ratio
    part = SHAPES[name](min(1.0, max(0, step - warmup) / settings.steps_left), settings)
    return floor + (1 - floor) * _rise(step, settings) * part


def listed_multiplier(multipliers: Sequence[float], step: int, settings: ScheduleSettings) -> float:
    """As `multiplier`, of a schedule given as the multipliers of all steps after the warm-up."""
    after, floor = max(0, step - settings.warmup_steps), settings.min_ratio
    first = floor + (1 - floor) * _rise(step, settings)
    return first * multipliers[min(after, len(multipliers) - 1)]


def _rise(step: int, settings: ScheduleSettings) -> float:
    """How far the warm-up is; 1 after it."""
    warmup = settings.warmup_steps
    return RISES[settings.rises]((step + 1) / warmup) if step < warmup else 1.0
