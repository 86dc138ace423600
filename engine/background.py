"""Work that may be slow or fail, done beside the training."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class Background:
    """Makes calls in a thread of its own, one after another; after one that fails, none any more.

    The thread ends with the process, whatever it is waiting for.

    Args:
        failed: is told what was raised, in that thread.
    """

    def __init__(self, name: str, failed: Callable[[Exception], None]) -> None:
        # Its `put` neither waits nor breaks when a signal's handler raises in the middle of it.
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._failed = failed
        self._is_broken = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], None]) -> None:
        """Make this call when all before it are made; returns at once."""
        if not self._is_broken:
            self._calls.put(function)

    def finish(self, seconds: float) -> bool:
        """Wait so long for the calls that are left; gives whether all are made."""
        self._calls.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (function := self._calls.get()) is not None:
            if self._is_broken:
                continue
            try:
                function()
            except Exception as error:  # noqa: BLE001  no thread above could handle it
                self._is_broken = True
                self._failed(error)
