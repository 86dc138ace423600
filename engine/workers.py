"""Pieces of work that several threads do at once, with results in order.

While one thread waits for a disk another one computes, and PyTorch lets both go on. Memory stays
small because only so many pieces are begun before their results are taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_THREADS = 8
# An accelerator computes; these read for it.
_READERS = 4


def num_workers(device: torch.device | str) -> int:
    """Threads that loading a model to a device is divided among."""
    if torch.device(device).type != "cpu":
        return _READERS
    # Two at least, of which one may be waiting for the disk.
    return max(2, min(torch.get_num_threads(), _MOST_THREADS))


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], *, num_threads: int
) -> Generator[Result, None, None]:
    """``work`` of every item, in the order of the items.

    At most ``num_threads + 1`` items are begun or wait to be taken. Each thread computes with one
    thread of PyTorch. What an item raises is raised here; of later ones none is begun.
    """
    before = torch.get_num_threads()
    waiting: deque[Future[Result]] = deque()
    remaining = iter(items)
    # PyTorch keeps the number of threads for each thread apart, but new ones take the last.
    pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for item in islice(remaining, num_threads + 1):
            waiting.append(pool.submit(work, item))
        while waiting:
            yield waiting.popleft().result()
            for item in islice(remaining, 1):
                waiting.append(pool.submit(work, item))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)
