"""Tells a run that goes on what to do, or shows what it is doing, from another process."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from .. import control, run_status
from ..config_file import load_config
from ..errors import EngineError
from ..run_status import Status

WORDS = {"status": "show what the run is doing; changes nothing", **control.COMMANDS}
_LOOK_EVERY_SECONDS = 0.2
# What stands behind the name of a run in the names of its files.
_ENDINGS = re.compile(
    r"(-step\d{8}|-\d{6}|-best)?\.(safetensors|state)|\.toml|\.log|\.loss_history\.jsonl"
    rf"|{re.escape(control.ENDING)}|{re.escape(run_status.ENDING)}"
)


def run(
    path: Path, word: str, *, wait: bool, as_json: bool, write: Callable[[str], object]
) -> None:
    """Give a run a command of `WORDS`.

    Args:
        path: output_dir/output_name, any file of the run, or a config file that names both.
        wait: return when it is done.
        as_json: show the status as JSON.
        write: takes what there is to show.

    Raises:
        EngineError: there is no such run, it is over, or it ends before it obeys.
    """
    place = find_run(path)
    status = _status(place)
    if word == "status":
        shown = run_status.as_sentence(place.name, status, time.time())
        write(f"{run_status.as_json(status) if as_json else shown}\n")
        return
    _check(place, status, word)
    control.request(place.with_name(place.name + control.ENDING), word)
    if wait:
        status = _wait(place, status, word)
        write(f"{run_status.as_sentence(place.name, status, time.time())}\n")
    else:
        write(f"{place.name}: {word} is asked for\n")


def find_run(path: Path) -> Path:
    """Folder and name of the run that is meant; it has begun at some time.

    Raises:
        EngineError: there is none.
    """
    candidates = [path]
    if match := re.fullmatch(rf"(.+?)({_ENDINGS.pattern})", path.name):
        candidates.append(path.with_name(match[1]))
    if path.suffix == ".toml" and path.is_file():
        output = load_config(path, {}, {}).output
        if output.output_dir and output.output_name:
            candidates.append(output.output_dir / output.output_name)
    for place in candidates:
        if _status_file(place).exists():
            return place
    others = sorted(each.name for each in path.parent.glob(f"*{run_status.ENDING}"))
    names = [name.removesuffix(run_status.ENDING) for name in others]
    there = f"runs of the folder: {', '.join(names[:10])}" if names else "the folder has none"
    raise EngineError(
        f"{path}: there is no run of that name ({there}); give output_dir/output_name, one of the "
        "run's files, or its config file"
    )


def _status_file(place: Path) -> Path:
    return place.with_name(place.name + run_status.ENDING)


def _status(place: Path) -> Status:
    status = run_status.read_status(_status_file(place))
    if status is None:
        raise EngineError(f"{_status_file(place)} is gone; was the run deleted?")
    return status


def _check(place: Path, status: Status, word: str) -> None:
    """Whether the run can still be told anything."""
    if status.has_ended:
        raise EngineError(f"{place}: cannot {word} what is over; the run has {_end(status)}")
    if run_status.is_gone(status):
        raise EngineError(
            f"{place}: cannot {word}, because process {status.pid} is gone; start the training "
            "with --resume to continue from the last save"
        )
    if reason := status.refused.get(word):
        raise EngineError(f"{place}: the run cannot {word}: {reason}")


def _end(status: Status) -> str:
    how = "been stopped" if status.state == "stopped" else status.state
    total = f" of {status.total_steps}" if status.total_steps else ""
    return f"{how} after step {status.step}{total}"


def _wait(place: Path, before: Status, word: str) -> Status:
    """The status when the command is obeyed; that of a stop is the last one."""
    while True:
        status = _status(place)
        ended = status.has_ended or status.started != before.started  # or begun anew
        done = status.obeyed.get(word, 0) > before.obeyed.get(word, 0)
        if ended if word == "stop" else done:
            return status
        if ended or run_status.is_gone(status):
            last = run_status.as_sentence(place.name, status, time.time())
            raise EngineError(f"{place}: the run ended before it could {word}: {last}")
        time.sleep(_LOOK_EVERY_SECONDS)
