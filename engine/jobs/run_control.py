"""Lets a training be told what to do, and tells what it is doing."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ..control import ControlFile
from ..errors import DataError, EngineError
from ..events import Event, Message, Progress, Reporter, Saved
from ..loss_history import Step
from ..run_status import is_gone, of_this_process, read_status, write_status
from ..signals import Stopped
from .outputs import RunFiles

LOOK_EVERY_SECONDS = 0.5
WRITE_EVERY_SECONDS = 2.0
_STATES = {"train": "training", "preview": "sampling", "samples": "sampling"}


@dataclass(frozen=True)
class Commands:
    """What to do before the next step; ``pause`` holds until the user lets the run go on."""

    stop: bool = False
    save: bool = False
    sample: bool = False
    pause: bool = False


class RunControl:
    """Owns the control and the status file of a run in a ``with`` block, one for each run.

    What `commands` and `wait_while_paused` gave counts as done when one of them is called again.

    Args:
        report: the run's own reporter; what goes through `RunControl.report` reaches it.
        refused: commands that the run cannot obey, and why.

    Attributes:
        told_to_stop: a command ends the run.
    """

    def __init__(
        self, files: RunFiles, report: Reporter, *, refused: Mapping[str, str] | None = None
    ) -> None:
        self.told_to_stop = False
        self._files = files
        self._report = report
        self._file = ControlFile(files.control, report)
        self._status = dataclasses.replace(of_this_process(), refused=dict(refused or {}))
        self._given: Counter[str] = Counter()
        self._paused = False
        self._next_look = self._next_write = 0.0
        self._has_warned = False

    def __enter__(self) -> RunControl:
        """Begin.

        Raises:
            EngineError: another process trains this run.
        """
        other = self._process_at_work()
        if other is not None:
            raise EngineError(
                f"{self._files.folder / self._files.name} is being trained by process {other} "
                "already; wait for it, stop it, or use another output_name"
            )
        self._files.folder.mkdir(parents=True, exist_ok=True)
        self._file.remove_leftover()
        self._enter("starting")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._count()
        if error is None:
            self._enter("finished", eta_seconds=0.0)
        elif isinstance(error, Stopped):
            self._enter("stopped", told_to_stop=self.told_to_stop)
        else:
            text = str(error) if isinstance(error, EngineError) else type(error).__name__
            self._enter("failed", message=text)

    def report(self, event: Event) -> None:
        """Pass an event on; the status follows it."""
        if isinstance(event, Progress):
            self._follow(event)
        elif isinstance(event, Saved) and event.kind == "state":
            self._update(saved_step=event.step, saved_at=time.time())
        self._report(event)

    def begin(self, step: int, total_steps: int) -> None:
        """So many steps were done before."""
        self._update(step=step, total_steps=total_steps)

    def record(self, step: Step, smoothed: float) -> None:
        """A step is done."""
        self._update(
            step=step.step,
            loss=step.loss,
            smoothed_loss=smoothed,
            learning_rate=step.learning_rate,
        )

    @contextmanager
    def during(self, state: str) -> Iterator[None]:
        """The run is in this state while the block lasts."""
        before = self._status.state
        self._enter(state)
        yield
        self._enter(before)

    def commands(self) -> Commands:
        """What came since the last call; costs next to nothing and looks twice a second at most."""
        if self._given:
            self._count()
            self._write()
        now = time.monotonic()
        if now < self._next_look:
            return Commands(pause=self._paused)
        self._next_look = now + LOOK_EVERY_SECONDS
        self._write_if_due()
        return self._obey(self._file.take())

    def wait_while_paused(self) -> Commands:
        """Wait until there is something to do; while ``pause`` of it is set, call again after that.

        Signals are taken at once.
        """
        if self._paused:
            self._enter("paused")
        while (commands := self.commands()) == Commands(pause=True):
            time.sleep(LOOK_EVERY_SECONDS)
        if not self._paused:
            self._enter("training")
        return commands

    def _process_at_work(self) -> int | None:
        """Another process of this machine that has this run and is alive."""
        try:
            other = read_status(self._files.status)
        except DataError:
            return None  # as a power cut may leave it; it is written anew
        if other is None or other.has_ended or other.host != self._status.host:
            return None
        return None if other.pid == self._status.pid or is_gone(other) else other.pid

    def _obey(self, words: list[str]) -> Commands:
        given: set[str] = set()
        for word in words:
            if reason := self._status.refused.get(word):
                self._report(Message(f"the run cannot {word}: {reason}", level="warning"))
                continue
            self._given[word] += 1
            if word in ("pause", "resume"):
                self._pause(word == "pause")
            else:
                given.add(word)
        self.told_to_stop |= "stop" in given
        flags = {word: word in given for word in ("stop", "save", "sample")}
        return Commands(**flags, pause=self._paused)

    def _pause(self, wanted: bool) -> None:
        if wanted != self._paused:
            what = "paused" if wanted else "going on"
            self._report(Message(f"{what} after step {self._status.step}"))
        self._paused = wanted

    def _count(self) -> None:
        obeyed = Counter(self._status.obeyed) + self._given
        self._given.clear()
        self._status = dataclasses.replace(self._status, obeyed=dict(obeyed))

    def _follow(self, event: Progress) -> None:
        state = _STATES.get(event.task, "caching" if event.task.startswith("cache") else None)
        if event.task == "train":
            self._status = dataclasses.replace(
                self._status,
                step=event.done,
                total_steps=event.total,
                loss=event.loss,
                step_seconds=event.step_seconds,
                eta_seconds=event.eta_seconds,
            )
        if state and state != self._status.state:
            self._enter(state)
        else:
            self._write_if_due()

    def _enter(self, state: str, **changes: Any) -> None:
        self._status = dataclasses.replace(self._status, state=state, **changes)
        self._write()

    def _update(self, **changes: Any) -> None:
        self._status = dataclasses.replace(self._status, **changes)
        self._write_if_due()

    def _write_if_due(self) -> None:
        if time.monotonic() >= self._next_write:
            self._write()

    def _write(self) -> None:
        """A run that cannot say how it is goes on."""
        self._next_write = time.monotonic() + WRITE_EVERY_SECONDS
        self._status = dataclasses.replace(self._status, updated=time.time())
        try:
            write_status(self._files.status, self._status)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                self._report(
                    Message(
                        f"{self._files.status}: the status cannot be written ({error.strerror}); "
                        "the training goes on",
                        level="warning",
                    )
                )
