"""Tests of MagCache's plans: the published schedules, and that the optimal plan is one."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from pack.engine import magcache
from pack.engine.errors import ConfigError
from pack.engine.magcache import PRESETS, Rule, greedy_plan, optimal_plan
from pack.engine.magcache_curves import (
    CONDITIONAL,
    UNCONDITIONAL,
    default_curve,
    families_with_published,
    published_curve,
    published_variants,
)

# What the peer trainer's own code decided: F computes a step, a dot skips it.
PUBLISHED = "0"
EXAMPLE = (
    "1.00000,1.26562,1.08594,1.02344,1.00781,1.01562,1.01562,1.03125,1.04688,1.00781,1.03125,"
    "1.00000,1.01562,1.01562,1.02344,1.01562,0.98438,1.05469,0.98438,0.97266,1.03125,0.96875,"
    "0.93359,0.95703,0.77734"
)
SCHEDULES = [
    (PUBLISHED, 50, Rule(), "FFFFFFFFFF....F...F....F.....F....F......F....F.FF"),
    (PUBLISHED, 25, Rule(), "FFFFF...F...F....F.....FF"),
    (PUBLISHED, 30, Rule(), "FFFFFF...F....F....F......F..F"),
    (EXAMPLE, 25, Rule(), "FFFFF....F....F......F..F"),
    (EXAMPLE, 25, Rule(threshold=0.12, k=3), "FFFFF...F...F...F...F.F.F"),
    (EXAMPLE, 50, Rule(), "FFFFFFFFFF....F..F.....F....F.....F......F...F..FF"),
    (PUBLISHED, 50, Rule(retention_ratio=0.5), "F" * 25 + "....F....F......F....F.FF"),
    (PUBLISHED, 8, Rule(retention_ratio=0.0), "F..F...F"),
]


def ratios_of(text: str) -> tuple[float, ...]:
    if text == PUBLISHED:
        return default_curve("framepack").of(CONDITIONAL)
    return tuple(map(float, text.split(",")))


def shown(plan: magcache.Plan) -> str:
    return "".join("F" if now else "." for now in plan.computed)


def random_curve(seed: int, steps: int) -> list[float]:
    chance = random.Random(seed)
    return [math.exp(chance.gauss(0, 0.05)) for _ in range(steps)]


def cost(ratios: list[float], computed: tuple[bool, ...]) -> float:
    """The summed error, by the definition: |1 - product of the ratios since the last computed|."""
    total = 0.0
    for step, now in enumerate(computed):
        if not now:
            last = max(index for index in range(step) if computed[index])
            total += abs(1 - math.prod(ratios[last + 1 : step + 1]))
    return total


@pytest.mark.parametrize(("text", "steps", "rule", "expected"), SCHEDULES)
def test_the_published_rule_makes_the_peers_schedules(
    text: str, steps: int, rule: Rule, expected: str
) -> None:
    assert shown(greedy_plan(ratios_of(text), steps, rule)) == expected


def test_a_smaller_k_skips_as_many_steps_as_in_the_peers_code() -> None:
    plan = greedy_plan(ratios_of(PUBLISHED), 50, Rule(k=2))
    assert plan.steps - plan.num_computed == 26


def test_other_numbers_of_steps_take_the_nearest_ratios() -> None:
    assert magcache.step_map(50, 25) == [*range(0, 25, 2), *range(27, 50, 2)]
    assert magcache.step_map(50, 8) == [0, 7, 14, 21, 28, 35, 42, 49]
    assert magcache.step_map(25, 25) == list(range(25))
    assert magcache.step_map(25, 1) == [24]
    halves = magcache.step_map(2, 3)  # the middle one lies between both: the even index
    assert halves == [0, 0, 1]


@pytest.mark.parametrize("length", [2, 20, 28, 50])
@pytest.mark.parametrize("steps", [2, 9, 28, 77])
def test_the_step_map_is_that_of_numpys_rounding(length: int, steps: int) -> None:
    import numpy as np

    expected = np.round(np.arange(steps) * ((length - 1) / (steps - 1))).astype(int)
    assert magcache.step_map(length, steps) == expected.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_the_rule_by_hand(seed: int) -> None:
    """A slow version: before each step, the sums since the last computed one from the start."""
    chance = random.Random(seed)
    steps = chance.randint(1, 40)
    ratios = random_curve(seed, steps)
    rule = Rule(chance.choice([0, 0.1, 0.2, 0.5]), chance.choice([0, 0.06, 0.24]), seed % 7)
    computed: list[bool] = []
    for step in range(steps):
        first_steps = step < max(int(rule.retention_ratio * steps), 1)
        last = max((index for index in range(step) if computed[index]), default=0)
        products = [math.prod(ratios[last + 1 : end + 1]) for end in range(last + 1, step + 1)]
        fits = sum(abs(1 - product) for product in products) <= rule.threshold
        skip = not first_steps and step < steps - 1 and fits and step - last <= rule.k
        computed.append(not skip)
    assert greedy_plan(ratios, steps, rule).computed == tuple(computed)


def test_one_step_is_computed_and_so_are_two() -> None:
    for steps in (1, 2):
        assert shown(greedy_plan(ratios_of(PUBLISHED), steps)) == "F" * steps


def test_an_error_of_exactly_the_threshold_is_allowed() -> None:
    ratios = [1.0, 1.0, 0.75, 1.0, 1.0]  # binary fractions: the sums are exact
    assert shown(greedy_plan(ratios, 5, Rule(0.2, 0.5, 6))) == "F...F"
    assert shown(greedy_plan(ratios, 5, Rule(0.2, 0.49, 6))) == "F..FF"


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("k", [None, 1, 3])
def test_no_plan_of_as_many_steps_is_better_than_the_optimal_one(seed: int, k: int | None) -> None:
    steps, retention = 11, (0.1, 0.3)[seed % 2]
    ratios = random_curve(seed, steps)
    keep = magcache.kept(steps, retention)
    best: dict[int, float] = {}
    for choice in itertools.product([False, True], repeat=steps):
        runs = [len(list(run)) for now, run in itertools.groupby(choice) if not now]
        fits = all(now or not must for now, must in zip(choice, keep, strict=True))
        if fits and (k is None or max(runs, default=0) <= k):
            number = sum(choice)
            best[number] = min(best.get(number, math.inf), cost(ratios, choice))
    for number in range(1, steps + 1):
        if number not in best:
            with pytest.raises(ConfigError, match=f"at least {min(best)}"):
                optimal_plan(ratios, steps, number, retention_ratio=retention, k=k)
            continue
        plan = optimal_plan(ratios, steps, number, retention_ratio=retention, k=k)
        assert plan.num_computed == number
        assert plan.error == pytest.approx(best[number], abs=1e-12)
        assert plan.error == pytest.approx(cost(ratios, plan.computed), abs=1e-12)


def every_published_curve() -> list[tuple[str, str, str]]:
    return [
        (family, variant, branch)
        for family in families_with_published()
        for variant in published_variants(family)
        for branch in (CONDITIONAL, UNCONDITIONAL)
    ]


@pytest.mark.parametrize(("family", "variant", "branch"), every_published_curve())
def test_the_optimal_plan_is_at_least_as_good_as_the_rule_on_published_curves(
    family: str, variant: str, branch: str
) -> None:
    curve = published_curve(family, variant=variant)
    assert curve
    for steps in (curve.steps, 25):
        for rule in (Rule(), Rule(threshold=0.12, k=3), Rule(threshold=0.06, k=2)):
            greedy = greedy_plan(curve.of(branch), steps, rule)
            optimal = optimal_plan(curve.of(branch), steps, greedy.num_computed, k=rule.k)
            assert optimal.num_computed == greedy.num_computed
            assert optimal.error <= greedy.error + 1e-12


def test_the_sum_is_smaller_than_with_the_smallest_worst_run() -> None:
    """An independent search for the plan whose worst run is best found sums of 0.73 and 0.64."""
    greedy = greedy_plan(ratios_of(EXAMPLE), 25)
    optimal = optimal_plan(ratios_of(EXAMPLE), 25, greedy.num_computed)
    assert greedy.error == pytest.approx(0.73, abs=0.005)
    assert optimal.error < 0.635


def test_without_differences_the_computed_steps_are_spread_evenly() -> None:
    assert shown(magcache.even_plan(13, 6)) == "FF.F..F..F..F"
    assert shown(magcache.even_plan(10, 4, retention_ratio=0.1)) == "F..F..F..F"
    assert magcache.even_plan(10, 10) == magcache.full_plan(10)


def test_each_model_begins_with_computed_steps_of_its_own() -> None:
    flat = [1.0] * 20
    plan = greedy_plan(flat, 20, Rule(), handovers=[8])
    assert shown(plan) == "F......FFF......F..F"
    assert optimal_plan(flat, 20, 6, k=None, handovers=[8]).computed[8]
    with pytest.raises(ConfigError, match="at least 4"):
        optimal_plan(flat, 20, 3, k=None, handovers=[8])
    later = plan.part(8, 20)
    assert later.steps == 12 and later.computed == plan.computed[8:]
    with pytest.raises(ValueError, match="step 3 is skipped"):
        plan.part(3, 20)


def test_the_errors_of_a_plan_are_those_of_its_products() -> None:
    plan = magcache.planned([1.0, 0.5, 0.5, 2.0, 0.75], [True, False, False, True, False])
    assert plan.products == (1.0, 0.5, 0.25, 1.0, 0.75)
    assert plan.errors == (0.0, 0.5, 0.75, 0.0, 0.25) and plan.error == 1.5


def test_the_speedup_is_that_of_the_time_of_all_steps() -> None:
    plan = greedy_plan(ratios_of(EXAMPLE), 25)
    assert plan.speedup() == 25 / 9
    assert plan.speedup(other_cost=0.1) == 25 / (9 + 0.1 * 16)
    assert plan.speedup(other_cost=1.0) == 1.0


@pytest.mark.parametrize("steps", [8, 25, 50])
@pytest.mark.parametrize("other_cost", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("speedup", [0.5, 1.0, 1.5, 2.0, 2.5])
def test_no_more_steps_would_still_be_fast_enough(
    steps: int, other_cost: float, speedup: float
) -> None:
    number = magcache.computed_for(steps, speedup, other_cost=other_cost)

    def reached(computed: int) -> float:
        return steps / (computed + other_cost * (steps - computed))

    assert reached(number) >= speedup - 1e-9
    assert number == steps or reached(number + 1) < speedup


@pytest.mark.parametrize(("speedup", "other_cost"), [(6, 0.2), (2, 0.5), (2, 1.0), (30, 0.0)])
def test_a_speedup_out_of_reach_is_refused(speedup: float, other_cost: float) -> None:
    with pytest.raises(ConfigError, match="out of reach with 25 steps"):
        magcache.computed_for(25, speedup, other_cost=other_cost)


def test_a_plan_says_what_it_does() -> None:
    plan = greedy_plan(ratios_of(EXAMPLE), 25)
    assert magcache.describe(plan) == "computes 9 of 25 steps, about 2.8x"
    assert magcache.describe(plan, other_cost=0.1) == "computes 9 of 25 steps, about 2.4x"
    assert magcache.describe(magcache.full_plan(4)) == "computes all 4 steps"


def test_a_fitting_plan_raises_no_concerns() -> None:
    assert magcache.concerns(greedy_plan(ratios_of(EXAMPLE), 25), ["flux1-dev.safetensors"]) == []


def test_what_helps_little_is_said_in_one_sentence_each() -> None:
    few, nothing, distilled = magcache.concerns(
        magcache.full_plan(4), ["flux1-schnell.safetensors", "flux1-dev.safetensors"]
    )
    assert few.startswith("4 steps are few")
    assert "skips nothing" in nothing
    assert "flux1-schnell" in distilled and "'schnell'" in distilled


def test_the_presets_are_in_the_order_of_their_speed() -> None:
    assert list(PRESETS) == ["off", "careful", "fast", "default"]
    assert PRESETS["default"] == Rule(0.2, 0.24, 6)
    curve = published_curve("wan", variant="Wan2.1 T2V 14B")
    assert curve
    numbers = [
        greedy_plan(curve.of(CONDITIONAL), 50, rule).num_computed
        for rule in PRESETS.values()
        if rule
    ]
    assert numbers == sorted(numbers, reverse=True) and len(set(numbers)) == 3


@pytest.mark.parametrize("ratios", [[], [1.0, 0.0], [1.0, math.nan], [1.0, math.inf], [-1.0]])
def test_what_is_no_curve_is_refused(ratios: list[float]) -> None:
    with pytest.raises(ValueError, match="finite ratios above 0"):
        greedy_plan(ratios, 10)


def test_a_run_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        greedy_plan([1.0], 0)
