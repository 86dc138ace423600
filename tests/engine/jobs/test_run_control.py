from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from pack.engine import run_status
from pack.engine.control import request
from pack.engine.errors import DataError, EngineError
from pack.engine.events import Event, Message, Progress, Saved, silent
from pack.engine.jobs import run_control
from pack.engine.jobs.outputs import RunFiles
from pack.engine.jobs.run_control import Commands, RunControl
from pack.engine.loss_history import Step
from pack.engine.run_status import Status
from pack.engine.signals import Stopped, StopSignals

NOTHING = Commands()


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path, "cats")


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look and write whenever there is an occasion."""
    monkeypatch.setattr(run_control, "LOOK_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(run_control, "WRITE_EVERY_SECONDS", 0.0)


def status(files: RunFiles) -> Status:
    found = run_status.read_status(files.status)
    assert found is not None
    return found


def step(number: int, loss: float = 0.5) -> Step:
    return Step(number, 1, loss, 1e-4, 0.5, 0.1)


def test_a_run_is_told_what_was_asked_for_once(files: RunFiles, always: None) -> None:
    with RunControl(files, silent) as control:
        assert control.commands() == NOTHING
        request(files.control, "save")
        request(files.control, "sample")
        assert control.commands() == Commands(save=True, sample=True)
        assert control.commands() == NOTHING and not control.told_to_stop
        request(files.control, "stop")
        assert control.commands() == Commands(stop=True)
        assert control.told_to_stop


def test_a_command_counts_as_obeyed_when_the_run_asks_for_the_next(
    files: RunFiles, always: None
) -> None:
    with RunControl(files, silent) as control:
        request(files.control, "save")
        control.commands()
        assert status(files).obeyed == {}
        control.commands()
        assert status(files).obeyed == {"save": 1}
        request(files.control, "save")
        control.commands()
    assert status(files).obeyed == {"save": 2}  # at the end, too


def test_the_file_is_looked_at_twice_a_second_at_most(files: RunFiles) -> None:
    with RunControl(files, silent) as control:
        control.commands()
        begun = time.monotonic()
        request(files.control, "save")
        calls = 0
        while control.commands() == NOTHING:
            calls += 1
        seconds = time.monotonic() - begun
        assert 0.4 < seconds < 0.9 and calls > 1000


def test_asking_costs_next_to_nothing_in_a_step(files: RunFiles) -> None:
    with RunControl(files, silent) as control:
        control.commands()
        begun = time.perf_counter()
        for number in range(10_000):
            control.commands()
            control.record(step(number), 0.5)
            control.report(Progress("train", number, 10_000, loss=0.5))
        assert (time.perf_counter() - begun) / 10_000 < 100e-6  # 17 us here


def test_what_was_there_before_the_run_does_not_stop_it(files: RunFiles, always: None) -> None:
    told: list[Event] = []
    request(files.control, "stop")
    with RunControl(files, told.append) as control:
        assert control.commands() == NOTHING and not files.control.exists()
    [message] = told
    assert isinstance(message, Message) and "before the run began (stop)" in message.text


class Asker(threading.Thread):
    """Somebody at the control file who waits for what the status says."""

    def __init__(self, files: RunFiles, work: Callable[[Callable[..., None]], None]) -> None:
        super().__init__(daemon=True)
        self.files, self.work = files, work
        self.start()

    def run(self) -> None:
        self.work(self.ask)

    def ask(self, command: str, until: Callable[[Status], bool] = lambda found: True) -> None:
        request(self.files.control, command)
        end = time.monotonic() + 20
        while not until(status(self.files)):
            assert time.monotonic() < end
            time.sleep(0.001)


def test_a_paused_run_waits_and_saves_and_goes_on(files: RunFiles, always: None) -> None:
    told: list[Event] = []
    seen: list[Commands] = []

    def somebody(ask: Callable[..., None]) -> None:
        ask("save", lambda found: found.obeyed.get("save") == 1 and found.state == "paused")
        ask("sample", lambda found: found.obeyed.get("sample") == 1)
        ask("resume")

    with RunControl(files, told.append) as control:
        control.begin(7, 100)
        control.report(Progress("train", 8, 100))
        request(files.control, "pause")
        commands = control.commands()
        assert commands == Commands(pause=True)
        asker = Asker(files, somebody)
        while commands.pause:
            commands = control.wait_while_paused()
            seen.append(commands)
        asker.join()
        assert status(files).state == "training"
    assert seen == [Commands(save=True, pause=True), Commands(sample=True, pause=True), NOTHING]
    texts = [event.text for event in told if isinstance(event, Message)]
    assert texts == ["paused after step 8", "going on after step 8"]
    assert status(files).obeyed == {"pause": 1, "save": 1, "sample": 1, "resume": 1}


def test_a_paused_run_can_be_stopped(files: RunFiles, always: None) -> None:
    with RunControl(files, silent) as control:
        request(files.control, "pause")
        control.commands()
        request(files.control, "stop")
        assert control.wait_while_paused() == Commands(stop=True, pause=True)


def test_a_pause_that_is_over_before_it_is_seen_is_none(files: RunFiles, always: None) -> None:
    with RunControl(files, silent) as control:
        for word in ("pause", "save", "resume"):
            request(files.control, word)
        assert control.commands() == Commands(save=True)


def test_a_paused_run_uses_no_processor_and_says_that_it_lives(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_control, "LOOK_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(run_control, "WRITE_EVERY_SECONDS", 0.2)
    with RunControl(files, silent) as control:
        request(files.control, "pause")
        control.commands()
        threading.Timer(1.0, request, (files.control, "resume")).start()
        begun, used = status(files).updated, time.thread_time()
        control.wait_while_paused()
        assert (
            time.thread_time() - used < 0.2
        )  # a fifth of the time that it looked ten times as often
        assert status(files).updated - begun > 0.7


def test_a_signal_ends_a_pause(files: RunFiles) -> None:
    begun = time.monotonic()
    with pytest.raises(Stopped), StopSignals(), RunControl(files, silent) as control:
        request(files.control, "pause")
        control.commands()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        control.wait_while_paused()
    assert time.monotonic() - begun < 2
    assert status(files).state == "stopped" and not status(files).told_to_stop


def test_what_a_run_cannot_do_is_told_with_the_reason(files: RunFiles, always: None) -> None:
    told: list[Event] = []
    refused = {"sample": "it has no sample prompts; give sample_prompts"}
    with RunControl(files, told.append, refused=refused) as control:
        assert status(files).refused == refused
        request(files.control, "sample")
        request(files.control, "save")
        assert control.commands() == Commands(save=True)
    [message] = told
    assert isinstance(message, Message) and message.level == "warning"
    assert message.text == "the run cannot sample: it has no sample prompts; give sample_prompts"
    assert status(files).obeyed == {"save": 1}


def test_the_status_follows_the_run(files: RunFiles, always: None) -> None:
    passed: list[Event] = []
    with RunControl(files, passed.append) as control:
        first = status(files)
        assert first.state == "starting" and first.total_steps is None
        events = [
            Progress("cache images", 1, 5),
            Progress("train", 3, 10, loss=0.5, step_seconds=2.0, eta_seconds=14.0),
            Saved("cats.safetensors", "lora", 3),
            Saved("cats.state", "state", 3),
            Progress("preview", 1, 2),
        ]
        states = []
        for event in events:
            control.report(event)
            states.append(status(files).state)
        assert passed == events
        assert states == ["caching", "training", "training", "training", "sampling"]
        with control.during("saving"):
            assert status(files).state == "saving"
        control.record(step(4, loss=0.25), 0.4)
        found = status(files)
    assert (found.state, found.step, found.total_steps) == ("sampling", 4, 10)
    assert (found.loss, found.smoothed_loss, found.learning_rate) == (0.25, 0.4, 1e-4)
    assert (found.step_seconds, found.eta_seconds, found.saved_step) == (2.0, 14.0, 3)
    assert found.saved_at is not None and first.started <= found.saved_at <= time.time()
    assert status(files).state == "finished" and status(files).eta_seconds == 0


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (EngineError("out of memory in step 3"), "failed", "out of memory in step 3"),
        (Stopped("stopped"), "stopped", None),
        (ZeroDivisionError("secret"), "failed", "ZeroDivisionError"),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt"),
    ],
)
def test_the_status_says_how_the_run_ended(
    files: RunFiles, error: BaseException, state: str, message: str | None
) -> None:
    with pytest.raises(type(error)), RunControl(files, silent):
        raise error
    assert (status(files).state, status(files).message) == (state, message)


def test_an_end_by_a_command_is_told_from_one_by_a_signal(files: RunFiles, always: None) -> None:
    with pytest.raises(Stopped), RunControl(files, silent) as control:
        request(files.control, "stop")
        assert control.commands().stop
        raise Stopped("stopped after step 3")
    assert status(files).state == "stopped" and status(files).told_to_stop


def test_the_status_is_written_every_two_seconds_at_most(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[float] = []
    monkeypatch.setattr(run_control, "WRITE_EVERY_SECONDS", 0.2)
    monkeypatch.setattr(run_control, "write_status", lambda *_: written.append(time.monotonic()))
    with RunControl(files, silent) as control:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            control.record(step(1), 0.5)
        assert 4 <= len(written) <= 7


def test_a_run_whose_status_cannot_be_written_goes_on(tmp_path: Path, always: None) -> None:
    files = RunFiles(tmp_path, "cats")
    files.status.mkdir()
    told: list[Event] = []
    with pytest.raises(ZeroDivisionError), RunControl(files, told.append) as control:
        for number in range(5):
            control.record(step(number), 0.5)
        raise ZeroDivisionError
    [message] = told
    assert isinstance(message, Message) and "the status cannot be written" in message.text


@pytest.mark.parametrize("content", ["", '{"state": "training"}'])
def test_a_status_that_a_power_cut_damaged_is_replaced(files: RunFiles, content: str) -> None:
    files.status.write_text(content)
    with pytest.raises(DataError):
        run_status.read_status(files.status)
    with RunControl(files, silent):
        assert status(files).state == "starting"


_OTHER = """
import dataclasses, sys, time
from pathlib import Path
from engine.run_status import of_this_process, write_status
write_status(Path(sys.argv[1]), dataclasses.replace(of_this_process(), state="training"))
print("written", flush=True)
time.sleep(60)
"""


def test_a_run_that_another_process_trains_is_not_begun(files: RunFiles) -> None:
    root = Path(__file__).parents[3]
    command: list[Any] = [sys.executable, "-c", _OTHER, files.status]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"written\n"
        request(files.control, "save")
        with pytest.raises(EngineError, match=f"cats is being trained by process {other.pid} alr"):
            RunControl(files, silent).__enter__()
        assert status(files).state == "training" and files.control.exists()  # nothing was touched
        psutil.Process(other.pid).kill()
    with RunControl(files, silent):
        assert status(files).pid == os.getpid()


def test_the_status_of_a_run_is_readable_json(files: RunFiles) -> None:
    with RunControl(files, silent):
        record = json.loads(files.status.read_text("utf-8"))
    assert record["pid"] == os.getpid() and record["host"]
