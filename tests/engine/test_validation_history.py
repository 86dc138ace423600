from __future__ import annotations

from pathlib import Path

import pytest
from pack.engine.errors import EngineError
from pack.engine.validation_history import (
    Measurement,
    append_measurement,
    drop_after,
    read_validation,
)


def measurement(step: int, loss: float = 0.1) -> Measurement:
    return Measurement(step, loss, times=(0.25, 0.75), losses=(loss - 1e-9, loss + 1e-9))


def test_measurements_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "new/v.jsonl"
    assert read_validation(path) == []
    for step in (10, 20):
        append_measurement(path, measurement(step, 1 / step))
    assert read_validation(path) == [measurement(10, 0.1), measurement(20, 0.05)]


def test_a_run_that_goes_back_drops_what_comes_after_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    drop_after(path, 5)
    assert not path.exists()
    for step in (10, 20, 30):
        append_measurement(path, measurement(step))
    with path.open("a") as file:
        file.write('{"step": 40, "lo')
    assert len(read_validation(path)) == 3
    drop_after(path, 20)
    append_measurement(path, measurement(30, 0.5))
    assert read_validation(path) == [measurement(10), measurement(20), measurement(30, 0.5)]
    drop_after(path, 0)
    assert read_validation(path) == []


def test_lines_that_are_something_else_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    path.write_text('1\n[]\n{"step": 1}\n{"step": 1, "times": 1, "losses": []}\nx\n')
    assert read_validation(path) == []


def test_a_disk_that_takes_nothing_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="the validation loss cannot be written"):
        append_measurement(tmp_path, measurement(1))
