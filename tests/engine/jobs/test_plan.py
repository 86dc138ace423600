"""What settings mean in steps, and the draws of a run; `test_train.py` has the batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.config import (
    Config,
    DatasetConfig,
    OptimizerConfig,
    TimestepConfig,
    TrainingConfig,
)
from pack.engine.dataset import CachedItem
from pack.engine.errors import ConfigError
from pack.engine.events import Event, Message
from pack.engine.jobs.plan import TimeDraws, plan_run, schedule_of, schedule_settings
from pack.engine.schedules import SHAPES


def test_the_minimum_of_the_rate_is_the_published_one_of_each_schedule_unless_it_is_given() -> None:
    def lowest(**settings: Any) -> float:
        return schedule_settings(OptimizerConfig(**settings), 100).min_ratio

    assert lowest(lr_scheduler="cosine") == 0
    assert lowest(lr_scheduler="rex") == 0.01
    assert lowest(lr_scheduler="rex", lr_scheduler_min_lr_ratio=0.0) == 0


def test_the_decay_is_in_steps_or_a_share_of_all() -> None:
    def decay(**settings: Any) -> int | None:
        return schedule_settings(OptimizerConfig(**settings), 200).decay_steps

    assert decay(lr_decay_steps=30) == 30
    assert decay(lr_decay_steps="25%") == 50
    assert decay() is None


def test_the_cycles_are_half_waves_where_there_are_waves() -> None:
    """As in musubi-tuner: num_cycles / 2 for these two, whole cycles with restarts."""

    def waves(name: str) -> float:
        return schedule_settings(
            OptimizerConfig(lr_scheduler=name, lr_scheduler_num_cycles=3), 100
        ).waves

    assert waves("cosine_with_min_lr") == waves("warmup_stable_decay") == 1.5
    assert waves("cosine") == 0.5


def test_the_rules_of_a_piecewise_schedule_say_all_of_it() -> None:
    optimizer = OptimizerConfig(
        lr_scheduler="piecewise_constant",
        lr_scheduler_min_lr_ratio=0.3,
        lr_scheduler_args=["step_rules='1:2,0.1'"],
    )
    schedule = schedule_of(optimizer, 4, allowed=())
    assert [schedule(step) for step in range(4)] == [1, 1, 0.1, 0.1]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("warmup", [0, 5, 0.25, "50%", 20])
@pytest.mark.parametrize("decay", [None, 0, 0.3, "50%"])
def test_every_schedule_has_a_usable_rate_at_every_step_of_its_run(
    name: str, warmup: Any, decay: Any
) -> None:
    rules = ["step_rules='1:7,0.5'"] if name == "piecewise_constant" else []
    optimizer = OptimizerConfig(
        lr_scheduler=name, lr_warmup_steps=warmup, lr_decay_steps=decay, lr_scheduler_args=rules
    )
    if name == "warmup_stable_decay" and warmup == 20 and decay:
        with pytest.raises(ConfigError, match="do not fit into a run of 20"):
            schedule_of(optimizer, 20, allowed=())
        return
    schedule = schedule_of(optimizer, 20, allowed=())
    assert all(0 < schedule(step) <= 1 for step in range(20))


@pytest.mark.parametrize("total", range(1, 60))
def test_shares_that_make_up_the_whole_run_fit_into_it(total: int) -> None:
    for warmup, decay in ((0.5, 0.5), (0.1, 0.9), (0.25, "75%")):
        optimizer = OptimizerConfig(
            lr_scheduler="warmup_stable_decay", lr_warmup_steps=warmup, lr_decay_steps=decay
        )
        settings = schedule_settings(optimizer, total)
        assert settings.decay_steps is not None
        assert settings.warmup_steps + settings.decay_steps in (total - 1, total)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lr_warmup_steps": 51}, "lr_warmup_steps: a warm-up of 51 steps does not fit into a run"),
        (
            {"lr_warmup_steps": 30, "lr_decay_steps": 30, "lr_scheduler": "warmup_stable_decay"},
            "lr_decay_steps: 30 steps of warm-up and 30 of decay do not fit into a run of 50",
        ),
        (
            {
                "lr_warmup_steps": 10,
                "lr_scheduler": "warmup_stable_decay",
                "lr_scheduler_args": ["num_stable_steps=30", "num_decay_steps=11"],
            },
            "10 steps of warm-up, 30 stable steps and 11 of decay do not fit into a run of 50",
        ),
        ({"lr_scheduler_args": ["power=2"]}, "constant takes no arguments; remove power"),
        ({"lr_scheduler_type": "LambdaLR"}, "it needs a function"),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["size=1"]}, "has no argument size"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_before_the_run(
    settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        schedule_of(OptimizerConfig(**settings), 50, allowed=())
    assert says in str(caught.value)


def test_a_class_begins_after_the_warm_up_which_rises_to_it() -> None:
    optimizer = OptimizerConfig(
        lr_scheduler_type="StepLR",
        lr_scheduler_args=["step_size=2", "gamma=0.5"],
        lr_warmup_steps=4,
    )
    schedule = schedule_of(optimizer, 10, allowed=())
    found = [schedule(step) for step in range(10)]
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.5, 0.5, 0.25, 0.25])


def test_a_class_after_a_warm_up_as_long_as_the_run_is_asked_for_its_first_rate_only() -> None:
    optimizer = OptimizerConfig(
        lr_scheduler_type="StepLR", lr_scheduler_args=["step_size=1"], lr_warmup_steps=3
    )
    schedule = schedule_of(optimizer, 3, allowed=())
    assert [schedule(step) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])


@pytest.mark.parametrize(("cycled", "num_messages"), [("True", 1), ("False", 0)])
def test_a_momentum_that_is_not_cycled_is_said(cycled: str, num_messages: int) -> None:
    optimizer = OptimizerConfig(
        lr_scheduler_type="OneCycleLR",
        lr_scheduler_args=["max_lr=1e-3", "total_steps=10", f"cycle_momentum={cycled}"],
    )
    events: list[Event] = []
    schedule_of(optimizer, 10, allowed=(), report=events.append)
    assert len(events) == num_messages
    for event in events:
        assert isinstance(event, Message) and "the momentum stays as it is" in event.text


@pytest.mark.parametrize("epochs", [None, 3])
def test_a_plan_has_the_schedule_of_all_its_steps(epochs: int | None) -> None:
    config = Config(
        optimizer=OptimizerConfig(lr_scheduler="linear"),
        training=TrainingConfig(max_train_steps=7, max_train_epochs=epochs),
    )
    plan = plan_run(config, items(5), num_processes=1, start=2)
    assert plan.total_steps == (15 if epochs else 7)
    assert plan.multiplier(plan.total_steps - 1) == pytest.approx(1 / plan.total_steps)


def items(count: int, *, side: int = 8) -> list[CachedItem]:
    shapes = (("latents", (16, 1, side, side)),)
    return [CachedItem(Path(str(n)), Path(str(n)), shapes, 1, str(n)) for n in range(count)]


def draws(config: Config, data: list[CachedItem], order: list[int]) -> dict[int, torch.Tensor]:
    """The draws of the batches, all of them full, asked for in some order."""
    draw = TimeDraws(config, data, plan_run(config, data, num_processes=1, start=0))
    return {index: draw(index, config.dataset.batch_size) for index in order}


@pytest.mark.parametrize("strata", [None, 1, 4])
def test_the_draws_of_a_batch_do_not_depend_on_what_came_before(strata: int | None) -> None:
    config = Config(
        dataset=DatasetConfig(batch_size=4), timesteps=TimestepConfig(num_timestep_buckets=strata)
    )
    data = items(12)
    first, second = draws(config, data, list(range(9))), draws(config, data, [8, 2, 5, 0, 8])
    for index, drawn in second.items():
        assert torch.equal(drawn, first[index])
    assert len({tuple(drawn.tolist()) for drawn in first.values()}) == 9


def test_each_epoch_is_stratified_as_a_whole() -> None:
    config = Config(
        dataset=DatasetConfig(batch_size=4), timesteps=TimestepConfig(num_timestep_buckets=6)
    )
    data = items(12)
    found = draws(config, data, list(range(6)))
    for epoch in ((0, 1, 2), (3, 4, 5)):
        together = torch.cat([found[index] for index in epoch])
        assert torch.bincount((together * 6).long(), minlength=6).tolist() == [2] * 6
