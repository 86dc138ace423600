"""Tells what each optimizer step did, one step late so that a GPU never waits for it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from ..errors import EngineError
from ..events import Progress, Reporter
from ..loss_history import LossHistory, Step
from .step import StepResult


@dataclass(frozen=True)
class _Pending:
    step: int
    epoch: int
    learning_rate: float
    result: StepResult


class StepLog:
    """Keeps the last step's numbers on the device until the next step is under way.

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

    def record(self, step: int, epoch: int, learning_rate: float, result: StepResult) -> None:
        """Remember step number ``step`` (counted from 1) and report the one before."""
        self.flush()
        self._pending = _Pending(step, epoch, learning_rate, result)

    def flush(self) -> None:
        """Report the step that is still pending.

        Raises:
            EngineError: its loss is NaN or infinite.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        loss, t = pending.result.loss.item(), pending.result.t.item()
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if not math.isfinite(loss):
            raise EngineError(
                f"the loss became {loss} at step {pending.step}; use --resume to go back to the "
                "last saved state, with a lower learning_rate"
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
