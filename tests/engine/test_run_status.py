from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from pack.engine.errors import DataError
from pack.engine.run_status import (
    Status,
    as_json,
    as_sentence,
    is_gone,
    is_silent,
    of_this_process,
    read_status,
    write_status,
)

TRAINING = Status(
    "training",
    pid=1,
    host="elsewhere",
    process_started=10.0,
    started=1000.0,
    updated=2000.0,
    step=120,
    total_steps=1600,
    loss=0.08123,
    smoothed_loss=0.09111,
    learning_rate=1e-4,
    step_seconds=2.1,
    eta_seconds=3108.0,
    saved_step=100,
    saved_at=1800.0,
    obeyed={"save": 2},
)


def test_a_status_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "cats.status.json"
    assert read_status(path) is None
    write_status(path, TRAINING)
    assert read_status(path) == TRAINING
    assert [each.name for each in tmp_path.iterdir()] == ["cats.status.json"]


def test_a_field_of_a_later_version_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "cats.status.json"
    path.write_text(json.dumps(dataclasses.asdict(TRAINING) | {"mood": "good"}))
    assert read_status(path) == TRAINING


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"state": "training"}', "\xff\xfe"])
def test_something_else_is_one_sentence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "cats.status.json"
    path.write_bytes(content.encode("latin1"))
    with pytest.raises(DataError, match=r"cats\.status\.json: this is no status of a run \("):
        read_status(path)


def test_a_loss_that_is_no_number_is_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "cats.status.json"
    write_status(path, dataclasses.replace(TRAINING, loss=math.nan, smoothed_loss=math.inf))
    record = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert record["loss"] is None and record["smoothed_loss"] is None


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cats.status.json"
    write_status(path, dataclasses.replace(TRAINING, step=0))
    writing = True

    def write() -> None:
        for step in range(300):
            write_status(path, dataclasses.replace(TRAINING, step=step))
        nonlocal writing
        writing = False

    thread = threading.Thread(target=write)
    thread.start()
    seen: list[int] = []
    while writing:
        found = read_status(path)
        assert found is not None
        seen.append(found.step)
    thread.join()
    assert len(set(seen)) > 3 and seen == sorted(seen)


def test_this_process_is_not_gone() -> None:
    mine = of_this_process()
    assert mine.state == "starting" and mine.pid == os.getpid() and not is_gone(mine)
    assert mine.process_started == psutil.Process().create_time()


def test_a_process_that_ended_is_gone_unless_it_said_so() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    created = psutil.Process(process.pid).create_time()
    left = dataclasses.replace(of_this_process(), pid=process.pid, process_started=created)
    end = time.monotonic() + 20
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
    assert is_gone(left)  # its parent has not asked yet
    process.wait()
    assert is_gone(left)
    assert not is_gone(dataclasses.replace(left, state="finished"))
    assert not is_gone(dataclasses.replace(left, host="elsewhere"))  # nobody here can know


def test_a_number_that_another_process_has_now_is_no_sign_of_life() -> None:
    mine = of_this_process()
    assert is_gone(dataclasses.replace(mine, process_started=mine.process_started - 3600))


@pytest.mark.parametrize(
    ("step_seconds", "quiet", "silent"),
    [(None, 110, False), (None, 130, True), (30.0, 590, False), (30.0, 610, True)],
)
def test_silence_is_measured_in_steps(
    step_seconds: float | None, quiet: float, silent: bool
) -> None:
    status = dataclasses.replace(TRAINING, step_seconds=step_seconds)
    assert is_silent(status, status.updated + quiet) == silent
    assert not is_silent(dataclasses.replace(status, state="stopped"), status.updated + quiet)


def test_a_status_in_words() -> None:
    assert as_sentence("cats", TRAINING, now=2000.0) == (
        "cats: training, step 120/1600, loss 0.0812, 2.1 s/step, 51:48 left, smoothed 0.0911, "
        "learning rate 0.0001, saved at step 100 3 min ago"
    )
    starting = Status("starting", 1, "elsewhere", 0.0, 1000.0, 1000.0)
    assert as_sentence("cats", starting, now=1000.0) == "cats: starting"
    quiet = as_sentence("cats", starting, now=1000.0 + 7200)
    assert quiet == "cats: starting, but the last sign of life was 2 h ago"
    failed = dataclasses.replace(starting, state="failed", message="out of memory")
    assert as_sentence("cats", failed, now=9e9) == "cats: failed (out of memory)"
    gone = dataclasses.replace(of_this_process(), process_started=0.0)
    assert "gone, process" in as_sentence("cats", gone, now=gone.updated)


def test_as_json_it_has_every_field_and_whether_the_process_is_gone() -> None:
    assert json.loads(as_json(TRAINING)) == {**dataclasses.asdict(TRAINING), "gone": False}
