"""``loss_history.jsonl``: one JSON line per optimizer step, readable while the run goes on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from .atomic_file import write_text
from .errors import EngineError


@dataclass(frozen=True)
class Step:
    """``step`` counts from 1; ``t`` is the mean flow time; ``seconds`` the wall time it took."""

    step: int
    epoch: int
    loss: float
    learning_rate: float
    t: float
    seconds: float


def read_history(path: Path) -> list[Step]:
    """All whole lines; a line that a crash cut short is left out."""
    steps: list[Step] = []
    if not path.exists():
        return steps
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            steps.append(Step(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return steps


class LossHistory:
    """Appends steps to a file; lines after ``resume_step`` of an earlier run are dropped first."""

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        kept = [step for step in read_history(path) if step.step <= resume_step]
        write_text(path, "".join(_line(step) for step in kept))
        self._path = path
        # Without a buffer: a line that a full disk refused would be tried again on closing.
        self._file = path.open("ab", buffering=0)

    def append(self, step: Step) -> None:
        """Write one line; it survives a crash of this process.

        Raises:
            EngineError: the disk does not take it.
        """
        try:
            self._file.write(_line(step).encode())
        except OSError as error:
            raise EngineError(
                f"{self._path}: the loss cannot be written ({error.strerror}); make room and use "
                "--resume to continue from the last saved state"
            ) from None

    def __enter__(self) -> LossHistory:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def _line(step: Step) -> str:
    return json.dumps(asdict(step)) + "\n"
