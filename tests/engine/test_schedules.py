from __future__ import annotations

from pack.engine.schedules import constant_with_warmup


def test_the_warm_up_rises_in_equal_steps_and_never_wastes_the_first() -> None:
    rates = [constant_with_warmup(step, warmup_steps=4) for step in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_without_a_warm_up_the_rate_is_constant() -> None:
    assert [constant_with_warmup(step, warmup_steps=0) for step in range(3)] == [1.0] * 3
