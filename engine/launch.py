"""Runs a job in a child process of the same Python, relays its events and stops it.

The child owns the accelerator's memory only as long as it lives, and whatever happens to it, the
parent goes on. It is told to stop by the end of its standard input, which also comes when the
parent dies: a training never goes on without the one who watches it.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .errors import EngineError
from .events import Event, Message, from_line

PACKAGE = Path(__file__).parent
_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 120
_TAIL_LINES = 15
# "-m" needs a Python that looks into the current folder; that of the portable ComfyUI does not.
_START = (
    "import runpy, sys; sys.path = [sys.argv.pop(1), *filter(None, sys.path)]; "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
_STOPPED = 3  # exit code of a job that saved and stopped


@dataclass(frozen=True)
class Ended:
    """How the child ended; ``stopped`` means that it saved and can be continued."""

    stopped: bool


def run_job(
    job: str,
    config_file: Path,
    *,
    log: Path,
    on_event: Callable[[Event], None],
    poll: Callable[[], None] = lambda: None,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run ``job`` with the settings in ``config_file`` and wait for its end.

    Args:
        config_file: TOML with absolute paths.
        log: receives what the child prints that is no event; replaced.
        on_event: called here, in the caller's thread, for each event.
        poll: called several times a second. If it or ``on_event`` raises, the child is asked to
            stop, waited for and its last events are delivered before the exception goes on.
        environment: added to the child's.

    Raises:
        EngineError: the job failed; carries the job's own sentence, or the end of its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb", buffering=0) as log_file:
        child = _Child(job, config_file, log_file, environment or {})
        try:
            _relay(child, on_event, poll)
        except BaseException:
            child.stop()
            _drain(child, on_event)
            raise
        finally:
            child.close()
    if child.code not in (0, _STOPPED):
        raise EngineError(child.error or _explain(job, child, log))
    return Ended(stopped=child.code == _STOPPED)


class _Child:
    """The process, and what its reader threads have taken from it."""

    def __init__(
        self, job: str, config_file: Path, log: IO[bytes], environment: Mapping[str, str]
    ) -> None:
        start = [sys.executable, "-u", "-c", _START, str(PACKAGE.parent), PACKAGE.name]
        options = ["--config_file", str(config_file), "--events", "json", "--stop_with_input"]
        self.process = subprocess.Popen(
            [*start, job, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", **environment},
            # Ctrl-C in the terminal reaches the parent alone, which then stops the child.
            start_new_session=True,
        )
        self.events: queue.Queue[Event | None] = queue.Queue()
        self.code: int = 0
        self.error: str | None = None
        self.last_words: deque[bytes] = deque(maxlen=_TAIL_LINES)
        self._log = log
        self._readers = [
            threading.Thread(target=read, name=f"{job} output", daemon=True)
            for read in (self._read_events, self._read_errors)
        ]
        for reader in self._readers:
            reader.start()

    def stop(self) -> None:
        """Ask it to save and stop; what hangs is killed after a while."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def close(self) -> None:
        """Wait for its end; it must be on its way."""
        assert self.process.stdin is not None
        self.code = self.process.wait()
        self.process.stdin.close()
        for reader in self._readers:
            reader.join()

    def _read_events(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                event = from_line(line.decode("utf-8", errors="replace"))
                if event is None:
                    self._log.write(line)
                elif isinstance(event, Message) and event.level == "error":
                    self.error = event.text
                else:
                    self.events.put(event)
        self.events.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self._log.write(line)
                self.last_words.append(line)


def _relay(child: _Child, on_event: Callable[[Event], None], poll: Callable[[], None]) -> None:
    while True:
        try:
            event = child.events.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            poll()
            continue
        if event is None:
            return
        on_event(event)
        poll()


def _drain(child: _Child, on_event: Callable[[Event], None]) -> None:
    """Deliver the rest, except to a receiver that raises once more."""
    while (event := child.events.get()) is not None:
        try:
            on_event(event)
        except BaseException:  # noqa: BLE001  the first one is on its way up already
            continue


def _explain(job: str, child: _Child, log: Path) -> str:
    tail = b"".join(child.last_words).decode("utf-8", errors="replace").strip()
    code = child.code
    end = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    hint = " (the system kills what takes too much memory)" if code == -9 else ""
    return (
        f"the {job} process {end}{hint}; start it again to continue from the last save. "
        f"Its last words, of which {log} has more:\n{tail or 'none'}"
    )
