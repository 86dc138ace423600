from __future__ import annotations

import threading
import time

import pytest
import torch
from pack.engine.workers import in_order, num_workers


def test_results_come_in_the_order_of_the_items() -> None:
    def work(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        return item * item

    assert list(in_order(work, range(20), num_threads=3)) == [item * item for item in range(20)]


def test_no_more_is_begun_than_threads_and_one() -> None:
    lock, begun = threading.Lock(), []

    def work(item: int) -> int:
        with lock:
            begun.append(item)
        return item

    results = in_order(work, range(50), num_threads=2)
    for taken in range(10):
        assert next(results) == taken
        time.sleep(0.01)
        # One more may have been handed out to be taken next.
        assert len(begun) <= taken + 1 + 3
    results.close()
    assert len(begun) < 20


def test_two_items_are_worked_on_at_the_same_time() -> None:
    together = threading.Barrier(2, timeout=10)  # breaks if one waits in vain

    def work(item: int) -> int:
        together.wait()
        return item

    assert list(in_order(work, range(4), num_threads=2)) == [0, 1, 2, 3]


def test_what_an_item_raises_is_raised_and_the_rest_is_left() -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise KeyError("three")
        return item

    found = []
    with pytest.raises(KeyError, match="three"):
        for result in in_order(work, range(100), num_threads=2):
            found.append(result)
    assert found == [0, 1, 2]
    assert len(begun) < 10


@pytest.mark.parametrize("count", [1, 2])
def test_the_number_of_threads_of_pytorch_is_what_it_was(count: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        inside = list(in_order(lambda _: torch.get_num_threads(), range(3), num_threads=2))
        assert inside == [1, 1, 1]
        assert torch.get_num_threads() == count
        # A thread that begins later has it from the whole program.
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [count]
    finally:
        torch.set_num_threads(before)


def test_one_thread_may_wait_for_the_disk() -> None:
    assert num_workers("cpu") == 2  # with one thread of PyTorch, as in all tests
    assert num_workers(torch.device("meta")) > 1
