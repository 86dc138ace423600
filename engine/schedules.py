"""Learning-rate multipliers as functions of the optimizer step, counted from 0.

After the warm-up a schedule is a shape over the progress of what is left: 0 at the first step
after it, 1 one step after the last. Names and shapes are those of transformers'
``get_scheduler`` where it has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

_DEFAULT_TIMESCALE = 10_000  # of inverse_sqrt without a warm-up, as in transformers
_DEFAULT_DECAY = 0.2  # of what follows the warm-up


class ScheduleSettings(NamedTuple):
    """What the shapes are made from; see the settings of the same names.

    ``decay_steps`` and ``timescale`` have defaults of their own where they are None.
    """

    total_steps: int
    warmup_steps: int = 0
    min_ratio: float = 0.0
    num_cycles: int = 1
    power: float = 1.0
    decay_steps: int | None = None
    timescale: int | None = None
    rex_alpha: float = 0.1
    rex_beta: float = 0.9


# (progress after the warm-up, settings) -> the part of the rate above its minimum
Shape = Callable[[float, ScheduleSettings], float]


def constant(progress: float, settings: ScheduleSettings) -> float:
    return 1.0


def linear(progress: float, settings: ScheduleSettings) -> float:
    return 1.0 - progress


def cosine(progress: float, settings: ScheduleSettings) -> float:
    """Half a wave. Loshchilov and Hutter 2017, arXiv:1608.03983."""
    return (1 + math.cos(math.pi * progress)) / 2


def cosine_with_restarts(progress: float, settings: ScheduleSettings) -> float:
    """``num_cycles`` times from the top to the minimum; arXiv:1608.03983."""
    return cosine(settings.num_cycles * progress % 1.0, settings) if progress < 1 else 0.0


def polynomial(progress: float, settings: ScheduleSettings) -> float:
    return (1.0 - progress) ** settings.power


def inverse_sqrt(progress: float, settings: ScheduleSettings) -> float:
    """``1 / sqrt(1 + steps / timescale)``, which has no end."""
    steps = progress * (settings.total_steps - settings.warmup_steps)
    timescale = settings.timescale or settings.warmup_steps or _DEFAULT_TIMESCALE
    return (1 + steps / timescale) ** -0.5


def warmup_stable_decay(progress: float, settings: ScheduleSettings) -> float:
    """Constant, then half a wave over the last ``decay_steps``."""
    left = max(1, settings.total_steps - settings.warmup_steps)
    wanted = settings.decay_steps
    decay = _DEFAULT_DECAY * left if wanted is None else min(wanted, left)
    begins = 1 - decay / left
    return 1.0 if progress <= begins else cosine((progress - begins) * left / decay, settings)


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
    "rex": rex,
}


def multiplier(name: str, step: int, settings: ScheduleSettings) -> float:
    """What the learning rate is multiplied with at optimizer step ``step``.

    The warm-up rises from the minimum in equal steps; its first step is above it already, because
    a step with a rate of zero would be wasted.
    """
    total, warmup, floor = settings.total_steps, settings.warmup_steps, settings.min_ratio
    if step < warmup:
        part = (step + 1) / warmup
    else:
        part = SHAPES[name](min(1.0, (step - warmup) / max(1, total - warmup)), settings)
    return floor + (1 - floor) * part
