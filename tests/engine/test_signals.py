from __future__ import annotations

import os
import signal

import pytest
from pack.engine.signals import Stopped, StopSignals


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
