"""``loss_history.jsonl``: one JSON line per optimizer step, readable while the run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from .atomic_file import write_text
from .errors import EngineError

_DECAY = 0.98


@dataclass(frozen=True)
class Step:
    """``step`` counts from 1; ``t`` is the mean flow time; ``seconds`` the wall time it took.

    ``grad_norm`` is that before clipping, where it was computed. ``max_norms`` are the number of
    adapters that were scaled down, the mean and the largest norm, where norms are limited.
    """

    step: int
    epoch: int
    loss: float
    learning_rate: float
    t: float
    seconds: float
    grad_norm: float | None = None
    max_norms: tuple[float, ...] | None = None


class Smoothed:
    """Exponential mean of a loss over about 50 steps, without a bias towards its start."""

    def __init__(self, steps: Iterable[Step] = ()) -> None:
        self._sum = self._weight = 0.0
        for step in steps:
            self.add(step.loss)

    def add(self, loss: float) -> float:
        """The mean including ``loss``."""
        self._sum = _DECAY * self._sum + (1 - _DECAY) * loss
        self._weight = _DECAY * self._weight + 1 - _DECAY
        return self._sum / self._weight


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
    """Appends steps to a file; lines after ``resume_step`` of an earlier run are dropped first.

    Attributes:
        kept: the steps that were there before.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        self.kept = [step for step in read_history(path) if step.step <= resume_step]
        write_text(path, "".join(_line(step) for step in self.kept))
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
    record = asdict(step)
    if step.max_norms is None:
        del record["max_norms"]
    return json.dumps(record) + "\n"
