from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.errors import ConfigError
from pack.engine.schedule_classes import class_multipliers, cycles_momentum, find_class
from torch.optim import lr_scheduler

RATE, STEPS = 0.003, 50

CLASSES: list[tuple[str, dict[str, Any]]] = [
    ("StepLR", {"step_size": 7, "gamma": 0.5}),
    ("MultiStepLR", {"milestones": [5, 30]}),
    ("ConstantLR", {"total_iters": 9}),
    ("LinearLR", {"start_factor": 0.1, "total_iters": 20}),
    ("ExponentialLR", {"gamma": 0.95}),
    ("PolynomialLR", {"total_iters": STEPS, "power": 2.0}),
    ("CosineAnnealingLR", {"T_max": STEPS, "eta_min": 1e-4}),
    ("CosineAnnealingWarmRestarts", {"T_0": 4, "T_mult": 2}),
    ("CyclicLR", {"base_lr": 1e-4, "max_lr": 1e-2, "step_size_up": 6, "cycle_momentum": False}),
    ("OneCycleLR", {"max_lr": 0.01, "total_steps": STEPS, "three_phase": True}),
]


def multipliers(name: str, arguments: dict[str, Any], steps: int = STEPS) -> list[float]:
    found = find_class(name, allowed=())
    return list(class_multipliers(found, arguments, learning_rate=RATE, num_steps=steps))


@pytest.mark.parametrize(("name", "arguments"), CLASSES)
def test_a_class_gives_the_rates_that_it_gives_in_a_training(
    name: str, arguments: dict[str, Any]
) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=RATE)
    scheduler = getattr(lr_scheduler, name)(optimizer, **arguments)
    expected: list[float] = []
    for _ in range(STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        weight.square().sum().backward()
        optimizer.step()
        if len(expected) < STEPS:
            scheduler.step()
    found = multipliers(name, arguments)
    assert [RATE * each for each in found] == pytest.approx(expected, rel=1e-12)


def test_stepping_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(multipliers("StepLR", {"step_size": 2})) == STEPS


def test_a_class_may_be_named_with_or_without_its_module() -> None:
    assert find_class("StepLR", allowed=()) is lr_scheduler.StepLR
    assert find_class("torch.optim.lr_scheduler.StepLR", allowed=()) is lr_scheduler.StepLR


def test_a_class_of_an_allowed_package_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "schedules_of_a_user.py").write_text(
        "from torch.optim.lr_scheduler import LRScheduler\n"
        "class Halving(LRScheduler):\n"
        "    def __init__(self, optimizer, every, last_epoch=-1):\n"
        "        self.every = every\n"
        "        super().__init__(optimizer, last_epoch)\n"
        "    def get_lr(self):\n"
        "        return [lr * 0.5 ** (self.last_epoch // self.every) for lr in self.base_lrs]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = "schedules_of_a_user.Halving"
    with pytest.raises(ConfigError, match="lr_scheduler_type = 'schedules_of_a_user.Halving'"):
        find_class(name, allowed=())
    found = find_class(name, allowed=("schedules_of_a_user",))
    halves = class_multipliers(found, {"every": 2}, learning_rate=RATE, num_steps=5)
    assert list(halves) == pytest.approx([1, 1, 0.5, 0.5, 0.25])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("StpLR", "did you mean StepLR?"),
        ("Optimizer", "not a kind of LRScheduler"),
        ("LambdaLR", "it needs a function"),
        ("torch.optim.lr_scheduler.MultiplicativeLR", "it needs a function"),
        ("ReduceLROnPlateau", "it needs a loss that is measured during the run"),
        ("SequentialLR", "it needs other schedulers"),
        ("ChainedScheduler", "it needs other schedulers"),
        ("LRScheduler", "what all others are made from"),
        ("os.path", "os was not imported"),
    ],
)
def test_a_class_that_cannot_be_used_is_refused_in_a_sentence(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match="lr_scheduler_type") as caught:
        find_class(name, allowed=())
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("StepLR", {}, "StepLR needs step_size; it takes step_size, gamma"),
        ("StepLR", {"step": 3}, "StepLR has no argument step; it takes step_size, gamma"),
        ("StepLR", {"step_size": 3, "last_epoch": 4}, "has no argument last_epoch"),
        ("StepLR", {"step_size": 0}, "fails at step 2 of 50: integer modulo by zero"),
        ("StepLR", {"step_size": "3"}, "StepLR fails at step 2"),
        ("OneCycleLR", {"max_lr": 0.1}, "You must define either total_steps OR"),
        (
            "OneCycleLR",
            {"max_lr": 0.1, "total_steps": 10},
            "The specified number of total steps is 10",
        ),
        ("ExponentialLR", {"gamma": 1e30}, "the learning rate would be inf"),
        ("ExponentialLR", {"gamma": -1}, "the learning rate would be -0.003"),
        ("CyclicLR", {"base_lr": [1, 2], "max_lr": 1}, "CyclicLR fails at step 1"),
    ],
)
def test_wrong_arguments_are_refused_before_the_training(
    name: str, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        multipliers(name, arguments)
    assert str(caught.value).startswith("lr_scheduler_args: ") and says in str(caught.value)


def test_more_steps_than_can_be_asked_for_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="no more than 10,000,000; the run has 10,000,001"):
        multipliers("StepLR", {"step_size": 2}, 10_000_001)


@pytest.mark.parametrize(
    ("name", "arguments", "cycles"),
    [
        ("OneCycleLR", {}, True),
        ("CyclicLR", {"cycle_momentum": False}, False),
        ("StepLR", {}, False),
    ],
)
def test_whether_the_momentum_would_be_cycled_is_known(
    name: str, arguments: dict[str, Any], cycles: bool
) -> None:
    assert cycles_momentum(find_class(name, allowed=()), arguments) is cycles
