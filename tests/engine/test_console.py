from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from pack.engine.console import ConsoleReporter, json_lines
from pack.engine.events import Event, Finished, Message, Progress, Saved, from_line


def screen(*events: Event, close: bool = False) -> list[str]:
    """The lines that stay on a terminal, where \\r goes back to the start of a line."""
    stream = io.StringIO()
    report = ConsoleReporter(stream)
    for event in events:
        report(event)
    if close:
        report.close()
    lines = [line.split("\r")[-1].rstrip() for line in stream.getvalue().split("\n")]
    assert "\n" not in lines[-1]
    return lines[:-1] if lines[-1] == "" else lines


def test_sentences_and_files_are_lines() -> None:
    shown = screen(
        Message("12 images"),
        Message("the last one is small", level="warning"),
        Saved("out/a.safetensors", "lora", 7),
        Finished("train"),
    )
    assert shown == ["12 images", "warning: the last one is small", "saved out/a.safetensors"]


def test_the_state_is_saved_without_a_word() -> None:
    assert screen(Saved("out/a.state", "state", 7)) == []


def test_a_finished_bar_keeps_its_line() -> None:
    (line,) = screen(
        Progress("train", 1, 4),
        Progress("train", 4, 4, loss=0.25, step_seconds=0.5, eta_seconds=0.0),
    )
    assert line.startswith("train: 100%|")
    assert line.endswith("| 4/4, loss 0.2500, 500 ms/step")


def test_a_running_bar_shows_the_numbers_of_the_job() -> None:
    (line,) = screen(
        Progress("train", 1, 4),
        Progress("train", 2, 4, loss=0.5, step_seconds=2.0, eta_seconds=125.0),
        close=True,
    )
    assert line.startswith("train:  50%|")
    assert line.endswith("| 2/4, loss 0.5000, 2.0 s/step, 2:05 left")


def test_a_resumed_run_starts_where_it_was() -> None:
    (line,) = screen(Progress("train", 7, 10), close=True)
    assert line.startswith("train:  70%|") and line.endswith("| 7/10")


def test_a_sentence_stands_above_the_bar() -> None:
    first, second = screen(
        Progress("train", 1, 2),
        Message("half of it"),
        Progress("train", 2, 2),
    )
    assert first == "half of it" and second.startswith("train: 100%|")


@pytest.mark.parametrize("done", [1, 2])
def test_a_new_task_has_a_bar_of_its_own(done: int) -> None:
    first, second = screen(
        Progress("cache latents", done, 2, unit="image"),
        Progress("cache text", 1, 1, unit="image", step_seconds=1.0),
    )
    assert first.startswith("cache latents: ") and first.endswith(f"| {done}/2")
    assert second.startswith("cache text: 100%|") and second.endswith("| 1/1, 1.0 s/image")


@pytest.mark.parametrize("ends", [Finished("train", stopped=True), None])
def test_an_unfinished_bar_ends_its_line(ends: Event | None) -> None:
    stream = io.StringIO()
    report = ConsoleReporter(stream)
    report(Progress("train", 1, 2))
    assert not stream.getvalue().endswith("\n")
    if ends:
        report(ends)
    report.close()
    report.close()
    assert stream.getvalue().endswith("\n") and stream.getvalue().count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0, "0 ms"),
        (0.0123, "12 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1:00"),
        (61.4, "1:01"),
        (3599.4, "59:59"),
        (3599.6, "1:00:00"),
        (90_061.0, "25:01:01"),
    ],
)
def test_a_duration_is_written_as_people_read_it(seconds: float, shown: str) -> None:
    (line,) = screen(Progress("train", 1, 2, step_seconds=seconds), close=True)
    assert line.endswith(f", {shown}/step")


def test_a_program_reads_each_event_as_soon_as_it_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "events"
    events = [Message("naïve\n猫"), Progress("train", 1, 2, loss=0.5), Finished("train")]
    with path.open("w", encoding="ascii") as stream:
        report = json_lines(stream)
        for number, event in enumerate(events, 1):
            report(event)
            assert [from_line(line) for line in path.read_text().splitlines()] == events[:number]


def test_a_job_goes_on_when_nobody_reads_its_events_any_more() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w")  # noqa: SIM115  closing it raises
    report = json_lines(stream)
    for text in ("one", "two"):
        report(Message(text))
    with pytest.raises(BrokenPipeError):
        stream.close()
