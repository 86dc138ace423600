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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .errors import EngineError
from .events import Event, Message, from_line

PACKAGE = Path(__file__).parent
_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 120
_PATIENCE_WITH_TOOLS_SECONDS = 5  # which have nothing to save
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
    words = [job, "--config_file", str(config_file)]
    child = _run(
        words, log, on_event, poll, patience=_PATIENCE_SECONDS, environment=environment or {}
    )
    if child.code not in (0, _STOPPED):
        hint = "; start it again to continue from the last save"
        raise EngineError(child.error or _explain(job, child, log, hint))
    return Ended(stopped=child.code == _STOPPED)


def run_tool(
    tool: str,
    arguments: Sequence[str],
    *,
    log: Path,
    on_event: Callable[[Event], None],
    poll: Callable[[], None] = lambda: None,
) -> None:
    """Run a tool for LoRA files and wait for its end; its last event is a message, the report.

    Args:
        tool: one of `lora_command.TOOLS`.
        arguments: as in the shell, with absolute paths.
        log: as in `run_job`, and so are the others.

    Raises:
        EngineError: as in `run_job`.
    """
    words = ["lora", tool, *arguments]
    child = _run(words, log, on_event, poll, patience=_PATIENCE_WITH_TOOLS_SECONDS, environment={})
    if child.code:
        raise EngineError(child.error or _explain(tool, child, log, ""))


def _run(
    words: Sequence[str],
    log: Path,
    on_event: Callable[[Event], None],
    poll: Callable[[], None],
    *,
    patience: float,
    environment: Mapping[str, str],
) -> _Child:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb", buffering=0) as log_file:
        child = _Child(words, log_file, environment)
        try:
            _relay(child, on_event, poll)
        except BaseException:
            child.stop(patience)
            _drain(child, on_event)
            raise
        finally:
            child.close()
    return child


class _Child:
    """The process, and what its reader threads have taken from it.

    Args:
        words: of the command line, the job first.
    """

    def __init__(
        self, words: Sequence[str], log: IO[bytes], environment: Mapping[str, str]
    ) -> None:
        start = [sys.executable, "-u", "-c", _START, str(PACKAGE.parent), PACKAGE.name]
        self.process = subprocess.Popen(
            [*start, *words, "--events", "json", "--stop_with_input"],
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
            threading.Thread(target=read, name=f"{words[0]} output", daemon=True)
            for read in (self._read_events, self._read_errors)
        ]
        for reader in self._readers:
            reader.start()

    def stop(self, patience: float) -> None:
        """Ask it to save and stop; what hangs is killed after so many seconds."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(patience)
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


def _explain(job: str, child: _Child, log: Path, what_to_do: str) -> str:
    tail = b"".join(child.last_words).decode("utf-8", errors="replace").strip()
    code = child.code
    end = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    hint = " (the system kills what takes too much memory)" if code == -9 else ""
    return (
        f"the {job} process {end}{hint}{what_to_do}. "
        f"Its last words, of which {log} has more:\n{tail or 'none'}"
    )
