from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from pack.engine.signals import Stopped, StopSignals
from pack.tests.conftest import ROOT


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_job_at_once(number: signal.Signals) -> None:
    reached = False
    with StopSignals() as stop, pytest.raises(Stopped):
        send(number)
        reached = True
    assert stop.requested and not reached


def test_a_shielded_block_is_finished_first() -> None:
    done: list[str] = []
    with StopSignals() as stop, pytest.raises(Stopped):
        with stop.shield():
            send(signal.SIGTERM)
            done.append("inner")
        done.append("after")
    assert done == ["inner"]


def test_a_second_signal_does_not_interrupt_saving() -> None:
    saved = False
    with StopSignals():
        try:
            send(signal.SIGINT)
        except Stopped:
            send(signal.SIGINT)
            send(signal.SIGTERM)
            saved = True
    assert saved


def test_an_error_in_a_shielded_block_is_not_replaced() -> None:
    with StopSignals() as stop, pytest.raises(KeyError), stop.shield():
        send(signal.SIGINT)
        raise KeyError("the real one")


def test_the_handlers_of_before_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


_WATCHER = """
import sys, time
from engine.signals import Stopped, StopSignals, stop_with_input
stop_with_input()
print("watching", flush=True)
try:
    with StopSignals():
        print("working", flush=True)
        time.sleep(60)
except Stopped:
    print("saved", flush=True)
    sys.exit(3)
"""


def start_watcher(program: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    while process.stdout.readline().strip() not in ("working", "waiting", ""):
        continue
    process.stdin.close()
    return process


def test_the_end_of_the_input_stops_the_job() -> None:
    process = start_watcher(
        _WATCHER.replace("time.sleep(60)", "[time.sleep(0.1) for _ in range(600)]")
    )
    assert process.stdout is not None
    assert process.stdout.read() == "saved\n"
    assert process.wait(30) == 3


def test_before_there_is_a_job_the_end_of_the_input_ends_the_process() -> None:
    process = start_watcher(
        _WATCHER.replace("try:", "print('waiting', flush=True)\ntime.sleep(60)\ntry:")
    )
    assert process.wait(30) == 130
