"""Tests of what stands in for skipped residuals."""

from __future__ import annotations

import pytest
from pack.engine.magcache import Plan, full_plan, planned
from pack.engine.magcache_forecast import PREDICTIONS, linear, reuse, weights


def plan_of(text: str) -> Plan:
    return planned([1.0] * len(text), [letter == "F" for letter in text])


def test_reusing_takes_the_last_computed_step() -> None:
    assert weights(plan_of("FF..F."), reuse) == [{}, {}, {1: 1.0}, {1: 1.0}, {}, {4: 1.0}]


def test_a_line_through_two_steps_is_followed() -> None:
    found = weights(plan_of("F..F.F"), linear)
    assert found[1] == {0: 1.0}  # one computed step makes no line
    assert found[4] == {3: pytest.approx(4 / 3), 0: pytest.approx(-1 / 3)}


def test_the_line_ends_as_far_beyond_the_steps_as_they_are_apart() -> None:
    found = weights(plan_of("FF...F"), linear)
    assert found[2] == found[3] == found[4] == {1: 2.0, 0: -1.0}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_the_weights_of_a_step_sum_to_one_and_computed_steps_have_none(name: str) -> None:
    plan = plan_of("FF.F..F...F.FF..F....F")
    for now, found in zip(plan.computed, weights(plan, PREDICTIONS[name]), strict=True):
        assert found == {} if now else sum(found.values()) == pytest.approx(1)
    assert not any(weights(full_plan(5), PREDICTIONS[name]))


def test_residuals_that_change_evenly_are_forecast_exactly() -> None:
    plan = plan_of("FF.F..F..F")
    for step, found in enumerate(weights(plan, linear)):
        if found:
            assert sum(weight * source for source, weight in found.items()) == pytest.approx(step)
