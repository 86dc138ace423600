from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pack.engine.config_types import parse_arguments
from pack.engine.errors import ConfigError
from pack.engine.schedule_arguments import ARGUMENTS, with_arguments
from pack.engine.schedules import SHAPES, ScheduleSettings, multiplier

TOTAL, RATE = 60, 0.02


def given(name: str, *entries: str) -> ScheduleSettings:
    settings = ScheduleSettings(TOTAL)
    return with_arguments(settings, name, parse_arguments(list(entries)), learning_rate=RATE)


def theirs(name: str, arguments: dict[str, Any]) -> list[float]:
    """The rates that the library gives which names the arguments."""
    from diffusers.optimization import get_piecewise_constant_schedule
    from transformers import get_inverse_sqrt_schedule, get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    if name == "piecewise_constant":
        scheduler = get_piecewise_constant_schedule(optimizer, **arguments)
    elif name == "inverse_sqrt":  # whose timescale get_scheduler drops in transformers 4
        scheduler = get_inverse_sqrt_schedule(optimizer, num_warmup_steps=0, **arguments)
    else:
        scheduler = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=TOTAL,
            scheduler_specific_kwargs=arguments,
        )
    found: list[float] = []
    for _ in range(TOTAL):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("cosine", ["num_cycles=1.5"]),
        ("cosine_with_restarts", ["num_cycles=3"]),
        ("cosine_with_min_lr", ["min_lr=0.005"]),
        ("cosine_with_min_lr", ["min_lr_rate=0.1", "min_lr=None", "num_cycles=1"]),
        ("polynomial", ["power=2", "lr_end=0.001"]),
        ("inverse_sqrt", ["timescale=7"]),
        ("inverse_sqrt", ["timescale=None"]),
        ("warmup_stable_decay", ["num_decay_steps=20"]),
        ("warmup_stable_decay", ["num_decay_steps=20", "num_stable_steps=10", "min_lr_ratio=0.5"]),
        ("warmup_stable_decay", ["num_decay_steps=25", "decay_type='1-sqrt'", "num_cycles=1"]),
        ("piecewise_constant", ["step_rules='1:10,0.1:20,0.01'"]),
        ("piecewise_constant", ["step_rules='0.1: 20, 1:10 ,0.01'"]),
    ],
)
def test_arguments_mean_what_they_mean_to_the_library_that_names_them(
    name: str, entries: list[str]
) -> None:
    settings = given(name, *entries)
    ours = [RATE * multiplier(name, step, settings) for step in range(TOTAL)]
    assert ours == pytest.approx(theirs(name, parse_arguments(entries)), abs=1e-12)


def test_the_arguments_of_rex_are_those_of_the_specification() -> None:
    settings = given("rex", "rex_alpha=0.5", "rex_beta=0.5")
    assert (settings.rex_alpha, settings.rex_beta) == (0.5, 0.5)


def test_an_argument_wins_over_the_setting_that_means_the_same() -> None:
    before = ScheduleSettings(TOTAL, power=3.0, min_ratio=0.5)
    after = with_arguments(before, "polynomial", {"power": 2}, learning_rate=RATE)
    assert after == before._replace(power=2.0)


def test_every_schedule_says_what_it_takes() -> None:
    assert ARGUMENTS.keys() == SHAPES.keys()
    fields = {argument.field for known in ARGUMENTS.values() for argument in known.values()}
    assert fields <= set(ScheduleSettings._fields)


@pytest.mark.parametrize(
    ("name", "entry", "says"),
    [
        ("rex", "rex_aplha=0.1", "rex has no argument rex_aplha; it takes rex_alpha, rex_beta"),
        ("cosine", "power=2", "cosine has no argument power; it takes num_cycles"),
        ("linear", "power=2", "linear takes no arguments; remove power"),
        ("polynomial", "power='2'", "power='2': expected a number above 0"),
        ("polynomial", "power=True", "power=True: expected a number above 0"),
        ("polynomial", "power=0", "power=0: expected a number above 0"),
        ("polynomial", "power=1e999", "power=inf: expected a number above 0"),
        ("polynomial", f"power=1{'0' * 400}", "expected a number above 0"),
        ("inverse_sqrt", f"timescale=1{'0' * 400}", "expected whole steps from 1 up"),
        ("polynomial", "lr_end=0.03", "expected a learning rate from 0 to that of the run, 0.02"),
        ("cosine_with_min_lr", "min_lr_rate=2", "expected a part of the learning rate, from 0 to"),
        ("inverse_sqrt", "timescale=0", "timescale=0: expected whole steps from 1 up"),
        ("inverse_sqrt", "timescale=1.5", "timescale=1.5: expected whole steps from 1 up"),
        ("rex", "rex_beta=-1", "rex_beta=-1: expected a number from 0 up"),
        ("warmup_stable_decay", "num_decay_steps=-1", "expected whole steps from 0 up"),
        ("warmup_stable_decay", "num_decay_steps=None", "expected whole steps from 0 up"),
        ("warmup_stable_decay", "decay_type='exp'", "expected one of 'cosine', 'linear', '1-sqrt'"),
        ("warmup_stable_decay", "warmup_type=1", "expected one of 'linear', 'cosine', '1-sqrt'"),
        *(
            ("piecewise_constant", f"step_rules={rules!r}", "expected text such as '1:10,0.1:20")
            for rules in ("", "1:10", "1,2", "a:10,1", "1:x,1", "1:1.5,1", "1:5:6,1", "1:5,", 0.5)
        ),
        ("piecewise_constant", "step_rules='1:5,0.5:5,0.1'", "expected text such as '1:10,0.1"),
        ("piecewise_constant", "step_rules='1:0,0.1'", "expected text such as '1:10,0.1"),
        ("piecewise_constant", "step_rules='-1:5,0.1'", "expected multipliers from 0 up"),
        ("piecewise_constant", "step_rules='1:5,nan'", "expected multipliers from 0 up"),
        ("piecewise_constant", "step_rules='1:5,inf'", "expected multipliers from 0 up"),
    ],
)
def test_what_a_schedule_does_not_take_is_said(name: str, entry: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        given(name, entry)
    assert str(caught.value).startswith("lr_scheduler_args: ") and says in str(caught.value)


def test_two_arguments_for_one_thing_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_lr and min_lr_rate mean the same; give one"):
        given("cosine_with_min_lr", "min_lr=0.001", "min_lr_rate=0.1")


def test_a_piecewise_schedule_without_rules_says_how_they_look() -> None:
    with pytest.raises(ConfigError, match="step_rules='1:10,0.1:20,0.01'"):
        given("piecewise_constant")


def test_the_last_rule_has_no_end() -> None:
    assert given("piecewise_constant", "step_rules='2'").rules == ((math.inf, 2.0),)
