"""Tells what each optimizer step did, on a GPU one step late so that it never waits."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import EngineError
from ..events import Progress, Reporter
from ..loss_history import LossHistory, Step
from .step import StepResult


class _Reading:
    """A few numbers on their way from the device; nothing waits for them before `values`."""

    def __init__(self, *numbers: Tensor) -> None:
        stacked = torch.stack(numbers)
        self.is_ready = stacked.device.type == "cpu"
        self._values = stacked.to("cpu", non_blocking=True)
        if not self.is_ready:
            # `item` would queue its copy behind the next step's work and so wait for that, too.
            self._copied = torch.Event(stacked.device)
            self._copied.record()

    def values(self) -> list[float]:
        if not self.is_ready:
            self._copied.synchronize()
        return self._values.tolist()


@dataclass(frozen=True)
class _Pending:
    step: int
    epoch: int
    learning_rate: float
    reading: _Reading


class StepLog:
    """Reads the numbers of a step when the next one is under way; on a CPU at once.

    Args:
        history: receives one line per step; None in processes that do not write.
        total_steps: for the estimate of the time left.
    """

    def __init__(self, history: LossHistory | None, report: Reporter, *, total_steps: int) -> None:
        self._history = history
        self._report = report
        self._total_steps = total_steps
        self._pending: _Pending | None = None
        self._last = time.perf_counter()
        # The first step warms up caches and kernels, so it counts for no average.
        self._timed_steps = -1
        self._timed_seconds = 0.0
        self.stop_requested = False

    def record(
        self,
        step: int,
        epoch: int,
        learning_rate: float,
        result: StepResult,
        stop: Tensor | None = None,
    ) -> None:
        """Remember step number ``step`` (counted from 1) and report the one before.

        ``stop`` is above 0 if the run was asked to stop.

        Raises:
            EngineError: the loss of the reported step is NaN or infinite.
        """
        self.flush()
        reading = _Reading(result.loss, result.t, *([] if stop is None else [stop]))
        self._pending = _Pending(step, epoch, learning_rate, reading)
        if reading.is_ready:
            self.flush()

    def flush(self) -> None:
        """Report the step that is still pending, and set ``stop_requested`` as of then.

        Raises:
            EngineError: its loss is NaN or infinite.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        loss, t, *stop = pending.reading.values()
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.stop_requested = any(stop)
        if not math.isfinite(loss):
            raise EngineError(
                f"the loss became {loss} at step {pending.step}; what was saved before is "
                "untouched, start again with a lower learning_rate"
            )
        if self._history:
            self._history.append(
                Step(pending.step, pending.epoch, loss, pending.learning_rate, t, seconds)
            )
        self._timed_steps += 1
        mean_seconds = None
        if self._timed_steps:
            self._timed_seconds += seconds
            mean_seconds = self._timed_seconds / self._timed_steps
        left = self._total_steps - pending.step
        self._report(
            Progress(
                "train",
                pending.step,
                self._total_steps,
                loss=loss,
                step_seconds=mean_seconds,
                eta_seconds=None if mean_seconds is None else mean_seconds * left,
            )
        )
