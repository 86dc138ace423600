"""Which batches make up a training run: a function of settings, data and number of processes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import plugins, schedule_arguments, schedule_classes, schedules, seeds
from ..config import Config, OptimizerConfig
from ..dataset import CachedItem, Planned, epoch_batches
from ..errors import ConfigError
from ..events import Message, Reporter, silent
from ..schedules import ScheduleSettings
from ..timesteps import stratified_draws

_LOWEST = {"rex": 0.01}  # unless it is given; 0 for the others
# Schedules of which lr_scheduler_num_cycles counts half waves.
_WITH_WAVES = ("cosine_with_min_lr", "warmup_stable_decay")


@dataclass(frozen=True)
class Plan:
    """How the run's batches, counted over all processes and epochs, make up its steps.

    ``start`` steps are done already. ``multiplier`` gives what the learning rate of an optimizer
    step, counted from 0, is multiplied with.
    """

    start: int
    batches_per_epoch: int
    batches_per_step: int
    total_steps: int
    multiplier: Callable[[int], float]

    def epoch_after(self, step: int) -> int:
        """The epoch, counted from 1, of the last batch of optimizer step ``step``."""
        return max(0, step * self.batches_per_step - 1) // self.batches_per_epoch + 1

    def ended_epochs(self, step: int) -> range:
        """The epochs, counted from 1, whose last batch is in optimizer step ``step``."""
        last = step * self.batches_per_step
        before = (last - self.batches_per_step) // self.batches_per_epoch
        return range(before + 1, last // self.batches_per_epoch + 1)


def plan_run(
    config: Config,
    items: Sequence[CachedItem],
    *,
    num_processes: int,
    start: int,
    report: Reporter = silent,
) -> Plan:
    """The plan of a run of which ``start`` optimizer steps are done.

    Raises:
        ConfigError: the learning-rate schedule cannot be, or not for so many steps.
    """
    training = config.training
    batches = len(_epoch(config, items, 0))
    per_step = training.gradient_accumulation_steps * num_processes
    total = training.max_train_steps
    if training.max_train_epochs:
        total = math.ceil(training.max_train_epochs * batches / per_step)
    allowed = plugins.allowed_packages(os.environ)
    schedule = schedule_of(config.optimizer, total, allowed=allowed, report=report)
    return Plan(start, batches, per_step, total, schedule)


def schedule_of(
    optimizer: OptimizerConfig,
    total_steps: int,
    *,
    allowed: Collection[str],
    report: Reporter = silent,
) -> Callable[[int], float]:
    """What the learning rate is multiplied with, by optimizer step counted from 0.

    Args:
        allowed: packages that a class may come from, see `plugins`.
        report: is told what a class would do besides.

    Raises:
        ConfigError: the schedule cannot be, or not for so many steps.
    """
    settings = schedule_settings(optimizer, total_steps)
    if optimizer.lr_scheduler_type is None:
        return lambda step: schedules.multiplier(optimizer.lr_scheduler, step, settings)
    found = schedule_classes.find_class(optimizer.lr_scheduler_type, allowed=allowed)
    arguments = optimizer.scheduler_arguments
    listed = schedule_classes.class_multipliers(
        found,
        arguments,
        learning_rate=optimizer.learning_rate,
        num_steps=settings.steps_left,
    )
    if schedule_classes.cycles_momentum(found, arguments):
        report(
            Message(
                f"{found.__name__} sets the learning rate only; the momentum stays as it is (with "
                'lr_scheduler_args = ["cycle_momentum=False"] this is not said)'
            )
        )
    return lambda step: schedules.listed_multiplier(listed, step, settings)


def schedule_settings(optimizer: OptimizerConfig, total_steps: int) -> ScheduleSettings:
    """The settings as the schedules take them; shares become steps.

    Raises:
        ConfigError: the schedule does not take its arguments, or not for so many steps.
    """

    def steps(value: int | float) -> int:
        return value if isinstance(value, int) else round(value * total_steps)

    name, ratio = optimizer.lr_scheduler, optimizer.lr_scheduler_min_lr_ratio
    warmup, decay = steps(optimizer.lr_warmup_steps), optimizer.lr_decay_steps
    if isinstance(decay, float) and steps(decay) == total_steps - warmup + 1:
        decay = steps(decay) - 1  # two halves of an odd number of steps are both rounded up
    settings = ScheduleSettings(
        total_steps=total_steps,
        warmup_steps=warmup,
        min_ratio=_LOWEST.get(name, 0.0) if ratio is None else ratio,
        num_cycles=optimizer.lr_scheduler_num_cycles,
        # As in musubi-tuner, where the setting counts what cosine_with_restarts does once.
        waves=optimizer.lr_scheduler_num_cycles / 2 if name in _WITH_WAVES else 0.5,
        power=optimizer.lr_scheduler_power,
        decay_steps=None if decay is None else steps(decay),
        timescale=optimizer.lr_scheduler_timescale,
        rex_alpha=optimizer.rex_alpha,
        rex_beta=optimizer.rex_beta,
    )
    if optimizer.lr_scheduler_type is None:
        settings = schedule_arguments.with_arguments(
            settings, name, optimizer.scheduler_arguments, learning_rate=optimizer.learning_rate
        )
    if name == "piecewise_constant":
        settings = settings._replace(min_ratio=0.0)  # its rules say all of it
    _check_stages(settings, name)
    return settings


def _excess(settings: ScheduleSettings) -> int:
    """Steps that warm-up, stable part and decay have more than the run."""
    stages = settings.warmup_steps, settings.stable_steps, settings.decay_steps
    return sum(stage or 0 for stage in stages) - settings.total_steps


def _check_stages(settings: ScheduleSettings, name: str) -> None:
    total, warmup = settings.total_steps, settings.warmup_steps
    if warmup > total:
        raise ConfigError(
            f"lr_warmup_steps: a warm-up of {warmup} steps does not fit into a run of {total}; "
            "take fewer, or a share of the run such as 0.1"
        )
    if name == "warmup_stable_decay" and _excess(settings) > 0:
        stable = f", {settings.stable_steps} stable steps" if settings.stable_steps else ""
        raise ConfigError(
            f"lr_decay_steps: {warmup} steps of warm-up{stable} and {settings.decay_steps or 0} "
            f"of decay do not fit into a run of {total}; take fewer, or shares of the run such as "
            "0.1"
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
