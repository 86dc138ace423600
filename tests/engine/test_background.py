from __future__ import annotations

import threading
import time

import pytest
from pack.engine.background import Background


def test_calls_are_made_in_order_in_one_other_thread() -> None:
    made: list[tuple[int, int]] = []
    background = Background("test", failed=lambda error: None)
    for number in range(1000):
        background.call(lambda number=number: made.append((number, threading.get_ident())))
    assert background.finish(60)
    assert [number for number, _ in made] == list(range(1000))
    assert len({thread for _, thread in made} - {threading.get_ident()}) == 1


def test_the_caller_does_not_wait() -> None:
    going_on = threading.Event()
    made: list[str] = []
    background = Background("test", failed=lambda error: None)
    background.call(lambda: made.append("first" if going_on.wait(60) else "late"))
    background.call(lambda: made.append("second"))
    assert made == []
    going_on.set()
    assert background.finish(60)
    assert made == ["first", "second"]


def test_after_a_failure_nothing_more_is_done() -> None:
    failures: list[Exception] = []
    made: list[str] = []
    background = Background("test", failed=failures.append)
    background.call(lambda: [][0])
    background.call(lambda: made.append("one that waited"))
    assert background.finish(60)
    background.call(lambda: made.append("a later one"))
    assert [type(error) for error in failures] == [IndexError] and made == []


def test_what_hangs_is_waited_for_no_longer_than_said() -> None:
    going_on = threading.Event()
    background = Background("test", failed=lambda error: None)
    background.call(lambda: going_on.wait(60) and None)
    begun = time.monotonic()
    assert not background.finish(0.2)
    assert time.monotonic() - begun == pytest.approx(0.2, abs=5)
    going_on.set()
    assert background.finish(60)
