"""Commands for a run that goes on: one word a line in a text file beside its LoRA.

Who shares the folder can give them, from another machine or with a text editor, too. The run
takes the file away and so does everything once.
"""

from __future__ import annotations

import os
import stat
import uuid
from pathlib import Path

from .errors import EngineError
from .events import Message, Reporter

ENDING = ".control"  # after the run's name
COMMANDS = {
    "stop": "save everything and end; the run can be continued",
    "save": "save the LoRA and the state now",
    "sample": "draw the sample prompts now",
    "pause": "wait between two steps",
    "resume": "go on after a pause",
}
_MOST_BYTES = 2**16
_MOST_ATTEMPTS = 100
_LOOKS_UNTIL_WARNING = 20
_SHOWN_CHARACTERS = 40


def request(path: Path, command: str) -> None:
    """Add ``command`` to what the run is told in the control file ``path``.

    Whoever asks at the same time, and the run itself, sees whole files only, and each command in
    one of them. (On a file system without hard links two requests in the same instant may become
    one.)

    Raises:
        EngineError: the file cannot be written.
    """
    lines = [command]
    try:
        for _ in range(_MOST_ATTEMPTS):
            if _publish(path, lines):
                return
            lines = [*_lines(_take_away(path)), *lines]
    except OSError as error:
        raise EngineError(
            f"{path}: the command cannot be written ({error.strerror}); the run goes on without it"
        ) from None
    raise EngineError(f"{path}: something is in the way that is no control file; remove it")


class ControlFile:
    """The side of the run: ``path`` is looked at, and emptied, whenever it calls `take`."""

    def __init__(self, path: Path, report: Reporter) -> None:
        self.path = path
        self._report = report
        self._unfinished: tuple[int, int] | None = None
        self._failures = 0

    def take(self) -> list[str]:
        """The commands that came since the last call, in order; each is given once.

        Words that are none are told to the user and dropped. An empty file is none, and one that
        does not end with a line end is left until the next call finds it unchanged: somebody may
        still be writing it.
        """
        try:
            lines = self._read()
        except OSError as error:
            self._fail(error)
            return []
        self._failures = 0
        words = [line.casefold() for line in lines]
        unknown = [line for line in lines if line.casefold() not in COMMANDS]
        if unknown:
            shown = ", ".join(repr(line[:_SHOWN_CHARACTERS]) for line in unknown[:3])
            self._tell(f"{self.path.name}: {shown} is dropped; commands are {', '.join(COMMANDS)}")
        return [word for word in words if word in COMMANDS]

    def remove_leftover(self) -> None:
        """What was written before the run began is not meant for it."""
        try:
            lines = _lines(_take_away(self.path))
        except OSError as error:
            self._fail(error)
            return
        if lines:
            shown = ", ".join(line[:_SHOWN_CHARACTERS] for line in lines[:3])
            self._tell(f"{self.path.name} was there before the run began ({shown}); it is dropped")

    def _read(self) -> list[str]:
        try:
            facts = self.path.stat()
            if not facts.st_size or not stat.S_ISREG(facts.st_mode):
                return []
            found = facts.st_mtime_ns, facts.st_size
            if found != self._unfinished and not _text(_beginning(self.path)).endswith("\n"):
                self._unfinished = found
                return []
        except FileNotFoundError:
            return []
        self._unfinished = None
        return _lines(_take_away(self.path))

    def _fail(self, error: OSError) -> None:
        """Say once what does not go away; a network may be slow, and Windows locks open files."""
        self._failures += 1
        if self._failures == _LOOKS_UNTIL_WARNING:
            self._tell(
                f"{self.path}: commands for the run cannot be read ({error.strerror}); it goes on"
            )

    def _tell(self, text: str) -> None:
        self._report(Message(text, level="warning"))


def _publish(path: Path, lines: list[str]) -> bool:
    """Make ``path`` with these lines unless there is such a file."""
    fresh = _private(path)
    try:
        fresh.write_bytes("".join(f"{line}\n" for line in lines).encode())
        try:
            os.link(fresh, path)
        except FileExistsError:
            return False
        except OSError:
            # There are file systems without hard links, and Windows shares of them.
            if path.exists():
                return False
            os.rename(fresh, path)
        return True
    finally:
        fresh.unlink(missing_ok=True)


def _take_away(path: Path) -> bytes:
    """The content of a file that nobody else gets any more; nothing if there is no file."""
    if not path.is_file():
        return b""
    taken = _private(path)
    try:
        # Before it is read: what is asked for from now on is in another file.
        os.rename(path, taken)
    except FileNotFoundError:
        return b""  # another one was faster
    try:
        return _beginning(taken)
    finally:
        taken.unlink(missing_ok=True)


def _private(path: Path) -> Path:
    # Process ids of two machines that share the folder may be the same.
    return path.with_name(f".{path.name}.{uuid.uuid4().int}.tmp")


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MOST_BYTES)


def _lines(content: bytes) -> list[str]:
    return [line for line in map(str.strip, _text(content).splitlines()) if line]


def _text(content: bytes) -> str:
    # Windows PowerShell's ">" writes UTF-16, and some editors put a mark before UTF-8.
    utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    return content.decode("utf-16" if utf16 else "utf-8-sig", errors="replace")
