"""Which batches make up a training run: a function of settings, data and number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import seeds
from ..config import Config, OptimizerConfig
from ..dataset import CachedItem, Planned, epoch_batches
from ..schedules import ScheduleSettings
from ..timesteps import stratified_draws


@dataclass(frozen=True)
class Plan:
    """How the run's batches, counted over all processes and epochs, make up its steps.

    ``start`` steps are done already.
    """

    start: int
    batches_per_epoch: int
    batches_per_step: int
    total_steps: int
    schedule: ScheduleSettings

    def epoch_after(self, step: int) -> int:
        """The epoch, counted from 1, of the last batch of optimizer step ``step``."""
        return max(0, step * self.batches_per_step - 1) // self.batches_per_epoch + 1

    def ended_epochs(self, step: int) -> range:
        """The epochs, counted from 1, whose last batch is in optimizer step ``step``."""
        last = step * self.batches_per_step
        before = (last - self.batches_per_step) // self.batches_per_epoch
        return range(before + 1, last // self.batches_per_epoch + 1)


def plan_run(
    config: Config, items: Sequence[CachedItem], *, num_processes: int, start: int
) -> Plan:
    """The plan of a run of which ``start`` optimizer steps are done."""
    training = config.training
    batches = len(_epoch(config, items, 0))
    per_step = training.gradient_accumulation_steps * num_processes
    total = training.max_train_steps
    if training.max_train_epochs:
        total = math.ceil(training.max_train_epochs * batches / per_step)
    return Plan(start, batches, per_step, total, schedule_settings(config.optimizer, total))


def schedule_settings(optimizer: OptimizerConfig, total_steps: int) -> ScheduleSettings:
    """The settings as the schedules take them; shares become steps."""

    def steps(value: int | float) -> int:
        return value if isinstance(value, int) else round(value * total_steps)

    ratio, decay = optimizer.lr_scheduler_min_lr_ratio, optimizer.lr_decay_steps
    default_ratio = 0.01 if optimizer.lr_scheduler == "rex" else 0.0
    return ScheduleSettings(
        total_steps=total_steps,
        warmup_steps=steps(optimizer.lr_warmup_steps),
        min_ratio=default_ratio if ratio is None else ratio,
        num_cycles=optimizer.lr_scheduler_num_cycles,
        power=optimizer.lr_scheduler_power,
        decay_steps=None if decay is None else steps(decay),
        timescale=optimizer.lr_scheduler_timescale,
        rex_alpha=optimizer.rex_alpha,
        rex_beta=optimizer.rex_beta,
    )


class TimeDraws:
    """Uniform draws for the training times of a batch, functions of seed and batch alone.

    With ``num_timestep_buckets`` those of an epoch are stratified together.
    """

    def __init__(self, config: Config, items: Sequence[CachedItem], plan: Plan) -> None:
        self._config, self._items, self._plan = config, items, plan
        self._num_strata = config.timesteps.num_timestep_buckets or 1
        self._seed = config.runtime.seed
        self._epoch = -1
        self._of_batch: Sequence[Tensor] = ()

    def __call__(self, index: int, count: int) -> Tensor:
        """The draws [count] of batch number ``index`` of the run, which has that many samples."""
        if self._num_strata < 2:
            return torch.rand(count, generator=seeds.generator(self._seed, "time", index))
        epoch, position = divmod(index, self._plan.batches_per_epoch)
        if epoch != self._epoch:
            sizes = [len(batch) for batch in _epoch(self._config, self._items, epoch)]
            draws = stratified_draws(
                sum(sizes),
                num_strata=self._num_strata,
                generator=seeds.generator(self._seed, "time strata", epoch),
            )
            self._epoch, self._of_batch = epoch, draws.split(sizes)
        assert len(self._of_batch[position]) == count
        return self._of_batch[position]


def _epoch(config: Config, items: Sequence[CachedItem], epoch: int) -> list[tuple[int, ...]]:
    return epoch_batches(
        items, batch_size=config.dataset.batch_size, seed=config.runtime.seed, epoch=epoch
    )


def batches_to_come(
    config: Config,
    items: Sequence[CachedItem],
    plan: Plan,
    *,
    process_index: int,
    num_processes: int,
) -> Iterator[Planned]:
    """The index of every batch that one of the processes still has to train, and its items."""
    indices = range(
        plan.start * plan.batches_per_step + process_index,
        plan.total_steps * plan.batches_per_step,
        num_processes,
    )
    epoch, batches = -1, []
    for index in indices:
        wanted, position = divmod(index, plan.batches_per_epoch)
        if wanted != epoch:
            epoch, batches = wanted, _epoch(config, items, wanted)
        yield index, batches[position]
