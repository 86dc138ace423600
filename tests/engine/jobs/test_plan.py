"""What settings mean in steps, and the draws of a run; `test_train.py` has the batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.config import Config, DatasetConfig, OptimizerConfig, TimestepConfig
from pack.engine.dataset import CachedItem
from pack.engine.jobs.plan import TimeDraws, plan_run, schedule_settings


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
