"""Real child processes of a made-up package whose ``-m`` runs the job that a test writes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pack.engine import launch
from pack.engine.errors import EngineError
from pack.engine.events import Event, Finished, Message, Progress, Saved, silent

_PROGRAM = """
import json, os, signal, sys, threading, time
def report(**event): print(json.dumps(event), flush=True)
def step(done): report(event="progress", task="train", done=done, total=100)
"""
_STOPPABLE = """
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
step(1)
ended.wait(60)
report(event="saved", path="my.safetensors", kind="lora", step=1)
sys.exit(3)
"""

RunJob = Callable[..., launch.Ended]


@pytest.fixture
def run_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunJob:
    """Runs a program as the job; its settings file and log are in ``tmp_path``."""
    package = tmp_path / "trainer"
    package.mkdir()
    monkeypatch.setattr(launch, "PACKAGE", package)

    def run(program: str, **options: object) -> launch.Ended:
        (package / "__main__.py").write_text(_PROGRAM + program)
        config = tmp_path / "run.toml"
        options = {"on_event": silent} | options
        return launch.run_job("train", config, log=tmp_path / "run.log", **options)  # type: ignore[arg-type]

    return run


def log(folder: Path) -> list[str]:
    return (folder / "run.log").read_text().splitlines()


def test_events_arrive_in_order_and_the_rest_goes_into_the_log(
    run_job: RunJob, tmp_path: Path
) -> None:
    events: list[Event] = []
    ended = run_job(
        """
step(1)
print("a library's line")
step(2)
print("a warning", file=sys.stderr)
report(event="finished", job="train")
""",
        on_event=events.append,
    )
    assert events == [Progress("train", 1, 100), Progress("train", 2, 100), Finished("train")]
    assert not ended.stopped
    assert sorted(log(tmp_path)) == ["a library's line", "a warning"]


def test_the_job_is_started_with_its_settings_and_told_to_watch_its_input(
    run_job: RunJob, tmp_path: Path
) -> None:
    events: list[Event] = []
    run_job(
        'report(event="message", text=" ".join(sys.argv[1:]) + os.environ["COLOUR"])',
        on_event=events.append,
        environment={"COLOUR": "red"},
    )
    expected = f"train --config_file {tmp_path / 'run.toml'} --events json --stop_with_inputred"
    assert events == [Message(expected)]


@pytest.mark.skipif(os.name == "nt", reason="the wrapper is a shell script")
def test_a_python_that_looks_nowhere_else_finds_the_package(
    run_job: RunJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The portable ComfyUI's reads neither the current folder nor PYTHONPATH; -I is like it."""
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(wrapper))
    events: list[Event] = []
    run_job('report(event="message", text=str(sys.flags.isolated))', on_event=events.append)
    assert events == [Message("1")]


def test_the_error_is_the_sentence_of_the_job(run_job: RunJob) -> None:
    with pytest.raises(EngineError, match=r"^run\.toml: unknown setting$"):
        run_job('report(event="message", text="run.toml: unknown setting", level="error"); exit(2)')


def test_a_crash_is_told_with_the_end_of_the_log(run_job: RunJob, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        run_job("for n in range(100): print('line', n)\nraise KeyError('broken')")
    message = str(caught.value)
    assert "the train process ended with exit code 1; start it again to continue" in message
    assert str(tmp_path / "run.log") in message
    assert message.endswith("KeyError: 'broken'")
    assert len(log(tmp_path)) > 100


def test_a_killed_child_is_an_error_and_the_parent_goes_on(run_job: RunJob) -> None:
    with pytest.raises(EngineError, match=r"was killed by signal 9 \(the system kills what takes"):
        run_job("step(1); os.kill(os.getpid(), signal.SIGKILL)")
    assert run_job("").stopped is False


def test_when_the_receiver_raises_the_child_saves_and_its_last_events_arrive(
    run_job: RunJob,
) -> None:
    events: list[Event] = []

    def cancel(event: Event) -> None:
        events.append(event)
        if isinstance(event, Progress):
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_job(_STOPPABLE, on_event=cancel)
    assert time.monotonic() - start < 10
    assert events == [Progress("train", 1, 100), Saved("my.safetensors", "lora", 1)]


def test_a_poll_that_raises_stops_a_child_that_says_nothing(run_job: RunJob) -> None:
    calls: list[float] = []

    def poll() -> None:
        calls.append(time.monotonic())
        if len(calls) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run_job(_STOPPABLE.replace("step(1)", ""), poll=poll)
    assert max(b - a for a, b in zip(calls, calls[1:], strict=False)) < 1


def test_a_child_that_ignores_the_end_of_its_input_is_killed(
    run_job: RunJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_PATIENCE_SECONDS", 0.5)

    def cancel(event: Event) -> None:
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_job("step(1); time.sleep(60)", on_event=cancel)
    assert time.monotonic() - start < 30


def test_a_job_that_was_stopped_by_someone_else_says_so(run_job: RunJob) -> None:
    assert run_job("exit(3)").stopped


def test_events_after_a_second_error_in_the_receiver_are_still_read(run_job: RunJob) -> None:
    def always(event: Event) -> None:
        raise OSError("the window is gone")

    with pytest.raises(OSError, match="the window is gone"):
        run_job("for n in range(1000): step(n)", on_event=always)


def test_ctrl_c_in_the_terminal_does_not_reach_the_child(run_job: RunJob) -> None:
    if not hasattr(os, "getpgid"):
        pytest.skip("process groups are POSIX")
    events: list[Event] = []
    run_job(
        'report(event="message", text=str(os.getpgid(0) == os.getpid()))', on_event=events.append
    )
    assert events == [Message("True")]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Tools for LoRA files


@pytest.fixture
def run_tool(run_job: RunJob, tmp_path: Path) -> Callable[..., None]:
    """As `run_job`, with arguments."""

    def run(program: str, *arguments: str, **options: object) -> None:
        (tmp_path / "trainer" / "__main__.py").write_text(_PROGRAM + program)
        options = {"on_event": silent} | options
        launch.run_tool("resize", arguments, log=tmp_path / "run.log", **options)  # type: ignore[arg-type]

    return run


def test_a_tool_is_started_as_in_the_shell_and_told_to_watch_its_input(
    run_tool: Callable[..., None],
) -> None:
    events: list[Event] = []
    program = 'report(event="message", text=" ".join(sys.argv[1:]))'
    run_tool(program, "a b", "--rank", "4", on_event=events.append)
    assert events == [Message("lora resize a b --rank 4 --events json --stop_with_input")]


def test_the_error_of_a_tool_is_its_sentence_or_the_end_of_its_log(
    run_tool: Callable[..., None],
) -> None:
    program = 'report(event="message", level="error", text="no such file"); exit(1)'
    with pytest.raises(EngineError, match="^no such file$"):
        run_tool(program)
    with pytest.raises(EngineError) as caught:
        run_tool("raise ValueError(3)")
    assert str(caught.value).startswith("the resize process ended with exit code 1. Its last words")
    with pytest.raises(EngineError, match=r"^the resize process ended with exit code 3\."):
        run_tool("exit(3)")


def test_a_tool_that_does_not_listen_is_killed_soon(run_tool: Callable[..., None]) -> None:
    def cancel(event: Event) -> None:
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        # As a regular expression that takes for ever, it lets no other thread run.
        program = "import re; step(1); re.fullmatch(r'((\\w|\\.)+)+!', 'a' * 60)"
        run_tool(program, on_event=cancel)
    assert time.monotonic() - start < 20
