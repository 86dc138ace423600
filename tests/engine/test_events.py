from __future__ import annotations

import pytest
from pack.engine.events import Finished, Message, Progress, Saved, from_line, to_line


@pytest.mark.parametrize(
    "event",
    [
        Message("naïve\n", level="warning"),
        Progress("train", 3, 10, loss=0.25, step_seconds=1.5, eta_seconds=10.5),
        Progress("cache latents", 1, 2, unit="image"),
        Saved("out/a.safetensors", "lora", 7),
        Finished("train", stopped=True),
    ],
)
def test_an_event_survives_its_line(event) -> None:
    line = to_line(event)
    assert "\n" not in line
    assert from_line(line) == event


@pytest.mark.parametrize(
    "line", ["", "Loading 3/4", "[1]", "7", '{"event": "other"}', '{"event": "saved", "x": 1}']
)
def test_a_line_that_is_no_event_is_left_alone(line: str) -> None:
    assert from_line(line) is None
