"""Tells what each optimizer step did, on a GPU one step late so that it never waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..events import Progress, Reporter
from ..loss_history import Smoothed, Step
from .step import StepResult

# (step, smoothed loss)
Sink = Callable[[Step, float], None]


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
    has_norm: bool
    has_max_norms: bool
    is_usual: bool
    reading: _Reading


class StepLog:
    """Reads the numbers of a step when the next one is under way; on a CPU at once.

    Args:
        observe: is told the number and loss of every step, before anything else is.
        sinks: receive every step and the smoothed loss.
        total_steps: for the estimate of the time left.
        smoothed: the smoothed loss so far, of a run that is continued.
    """

    def __init__(
        self,
        observe: Callable[[int, float], None],
        sinks: Sequence[Sink],
        report: Reporter,
        *,
        total_steps: int,
        smoothed: Smoothed,
    ) -> None:
        self._observe = observe
        self._sinks = sinks
        self._report = report
        self._total_steps = total_steps
        self._smoothed = smoothed
        self._pending: _Pending | None = None
        self._last = time.perf_counter()
        self._is_first = True
        self._timed_steps = 0
        self._timed_seconds = 0.0
        self.stop_requested = False

    def record(
        self,
        step: int,
        epoch: int,
        learning_rate: float,
        result: StepResult,
        *,
        norm: Tensor | None = None,
        max_norms: Tensor | None = None,
        stop: Tensor | None = None,
        is_usual: bool = True,
    ) -> None:
        """Remember step number ``step`` (counted from 1) and report the one before.

        Args:
            norm: of the gradient.
            max_norms: [3], see `loss_history.Step`.
            stop: above 0 if the run was asked to stop.
            is_usual: it took about as long as others will; else it counts for no mean time.

        Raises:
            Diverged: by ``observe``, for the reported step.
        """
        self.flush()
        norms = [] if max_norms is None else list(max_norms.unbind())
        extra = [value for value in (norm, *norms, stop) if value is not None]
        reading = _Reading(result.loss, result.t, *(value.to(result.loss) for value in extra))
        self._pending = _Pending(
            step, epoch, learning_rate, norm is not None, bool(norms), is_usual, reading
        )
        if reading.is_ready:
            self.flush()

    def flush(self) -> None:
        """Report the step that is still pending, and set ``stop_requested`` as of then.

        Raises:
            Diverged: by ``observe``.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        loss, t, *more = pending.reading.values()
        norm = more.pop(0) if pending.has_norm else None
        max_norms = tuple(more.pop(0) for _ in range(3)) if pending.has_max_norms else None
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.stop_requested = any(more)
        self._observe(pending.step, loss)
        smoothed = self._smoothed.add(loss)
        step = Step(
            pending.step,
            pending.epoch,
            loss,
            pending.learning_rate,
            t,
            seconds,
            norm,
            max_norms,
        )
        for sink in self._sinks:
            sink(step, smoothed)
        self._report(self._progress(step, is_usual=pending.is_usual))

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """What is done in this block counts as part of no step.

        Raises:
            Diverged: by ``observe``, for the step before.
        """
        self.flush()
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._last += time.perf_counter() - begun

    def _progress(self, step: Step, *, is_usual: bool) -> Progress:
        # The first step warms up caches and kernels, so it counts for no average.
        if is_usual and not self._is_first:
            self._timed_steps += 1
            self._timed_seconds += step.seconds
        self._is_first = False
        mean_seconds = self._timed_seconds / self._timed_steps if self._timed_steps else None
        left = self._total_steps - step.step
        return Progress(
            "train",
            step.step,
            self._total_steps,
            loss=step.loss,
            step_seconds=mean_seconds,
            eta_seconds=None if mean_seconds is None else mean_seconds * left,
        )
