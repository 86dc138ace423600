from __future__ import annotations

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack.engine.jobs.guard import WINDOW, Diverged, DivergenceGuard


def first_alarm(losses: list[float], factor: float = 5.0) -> int | None:
    guard = DivergenceGuard(factor)
    for step, loss in enumerate(losses, start=1):
        try:
            guard.observe(step, loss)
        except Diverged as diverged:
            assert diverged.step == step and f"at step {step}" in str(diverged)
            return step
    return None


def slow_reference(losses: list[float], factor: float) -> int | None:
    """All medians of ``WINDOW`` losses, looked at anew after every step."""
    for step in range(1, len(losses) + 1):
        if not math.isfinite(losses[step - 1]):
            return step
        medians = [statistics.median(losses[end - WINDOW : end]) for end in range(WINDOW, step + 1)]
        if len(medians) > 1 and factor:
            limit = max(factor * min(medians[:-1]), medians[0])
            if medians[-1] > limit:
                return step
    return None


LOSSES = st.lists(st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0, 4.0, 30.0]), max_size=120)


@given(LOSSES, st.sampled_from([0.0, 2.0, 5.0]))
def test_an_explosion_is_found_where_a_slow_look_finds_it(
    losses: list[float], factor: float
) -> None:
    assert first_alarm(losses, factor) == slow_reference(losses, factor)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_found_at_once(loss: float) -> None:
    assert first_alarm([0.5, 0.5, loss]) == 3
    assert first_alarm([0.5, loss], factor=0) == 2


def test_single_large_losses_are_no_explosion() -> None:
    assert first_alarm([0.3, 900.0, 0.3, 0.3] * 100) is None


def test_a_loss_that_was_almost_zero_may_rise_up_to_where_it_began() -> None:
    falling = [0.5] * WINDOW + [1e-6] * 40
    assert first_alarm(falling + [0.1] * 100) is None
    assert first_alarm(falling + [0.6] * 100) == len(falling) + WINDOW // 2 + 1


def test_the_rise_of_an_explosion_is_worth_no_going_back_to() -> None:
    guard = DivergenceGuard(5)
    for step in range(1, 41):
        guard.observe(step, 0.2)
        assert guard.is_calm
    calm: list[bool] = []
    for step in range(41, 61):
        guard.observe(step, 0.9)  # below the alarm at 1.0
        calm.append(guard.is_calm)
    # The median of the last five.
    assert calm == [True] * 2 + [False] * 18
    assert guard.state()["calm"] is False


@given(LOSSES, st.integers(0, 120))
def test_a_guard_that_was_stored_goes_on_in_the_same_way(losses: list[float], cut: int) -> None:
    whole, first = DivergenceGuard(2), DivergenceGuard(2)
    second = DivergenceGuard(2)
    for step, loss in enumerate(losses):
        if step == cut:
            second.restore(json.loads(json.dumps(first.state())))
        part = first if step < cut else second
        try:
            whole.observe(step, loss)
        except Diverged as diverged:
            with pytest.raises(Diverged, match=str(diverged)):
                part.observe(step, loss)
            return
        part.observe(step, loss)
        assert part.is_calm == whole.is_calm
