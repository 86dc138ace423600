"""``NAME.validation.jsonl``: one JSON line per measurement of the validation loss."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from .atomic_file import write_text
from .errors import EngineError


@dataclass(frozen=True)
class Measurement:
    """The loss after ``step`` optimizer steps: its mean, and at each of the flow ``times``."""

    step: int
    loss: float
    times: tuple[float, ...]
    losses: tuple[float, ...]


def read_validation(path: Path) -> list[Measurement]:
    """All whole lines; a line that a crash cut short is left out."""
    found: list[Measurement] = []
    if not path.exists():
        return found
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            times, losses = tuple(record.pop("times")), tuple(record.pop("losses"))
            found.append(Measurement(**record, times=times, losses=losses))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return found


def append_measurement(path: Path, measurement: Measurement) -> None:
    """Write one line; it survives a crash of this process.

    Raises:
        EngineError: the disk does not take it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            file.write(_line(measurement).encode())
    except OSError as error:
        raise EngineError(
            f"{path}: the validation loss cannot be written ({error.strerror}); make room and use "
            "--resume to continue from the last saved state"
        ) from None


def drop_after(path: Path, step: int) -> None:
    """Keep only the measurements up to ``step``, which the run continues after."""
    if path.exists():
        kept = [each for each in read_validation(path) if each.step <= step]
        write_text(path, "".join(_line(each) for each in kept))


def _line(measurement: Measurement) -> str:
    return json.dumps(asdict(measurement)) + "\n"
