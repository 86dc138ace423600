"""Shows a job's events: a progress bar for people, JSON lines for programs."""

from __future__ import annotations

import contextlib
import sys
from typing import IO

from tqdm import tqdm

from .events import Event, Finished, Message, Progress, Reporter, Saved, in_words, to_line


class ConsoleReporter:
    """A progress bar per task on standard error, sentences and saved files above it."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: tqdm | None = None
        self._task = ""

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress):
            self._advance(event)
        elif isinstance(event, Message):
            prefix = "warning: " if event.level == "warning" else ""
            self._write(f"{prefix}{event.text}")
        elif isinstance(event, Saved) and event.kind != "state":
            self._write(f"saved {event.path}")
        elif isinstance(event, Finished):
            self.close()

    def close(self) -> None:
        """End the line of an unfinished bar."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None

    def _advance(self, event: Progress) -> None:
        if self._bar is None or self._task != event.task:
            self.close()
            self._task = event.task
            # The numbers are the job's own; tqdm's averages would include the first, slow step.
            self._bar = tqdm(
                total=event.total,
                desc=event.task,
                file=self._stream,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
                dynamic_ncols=True,
            )
        self._bar.set_postfix_str(in_words(event), refresh=False)
        self._bar.update(event.done - self._bar.n)
        if event.done >= event.total:
            self.close()

    def _write(self, line: str) -> None:
        tqdm.write(line, file=self._stream)


def json_lines(stream: IO[str]) -> Reporter:
    """A reporter that writes one line per event and flushes it.

    When nobody reads them any more, events are dropped: a job whose parent has died must be able
    to save.
    """

    def report(event: Event) -> None:
        with contextlib.suppress(OSError):
            stream.write(f"{to_line(event)}\n")
            stream.flush()

    return report
