from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from pack.engine import control
from pack.engine.control import COMMANDS, ControlFile, request
from pack.engine.errors import EngineError
from pack.engine.events import Event, Message
from pack.tests.conftest import ROOT


@pytest.fixture
def told() -> list[Event]:
    """What the run says."""
    return []


@pytest.fixture
def file(tmp_path: Path, told: list[Event]) -> ControlFile:
    return ControlFile(tmp_path / "cats.control", told.append)


def warnings(told: list[Event]) -> list[str]:
    assert all(isinstance(event, Message) and event.level == "warning" for event in told)
    return [event.text for event in told if isinstance(event, Message)]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_given_once(file: ControlFile, command: str) -> None:
    assert file.take() == []
    request(file.path, command)
    assert file.path.read_bytes() == f"{command}\n".encode()
    assert file.take() == [command]
    assert file.take() == [] and not list(file.path.parent.iterdir())


def test_commands_keep_their_order(file: ControlFile) -> None:
    for command in ("pause", "save", "resume", "save"):
        request(file.path, command)
    assert file.take() == ["pause", "save", "resume", "save"]


@pytest.mark.parametrize(
    "content",
    [
        b"save\r\nstop\r\n",
        b"\xef\xbb\xbfSave\n\n  STOP  \n",
        "save\r\nstop\r\n".encode("utf-16"),  # ">" in Windows PowerShell, with its mark
        b"\xfe\xff" + "Save\nStop\n".encode("utf-16-be"),
        b"save\rstop\r",
        b"\n\nsave\nstop\n",
    ],
)
def test_a_file_written_by_hand_is_understood(
    file: ControlFile, told: list[Event], content: bytes
) -> None:
    file.path.write_bytes(content)
    assert [word for _ in range(2) for word in file.take()] == ["save", "stop"]
    assert told == [] and not file.path.exists()


def test_a_line_that_is_still_being_written_is_not_taken_apart(
    file: ControlFile, told: list[Event]
) -> None:
    with file.path.open("wb", buffering=0) as writer:
        assert file.take() == []  # as a shell's ">" leaves it for a moment
        writer.write(b"save\nst")
        assert file.take() == []
        writer.write(b"op\n")
        assert file.take() == ["save", "stop"]
    assert told == []


def test_a_last_line_without_an_end_is_taken_when_it_stays_as_it_is(file: ControlFile) -> None:
    file.path.write_text("stop")
    assert file.take() == []
    assert file.take() == ["stop"]


def test_unknown_words_are_told_once_and_dropped(file: ControlFile, told: list[Event]) -> None:
    file.path.write_bytes(b"save\nsaev\n\xff\x00\nstop now\nstop\n")
    assert file.take() == ["save", "stop"]
    assert file.take() == []
    [text] = warnings(told)
    assert text.startswith("cats.control: 'saev', ") and "'stop now' is dropped" in text
    assert text.endswith("commands are stop, save, sample, pause, resume")


def test_a_large_file_of_something_else_gives_one_short_sentence(
    file: ControlFile, told: list[Event]
) -> None:
    file.path.write_bytes(b"x" * 10**7 + b"\n")
    assert [word for _ in range(3) for word in file.take()] == []
    [text] = warnings(told)
    assert len(text) < 200 and not file.path.exists()


def test_what_was_written_before_the_run_is_dropped_and_told(
    file: ControlFile, told: list[Event]
) -> None:
    file.remove_leftover()
    assert told == []
    request(file.path, "stop")
    file.remove_leftover()
    assert warnings(told) == ["cats.control was there before the run began (stop); it is dropped"]
    assert file.take() == []


_WRITER = """
import sys
from pathlib import Path
from engine.control import request
path, commands = Path(sys.argv[1]), sys.argv[2:]
for command in commands:
    request(path, command)
"""


def test_of_several_writers_and_a_reader_each_gets_every_command_through_once(
    file: ControlFile, told: list[Event]
) -> None:
    """Two processes and two threads; what arrives is exactly what was asked for."""
    count = 60
    words = ("save", "sample", "pause", "resume")
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, str(file.path), *[word] * count], cwd=ROOT)
        for word in words[:2]
    ]
    threads = [
        threading.Thread(target=lambda w=word: [request(file.path, w) for _ in range(count)])
        for word in words[2:]
    ]
    for thread in threads:
        thread.start()
    taken: Counter[str] = Counter()
    while any(w.poll() is None for w in writers) or any(t.is_alive() for t in threads):
        taken.update(file.take())
    taken.update(file.take())
    assert [writer.returncode for writer in writers] == [0, 0]
    assert taken == dict.fromkeys(words, count)
    assert told == [] and not list(file.path.parent.iterdir())


def test_where_there_are_no_hard_links_commands_arrive_too(
    file: ControlFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)  # as vfat does
    request(file.path, "pause")
    request(file.path, "save")
    assert file.take() == ["pause", "save"]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "cats.control"
    with pytest.raises(
        EngineError, match=r"cats\.control: the command cannot be written \(No such"
    ):
        request(path, "stop")


def test_a_folder_in_the_place_of_the_file_is_left_alone(
    file: ControlFile, told: list[Event]
) -> None:
    file.path.mkdir()
    (file.path / "precious").touch()
    with pytest.raises(EngineError, match="something is in the way that is no control file"):
        request(file.path, "stop")
    assert file.take() == []
    file.remove_leftover()
    assert [each.name for each in file.path.iterdir()] == ["precious"] and told == []
    assert [each.name for each in file.path.parent.iterdir()] == ["cats.control"]


def test_a_file_that_stays_unreadable_is_told_once(
    file: ControlFile, told: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    request(file.path, "stop")

    def locked(source: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", locked)  # on Windows while somebody has it open
        for _ in range(100):
            assert file.take() == []
    assert len(warnings(told)) == 1 and "cannot be read (Permission denied)" in warnings(told)[0]
    assert file.take() == ["stop"]


def test_looking_where_there_is_nothing_costs_microseconds(file: ControlFile) -> None:
    fastest = min(_seconds(file) for _ in range(5))
    assert fastest < 100e-6  # 3 us here; it is done twice a second at most


def _seconds(file: ControlFile) -> float:
    begun = time.perf_counter()
    for _ in range(200):
        file.take()
    return (time.perf_counter() - begun) / 200


def test_the_ending_is_no_file_of_a_model() -> None:
    assert control.ENDING == ".control"
