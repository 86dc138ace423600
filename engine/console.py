"""Shows a job's events: a progress bar for people, JSON lines for programs."""

from __future__ import annotations

import sys
from typing import IO

from tqdm import tqdm

from .events import Event, Finished, Message, Progress, Reporter, Saved, to_line


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
        self._bar.set_postfix_str(_numbers(event), refresh=False)
        self._bar.update(event.done - self._bar.n)
        if event.done >= event.total:
            self.close()

    def _write(self, line: str) -> None:
        tqdm.write(line, file=self._stream)


def json_lines(stream: IO[str]) -> Reporter:
    """A reporter that writes one line per event and flushes it."""

    def report(event: Event) -> None:
        stream.write(f"{to_line(event)}\n")
        stream.flush()

    return report


def _numbers(event: Progress) -> str:
    parts: list[str] = []
    if event.loss is not None:
        parts.append(f"loss {event.loss:.4f}")
    if event.step_seconds is not None:
        parts.append(f"{_duration(event.step_seconds)}/{event.unit}")
    if event.eta_seconds is not None and event.done < event.total:
        parts.append(f"{_duration(event.eta_seconds)} left")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    if round(seconds, 3) < 1:
        return f"{seconds * 1000:.0f} ms"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
