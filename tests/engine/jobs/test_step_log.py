from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from pack.engine.events import Event, Progress
from pack.engine.jobs.guard import Diverged, DivergenceGuard
from pack.engine.jobs.step import StepResult
from pack.engine.jobs.step_log import StepLog
from pack.engine.loss_history import Smoothed, Step


def result(loss: float, t: float = 0.5) -> StepResult:
    return StepResult(torch.tensor(loss), torch.tensor(t))


class Seen:
    """A log, what it tells its sinks, and what it reports."""

    def __init__(self, *, total_steps: int, observe: Any = lambda step, loss: None) -> None:
        self.steps: list[Step] = []
        self.smoothed: list[float] = []
        self.events: list[Event] = []
        self.log = StepLog(
            observe,
            [self.take],
            self.events.append,
            total_steps=total_steps,
            smoothed=Smoothed(),
        )

    def take(self, step: Step, smoothed: float) -> None:
        self.steps.append(step)
        self.smoothed.append(smoothed)

    @property
    def told(self) -> list[Progress]:
        return [event for event in self.events if isinstance(event, Progress)]


def test_every_step_is_told_and_given_on() -> None:
    seen = Seen(total_steps=5)
    for step in (3, 4, 5):
        seen.log.record(
            step, 2, 1e-4 * step, result(1 / step, t=step / 10), norm=torch.tensor(step / 2)
        )
    seen.log.flush()
    found = [(s.step, s.epoch, s.loss, s.learning_rate, s.t, s.grad_norm) for s in seen.steps]
    assert found == [
        (step, 2, pytest.approx(1 / step), 1e-4 * step, pytest.approx(step / 10), step / 2)
        for step in (3, 4, 5)
    ]
    assert [(event.done, event.total, event.loss) for event in seen.told] == [
        (step.step, 5, step.loss) for step in seen.steps
    ]


def test_the_smoothed_loss_is_a_mean_that_forgets() -> None:
    seen = Seen(total_steps=9)
    losses = [1.0, 3.0, 2.0, 0.5]
    for step, loss in enumerate(losses, start=1):
        seen.log.record(step, 1, 1e-4, result(loss))
        weights = [0.98**age for age in reversed(range(step))]
        mean = sum(w * x for w, x in zip(weights, losses[:step], strict=True)) / sum(weights)
        assert seen.smoothed[-1] == pytest.approx(mean)


def test_the_mean_time_leaves_the_first_step_out() -> None:
    seen = Seen(total_steps=10)
    for step in range(1, 5):
        seen.log.record(step, 1, 1e-4, result(1.0))
    assert seen.told[0].step_seconds is None and seen.told[0].eta_seconds is None
    for count, event in enumerate(seen.told[1:], start=1):
        mean = sum(step.seconds for step in seen.steps[1 : count + 1]) / count
        assert event.step_seconds == pytest.approx(mean)
        assert event.eta_seconds == pytest.approx(mean * (10 - event.done))


def test_what_is_done_between_steps_is_no_part_of_them() -> None:
    seen = Seen(total_steps=10)
    seen.log.record(1, 1, 1e-4, result(1.0))
    with seen.log.excluded():
        time.sleep(0.3)
    seen.log.record(2, 1, 1e-4, result(1.0))
    assert seen.steps[1].seconds < 0.15


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_step_that_went_wrong_is_told_to_nobody(loss: float) -> None:
    seen = Seen(total_steps=2, observe=DivergenceGuard(5).observe)
    seen.log.record(1, 1, 1e-4, result(1.0))
    with pytest.raises(Diverged, match=f"the loss became {loss} at step 2"):
        seen.log.record(2, 1, 1e-4, result(loss))
    seen.log.flush()
    assert [step.step for step in seen.steps] == [event.done for event in seen.told] == [1]


def test_a_wish_to_stop_of_any_process_is_seen() -> None:
    log = Seen(total_steps=2).log
    log.record(1, 1, 1e-4, result(1.0))
    log.record(2, 1, 1e-4, result(1.0), norm=torch.tensor(3.0), stop=torch.tensor(0.0))
    assert not log.stop_requested
    log.record(3, 1, 1e-4, result(1.0), norm=torch.tensor(3.0), stop=torch.tensor(0.125))
    assert log.stop_requested


@pytest.mark.gpu
def test_a_gpu_is_never_waited_for() -> None:
    seen = Seen(total_steps=3)
    busy = torch.zeros(1, device="cuda")
    for step in (1, 2, 3):
        busy += step
        torch.cuda._sleep(10**9)  # about half a second of the GPU's time
        seen.log.record(step, 1, 1e-4, StepResult(busy.mean(), busy.mean()), norm=busy.mean())
        # Told is what is done while this step still runs.
        assert not torch.cuda.current_stream().query()
        assert [event.done for event in seen.told] == list(range(1, step))
    seen.log.flush()
    assert [event.loss for event in seen.told] == [1.0, 3.0, 6.0]
