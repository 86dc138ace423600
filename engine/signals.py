"""Stopping a job by SIGINT or SIGTERM without losing work.

A signal ends the job at once by raising `Stopped` wherever the job is, because loading a model or
one step of a large one can take minutes. Where half-done work would be wrong (an optimizer step,
a file being written) the job shields itself and is stopped right after.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """The job was asked to stop; what it had computed is saved.

    No `Exception`, as KeyboardInterrupt is none: it is raised inside libraries, and some of them
    catch every `Exception` while they import modules or read files.
    """


class StopSignals:
    """Context manager that owns SIGINT and SIGTERM while a job runs in the main thread.

    In other threads Python delivers no signals, and the context does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._shields = 0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Let this block finish before a signal takes effect."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
        self._stop_if_requested()

    def hold(self) -> None:
        """From here on signals only set ``requested``; the job looks at it and ends by itself."""
        self._shields += 1

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            return  # already stopping; saving must not be interrupted by impatience
        self.requested = True
        self._stop_if_requested()

    def _stop_if_requested(self) -> None:
        if self.requested and not self._shields:
            raise Stopped("stopped by a signal")


def stop_with_input() -> None:
    """From here on the end of standard input counts as SIGTERM, also where there are no signals."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        if callable(signal.getsignal(signal.SIGTERM)):
            _thread.interrupt_main(signal.SIGTERM)
        else:
            os._exit(130)  # no job has begun, so there is nothing to save

    threading.Thread(target=watch, name="input", daemon=True).start()
