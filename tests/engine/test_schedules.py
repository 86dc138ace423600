from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pack.engine.schedules import (
    FALLS,
    RISES,
    SHAPES,
    ScheduleSettings,
    listed_multiplier,
    multiplier,
)
from pack.tests.conftest import ROOT

TOTAL = 100
REX = json.loads((ROOT / "tests/data/rex_lr.json").read_text())


FLAT = ((math.inf, 1.0),)  # the rules of a piecewise schedule that does nothing


def rates(name: str, **settings: Any) -> list[float]:
    chosen = ScheduleSettings(**{"total_steps": TOTAL, "rules": FLAT} | settings)
    return [multiplier(name, step, chosen) for step in range(chosen.total_steps)]


def transformers_rates(name: str, *, warmup_steps: int = 0, **specific: Any) -> list[float]:
    """What transformers' scheduler of that name gives to an optimizer with a rate of 1."""
    from transformers import get_inverse_sqrt_schedule, get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if name == "inverse_sqrt":  # whose timescale get_scheduler drops in transformers 4
        scheduler = get_inverse_sqrt_schedule(optimizer, num_warmup_steps=warmup_steps, **specific)
    else:
        scheduler = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup_steps,
            num_training_steps=TOTAL,
            scheduler_specific_kwargs=specific or None,
        )
    return stepped(optimizer, scheduler)


def stepped(optimizer: torch.optim.Optimizer, scheduler: Any) -> list[float]:
    """The rates of a run in which a scheduler does its work."""
    found: list[float] = []
    for _ in range(TOTAL):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_the_warm_up_rises_in_equal_steps_and_never_wastes_the_first(name: str) -> None:
    assert rates(name, warmup_steps=4)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates(name, warmup_steps=4)[4] == pytest.approx(1.0)


@pytest.mark.parametrize("name", SHAPES)
def test_the_warm_up_rises_from_the_minimum(name: str) -> None:
    assert rates(name, warmup_steps=4, min_ratio=0.2)[:4] == pytest.approx([0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("name", SHAPES)
def test_a_rate_stays_between_the_minimum_and_one(name: str) -> None:
    found = rates(name, warmup_steps=7, min_ratio=0.1, num_cycles=3, power=2.0)
    assert all(0.1 <= rate <= 1 + 1e-12 for rate in found)
    after = ScheduleSettings(TOTAL, min_ratio=0.1, rules=FLAT)
    beyond = multiplier(name, 10 * TOTAL, after)
    assert 0.1 <= beyond <= 1


def test_without_a_warm_up_the_constant_rate_is_constant() -> None:
    assert rates("constant") == rates("constant_with_warmup") == [1.0] * TOTAL


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("linear", {}, {}),
        ("cosine", {}, {}),
        ("cosine_with_restarts", {"num_cycles": 3}, {"num_cycles": 3}),
        ("cosine_with_min_lr", {"min_ratio": 0.1}, {"min_lr_rate": 0.1}),
        ("polynomial", {"power": 2.5}, {"power": 2.5, "lr_end": 0.0}),
        ("inverse_sqrt", {"timescale": 20}, {"timescale": 20}),
        ("cosine", {"waves": 1.75}, {"num_cycles": 1.75}),
        ("cosine_with_restarts", {"num_cycles": 2.5}, {"num_cycles": 2.5}),
        ("cosine_with_min_lr", {"waves": 2, "min_ratio": 0.2}, {"num_cycles": 2, "min_lr": 0.2}),
        (
            "warmup_stable_decay",
            {"decay_steps": 30, "min_ratio": 0.05},
            {"num_stable_steps": 70, "num_decay_steps": 30, "min_lr_ratio": 0.05},
        ),
        (
            "warmup_stable_decay",
            {"decay_steps": 30, "stable_steps": 20, "min_ratio": 0.05, "waves": 1.5},
            {
                "num_stable_steps": 20,
                "num_decay_steps": 30,
                "min_lr_ratio": 0.05,
                "num_cycles": 1.5,
            },
        ),
    ],
)
def test_a_shape_is_that_of_transformers(
    name: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    assert rates(name, **ours) == pytest.approx(transformers_rates(name, **theirs), abs=1e-9)


@pytest.mark.parametrize("fall", FALLS)
def test_a_decay_is_that_of_transformers(fall: str) -> None:
    ours = rates("warmup_stable_decay", decay_steps=40, falls=fall, min_ratio=0.1)
    theirs = transformers_rates(
        "warmup_stable_decay", num_decay_steps=40, decay_type=fall, min_lr_ratio=0.1
    )
    assert ours == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("rise", RISES)
def test_a_warm_up_is_that_of_transformers_one_step_later(rise: str) -> None:
    """Theirs begins at the minimum; ours skips that, and ends one step earlier."""
    ours = rates("warmup_stable_decay", warmup_steps=10, rises=rise, min_ratio=0.1)
    theirs = transformers_rates(
        "warmup_stable_decay",
        warmup_steps=10,
        num_decay_steps=0,
        warmup_type=rise,
        min_lr_ratio=0.1,
    )
    assert ours[:10] == pytest.approx(theirs[1:11], abs=1e-9)


RULES = [
    ("1:10,0.1:20,0.01", ((10, 1.0), (20, 0.1), (math.inf, 0.01))),
    ("0.5:1,1:99,2", ((1, 0.5), (99, 1.0), (math.inf, 2.0))),
    ("0.5", ((math.inf, 0.5),)),
]


@pytest.mark.parametrize(("text", "rules"), RULES)
def test_a_piecewise_schedule_is_that_of_diffusers(
    text: str, rules: tuple[tuple[float, float], ...]
) -> None:
    from diffusers.optimization import get_piecewise_constant_schedule

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = stepped(optimizer, get_piecewise_constant_schedule(optimizer, text))
    assert rates("piecewise_constant", rules=rules) == theirs


def test_the_steps_of_a_piecewise_schedule_are_those_of_the_run_with_its_warm_up() -> None:
    """Whatever the lengths are: a quotient of steps must not be rounded to the step before."""
    for warmup in range(50):
        found = rates(
            "piecewise_constant", warmup_steps=warmup, rules=((50, 0.5), (math.inf, 0.25))
        )
        assert found[warmup:] == [0.5] * (50 - warmup) + [0.25] * 50
        assert found[:warmup] == pytest.approx([0.5 * n / warmup for n in range(1, warmup + 1)])


@given(
    name=st.sampled_from([name for name in SHAPES if name != "piecewise_constant"]),
    total=st.integers(1, 300),
    part=st.floats(0, 1),
    floor=st.floats(0, 1),
    power=st.floats(0.1, 10),
    rise=st.sampled_from(list(RISES)),
    fall=st.sampled_from(list(FALLS)),
)
def test_without_cycles_a_rate_rises_to_one_and_then_only_falls_to_the_minimum(
    name: str, total: int, part: float, floor: float, power: float, rise: str, fall: str
) -> None:
    warmup = round(part * total)
    found = rates(
        name,
        total_steps=total,
        warmup_steps=warmup,
        min_ratio=floor,
        power=power,
        rises=rise,
        falls=fall,
    )
    rounding = 1e-12
    assert all(floor - rounding <= rate <= 1 + rounding for rate in found)
    up, down = found[:warmup], found[max(0, warmup - 1) :]
    assert all(first <= second + rounding for first, second in zip(up, up[1:], strict=False))
    assert all(first >= second - rounding for first, second in zip(down, down[1:], strict=False))


@given(warmup=st.integers(0, 20), floor=st.floats(0, 1), scale=st.floats(0.1, 10))
def test_listed_multipliers_have_the_warm_up_of_a_shape_in_front(
    warmup: int, floor: float, scale: float
) -> None:
    settings = ScheduleSettings(30, warmup_steps=warmup, min_ratio=floor)
    listed = [scale * 0.9**n for n in range(settings.steps_left)]
    found = [listed_multiplier(listed, step, settings) for step in range(40)]
    assert found[warmup:30] == listed[: 30 - warmup]
    assert found[30:] == [listed[-1]] * 10
    constant = [multiplier("constant", step, settings) for step in range(warmup)]
    assert found[:warmup] == pytest.approx([scale * rate for rate in constant])


@pytest.mark.parametrize("case", REX, ids=lambda case: f"{case['num_steps']} steps")
def test_rex_equals_another_implementation(case: dict[str, Any]) -> None:
    found = rates(
        "rex",
        total_steps=case["num_steps"],
        min_ratio=case["min_lr_ratio"],
        rex_alpha=case["rex_alpha"],
        rex_beta=case["rex_beta"],
    )
    expected = [rate / case["lr"] for rate in case["lr_per_step"]]
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_shape_is_spread_over_what_follows_the_warm_up() -> None:
    found = rates("cosine", warmup_steps=20)
    assert found[60] == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert found[20] == 1.0


def test_a_warm_up_as_long_as_the_run_is_nothing_but_warm_up() -> None:
    assert rates("cosine", warmup_steps=TOTAL)[-1] == 1.0


@pytest.mark.parametrize(("decay", "begins"), [(None, 80), (0, 100), (30, 70), (100, 0)])
def test_the_stable_part_ends_where_the_decay_begins(decay: int | None, begins: int) -> None:
    found = rates("warmup_stable_decay", decay_steps=decay)
    assert found[: begins + 1] == pytest.approx([1.0] * min(begins + 1, TOTAL))
    assert all(rate < 1 for rate in found[begins + 1 :])
