"""What a job reports while it runs: small frozen records, one JSON line each.

A job calls ``report(event)`` and never prints. The shell turns events into a progress bar
(`console.py`); a parent process reads them as JSON lines on the child's standard output.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Message:
    """A sentence for the user; ``level`` is "info", "warning" or "error"."""

    text: str
    level: str = "info"


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` units of ``task`` are finished.

    ``loss`` is the mean loss of the last optimizer step; ``step_seconds`` and ``eta_seconds`` are
    unknown until the second unit, because the first one includes warm-up.
    """

    task: str
    done: int
    total: int
    unit: str = "step"
    loss: float | None = None
    step_seconds: float | None = None
    eta_seconds: float | None = None


@dataclass(frozen=True)
class Saved:
    """A finished file; ``kind`` is "lora", "state", "recipe", "image", "latents" or "plot"."""

    path: str
    kind: str
    step: int | None = None


@dataclass(frozen=True)
class Finished:
    """The job is over; ``stopped`` says that a signal ended it early and it can be resumed."""

    job: str
    stopped: bool = False


Event = Message | Progress | Saved | Finished
Reporter = Callable[[Event], None]

_TYPES: dict[str, type[Event]] = {
    "message": Message,
    "progress": Progress,
    "saved": Saved,
    "finished": Finished,
}
_NAMES = {event_type: name for name, event_type in _TYPES.items()}


def silent(event: Event) -> None:
    """A reporter that drops everything."""


def to_line(event: Event) -> str:
    """``event`` as one line of JSON, without the line end."""
    return json.dumps({"event": _NAMES[type(event)], **asdict(event)})


def from_line(line: str) -> Event | None:
    """The event in ``line``, or None if the line is something else (a library printed it)."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("event") not in _TYPES:
        return None
    event_type = _TYPES[record.pop("event")]
    try:
        return event_type(**record)
    except TypeError:
        return None


def in_words(event: Progress) -> str:
    """Loss, step time and time left, as far as they are known."""
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
