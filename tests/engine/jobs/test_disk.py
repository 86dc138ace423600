from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pack.engine.errors import EngineError
from pack.engine.jobs import disk
from pack.engine.jobs.outputs import RunFiles
from pack.engine.jobs.plan import Plan
from pack.tests.engine.jobs import tiny

MIB = 2**20


def plan(*, start: int = 0, total: int = 100, per_epoch: int = 10) -> Plan:
    return Plan(start, per_epoch, 1, total, multiplier=lambda step: 1.0)


def slow_kept_at_once(settings: dict[str, Any], of: Plan) -> tuple[int, int]:
    """Every file of the run, step by step, as `saving` writes and removes them."""

    def most(ending_kept: bool, last_steps: int | None, last_epochs: int | None) -> int:
        if not ending_kept:
            return 0
        by_step: list[int] = []
        by_epoch: list[int] = []
        highest = 0
        for step in range(of.start + 1, of.total_steps + 1):
            every = settings.get("save_every_n_steps")
            if every and step % every == 0:
                by_step.append(step)
            ended = of.ended_epochs(step)
            every = settings.get("save_every_n_epochs")
            by_epoch += [epoch for epoch in ended if every and epoch % every == 0]
            highest = max(highest, len(by_step) + len(by_epoch))
            if last_steps is not None:
                by_step = [each for each in by_step if each >= step - last_steps]
            if last_epochs is not None and ended:
                oldest = ended[-1] - last_epochs * (settings["save_every_n_epochs"] or 1) + 1
                by_epoch = [each for each in by_epoch if each >= oldest]
        return highest

    steps, epochs = settings.get("save_last_n_steps"), settings.get("save_last_n_epochs")
    loras = most(True, steps, epochs)
    states = most(
        settings.get("save_state", False),
        settings.get("save_last_n_steps_state") or steps,
        settings.get("save_last_n_epochs_state") or epochs,
    )
    return 1 + loras, 1 + states


@pytest.mark.parametrize("start", [0, 37])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"save_every_n_steps": 10},
        {"save_every_n_steps": 7, "save_last_n_steps": 20},
        {"save_every_n_steps": 7, "save_last_n_steps": 20, "save_state": True},
        {"save_every_n_epochs": 2, "save_state": True, "save_last_n_epochs_state": 1},
        {"save_every_n_epochs": 1, "save_last_n_epochs": 3},
        {"save_every_n_epochs": 1, "save_every_n_steps": 5, "save_last_n_steps": 15},
    ],
)
def test_files_that_are_there_at_the_same_time_are_counted(
    settings: dict[str, Any], start: int
) -> None:
    of = plan(start=start)
    exact = slow_kept_at_once(settings, of)
    counted = disk.kept_at_once(tiny.config(settings), of)
    for most, expected in zip(counted, exact, strict=True):
        # Enough in any case, and one or two more where the oldest goes at another moment.
        assert expected <= most <= expected + 2


def test_the_best_lora_is_one_more() -> None:
    settings = {"validation_split": 0.1}
    without = disk.kept_at_once(tiny.config(settings), plan())
    assert disk.kept_at_once(tiny.config(settings, keep_best=True), plan())[0] == without[0] + 1


def test_what_the_run_replaces_needs_no_room_of_its_own(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, "tiny")
    sizes = {"lora_bytes": 100 * MIB, "state_bytes": 300 * MIB}
    before = disk.needed_bytes(tiny.config(), files, plan(), **sizes)
    # Both, the one that is being written, and small files.
    assert 700 * MIB <= before <= 750 * MIB
    files.lora.write_bytes(b"0" * MIB)
    assert disk.needed_bytes(tiny.config(), files, plan(), **sizes) == before - MIB


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_room_is_told_with_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage: Callable[[Path], Usage] = lambda path: Usage(100, 100, 3 * 2**29)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert disk.check_room(tmp_path, 2**30) == 3 * 2**29
    with pytest.raises(EngineError, match=r"need 2\.0 GiB, but only 1\.5 GiB are free; make room"):
        disk.check_room(tmp_path, 2**31)


def test_a_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    disk.check_folder(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(EngineError, match="taken: the file cannot be written"):
        disk.check_folder(tmp_path / "taken")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "theirs")
    folder.chmod(0o500)
    with pytest.raises(EngineError, match="theirs: the file cannot be written"):
        disk.check_folder(folder)
