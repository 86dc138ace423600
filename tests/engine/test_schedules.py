from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from pack.engine.schedules import SHAPES, ScheduleSettings, multiplier
from pack.tests.conftest import ROOT

TOTAL = 100
REX = json.loads((ROOT / "tests/data/rex_lr.json").read_text())


def rates(name: str, **settings: Any) -> list[float]:
    given = ScheduleSettings(**{"total_steps": TOTAL} | settings)
    return [multiplier(name, step, given) for step in range(given.total_steps)]


def transformers_rates(name: str, **specific: Any) -> list[float]:
    """What transformers' scheduler of that name gives to an optimizer with a rate of 1."""
    from transformers import get_inverse_sqrt_schedule, get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if name == "inverse_sqrt":  # whose timescale get_scheduler drops in transformers 4
        scheduler = get_inverse_sqrt_schedule(optimizer, num_warmup_steps=0, **specific)
    else:
        scheduler = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=TOTAL,
            scheduler_specific_kwargs=specific or None,
        )
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
    beyond = multiplier(name, 10 * TOTAL, ScheduleSettings(TOTAL, min_ratio=0.1))
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
        (
            "warmup_stable_decay",
            {"decay_steps": 30, "min_ratio": 0.05},
            {"num_stable_steps": 70, "num_decay_steps": 30, "min_lr_ratio": 0.05},
        ),
    ],
)
def test_a_shape_is_that_of_transformers(
    name: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    assert rates(name, **ours) == pytest.approx(transformers_rates(name, **theirs), abs=1e-9)


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


@pytest.mark.parametrize(("decay", "begins"), [(None, 80), (0, 100), (30, 70), (500, 0)])
def test_the_stable_part_ends_where_the_decay_begins(decay: int | None, begins: int) -> None:
    found = rates("warmup_stable_decay", decay_steps=decay)
    assert found[: begins + 1] == pytest.approx([1.0] * min(begins + 1, TOTAL))
    assert all(rate < 1 for rate in found[begins + 1 :])
