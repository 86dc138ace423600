"""Which steps of a sampling run are computed and which reuse the last computed one.

MagCache (Ma et al. 2025, arXiv:2506.09045) reuses the residual, what all blocks of a transformer
together add to their input. How its size changes from step to step, the ratio, is nearly the same
for every prompt; so a measured curve of ratios says beforehand how wrong a reused residual is, and
the whole plan is known before sampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from .errors import ConfigError

_FEWEST_STEPS = 10  # below, there is little to skip, and each step differs much from the last
_DISTILLED = ("schnell", "lightning", "turbo", "hyper", "distill", "lcm", "causvid", "lightx2v")


@dataclass(frozen=True)
class Rule:
    """When the published rule skips a step.

    ``retention_ratio`` is the part of the steps at the beginning that are always computed,
    ``threshold`` the largest sum of errors of steps skipped in a row, ``k`` their largest number.
    The defaults are those of the specification.
    """

    retention_ratio: float = 0.2
    threshold: float = 0.24
    k: int = 6


# "careful" and "fast" are the thresholds and k that the authors of MagCache call slow and fast.
PRESETS: dict[str, Rule | None] = {
    "off": None,
    "careful": Rule(threshold=0.06, k=2),
    "fast": Rule(threshold=0.06, k=4),
    "default": Rule(),
}


@dataclass(frozen=True)
class Plan:
    """What happens at each step.

    ``products`` are those of the ratios since the last computed step, 1 where one is computed:
    the size of the residual that is due by that of the one that is used.
    """

    computed: tuple[bool, ...]
    products: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.computed)

    @cached_property
    def num_computed(self) -> int:
        return sum(self.computed)

    @cached_property
    def errors(self) -> tuple[float, ...]:
        """The magnitude error of each step, ``|1 - product|``; 0 where it is computed."""
        return tuple(abs(1 - product) for product in self.products)

    @cached_property
    def error(self) -> float:
        """The sum of the errors."""
        return sum(self.errors)

    def speedup(self, *, other_cost: float = 0.0) -> float:
        """How many times faster than computing all.

        Args:
            other_cost: the part of a computed step's time that a skipped one takes too, outside
                of the blocks; 0..1.
        """
        skipped = self.steps - self.num_computed
        return self.steps / (self.num_computed + other_cost * skipped)

    def part(self, first: int, end: int) -> Plan:
        """The steps ``first`` to ``end - 1``, for the one of several models that makes them."""
        if not self.computed[first]:
            raise ValueError(f"step {first} is skipped, so a model cannot begin with it")
        return Plan(self.computed[first:end], self.products[first:end])


def full_plan(steps: int) -> Plan:
    """Skips nothing."""
    _check_steps(steps)
    return Plan((True,) * steps, (1.0,) * steps)


def greedy_plan(
    ratios: Sequence[float], steps: int, rule: Rule | None = None, *, handovers: Sequence[int] = ()
) -> Plan:
    """The published rule: skip as long as the errors since the last computed step allow it.

    Args:
        ratios: measured in a run of any number of steps; see `resampled`.
        rule: that of the specification if there is none.
        handovers: the steps, from 0, at which another model takes over, whose first steps are
            computed like those of the first.
    """
    rule = rule or Rule()
    values = resampled(ratios, steps)
    computed: list[bool] = []
    product, error, skipped = 1.0, 0.0, 0
    for ratio, keep in zip(values, kept(steps, rule.retention_ratio, handovers), strict=True):
        product *= ratio
        error += abs(1 - product)
        skipped += 1
        skip = not keep and error <= rule.threshold and skipped <= rule.k
        if not skip:
            product, error, skipped = 1.0, 0.0, 0
        computed.append(not skip)
    return planned(values, computed)


def optimal_plan(
    ratios: Sequence[float],
    steps: int,
    num_computed: int,
    *,
    retention_ratio: float = 0.2,
    k: int | None = 6,
    handovers: Sequence[int] = (),
) -> Plan:
    """Of all plans that compute ``num_computed`` steps, one with the smallest `Plan.error`.

    It computes the same first and last steps as `greedy_plan`. Of equally good plans it is the
    one whose computed steps are spread most evenly. Exact, by dynamic programming over (number of
    computed steps, last of them).

    Args:
        ratios, handovers: as for `greedy_plan`.
        k: the most steps that may be skipped in a row; None for any number.

    Raises:
        ConfigError: so few steps are not enough for what is always computed.
    """
    values = resampled(ratios, steps)
    keep = kept(steps, retention_ratio, handovers)
    num_computed = min(num_computed, steps)
    runs = [_runs(values, keep, first, k) for first in range(steps)]
    # For each number of computed steps: by the last of them, the cost and the one before it.
    layers: list[dict[int, tuple[float, int, int]]] = [{0: (0.0, 0, -1)}]
    while steps - 1 not in layers[-1] or len(layers) < num_computed:
        layer: dict[int, tuple[float, int, int]] = {}
        for first, (error, uneven, _) in layers[-1].items():
            for last, cost in enumerate(runs[first], start=first + 1):
                found = (error + cost, uneven + (last - first) ** 2, first)
                if last not in layer or found < layer[last]:
                    layer[last] = found
        layers.append(layer)
    if len(layers) > num_computed:
        raise ConfigError(
            f"{num_computed} computed steps of {steps} are too few: with the first steps that are "
            f"always computed (retention ratio {retention_ratio:g}), the last one"
            + (f" and at most {k} skipped in a row" if k is not None else "")
            + f" it takes at least {len(layers)}"
        )
    chosen, step = set[int](), steps - 1
    for layer in reversed(layers):
        chosen.add(step)
        step = layer[step][2]
    return planned(values, [step in chosen for step in range(steps)])


def even_plan(
    steps: int,
    num_computed: int,
    *,
    retention_ratio: float = 0.2,
    handovers: Sequence[int] = (),
) -> Plan:
    """Computes the steps that `greedy_plan` always does and spreads the others evenly.

    Needs no curve, and so cannot say what error it makes.

    Raises:
        ConfigError: as for `optimal_plan`.
    """
    flat = [1.0] * steps
    return optimal_plan(
        flat, steps, num_computed, retention_ratio=retention_ratio, k=None, handovers=handovers
    )


def planned(ratios: Sequence[float], computed: Sequence[bool]) -> Plan:
    """The plan that computes these steps; ``ratios`` are one per step."""
    products: list[float] = []
    product = 1.0
    for ratio, now in zip(ratios, computed, strict=True):
        product = 1.0 if now else product * ratio
        products.append(product)
    return Plan(tuple(computed), tuple(products))


def kept(steps: int, retention_ratio: float, handovers: Sequence[int] = ()) -> list[bool]:
    """The steps that are always computed.

    Those are the first ``retention_ratio`` of each model's steps, rounded down but at least one,
    and the last one of all.
    """
    _check_steps(steps)
    keep = [False] * steps
    starts = [0, *sorted(handovers), steps]
    for start, end in zip(starts, starts[1:], strict=False):
        number = max(int(retention_ratio * (end - start)), 1)
        keep[start : start + number] = [True] * len(keep[start : start + number])
    keep[-1] = True
    return keep


def step_map(length: int, steps: int) -> list[int]:
    """For each of ``steps`` the nearest step of a run of ``length``; halves go to the even one.

    The first and the last steps meet; a single step is the last.
    """
    _check_steps(steps)
    if steps == 1:
        return [length - 1]
    scale = (length - 1) / (steps - 1)
    return [round(step * scale) for step in range(steps)]


def resampled(ratios: Sequence[float], steps: int) -> list[float]:
    """One ratio for each of ``steps``, by `step_map`.

    A ratio of a run with more or fewer steps is used as it is, not its power: interpolating the
    logarithms of the sums was measured to be twice as far off (40 to 20 and 50 to 25 steps).
    """
    if not ratios or not all(math.isfinite(ratio) and ratio > 0 for ratio in ratios):
        raise ValueError(f"a curve is made of finite ratios above 0, not {list(ratios)}")
    return [ratios[index] for index in step_map(len(ratios), steps)]


def computed_for(steps: int, speedup: float, *, other_cost: float = 0.0) -> int:
    """The most computed steps with which a run is at least ``speedup`` times faster.

    Args:
        other_cost: as for `Plan.speedup`.

    Raises:
        ConfigError: what every step costs outside of the blocks does not allow it.
    """
    if speedup <= 1:
        return steps
    share = (1 / speedup - other_cost) / (1 - other_cost) if other_cost < 1 else 0.0
    # The share of a number of steps may come out a little below it.
    number = math.floor(steps * share + 1e-9)
    if number < 1:
        raise ConfigError(
            f"a speed-up of {speedup:g} is out of reach with {steps} steps; with one computed step "
            f"it would be {steps / (1 + other_cost * (steps - 1)):.1f}"
        )
    return number


def describe(plan: Plan, *, other_cost: float = 0.0) -> str:
    """For people: "computes 9 of 25 steps, about 2.8x"."""
    if plan.num_computed == plan.steps:
        return f"computes all {plan.steps} steps"
    speedup = plan.speedup(other_cost=other_cost)
    return f"computes {plan.num_computed} of {plan.steps} steps, about {speedup:.1f}x"


def concerns(plan: Plan, names: Iterable[str] = ()) -> list[str]:
    """Why MagCache will help little or harm much, a sentence for each reason.

    Args:
        names: of the files of model and LoRAs, which often say that a model is distilled.
    """
    found: list[str] = []
    if plan.steps < _FEWEST_STEPS:
        found.append(
            f"{plan.steps} steps are few for MagCache, since each differs much from the one before "
            f"it; it is made for {_FEWEST_STEPS} and more"
        )
    if plan.num_computed == plan.steps:
        found.append(
            "MagCache skips nothing with these settings; raise the threshold or k, or take the "
            "preset 'fast'"
        )
    for name in names:
        if word := distilled_word(name):
            found.append(
                f"{name} seems to be distilled to few steps ({word!r}), each of which matters; "
                "MagCache takes more from its quality than from its time"
            )
    return found


def distilled_word(name: str) -> str | None:
    """The word in a file's name by which models that need few steps are known, if there is one."""
    return next((word for word in _DISTILLED if word in name.lower()), None)


def _runs(values: Sequence[float], keep: Sequence[bool], first: int, k: int | None) -> list[float]:
    """The error of computing step ``first`` and next ``first + 1``, ``first + 2``, and so on.

    As far as no step between them has to be computed, and no more than ``k`` are skipped.
    """
    end = next((step for step in range(first + 1, len(keep)) if keep[step]), first)
    if k is not None:
        end = min(end, first + 1 + k)
    between = accumulate(values[first + 1 : end], lambda product, ratio: product * ratio)
    errors = [0.0, *accumulate(abs(1 - product) for product in between)]
    return errors[: end - first]


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"a run has at least one step, not {steps}")
