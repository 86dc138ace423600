"""The recorded runs are what a real ComfyUI sends, and are read as they were written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pack.tests.comfyui.server import ComfyServer
from pack.tests.web.frontend import Page, wait_until
from pack.tests.web.recording import Message, from_wire, neutral, read, shapes, to_wire, write
from pack.tests.web.replay import ANSWERS

ENDINGS = {"execution_success", "execution_error", "execution_interrupted"}


@pytest.mark.parametrize(
    "wire",
    [
        '{"type": "executing", "data": {"node": "4"}}',
        b"\x00\x00\x00\x03\x00\x00\x00\x024:train 3/12 \xc3\xa4",
        b"\x00\x00\x00\x01\x00\x00\x00\x01\xff\xd8\xff",
    ],
)
def test_a_message_is_sent_as_it_came(wire: str | bytes) -> None:
    assert to_wire(from_wire(wire)) == wire


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    messages = [
        {"type": "executing", "data": {"node": None}},
        {"type": "progress_text", "data": {"node": "4", "text": "ä\n2"}},
    ]
    write("run", messages, tmp_path)
    assert read("run", tmp_path) == messages


def test_shapes_tell_names_and_types_but_no_values() -> None:
    one = {"type": "progress_state", "data": {"nodes": {"4": {"value": 1}}, "ids": []}}
    two = {"type": "progress_state", "data": {"nodes": {"5": {"value": 2}, "6": {}}, "ids": ["a"]}}
    assert shapes([one]) == {"progress_state": {".nodes.NODE.value int"}}
    assert shapes([one, two]) == {"progress_state": {".nodes.NODE.value int", ".ids[] str"}}


@pytest.mark.slow
def test_a_real_comfyui_answers_what_the_replayed_one_does(server: ComfyServer) -> None:
    (server.base / "user/default/workflows").mkdir(parents=True, exist_ok=True)
    for path, answer in ANSWERS.items():
        query = "?dir=workflows" if path == "/api/userdata" else ""
        assert type(server.get(path + query)) is type(answer), path


@pytest.mark.slow
def test_a_real_run_sends_what_was_recorded(real_page: Page, server: ComfyServer) -> None:
    real_page.open_template("demo_train_and_generate")
    real_page.set_widget("LoraLoom_TrainLora", "max_train_steps", 40)
    real_page.set_widget("KSampler", "steps", 4)
    messages = run(real_page, server)
    real_page.screenshot("real_run")

    compare("finished", messages)
    assert messages[-1]["type"] == "execution_success"
    assert not real_page.problems()


@pytest.mark.slow
def test_a_real_failure_sends_what_was_recorded(real_page: Page, server: ComfyServer) -> None:
    real_page.open_template("demo_train_and_generate")
    real_page.set_widget("LoraLoom_TrainLora", "output_name", "not/a name")
    [*_, error] = run(real_page, server)
    real_page.screenshot("real_failure")

    compare("failed", [error])
    assert error["type"] == "execution_error"
    assert error["data"]["node_type"] == "LoraLoom_TrainLora"


def run(page: Page, server: ComfyServer) -> list[Message]:
    """What the browser gets from the click on Run to the end of the run."""
    page.click("[data-testid=queue-button]")
    messages: list[Message] = []

    def ended() -> bool:
        messages.extend(map(from_wire, page.received()))
        return any(message["type"] in ENDINGS for message in messages)

    wait_until(ended, "the end of the run", seconds=150)
    last = next(i for i, message in enumerate(messages) if message["type"] in ENDINGS)
    return neutral(messages[: last + 1], server.base)


def compare(name: str, messages: list[Message]) -> None:
    if os.environ.get("LORA_LOOM_RECORD"):
        write(name, messages)
    assert shapes(messages) == shapes(read(name)), "record it anew, see recording.py"
