"""What a run says of itself: a small JSON file beside its LoRA; it stays when the run is over."""

from __future__ import annotations

import json
import math
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import DataError
from .events import Progress, in_words

ENDING = ".status.json"  # after the run's name
ENDED = ("finished", "stopped", "failed")
_ATTEMPTS = 5  # Windows refuses for a moment while somebody else has the file open
_SHORTEST_SILENCE_SECONDS = 120.0
_MOST_QUIET_STEPS = 20


@dataclass(frozen=True)
class Status:
    """One look at a run; times are seconds since 1970, as the run's machine counts them.

    Args:
        state: starting, caching, training, paused, saving, sampling, validating, or one of `ENDED`.
        told_to_stop: a command and no signal ended it.
        message: why it failed.
        process_started: when the system started the process ``pid`` of ``host``.
        refused: commands that this run cannot obey, and why.
        obeyed: how often each command was.
    """

    state: str
    pid: int
    host: str
    process_started: float
    started: float
    updated: float
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    smoothed_loss: float | None = None
    learning_rate: float | None = None
    step_seconds: float | None = None
    eta_seconds: float | None = None
    saved_step: int | None = None
    saved_at: float | None = None
    told_to_stop: bool = False
    message: str | None = None
    refused: dict[str, str] = field(default_factory=dict)
    obeyed: dict[str, int] = field(default_factory=dict)

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


def of_this_process() -> Status:
    """The first status of a run in this process."""
    import psutil

    now = time.time()
    created = psutil.Process().create_time()
    return Status("starting", os.getpid(), socket.gethostname(), created, started=now, updated=now)


def is_gone(status: Status) -> bool:
    """Whether the process was on this machine and ended without a word."""
    import psutil

    if status.has_ended or status.host != socket.gethostname():
        return False
    try:
        process = psutil.Process(status.pid)
        # A killed process keeps its number until its parent asks how it ended.
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        # Numbers of processes are used again.
        return abs(process.create_time() - status.process_started) > 1
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def is_silent(status: Status, now: float) -> bool:
    """Whether a run that has not ended has said nothing for much longer than its steps take."""
    patience = max(_SHORTEST_SILENCE_SECONDS, _MOST_QUIET_STEPS * (status.step_seconds or 0))
    return not status.has_ended and now - status.updated > patience


def write_status(path: Path, status: Status) -> None:
    """Replace the file; who reads it sees the old one or the new one.

    It is not flushed to the disk, which can take as long as a training step; after a power cut
    nobody asks for it.

    Raises:
        OSError: it cannot be written.
    """
    record = {key: _finite(value) for key, value in asdict(status).items()}
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().int}.tmp")
    try:
        temporary.write_text(f"{json.dumps(record, indent=1)}\n", "utf-8")
        for attempt in range(_ATTEMPTS):
            try:
                os.replace(temporary, path)
                return
            except PermissionError:
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(0.02)
    finally:
        temporary.unlink(missing_ok=True)


def read_status(path: Path) -> Status | None:
    """The status in ``path``, or None if there is no such file.

    Raises:
        DataError: the file cannot be read or is none.
    """
    try:
        record = json.loads(_read(path))
        known = {each.name for each in fields(Status)}
        return Status(**{key: value for key, value in record.items() if key in known})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: this is no status of a run ({error}); delete it") from None


def as_json(status: Status) -> str:
    """One line, with whether its process is known to be gone."""
    return json.dumps(asdict(status) | {"gone": is_gone(status)})


def as_sentence(name: str, status: Status, now: float) -> str:
    """All that is known, for people; ``now`` is the time of this machine."""
    parts = [f"{name}: {_state(status, now)}"]
    if status.total_steps:
        parts.append(f"step {status.step}/{status.total_steps}")
    numbers = Progress(
        "train",
        status.step,
        status.total_steps or 0,
        loss=status.loss,
        step_seconds=status.step_seconds,
        eta_seconds=None if status.has_ended else status.eta_seconds,
    )
    parts.append(in_words(numbers))
    if status.smoothed_loss is not None:
        parts.append(f"smoothed {status.smoothed_loss:.4f}")
    if status.learning_rate is not None:
        parts.append(f"learning rate {status.learning_rate:.3g}")
    if status.saved_at is not None:
        parts.append(f"saved at step {status.saved_step} {_ago(now - status.saved_at)}")
    return ", ".join(filter(None, parts)) + (f" ({status.message})" if status.message else "")


def _state(status: Status, now: float) -> str:
    if is_gone(status):
        return f"gone, process {status.pid} ended while {status.state}; --resume continues the run"
    if is_silent(status, now):
        return f"{status.state}, but the last sign of life was {_ago(now - status.updated)}"
    return status.state


def _ago(seconds: float) -> str:
    """Roughly; clocks of two machines may differ by seconds."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"


def _read(path: Path) -> str:
    for _ in range(_ATTEMPTS - 1):
        try:
            return path.read_text("utf-8")
        except PermissionError:
            time.sleep(0.02)
    return path.read_text("utf-8")


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
