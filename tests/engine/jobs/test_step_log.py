from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from pack.engine.errors import EngineError
from pack.engine.events import Event, Progress
from pack.engine.jobs.step import StepResult
from pack.engine.jobs.step_log import StepLog
from pack.engine.loss_history import LossHistory, read_history
from pack.tests.engine.jobs import tiny


def result(loss: float, t: float = 0.5, device: str = "cpu") -> StepResult:
    return StepResult(torch.tensor(loss, device=device), torch.tensor(t, device=device))


def test_every_step_is_told_and_written(tmp_path: Path) -> None:
    events: list[Event] = []
    with LossHistory(tmp_path / "loss.jsonl") as history:
        log = StepLog(history, events.append, total_steps=5)
        for step in (3, 4, 5):
            log.record(step, 2, 1e-4 * step, result(1 / step, t=step / 10))
        log.flush()

    steps = read_history(tmp_path / "loss.jsonl")
    found = [(s.step, s.epoch, s.loss, s.learning_rate, s.t) for s in steps]
    assert found == [
        (step, 2, pytest.approx(1 / step), 1e-4 * step, pytest.approx(step / 10))
        for step in (3, 4, 5)
    ]
    assert [(event.done, event.total, event.loss) for event in told(events)] == [
        (step.step, 5, step.loss) for step in steps
    ]


def told(events: list[Event]) -> list[Progress]:
    return [event for event in events if isinstance(event, Progress)]


def test_the_mean_time_leaves_the_first_step_out(tmp_path: Path) -> None:
    events: list[Event] = []
    with LossHistory(tmp_path / "loss.jsonl") as history:
        log = StepLog(history, events.append, total_steps=10)
        for step in range(1, 5):
            log.record(step, 1, 1e-4, result(1.0))

    seconds = [step.seconds for step in read_history(tmp_path / "loss.jsonl")]
    assert told(events)[0].step_seconds is None and told(events)[0].eta_seconds is None
    for count, event in enumerate(told(events)[1:], start=1):
        mean = sum(seconds[1 : count + 1]) / count
        assert event.step_seconds == pytest.approx(mean)
        assert event.eta_seconds == pytest.approx(mean * (10 - event.done))


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_not_written(tmp_path: Path, loss: float) -> None:
    events: list[Event] = []
    with LossHistory(tmp_path / "loss.jsonl") as history:
        log = StepLog(history, events.append, total_steps=2)
        log.record(1, 1, 1e-4, result(1.0))
        with pytest.raises(EngineError, match=f"the loss became {loss} at step 2"):
            log.record(2, 1, 1e-4, result(loss))
        log.flush()
    assert [step.step for step in read_history(tmp_path / "loss.jsonl")] == [1]
    assert [event.done for event in told(events)] == [1]


def test_a_process_that_does_not_write_still_tells_and_looks_at_the_loss() -> None:
    events: list[Event] = []
    log = StepLog(None, events.append, total_steps=2)
    log.record(1, 1, 1e-4, result(1.0))
    with pytest.raises(EngineError):
        log.record(2, 1, 1e-4, result(float("nan")))
    assert [event.done for event in told(events)] == [1]


def test_a_wish_to_stop_of_any_process_is_seen() -> None:
    log = StepLog(None, lambda event: None, total_steps=2)
    log.record(1, 1, 1e-4, result(1.0))
    log.record(2, 1, 1e-4, result(1.0), torch.tensor(0.0))
    assert not log.stop_requested
    log.record(3, 1, 1e-4, result(1.0), torch.tensor(0.125))
    assert log.stop_requested


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on file sizes")
def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with LossHistory(tmp_path / "loss.jsonl") as history:
        log = StepLog(history, lambda event: None, total_steps=2)
        log.record(1, 1, 1e-4, result(1.0))
        limit = (tmp_path / "loss.jsonl").stat().st_size
        with tiny.file_size_limit(limit), pytest.raises(EngineError) as caught:
            log.record(2, 1, 1e-4, result(1.0))
    assert "loss.jsonl: the loss cannot be written (File too large)" in str(caught.value)
    assert [step.step for step in read_history(tmp_path / "loss.jsonl")] == [1]


@pytest.mark.gpu
def test_a_gpu_is_never_waited_for() -> None:
    events: list[Event] = []
    log = StepLog(None, events.append, total_steps=3)
    busy = torch.zeros(1, device="cuda")
    for step in (1, 2, 3):
        busy += step
        torch.cuda._sleep(10**9)  # about half a second of the GPU's time
        log.record(step, 1, 1e-4, StepResult(busy.mean(), busy.mean()))
        # Told is what is done while this step still runs.
        assert not torch.cuda.current_stream().query()
        assert [event.done for event in told(events)] == list(range(1, step))
    log.flush()
    assert [event.loss for event in told(events)] == [1.0, 3.0, 6.0]
