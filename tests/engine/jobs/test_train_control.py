"""A real training process that is told what to do by its control file."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pack.engine.control import request
from pack.engine.events import silent
from pack.engine.jobs import train
from pack.engine.jobs.outputs import RunFiles
from pack.engine.loss_history import read_history
from pack.engine.run_status import Status, read_status
from pack.engine.training_state import read_progress
from pack.engine.weights import open_checkpoint
from pack.tests.engine.jobs import tiny
from pack.tests.engine.jobs.conftest import Job, StartJob

STOPPED = 3
ENDLESS = 100_000


class Training:
    """A run that would take for ever, and what can be seen of it from outside."""

    def __init__(self, start_job: StartJob, training: dict[str, Any], folder: Path) -> None:
        self.files = RunFiles(folder, "tiny")
        settings = tiny.config(training, output_dir=folder, max_train_steps=ENDLESS)
        self.job: Job = start_job("train", settings)
        self.job.wait_for_lines(self.files.history, 3)

    @property
    def steps(self) -> int:
        return len(read_history(self.files.history))

    def wait(self, reached: Callable[[Status], bool]) -> Status:
        """The status as soon as it is so, or the job's log if that ends before."""

        def look() -> Status | None:
            status = read_status(self.files.status)
            assert status is not None
            found = reached(status)
            assert found or self.job.poll() is None, self.job.log.read_text()
            return status if found else None

        return self.job.wait_for(look)

    def tell(self, command: str) -> Status:
        """Ask for something and wait until it is done."""
        before = read_status(self.files.status)
        count = before.obeyed.get(command, 0) if before else 0
        request(self.files.control, command)
        return self.wait(lambda status: status.obeyed.get(command, 0) > count)


@pytest.fixture
def run(start_job: StartJob, training: dict[str, Any], tmp_path: Path) -> Training:
    return Training(start_job, training, tmp_path / "told")


def test_stopped_by_hand_it_continues_to_the_bits_of_an_uninterrupted_run(
    run: Training, training: dict[str, Any], tmp_path: Path
) -> None:
    run.tell("pause")
    run.tell("save")
    run.tell("resume")
    run.files.control.write_bytes(b"STOP\r\n")
    assert run.job.wait() == STOPPED
    step = run.steps
    status = read_status(run.files.status)
    assert status and (status.state, status.told_to_stop, status.step) == ("stopped", True, step)
    assert read_progress(run.files.state).step == step
    assert f"stopped after step {step} of {ENDLESS}" in run.job.log.read_text()

    settings = {**training, "max_train_steps": step + 3}
    train.run(tiny.config(settings, output_dir=run.files.folder, resume=True), silent)
    status = read_status(run.files.status)
    assert status and (status.state, status.step) == ("finished", step + 3)
    whole = RunFiles(tmp_path / "whole", "tiny")
    train.run(tiny.config(settings, output_dir=whole.folder), silent)
    tiny.assert_same_file(whole.lora, run.files.lora)
    tiny.assert_same_file(whole.state, run.files.state)


def test_a_pause_takes_no_steps_and_no_processor_and_is_no_part_of_their_times(
    run: Training,
) -> None:
    import psutil

    run.tell("pause")
    status = run.wait(lambda status: status.state == "paused")
    paused_at, process = run.steps, psutil.Process(run.job.pid)
    used = process.cpu_times()
    time.sleep(3)
    now = process.cpu_times()
    assert now.user + now.system - used.user - used.system < 0.3
    assert run.steps == paused_at == status.step
    later = run.wait(lambda found: found.updated > status.updated)  # it says that it lives
    assert later.state == "paused"
    run.tell("resume")
    run.job.wait_for_lines(run.files.history, paused_at + 3)
    seconds = [step.seconds for step in read_history(run.files.history)]
    assert max(seconds[paused_at - 1 :]) < 2


def test_save_now_writes_lora_and_state_of_one_step_and_the_run_goes_on(run: Training) -> None:
    assert not run.files.lora.exists()
    first = run.tell("save")
    saved = int(open_checkpoint(run.files.lora).metadata["ss_steps"])
    assert saved == read_progress(run.files.state).step == first.saved_step
    run.job.wait_for_lines(run.files.history, saved + 2)
    run.tell("pause")
    second = run.tell("save")
    assert int(open_checkpoint(run.files.lora).metadata["ss_steps"]) == run.steps
    assert second.saved_step == run.steps > saved


def test_a_signal_ends_a_paused_run_which_saves(run: Training) -> None:
    run.tell("pause")
    run.wait(lambda status: status.state == "paused")
    run.job.send(signal.SIGTERM)
    assert run.job.wait() == STOPPED
    assert read_progress(run.files.state).step == run.steps
    status = read_status(run.files.status)
    assert status and status.state == "stopped" and not status.told_to_stop


def test_a_run_without_prompts_refuses_to_sample_and_goes_on(run: Training) -> None:
    request(run.files.control, "sample")
    run.tell("save")
    assert "the run cannot sample: it has no sample prompts" in run.job.log.read_text()


def test_a_second_process_does_not_train_the_same_run(
    run: Training, training: dict[str, Any], start_job: StartJob
) -> None:
    run.tell("save")
    again = tiny.config(training, output_dir=run.files.folder, resume=True)
    second = start_job("train", again)
    assert second.wait() == 1
    expected = f"is being trained by process {run.job.pid} already"
    assert expected in second.log.read_text()
    before = run.steps
    run.job.wait_for_lines(run.files.history, before + 2)
